"""One or several runs as a single HTML file that needs no network and runs no script, and their curves as one PNG.

    python -m llama_rlhf.report RUN [RUN ...] --out report.html

RUN: a save_dir or log_dir of a training script, or the log_dir of an evaluation. What is read is what they leave behind: run.json,
metrics.jsonl, samples*.jsonl, metrics.json. The page is report.html beside this file; jinja2 escapes every text that goes into it.
docs/REPORT.md says more.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from llama_rlhf.cli import sentence
from llama_rlhf.curves import COLOURS, NOTES, PANELS, REST, as_svg, curves_of, series, write_png
from llama_rlhf.records import as_text
from llama_rlhf.scoring import compare_paired

N_ITEMS = 3         # samples shown of each sort
SHOWN_RATIO = 1e8   # bytes of a plan from which on its ratio to the peak means something: below, the libraries' own workspaces are most of it

# what a run is called above its report
KINDS = {"solver_train.py": "Fine-tuning", "verifier_train.py": "Reward model", "solver_evaluate.py": "Evaluation", "ppo_train.py": "Reinforcement learning"}
ALGORITHMS = {"ppo": "PPO", "grpo": "GRPO", "dr_grpo": "Dr. GRPO", "rloo": "RLOO", "reinforce++": "REINFORCE++"}


# ---- reading


@dataclass
class Run:
    name: str
    folder: str
    script: str
    settings: dict
    environment: dict
    given: list[str] | None = None      # flags that its command named; the others have their defaults. None: an older run, which did not say
    started: str = ""
    records: list[dict] = field(default_factory=list)                       # lines of metrics.jsonl that count
    answers: list[tuple[str, list[dict]]] = field(default_factory=list)     # ("step 20", rows of samples-20.jsonl) of the first evaluation and the last
    colour: str = ""
    columns: dict = field(default_factory=dict, repr=False)                 # of `records`, once read: see curves.series

    def of(self, kind: str) -> list[dict]:
        return [record for record in self.records if record["kind"] == kind]

    @property
    def kind(self) -> str:
        return ALGORITHMS.get(self.settings.get("algorithm", ""), KINDS.get(self.script, self.script))


def read_run(path: str, name: str) -> Run:
    """FileNotFoundError where no run has left anything; ValueError for a file that is not what its name says."""
    marks = ("metrics.jsonl", "metrics.json")
    folder = next((f for f in (path, os.path.join(path, "log")) if any(os.path.isfile(os.path.join(f, mark)) for mark in marks)), None)
    if folder is None:
        within = [name for name in (sorted(os.listdir(path)) if os.path.isdir(path) else []) if any(
            os.path.isfile(os.path.join(path, name, log, mark)) for log in ("", "log") for mark in marks)]
        raise FileNotFoundError(f"{path}: neither metrics.jsonl nor metrics.json is there or in its log folder. Give the save_dir or log_dir of a run"
                                + (f", such as {os.path.join(path, within[0])}; this folder holds {', '.join(within)}" if within else ""))
    try:
        return _read_run(folder, name)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: its files are not what the scripts write ({type(error).__name__}: {error}). Leave this run out.") from error


def _read_run(folder: str, name: str) -> Run:
    if os.path.isfile(os.path.join(folder, "metrics.jsonl")):
        about = _read_json(os.path.join(folder, "run.json"))
        records = records_of(folder)
        evaluated = {record["step"] for record in records if record["kind"] == "evaluation"}       # files of other steps are of a run that was here before
        found = [(int(match[1]), file) for file in os.listdir(folder) if (match := re.fullmatch(r"samples-(\d+)\.jsonl", file)) and int(match[1]) in evaluated]
        unit = "iteration" if about["script"] == "ppo_train.py" else "step"
        return Run(name, folder, about["script"], about["arguments"], about["environment"], about.get("given"), about["started"], records,
                   [(f"{unit} {step}", _read_lines(os.path.join(folder, file))) for step, file in sorted(found)[:: max(1, len(found) - 1)]])
    about = _read_json(os.path.join(folder, "metrics.json"))
    metrics = {key: value for key, value in about.items() if key not in ("arguments", "environment", "given")}
    samples = os.path.join(folder, "samples.jsonl")
    return Run(name, folder, "solver_evaluate.py", about["arguments"], about["environment"], about.get("given"), records=[{"kind": "evaluation", **metrics}],
               answers=[("", _read_lines(samples))] if os.path.isfile(samples) else [])


def records_of(folder: str) -> list[dict]:
    """Of a log_dir, those that count."""
    return records_that_count(_read_lines(os.path.join(folder, "metrics.jsonl")))


def records_that_count(lines: list[dict]) -> list[dict]:
    """A run that was continued after step n voids what it had recorded beyond n; one that was started anew voids everything before."""
    sessions: dict[str, list[dict]] = {}
    for line in lines:
        sessions.setdefault(line["run"], []).append(line)
    kept: list[dict] = []
    for session in sessions.values():
        resumed = next((line["step"] for line in session if line["kind"] == "resumed"), -1)
        kept = [line for line in kept if line.get("step", 0) <= resumed] + session
    return kept


def _read_json(path: str) -> dict:
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}. It is damaged; leave this run out.") from error


def _read_lines(path: str) -> list[dict]:
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line.decode())] if line else []
        except ValueError as error:
            if number == len(lines):        # no newline at its end: the run was killed while it wrote it
                break
            raise ValueError(f"{path}, line {number} is not JSON: {error}. Remove the line to go on without it.") from error
    return rows


def names_of(paths: list[str]) -> list[str]:
    """What tells the paths apart: from their common folder on, without a final /log."""
    plain = [path.removesuffix(os.sep + "log") for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in plain])
    return [os.path.relpath(path, common) for path in plain]


# ---- numbers


def wall_seconds(run: Run) -> float:
    """From start to last record, of every session that counts."""
    ends = {record["run"]: record["time"] for record in run.records if "run" in record}
    return sum(end - datetime.datetime.fromisoformat(start).timestamp() for start, end in ends.items())


def seconds_by_phase(run: Run) -> dict[str, float]:
    """Phases of iterations, training steps and evaluations as recorded, and what is left of the run's time."""
    phases: dict[str, float] = defaultdict(float)
    for record in run.records:
        for phase, seconds in record.get("phases", {}).items():
            phases[phase] += seconds
        if record["kind"] in ("train", "evaluation"):
            phases[{"train": "training steps", "evaluation": "evaluation"}[record["kind"]]] += record.get("seconds") or 0.0
    phases["all else"] = max(0.0, wall_seconds(run) - sum(phases.values()))
    return {phase: seconds for phase, seconds in phases.items() if seconds}


def memory(run: Run) -> dict:
    """Bytes of a process: "planned" and by role where the run recorded a plan, "peak" as measured beside it, or else as its curve has it."""
    plan = next((held for record in reversed(run.records) if (held := record.get("memory") or record).get("planned_bytes")), {})     # an evaluation's stands inside
    peak = plan.get("peak_bytes") or max((record.get("peak_memory_gb") or 0 for record in run.records), default=0) * 1e9
    return {"planned": plan.get("planned_bytes"), "besides": plan.get("besides_bytes", 0), "peak": peak, "roles": plan.get("planned") or {}}


def headlines(run: Run) -> list[tuple[str, str, str]]:
    """What a run came to, the most telling first: (what was measured, its value or first → last, how to read it)."""
    said, evaluations = [], run.of("evaluation")
    first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    if "accuracy" in last:
        before = f"{first['accuracy']:.1%} → " if len(evaluations) > 1 else ""
        said.append(("accuracy", f"{before}{last['accuracy']:.1%}",
                     f"95 % interval {last['interval'][0]:.1%} to {last['interval'][1]:.1%}; {last['n_problems']} problems, rule {last['rule']}"))
    if chosen := last.get("selection"):
        best = chosen["ways"]["best of n"]
        said.append((f"best of {chosen['n_samples']}", f"{best['accuracy']:.1%}", f"chosen by the verifier; 95 % interval {best['interval'][0]:.1%} to {best['interval'][1]:.1%}"))
    if last.get("pair_accuracy") is not None:
        said.append(("pair accuracy", f"{last['pair_accuracy']:.1%}",
                     f"held-out pairs whose better response has the higher score; {last['n_pairs']} pairs of {last['n_problems_with_pairs']} problems"))
    for kind, name, unit in (("iteration", "score", "what is optimised, mean of an iteration"), ("iteration", "kl_sequence", "nats per response, to the reference"),
                             ("train", "loss", "nats per trained token" if run.script == "solver_train.py" else "")):
        if values := series(run, kind, name, 10**9)[1]:
            said.append((name.replace("kl_sequence", "KL"), f"{number(values[0])} → {number(values[-1])}", unit))
    return said


def headline(runs: list[Run]) -> str:
    """The name of the page: what was done, or what is compared."""
    kinds = list(dict.fromkeys(run.kind for run in runs))
    names = [run.name for run in runs]
    if len(runs) == 1:
        return f"{kinds[0]}: {names[0]}"
    return f"{', '.join(names[:-1])} and {names[-1]} compared" if len(runs) < 4 else f"{len(runs)} runs compared"


def number(value) -> str:
    """What was measured: four digits are enough for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.3g} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.3g} MB"


def colours_of_phases(runs: list[Run]) -> dict[str, str]:
    """A phase has one colour in all runs; what is in none of them is grey."""
    phases = [phase for phase in dict.fromkeys(phase for run in runs for phase in seconds_by_phase(run)) if phase != "all else"]
    colours = [colour for colour in COLOURS if colour != REST]
    return {phase: colours[place % len(colours)] for place, phase in enumerate(phases)} | {"all else": REST}


def planned(memory: dict) -> tuple[str, list[str], list[tuple[str, list[str]]]] | None:
    """A plan as a table: its unit, the kinds of memory, and (role, amount of each kind)."""
    roles = {"base of all roles" if role == "shared" else role: kinds if isinstance(kinds, dict) else {"weights": kinds} for role, kinds in memory["roles"].items()}
    there = [kind for kind in dict.fromkeys(kind for kinds in roles.values() for kind in kinds) if kind != "peak" and any(kinds.get(kind) for kinds in roles.values())]
    unit, name = (1e9, "GB") if (memory["planned"] or 0) >= 1e9 else (1e6, "MB")
    return (name, there, [(role, [f"{kinds[kind] / unit:.3g}" if kinds.get(kind) else "" for kind in there]) for role, kinds in roles.items()]) if there else None


def as_flag(value) -> str:
    """A setting as it is written on a command line."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value) if value != "" else '""'


def table(runs: list[Run], which: str) -> list[tuple[str, list[str], bool, bool]]:
    """(name, value of each run as it was, whether they differ, whether a run's command named it) of their settings or environments."""
    names = dict.fromkeys(name for run in runs for name in getattr(run, which))
    given = {name for run in runs for name in (names if run.given is None else run.given)} if which == "settings" else set(names)
    rows = [(name, [as_flag(getattr(run, which).get(name, "—")) for run in runs]) for name in names]
    return [(name, values, len(set(values)) > 1, name in given) for name, values in rows]


# ---- samples


def before_and_after(runs: list[Run]) -> list[dict]:
    """Answers to the same problems side by side: first and last evaluation of a run; runs with one evaluation beside the first of them, judged by its rule."""
    sets = [[(step if step and len(runs) == 1 else f"{run.name} {step}".strip(), rows) for step, rows in run.answers] for run in runs if run.answers]
    rules = [evaluation["rule"] for run in runs if len(run.answers) == 1 for evaluation in run.of("evaluation")[-1:]]
    single = [(name, judged(rows, rules[0])) for answers in sets if len(answers) == 1 for name, rows in answers]
    pairs: list[Sequence] = [(answers[0], answers[-1]) for answers in sets if len(answers) > 1] + [(single[0], other) for other in single[1:]]
    return [compared for pair in pairs or [single[:1]] if (compared := compare(pair))]


def judged(rows: list[dict], rule: str) -> list[dict]:
    """Rows as this rule sees them, whichever was asked for; those that it was not applied to, of another task, are left out."""
    return [{**row, "correct": row["correct_by_rule"][rule]} for row in rows if rule in row["correct_by_rule"]]


def compare(named: Sequence[tuple[str, list[dict]]]) -> dict | None:
    """First answers to the problems that all have, some of each fate; None where they have none in common."""
    columns = [{(row["id"], as_text(row["prompt"])): row for row in rows if row["sample"] == 0} for _, rows in named]
    common = [[column[key] for column in columns] for key in columns[0] if all(key in column for column in columns)] if columns else []
    fates: dict[tuple, list] = {}
    for rows in common:
        fates.setdefault(tuple(bool(row["correct"]) for row in rows), []).append(rows)
    order = ((False, True), (True, False), (False, False), (True, True), (True,), (False,))
    paired = compare_paired(*([row["correct"] for row in rows] for rows in zip(*common))) if common and len(columns) > 1 else None
    return {"names": [name for name, _ in named], "n": len(common), "paired": paired,
            "shown": [rows for fate in order for rows in fates.get(fate, [])[:N_ITEMS]]} if common else None


def coloured(responses: list[dict]) -> tuple[list[list[dict]], tuple[float, float, float]]:
    """Responses by problem, each token with a background: orange below the mean of all that is shown, blue above; and lowest, mean, highest."""
    shown = [p for response in responses for p in response["probabilities"]]
    low, mean, high = min(shown), sum(shown) / len(shown), max(shown)
    problems: dict[str, list[dict]] = {}
    for response in responses:
        strengths = [(p - mean) / ((high - mean if p > mean else mean - low) or 1) for p in response["probabilities"]]
        response["spans"] = [(piece, f"rgba({'59,130,246' if x > 0 else '234,110,10'},{0.75 * abs(x):.2f})", f"{p:.3f}")
                             for piece, x, p in zip(response["pieces"], strengths, response["probabilities"])]
        problems.setdefault(response["id"], []).append(response)
    return list(problems.values()), (low, mean, high)


# ---- the page


def write(paths: list[str], out: str) -> str:
    """Write the report of these runs to `out`, and its curves beside it as .png; returns `out`. Raises as read_run does."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    paths = list(dict.fromkeys(map(os.path.abspath, paths)))
    runs = list({(run := read_run(path, name)).folder: run for path, name in zip(paths, names_of(paths))}.values())
    curves = curves_of(runs)
    svgs = [(script, own, [(title, as_svg(draw, title, f"{script} {title}")) for title, draw in of_script]) for script, own, of_script in curves]
    scored = [(run, record["step"], *coloured(record["responses"])) for run in runs for record in run.of("scored")[-1:]]
    lines = [(panel[0] + (f" ({label})" if len(panel[2]) > 1 else ""), panel[1], [series(run, kind, name, 10**9)[1] for run in runs])
             for panel in PANELS for kind, name, label in panel[2]]
    notes = {title: note for title, note in NOTES.items() if "intervals" not in note or any(record.get("interval") for run in runs for record in run.of("evaluation"))}
    environment = Environment(loader=FileSystemLoader(os.path.dirname(os.path.abspath(__file__))), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("report.html").render(
        runs=runs, curves=svgs, notes=notes, scored=scored, lines=[line for line in lines if any(line[2])], samples=before_and_after(runs), number=number,
        as_text=as_text, duration=duration, headline=headline(runs), headlines=headlines, wall_seconds=wall_seconds, phases=seconds_by_phase, colours=colours_of_phases(runs),
        memory=memory, planned=planned, size=size, shown_ratio=SHOWN_RATIO, settings=table(runs, "settings"), environments=table(runs, "environment"),
        drawn_samples=[(run, run.of("samples")[:: max(1, len(run.of("samples")) - 1)]) for run in runs if run.of("samples")])
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    with open(out, "w", encoding="utf-8") as file:
        file.write(page)
    if curves:
        write_png(os.path.splitext(out)[0] + ".png", curves)
    return out


def at_the_end(log_dir: str) -> None:
    """For the scripts, when all else is done: a report that cannot be written is no reason to fail."""
    again = f"python -m llama_rlhf.report {shlex.quote(log_dir)}"
    if importlib.util.find_spec("matplotlib") is None:
        print(f"for a report with curves: pip install matplotlib && {again}")
        return
    try:
        print(f"report: {write([log_dir], os.path.join(log_dir, 'report.html'))}")
    except Exception as error:      # noqa: BLE001
        print(f"no report: {type(error).__name__}: {error}. The run itself is complete; try again with {again}", file=sys.stderr)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m llama_rlhf.report", description="Write one or several runs as a single HTML file, and their curves as PNG.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="save_dir or log_dir of a training script, or log_dir of an evaluation")
    parser.add_argument("--out", default="", help="default: report.html in the run's log_dir; of several runs, in the current folder")
    given = parser.parse_args(words)
    try:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("the report draws with matplotlib, which is not installed. Run `pip install matplotlib`.")
        out = given.out or ("report.html" if len(given.runs) > 1 else os.path.join(read_run(given.runs[0], "").folder, "report.html"))
        print(write(given.runs, out))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {sentence(error)}")


if __name__ == "__main__":
    main()
