"""The tasks that can be trained on and evaluated: problems, and whether a text answers one. No torch here.

A task is one file, in this folder or anywhere (`--task my_task.py`), with these names:

    RULES                   the names of its ways to score, RULE the one that counts unless --rule says otherwise
    TRAIN, TEST             where its problems come from when no file is named; "" if there is no such place
    load(source, faults=None) -> [Problem]
    score(problem, text, finished, *, rule=RULE, reward=False) -> `scored(...)`

`finished`: the model ended the text itself. `reward`: the score is trained on, so an unfinished text must not profit from a
number it merely passed by. `load_file` is all there is to `load` when problems stand in a file. A task whose name goes on after a
colon, as in `reasoning_gym:chain_sum`, has `task(rest)` instead, which returns an object with those names. docs/TASKS.md has an example.
"""

import contextlib
import difflib
import importlib
import importlib.abc
import importlib.util
import os
import pkgutil
import traceback
from dataclasses import dataclass, field

from llama_rlhf.records import located, naming, read_records

NAMES = ("RULES", "RULE", "TRAIN", "TEST", "load", "score")


@dataclass(frozen=True)
class Problem:
    id: int  # number of the record in its file, counted from 1
    prompt: str | list  # text, or chat messages
    solution: str  # reference solution; "" when there are only labels
    label: str  # the right answer as people read it
    more: object = field(default=None, repr=False)  # what else the task needs to score an answer


def scored(rule, finished, marks, score=None):
    """What `score` returns. marks: {rule: (the answer in one spelling per meaning, or None; whether it is right)}.

    score: what a reward is made of, 1 for right and 0 for wrong unless given. Votes count equal answers; they must be equally right.
    """
    if rule not in marks:
        raise ValueError(f"unknown rule {rule!r}. Known rules: {', '.join(marks)}")
    answer, right = marks[rule]
    return {
        "rule": rule,
        "finished": bool(finished),
        "answer": answer,
        "score": float(right) if score is None else score,
        "answers": {name: mark[0] for name, mark in marks.items()},
        "correct": {name: bool(mark[1]) for name, mark in marks.items()},
    }


def load_file(file, problem, faults=None):
    """[problem(number, where, record)] of a file's records; its ValueErrors go to `faults` if that is a list."""
    problems = []
    for number, where, record in located(read_records(file, faults)):
        with naming(where, faults):
            problems.append(problem(number, where, record))
    return problems


def get_task(name):
    """The task called `name`: a file of this folder (case does not matter), `file:more`, or the path of a file of your own."""
    if os.path.splitext(name)[1] == ".py":
        return _complete(import_file(name), f"--task {name}")
    kind, colon, rest = name.partition(":")
    known = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if kind.lower() not in known:
        near = difflib.get_close_matches(kind.lower(), known, n=1, cutoff=0.5)
        raise ValueError(f"unknown task {name!r}. Known tasks: {', '.join(known)}, or FILE.py of your own." + (f" Did you mean {near[0]!r}?" if near else ""))
    module = importlib.import_module(f"{__name__}.{kind.lower()}")
    if hasattr(module, "task"):
        return _complete(module.task(rest), f"--task {name}")
    if colon:
        raise ValueError(f"--task {name}: {kind} takes nothing after a colon")
    return _complete(module, f"--task {name}")


def import_file(path):
    """A module out of a Python file; runs it: it is the user's own code."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(os.path.splitext(os.path.basename(path))[0], path)
    if spec is None or not isinstance(spec.loader, importlib.abc.InspectLoader):
        raise ValueError(f"{path}: not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.get_code(module.__name__)
    except SyntaxError as error:
        raise ValueError(f"{error.filename}, line {error.lineno}: {error.msg}. Python cannot read this file.") from error
    with running(f"{path} cannot be imported"):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def running(what):
    """Inside, code of the user's runs. A ValueError says what failed, why, and on which line of the user's file; also where that code wanted to end the program."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__)[2:] if not f.filename.startswith("<frozen")]    # not ours: this, and who called it
        place = [f"{f.filename}, line {f.lineno}" for f in frames if f.filename == frames[0].filename][-1:]
        raise ValueError(f"{what}: {': '.join([*place, type(error).__name__])}: {error}") from error


def choose_rule(task, rule):
    """The rule that "auto" stands for, or `rule` if the task has it."""
    if rule != "auto" and rule not in task.RULES:
        raise ValueError(f"--rule {rule!r}: use auto, or one of {', '.join(task.RULES)}")
    return task.RULE if rule == "auto" else rule


def source_of(task, name, given, which):
    """The file (or split) named, or the task's own. which: "TRAIN" or "TEST".  name: of the flag."""
    source = given or getattr(task, which)
    if not source:
        raise ValueError(f"this task has no problems of its own: give a file with --{name}")
    return at_home(source)


def at_home(file):
    """The path of a file, which one of our own, such as dataset/GSM8K/train.json, has from any folder."""
    beside = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), file)
    return beside if file.startswith("dataset/") and not os.path.exists(file) and os.path.isfile(beside) else file


def _complete(task, name):
    if missing := [attribute for attribute in NAMES if not hasattr(task, attribute)]:
        raise ValueError(f"{name}: a task must define {', '.join(NAMES)}; missing: {', '.join(missing)} (docs/TASKS.md)")
    return task
