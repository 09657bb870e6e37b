"""Time a tensor-parallel all-reduce on CPU processes of one host: shared memory beside gloo, interleaved in one run.

    torchrun --nproc_per_node 2 benchmarks/collectives.py
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_rlhf.cli import run


def main(*, repeats: int = 20, blocks: int = 7):
    """Print microseconds per all-reduce (median of blocks) and the ratio.

    Args:
        repeats: all-reduces per block
        blocks: blocks per side; the sides alternate
    """
    import torch

    from llama_rlhf.parallel import groups
    from llama_rlhf.parallel.regions import all_reduce_

    groups.initialize(device="cpu")
    shared = groups.shared_memory()
    if shared is None:
        raise ValueError("needs at least 2 processes of one x86-64 host: torchrun --nproc_per_node 2 benchmarks/collectives.py")
    groups.log(f"{groups.tp_size()} processes, {torch.get_num_threads()} thread(s) each, torch {torch.__version__}")
    groups.log(f"{'dtype':10} {'shape':>12} {'shared us':>10} {'gloo us':>10} {'gloo / shared':>14}")
    for dtype in (torch.bfloat16, torch.float32):
        for shape in ((1, 576), (64, 576), (1024, 576), (1024, 4096)):
            x = torch.randn(shape).to(dtype)
            times = {"shared": [], "gloo": []}
            for _ in range(blocks):
                for side in ("shared", "gloo", "gloo", "shared"):
                    groups._state["shared_memory"] = shared if side == "shared" else None
                    started = time.perf_counter()
                    for _ in range(repeats):
                        all_reduce_(x)
                    times[side].append((time.perf_counter() - started) / repeats * 1e6)
                    x.zero_()
            a, b = (statistics.median(times[side]) for side in ("shared", "gloo"))
            groups.log(f"{str(dtype)[6:]:10} {'x'.join(map(str, shape)):>12} {a:10.0f} {b:10.0f} {b / a:14.1f}")
    groups._state["shared_memory"] = shared
    groups.shutdown()


if __name__ == "__main__":
    run(main)
