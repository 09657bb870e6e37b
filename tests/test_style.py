"""ruff and mypy find nothing, as pyproject.toml sets them up."""

import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def findings(tool: str, *arguments: str) -> str:
    """What `python -m tool` prints, "" when it is content."""
    pytest.importorskip(tool)
    done = subprocess.run([sys.executable, "-m", tool, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout if done.returncode else ""


def test_the_style_is_kept():
    assert not findings("ruff", "check", "--no-cache", ".")


def test_type_hints_hold(tmp_path):
    assert not findings("mypy", "--cache-dir", str(tmp_path))
