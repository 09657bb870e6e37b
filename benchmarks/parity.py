"""Our decoder against transformers, every family at every tensor-parallel size, in fp32 on random tiny models:

    python benchmarks/parity.py [--sizes 1,2,3,4,7] [--models llama,mixtral]

Nothing divides on purpose: 6 or 9 query heads, 2 or 3 kv heads, 77 rows of the feed-forward, 101 words; 7 is more ranks than heads.
logits: largest difference. gradients: of the mean loss over responses, largest difference over all weights, after what the
ranks must add up. greedy: 20 tokens generated through the cache are transformers' own. loaded: split into that many shards and
loaded again, every weight has the same bits. round trip: those shards exported to Hugging Face are the files they came from, bit
for bit (of first-generation Qwen, which is made by renaming a Qwen2: that Qwen2). Exit code 1 when a cell fails. Needs the tests
folder; no GPU.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

LIMITS = {"logits": 1e-4, "gradients": 1e-5}        # sums in another order, fp32


def main() -> int:
    import torch
    from ranks import run_ranks
    from toys import MODELS, make_reference, measure, same, weights

    from llama_rlhf.checkpoint.export import export_hf
    from llama_rlhf.parallel import groups
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1,2,3,4,7", help="tensor-parallel sizes")
    parser.add_argument("--models", default=",".join(MODELS), help="default: all")
    arguments = parser.parse_args()
    sizes, models = [int(n) for n in arguments.sizes.split(",")], arguments.models.split(",")
    if unknown := [name for name in models if name not in MODELS]:
        parser.error(f"unknown models {', '.join(unknown)}; known: {', '.join(MODELS)}")

    start = time.perf_counter()
    torch.set_num_threads(1)
    groups.initialize(device="cpu")
    failed, cells = 0, 0
    with tempfile.TemporaryDirectory() as root:
        folders = [os.path.join(root, name) for name in models]
        with contextlib.redirect_stdout(io.StringIO()):
            for folder, name in zip(folders, models):
                make_reference(folder, name, sizes)
        measured = {n: run_ranks(n, measure, folders) for n in sizes}
        exported = {}
        with contextlib.redirect_stdout(io.StringIO()):
            for folder in folders:
                for n in sizes:
                    export_hf(f"{folder}/shards-{n}", f"{folder}/exported-{n}")
                    exported[folder, n] = same(weights(f"{folder}/exported-{n}"), weights(f"{folder}/transformers"))
    groups.shutdown()
    print(f"{'model':20}{'ranks':>6}{'logits':>12}{'gradients':>12}{'greedy':>10}{'loaded':>10}{'round trip':>12}")
    for i, name in enumerate(models):
        for n in sizes:
            ranks = [rank[i] for rank in measured[n]]
            values = {key: max(rank[key] for rank in ranks) for key in LIMITS}
            equal = {"greedy": all(rank["tokens"] for rank in ranks), "loaded": all(rank["round trip"] for rank in ranks),
                     "round trip": exported[folders[i], n]}
            wrong = [not values[key] < limit for key, limit in LIMITS.items()] + [not same for same in equal.values()]
            failed, cells = failed + sum(wrong), cells + len(wrong)
            print(f"{name:20}{n:6}{values['logits']:12.1e}{values['gradients']:12.1e}"
                  f"{'equal' if equal['greedy'] else 'DIFFER':>10}{'equal' if equal['loaded'] else 'DIFFER':>10}"
                  f"{'equal' if equal['round trip'] else 'DIFFER':>12}"
                  f"{'   <- above ' + str(LIMITS) if any(wrong[:2]) else ''}")
    print(f"{cells - failed} of {cells} cells pass, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
