"""A model too large for this machine, at its true widths with few layers: split it, load one rank's part, and count the whole.

    python benchmarks/large_model.py --model_type llama-2-70b --layers 2 --n 8

Random bf16 weights in Hugging Face's form -> checkpoint_split for n ranks -> n processes each load their shard and run one
forward pass. Then, by arithmetic alone, what all layers take per rank.
"""

import json
import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from llama_rlhf.cli import run  # noqa: E402


def main(*, model_type: str = "llama-2-70b", layers: int = 2, n: int = 8, folder: str = "/tmp", load_only: bool = False):
    """Split and load a few layers of a large model at true widths; print seconds, memory, and the sum for all layers.

    Args:
        model_type: a preset
        layers: how many of its layers to make
        n: shards and ranks
        folder: on the disk to work on; a folder made in it is removed at the end
        load_only: internal: the part each rank runs
    """
    if load_only:
        load(folder)
        return
    import tempfile
    from dataclasses import replace

    import torch

    from llama_rlhf.checkpoint.formats import TensorInfo
    from llama_rlhf.checkpoint.shards import native_tensors, split_checkpoint
    from llama_rlhf.checkpoint.writer import SafetensorsWriter
    from llama_rlhf.models import FAMILIES, preset
    from llama_rlhf.models.family import lookup
    from llama_rlhf.models.transformer import CausalLM
    from llama_rlhf.parallel import groups
    from llama_rlhf.parallel.partition import Partition

    full = preset(model_type)
    config = replace(full, n_layers=layers)
    groups.initialize(device="cpu")
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="large-model-", dir=folder) as work:
        hf = os.path.join(work, "hf")
        os.makedirs(hf)
        family = FAMILIES[config.family]
        infos = {lookup(family.hf, name).name: TensorInfo(piece.shape, torch.bfloat16)
                 for name, piece in native_tensors(CausalLM(config)).items()}
        largest = max(torch.Size(info.shape).numel() for info in infos.values())
        noise = (torch.randn(largest + len(infos)) * 0.02).bfloat16()
        with open(os.path.join(hf, "config.json"), "w") as file:
            json.dump(family.write_hf(config), file)
        with SafetensorsWriter(os.path.join(hf, "model.safetensors"), infos) as writer:
            for i, (name, info) in enumerate(infos.items()):
                writer.write(name, noise[i:i + torch.Size(info.shape).numel()].view(info.shape))
        del noise
        print(f"{model_type} with {layers} of {full.n_layers} layers: {config.n_parameters / 1e9:.2f} of {full.n_parameters / 1e9:.2f} billion weights")
        started = time.perf_counter()
        split_checkpoint(hf, os.path.join(work, "split"), n)
        print(f"split for {n} ranks in {time.perf_counter() - started:.1f} s")
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n), os.path.abspath(__file__),
                        "--load_only", "--folder", os.path.join(work, "split")], check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
    pieces, plan = native_tensors(CausalLM(full)), Partition(full, n)
    sizes = [sum(2 * torch.Size(p.shape).numel() * (1 if p.dim is None else (plan.held[p.kind][r][1] - plan.held[p.kind][r][0]) / p.shape[p.dim])
                 for p in pieces.values()) for r in range(n)]
    print(f"all {full.n_layers} layers at {n} ranks, bf16 weights by the plan: {min(sizes) / 1e9:.2f} to {max(sizes) / 1e9:.2f} GB per rank")


def load(folder):
    """On each rank: load, one forward pass of 16 tokens, report."""
    import torch

    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.models.transformer import Rows
    from llama_rlhf.parallel import groups

    groups.initialize(device="cpu")
    started = time.perf_counter()
    model = load_model(folder, dtype=torch.bfloat16)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        finite = bool(model(torch.arange(16), Rows.packed([16])).isfinite().all())
    with open("/proc/self/status") as file:
        anon = next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = groups.gather_objects((seconds, held, anon, finite))
    groups.log(f"loaded on {groups.world_size()} ranks in {max(r[0] for r in rows):.1f} s: {max(r[1] for r in rows) / 1e9:.2f} GB of weights per rank, "
               f"anonymous memory at most {max(r[2] for r in rows) / 1e9:.2f} GB per rank, forward pass finite: {all(r[3] for r in rows)}")
    groups.shutdown()


if __name__ == "__main__":
    run(main)
