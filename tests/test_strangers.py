"""The campaign of campaigns/strangers.py in small: every attack, damage to a manifest, some inputs to each fuzz target."""

import os
import re
import subprocess
import sys

import pytest

SCRIPT = os.path.join(os.path.dirname(__file__), "campaigns", "strangers.py")


def test_damaged_hostile_and_random_files_are_refused_and_nothing_in_them_runs():
    pytest.importorskip("hypothesis")
    pytest.importorskip("gguf")
    done = subprocess.run([sys.executable, SCRIPT, "--flips", "3", "--kinds", "manifest", "--fuzz", "420"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "0 silent differences" in done.stdout
    n, executed, refused, ignored = map(int, re.search(r"(\d+) attacks: (\d+) executed, (\d+) refused, (\d+) loaded", done.stdout).groups())
    assert n >= 120 and executed == 0 and refused + ignored == n and ignored == 1
    assert len(re.findall(r"^fuzz .*passed$", done.stdout, re.M)) == 14
