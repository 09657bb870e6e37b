"""Reward beside exact accuracy, iteration by iteration: does the one that is optimised mean the other?

    python examples/arithmetic/curves.py runs/arithmetic-0/ppo-rule runs/arithmetic-0/ppo-verifier

Reads log/metrics.jsonl of save folders of ppo_train.py.
"""

import json
import sys

if len(sys.argv) < 2:
    sys.exit(__doc__)
for folder in sys.argv[1:]:
    with open(f"{folder}/log/metrics.jsonl") as file:
        records = [json.loads(line) for line in file]
    greedy = {r["step"]: r["accuracy"] for r in records if r["kind"] == "evaluation"}
    print(f"\n{folder}: greedy accuracy on held-out problems before: {greedy.get(0, float('nan')):.1%}")
    print("iteration   score  accuracy of samples  KL/response  entropy  length  seconds  held-out greedy")
    for r in (r for r in records if r["kind"] == "iteration"):
        held_out = f"{greedy[r['step']]:15.1%}" if r["step"] in greedy else ""
        print(f"{r['step']:9}{r['score']:8.3f}{r['accuracy']:21.1%}{r.get('kl_sequence', float('nan')):13.3f}{r['entropy']:9.3f}"
              f"{r['response_length']:8.1f}{r['seconds']:9.1f}{held_out}")
