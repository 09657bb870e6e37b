"""Every message that docs/TROUBLESHOOTING.md quotes is one that the program can print."""

import ast
import glob
import os
import re

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GAP = "\0"      # what an f-string fills in


def texts(node):
    """Every string of a module, the filled-in parts of f-strings as gaps; strings inside those parts stand on their own too."""
    for part in ast.walk(node):
        if isinstance(part, ast.JoinedStr):
            yield "".join(str(value.value) if isinstance(value, ast.Constant) else GAP for value in part.values)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


SOURCE = [text for file in glob.glob(os.path.join(ROOT, "*.py")) + glob.glob(os.path.join(ROOT, "llama_rlhf/**/*.py"), recursive=True)
          for text in texts(ast.parse(open(file, encoding="utf-8").read()))]


def quoted():
    with open(os.path.join(ROOT, "docs", "TROUBLESHOOTING.md"), encoding="utf-8") as file:
        text = file.read()
    yield from re.findall(r"^> `(.+)`$", text, re.M)
    yield from (message for message in re.findall(r"`([^`]+)`", re.sub(r"^>.*$", "", text, flags=re.M)) if "…" in message and message != "…")


def fits(message, text):
    """Whether the quoted message can be a part of this text: its pieces stand there in order, and between them something is filled in."""
    pieces = [re.escape(piece) for piece in message.strip("…").split("…")]
    return re.search(".*?\0.*?".join(pieces), text, re.S) is not None


@pytest.mark.parametrize("message", list(dict.fromkeys(quoted())))
def test_quoted_messages_exist(message):
    assert len(re.sub("[…\\W]", "", message)) > 8, "too little to recognise"
    assert any(fits(message, text) for text in SOURCE), f"no string of the program reads {message!r}"


def test_flags_named_in_the_page_exist():
    from test_readme import main_of

    from llama_rlhf import cli
    known = {name for script in ("checkpoint_split.py", "solver_train.py", "solver_evaluate.py", "verifier_train.py", "ppo_train.py")
             for name in cli._parameters(main_of(script))}
    others = {"nnodes", "nproc", "nproc_per_node", "master_addr", "master_port", "node_rank", "shm", "config", "local"}     # of torchrun, docker, hf
    with open(os.path.join(ROOT, "docs", "TROUBLESHOOTING.md"), encoding="utf-8") as file:
        named = set(re.findall(r"--(\w+)", file.read()))
    assert not named - known - others
