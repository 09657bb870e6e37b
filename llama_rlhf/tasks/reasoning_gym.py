"""Problems made and scored by the reasoning-gym package (pip install reasoning-gym; Apache-2.0): about a hundred kinds.

    --task reasoning_gym:chain_sum                              any name of the package's datasets
    --task reasoning_gym:chain_sum,min_terms=2,max_terms=3,seed=1   with settings of that dataset; the seed is 0 unless given
    --task reasoning_gym:composite,datasets=mix.yaml            several of them, from a file in the package's own form: docs/TASKS.md
    --train_file train:5000  --label_file test:300              how many of which split; train:2000 and test:200 unless given

Dataset, settings, seed and size decide the problems, whatever else the run does. A question belongs to the test split when the
SHA-256 of its text is 0 modulo 4, else to the training split, and comes once in it: no question stands in both, at any seed or size.

An answer is what `answers.final_answer` finds; the dataset's own function scores it, from 0 to 1, and 1 is right. The score is the reward.

A process of its own makes and scores the problems: some datasets depend on Python's hash seed, which is fixed there, and some
scores take for ever (9**9**9) or run text as Python; they end after a few seconds of computing, and `_harmless` keeps such text from them.
"""

import difflib
import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable

from llama_rlhf.records import Records
from llama_rlhf.tasks import Problem, scored
from llama_rlhf.tasks.answers import final_answer

CHUNK = 32          # problems made at once; those of a place in the sequence have the package's seed for it
SEED_STRIDE = 1_000_000     # places of one of our seeds: the package's next seed gives the same problems, one place further
SCORE_SECONDS = 5   # of its processor time: another program's load changes no score


def task(rest):
    return ReasoningGym(rest)


class ReasoningGym:
    RULES, RULE = ("own",), "own"
    TRAIN, TEST = "train:2000", "test:200"

    def __init__(self, rest):
        import yaml
        self.name, *settings = rest.split(",")
        try:
            pairs = [setting.split("=", 1) for setting in settings]
            self.settings = {name: yaml.safe_load(value) for name, value in pairs}
        except (ValueError, yaml.YAMLError):
            raise ValueError(f"--task reasoning_gym:{rest}: after the dataset's name come settings as in seed=1,min_terms=2") from None
        self.seed = self.settings.pop("seed", 0)
        if type(self.seed) is not int or self.seed < 0 or "size" in self.settings:
            raise ValueError(f"--task reasoning_gym:{rest}: seed must be a whole number, and the size goes with the file flags, as in test:200")
        if self.name == "composite":
            self.settings["datasets"] = _mixture(self.settings.get("datasets"))
        self._process = None
        self._ask("open", self.name, self.settings)

    def load(self, source, faults=None):
        split, size = self._split(source)
        problems, seen, tried = [], set(), 0
        while len(problems) < size:
            if tried >= 20 * size + 100 * CHUNK:
                raise ValueError(f"{self.name} with these settings gives {len(problems)} different questions for {split} in {tried} tries, not {size}: "
                                 f"ask for fewer, or widen its settings")
            for entry in self._ask("make", self.seed * SEED_STRIDE + tried):
                question, tried = entry["question"], tried + 1
                digest = hashlib.sha256(question.encode()).digest()
                if (digest[-1] % 4 == 0) == (split == "test") and digest not in seen and len(problems) < size:
                    seen.add(digest)
                    label = entry["answer"] if isinstance(entry["answer"], str) else ""
                    problems.append(Problem(len(problems) + 1, question, f"<answer>{label}</answer>" if label else "", label, entry))
        return problems

    def records(self, source):
        """For supervised fine-tuning, which teaches no more than the form of an answer: there are no worked solutions."""
        problems = self.load(source)
        if not all(problem.solution for problem in problems):
            raise ValueError(f"{self.name} has no reference answers to fine-tune on, only a function that scores them")
        return Records([{"instruction": problem.prompt, "output": problem.solution} for problem in problems], source)

    def score(self, problem, text, finished, *, rule="own", reward=False):
        answer = final_answer(text, whole=finished or not reward)
        points = 0.0 if answer is None else self._ask("score", answer, problem.more, SCORE_SECONDS)
        return scored(rule, finished, {"own": (answer, points == 1)}, points)

    def _split(self, source):
        match = re.fullmatch(r"(train|test)(?::([0-9]+))?", source)
        if not match or match[2] and int(match[2]) < 1:
            raise ValueError(f"{source!r} is no part of {self.name}: write train:2000 or test:200, with the number of problems")
        return match[1], int(match[2] or {"train": self.TRAIN, "test": self.TEST}[match[1]].split(":")[1])

    def _ask(self, *request):
        """What the other process answers; 0 for a score that ended it (too long, too much memory). It is started when it is not there."""
        if self._process is None or self._process.poll() is not None:
            root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
            code = f"import sys; sys.path.append({root!r}); from llama_rlhf.tasks.reasoning_gym import serve; serve()"
            self._process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                             env={**os.environ, "PYTHONHASHSEED": "0"})
            if request[0] != "open":
                self._ask("open", self.name, self.settings)
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump(request, process.stdin)
            process.stdin.flush()
            kind, value = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError):
            process.wait()
            if request[0] == "score":
                return 0.0
            raise RuntimeError(f"the process that makes {self.name}'s problems ended with code {process.returncode}") from None
        except BaseException:   # Ctrl-C: its answer would be taken for that to the next request
            process.kill()
            process.wait()
            raise
        if kind == "error":
            raise ValueError(value)
        return value


def _mixture(file):
    """The datasets that a file lists, as the package's "composite" takes them."""
    import yaml
    try:
        with open(os.path.expanduser(file), encoding="utf-8") as stream:
            return [{"weight": 1.0, "config": {}, **part} for part in yaml.safe_load(stream)["datasets"]]
    except (OSError, TypeError, KeyError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError("--task reasoning_gym:composite takes a file, as in composite,datasets=mix.yaml, with a line 'datasets:' and behind it one such as "
                         f"'- {{name: chain_sum, weight: 2, config: {{min_terms: 2}}}}' for each ({reason})") from None


# ----------------------------------------------------------------------------------------------------------------
# The other process


def serve():
    """Answer requests on stdin until it ends. Only this process imports the package."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)       # what a dataset prints is no answer
    commands: dict[str, Callable] = {"open": _open, "make": _make, "score": _score}
    state: dict = {}
    while True:
        try:
            command, *arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = "ok", commands[command](state, *arguments)
        except Exception as error:      # noqa: BLE001  of a package with a hundred authors; the other side raises it
            answer = "error", f"reasoning_gym:{state.get('name', arguments[0])}: {type(error).__name__}: {error}" if type(error) is not ValueError else str(error)
        pickle.dump(answer, answers)
        answers.flush()


def _open(state, name, settings):
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(f"--task reasoning_gym:{name} needs {error.name}: pip install reasoning-gym") from None
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.5) or ["chain_sum"]
        raise ValueError(f"--task reasoning_gym:{name}: no dataset of that name among {len(DATASETS)}. Did you mean {' or '.join(near)}?")

    def make(seed):
        parts = {"datasets": [reasoning_gym.composite.DatasetSpec(**part) for part in settings["datasets"]]} if name == "composite" else {}
        return reasoning_gym.create_dataset(name, size=CHUNK, seed=seed, **{**settings, **parts})

    state |= {"name": name, "make": make}
    try:
        state["dataset"] = state["make"](0)
    except (TypeError, AssertionError, ValueError, AttributeError) as error:
        known = [field for field in DATASETS[name][1].__dataclass_fields__ if field not in ("seed", "size")]
        raise ValueError(f"--task reasoning_gym:{name} with {json.dumps(settings)}: {error}. Its settings are {', '.join(known)}") from None
    import inspect
    parts = state["dataset"].datasets if name == "composite" else {name: state["dataset"]}
    state["parts"] = {part: (dataset, bool(re.search(r"\beval\(|parse_expr\(|sympify\(", inspect.getsource(type(dataset).score_answer)))) for part, dataset in parts.items()}


def _make(state, seed):
    dataset = state["make"](seed)
    return [dataset[i] for i in range(CHUNK)]


def _score(state, answer, entry, seconds):
    dataset, runs_text = state["parts"][entry["metadata"]["source_dataset"] if state["name"] == "composite" else state["name"]]
    if runs_text and answer != entry["answer"] and not _harmless(answer):
        return 0.0
    signal.setitimer(signal.ITIMER_PROF, seconds)       # nobody handles its signal, so it ends the process, wherever that is
    try:
        points = float(dataset.score_answer(answer, entry))
    except Exception:       # noqa: BLE001  a model writes every string some day
        return 0.0
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return points if 0 <= points <= 1 else 0.0


_FUNCTIONS = {"sin", "cos", "tan", "exp", "log", "ln", "sqrt", "pi"}


def _harmless(text):
    """Whether text run as Python, or by sympy, can do no more than calculate: names of one letter or of a function, no call beside a string."""
    names = re.findall(r"[^\W\d]\w*", text)
    quoted_call = "(" in text and ("'" in text or '"' in text)
    return "\\" not in text and not quoted_call and all(len(name) == 1 or name in _FUNCTIONS for name in names)
