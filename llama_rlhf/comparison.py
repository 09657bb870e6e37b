"""Evaluations side by side, from the folders they wrote: accuracies with intervals, what changed, and whether that is chance.

    print(compare_runs(["runs/before", "runs/after"], show=10))

No torch: behind `solver_evaluate.py --compare`, which is to answer at once.
"""

import itertools
import json
import os
import shutil
import textwrap

from llama_rlhf.records import as_text, read_records
from llama_rlhf.scoring import best_of_n, compare_paired


def compare_runs(log_dirs: list[str], show: int = 10) -> str:
    """A table of evaluations (one line each); for each against the first the paired exact McNemar test on common problems, and up to
    `show` of the problems whose verdict changed (-1: all), both responses side by side.

    Judged by the first run's headline rule throughout, on each problem's first answer; where a verifier scored several answers, on
    the one it prefers as well. ValueError when the runs answered different problems.
    """
    runs = [(log_dir, *read_run(log_dir)) for log_dir in log_dirs]
    first_name, metrics, first = runs[0]
    rule, rules = metrics["rule"], list(metrics["rules"])
    for name, metrics, rows in runs[1:]:
        differing = [key for key in first.keys() & rows.keys() if first[key][0]["prompt"] != rows[key][0]["prompt"]]
        if differing or not first.keys() & rows.keys() or rule not in metrics["rules"]:
            example = f" (first: id {min(differing)})" if differing else ""
            raise ValueError(f"{first_name} and {name} answered different problems{example}; compare runs of one --task and --label_file")
    width = max(len("run"), *(len(name) for name, *_ in runs))
    columns = max(7, *(len(name) + 2 for name in rules))
    lines = [f"{'run':{width}}  accuracy  95 % interval    " + "".join(f"{name:>{columns}}" for name in rules) + "  finished  tokens"]
    for name, metrics, _ in runs:
        low, high = metrics["rules"][rule]["interval"]
        by_rule = "".join(f"{metrics['rules'][other]['accuracy']:{columns}.1%}" for other in rules)
        lines.append(f"{name:{width}}  {metrics['rules'][rule]['accuracy']:8.1%}  {low:6.1%} to {high:6.1%} {by_rule}  {metrics['finished_share']:8.1%}"
                     f"  {metrics['mean_tokens']:6.0f}")
        if chosen := metrics.get("selection"):      # a verifier was asked, under that run's own rule
            best = chosen["ways"]["best of n"]
            lines.append(f"{'  best of ' + str(chosen['n_samples']):{width}}  {best['accuracy']:8.1%}  {best['interval'][0]:6.1%} to {best['interval'][1]:6.1%}"
                         f"   of {chosen['n_problems']} problems, by the verifier; majority vote {chosen['ways']['majority vote']['accuracy']:.1%}")
    for name, _, rows in runs[1:]:
        common = sorted(first.keys() & rows.keys())
        pairs = [(first[problem][0], rows[problem][0]) for problem in common]
        lines.append(_test(f"{name} against {first_name}", rule, pairs))
        if all(len(rows[problem]) > 1 and "score" in rows[problem][0] for problem in common):
            k = min(len(rows[problem]) for problem in common)
            best = [rows[problem][best_of_n([row["score"] for row in rows[problem][:k]])] for problem in common]
            lines.append(_test(f"{name}, best of {k}, against {first_name}", rule, [(was, now) for (was, _), now in zip(pairs, best)]))
        changed = [pair for pair in pairs if _right(pair[0], rule) != _right(pair[1], rule)]
        kept = changed if show < 0 else changed[:show]
        if kept:
            more = f", the first {len(kept)} (--limit shows more)" if len(kept) < len(changed) else ""
            lines.append(f"\nproblems that changed{more}; left {first_name}, right {name}")
        for pair in kept:
            lines += _side_by_side(*pair, rule)
    return "\n".join(lines)


def read_run(log_dir: str) -> tuple[dict, dict[int, list[dict]]]:
    """metrics.json of an evaluation, and its samples by problem, in order."""
    paths = [os.path.join(log_dir, name) for name in ("metrics.json", "samples.jsonl")]
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: not there. --compare takes log_dirs that solver_evaluate.py has written.")
    problems = {}
    try:
        with open(paths[0]) as file:
            metrics = json.load(file)
        for row in sorted(read_records(paths[1]), key=lambda row: (row["id"], row["sample"])):
            problems.setdefault(row["id"], []).append(row)
        return metrics | {"rule": metrics["rule"], "rules": metrics["rules"]}, problems
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{log_dir}: its metrics.json or samples.jsonl is not what solver_evaluate.py writes ({type(error).__name__}: {error})") from None


def _right(row: dict, rule: str) -> bool:
    return row["correct_by_rule"][rule]


def _test(what: str, rule: str, pairs: list[tuple[dict, dict]]) -> str:
    pair = compare_paired(*([_right(row, rule) for row in side] for side in zip(*pairs)))
    return f"{what}, {pair['n']} common problems, rule {rule}: {pair['gained']} became right, {pair['lost']} became wrong, McNemar p = {pair['p']:.2g}"


def _side_by_side(was: dict, now: dict, rule: str) -> list[str]:
    columns = shutil.get_terminal_size((140, 24)).columns
    half = max(20, (columns - 3) // 2)
    cells = [[f"{'right' if _right(row, rule) else 'wrong'}, answer {row['answers'][rule]}" + ("" if row["finished"] else ", unfinished"),
              *itertools.chain.from_iterable(textwrap.wrap(line, half) or [""] for line in row["response"].splitlines())] for row in (was, now)]
    return [f"\n-- problem {was['id']}, became {'right' if _right(now, rule) else 'wrong'}; label {was['label']}",
            *itertools.chain.from_iterable(textwrap.wrap(line, columns) for line in as_text(was["prompt"]).splitlines()),
            *(f"{left:{half}} | {right}".rstrip() for left, right in itertools.zip_longest(*cells, fillvalue=""))]
