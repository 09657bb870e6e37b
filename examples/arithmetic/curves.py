"""Reward beside exact accuracy, iteration by iteration: does the one that is optimised mean the other?

    python examples/arithmetic/curves.py runs/arithmetic-0/ppo-rule runs/arithmetic-0/ppo-verifier

Reads log/metrics.jsonl of save folders of ppo_train.py.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from llama_rlhf.report import read_run  # noqa: E402


def number(record, key, form):
    """In its column; "-" where there is none: null is a number that was not finite, and only problems with labels have an accuracy."""
    value = record.get(key)
    return format("-", f">{form.split('.')[0]}") if value is None else format(value, form)


if len(sys.argv) < 2:
    sys.exit(__doc__)
for folder in sys.argv[1:]:
    run = read_run(folder, folder)
    held_out = {record["step"]: record for record in run.of("evaluation")}
    print(f"\n{folder}: greedy accuracy on held-out problems before: {number(held_out.get(0, {}), 'accuracy', '.1%')}")
    print("iteration   score  accuracy of samples  KL/response  entropy  length  seconds  held-out greedy")
    for record in run.of("iteration"):
        columns = ("step", "9"), ("score", "8.3f"), ("accuracy", "21.1%"), ("kl_sequence", "13.3f"), ("entropy", "9.3f"), ("response_length", "8.1f"), ("seconds", "9.1f")
        last = number(held_out[record["step"]], "accuracy", "15.1%") if record["step"] in held_out else ""
        print("".join(number(record, *column) for column in columns) + last)
