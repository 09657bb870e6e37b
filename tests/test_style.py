"""ruff and mypy find nothing, as pyproject.toml sets them up; imports go the way docs/ARCHITECTURE.md says."""

import ast
import graphlib
import os
import re
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


def test_imports_go_downwards_without_a_cycle():
    """The line in docs/ARCHITECTURE.md names every module and package of ours once."""
    with open(os.path.join(ROOT, "docs", "ARCHITECTURE.md")) as file:
        layers, said = re.search(r"Imports go downwards, without a cycle: scripts, (.*?)\. One goes up, inside a function: (.*?),", file.read(), re.S).groups()
    level = {name: i for i, layer in enumerate(layers.split("->")) for name in re.findall(r"\w+", layer)}
    package = os.path.join(ROOT, "llama_rlhf")
    assert sorted(re.findall(r"\w+", layers)) == sorted({name.removesuffix(".py") for name in os.listdir(package) if not name.startswith("__") and not name.endswith(".html")})
    upwards, modules = set(), {}
    for folder, _, names in os.walk(package):
        for name in (name for name in names if name.endswith(".py")):
            path = os.path.relpath(os.path.join(folder, name), ROOT).removesuffix(".py").split(os.sep)
            own = ".".join(path).removesuffix(".__init__")
            with open(os.path.join(folder, name)) as file:
                tree = ast.parse(file.read())
            modules[own] = set()
            for node in ast.walk(tree):
                if not isinstance(node, ast.ImportFrom) or not (node.level or (node.module or "").startswith("llama_rlhf")):
                    continue
                source = ".".join([*path[:-node.level], node.module] if node.level else [node.module])
                named = [f"{source}.{alias.name}" for alias in node.names]
                targets = [name if os.path.exists(os.path.join(ROOT, *name.split(".")) + ".py") else source for name in named]
                modules[own] |= set(targets) if node in tree.body else set()
                upwards |= {f"{path[1]} -> {t.split('.')[1]}" for t in targets if path[1] in level and "." in t and level[t.split(".")[1]] < level[path[1]]}
    assert upwards == {said}
    assert list(graphlib.TopologicalSorter(modules).static_order())        # CycleError
