"""What a checkpoint holds, and what differs between two: checkpoint_split.py --inspect and --diff.

Any container and layout, seen through native names; one tensor in memory at a time. What is unknown, missing or of another shape
is a CheckpointError that names it, as in loading.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter

import torch

from llama_rlhf.checkpoint.shards import Rewrite, cut_for_file
from llama_rlhf.models import PRESETS, disagreements
from llama_rlhf.parallel.partition import Partition


def print_contents(source: str, n: int = 0, model_type: str = "") -> None:
    """Parameters, config, dtype, layout, the plan for n ranks (0: as many as there are shards), and the norm of every tensor."""
    with Rewrite(source, model_type=model_type) as rewrite:
        config, checkpoint = rewrite.config, rewrite.checkpoint
        print(f"{source}: {rewrite}")
        rewrite.check()
        changed = [f for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
        print("config:", ", ".join(f"{f.name}={getattr(config, f.name)!r}" for f in changed))
        print("presets of this config:", ", ".join(name for name, p in PRESETS.items() if not disagreements(config, p)) or "none")
        counts: Counter = Counter()
        for name, piece in rewrite.pieces.items():
            counts[rewrite.dtype(name)] += torch.Size(piece.shape).numel()
        print("dtype:", ", ".join(f"{_short(dtype)} {count / 1e6:.1f} M" for dtype, count in counts.most_common()))
        n_files, wq = len(checkpoint.files), "layers.0.attention.wq.weight"
        described = "manifest.json" if rewrite.contents.manifest else "its header" if checkpoint.kind == "gguf" else \
            os.path.basename(checkpoint.config_file or "") or "--model_type"
        print(f"layout: {n_files} {'tensor-parallel shards' if checkpoint.kind == 'shards' else 'file(s) of whole tensors'}, described by "
              f"{described}; {wq} is {rewrite.stored_name(wq)}")
        _print_plan(rewrite, n or (n_files if checkpoint.kind == "shards" else 1))
        print(f"{'tensor':52}{'shape':>18}  {'dtype':10}{'cut':8}{'norm':>12}")
        total = 0.0
        for name, piece in rewrite.pieces.items():
            x, cut = rewrite.read(name), cut_for_file(name, piece, config)
            norm, wrong = x.float().norm().item(), x.numel() - int(x.isfinite().sum())
            total += norm ** 2
            unit = "-" if cut is None else piece.kind if cut == piece.dim else "hidden"
            print(f"{name:52}{str(list(piece.shape)):>18}  {_short(x.dtype):10}{unit:8}{norm:12.5g}{f'   {wrong} values are not finite' if wrong else ''}")
        print(f"{len(rewrite.pieces)} tensors, norm of all {total ** 0.5:.6g}")


def _print_plan(rewrite: Rewrite, n: int) -> None:
    plan = Partition(rewrite.config, n)
    print(f"plan for {n}: what each rank holds\n  {'rank':6}{'query heads':>12}{'kv heads':>10}{'ffn rows':>16}{'vocabulary rows':>18}{'GB':>9}")
    for r in range(n):
        n_bytes = 0.0
        for name, piece in rewrite.pieces.items():
            start, stop = plan.held[piece.kind][r] if piece.kind else (0, 1)
            n_bytes += rewrite.nbytes(name) * (stop - start) / (1 if piece.dim is None else piece.shape[piece.dim])
        spans = [f"{start}..{stop - 1}" if start < stop else "none" for start, stop in
                 (plan.heads[r], plan.kv_heads[r], plan.held["ffn"][r], plan.held["vocab"][r])]
        print(f"  {r:<6}{spans[0]:>12}{spans[1]:>10}{spans[2]:>16}{spans[3]:>18}{n_bytes / 1e9:9.3f}")


def print_differences(a: str, b: str, model_type: str = "") -> bool:
    """The configs' fields, the tensors that only one has, the tensors whose bits differ and by how much. Whether anything differs."""
    with Rewrite(a, model_type=model_type) as one, Rewrite(b, model_type=model_type) as other:
        print(f"A: {a}: {one}\nB: {b}: {other}")
        one.check(), other.check()
        fields = disagreements(one.config, other.config)
        print("config:", "; ".join(fields) or "the same")
        alone = [(which, name) for which, left, right in (("A", one, other), ("B", other, one)) for name in left.pieces if name not in right.pieces]
        for which, name in alone:
            print(f"only in {which}: {name}")
        common, n_differ = [name for name in one.pieces if name in other.pieces], 0
        for name in common:
            x, y = one.read(name), other.read(name)
            if (x.dtype, x.shape) == (y.dtype, y.shape) and torch.equal(_bits(x), _bits(y)):
                continue
            if not n_differ:
                print(f"{'tensor':52}{'largest |A - B|':>16}{'|A - B| / |A|':>16}")
            n_differ += 1
            if x.shape != y.shape:
                print(f"{name:52}{list(x.shape)} and {list(y.shape)}")
                continue
            gap = x.float() - y.float()
            print(f"{name:52}{gap.abs().max().item():16.4g}{(gap.norm() / x.float().norm()).item():16.4g}"
                  f"{'' if x.dtype == y.dtype else f'   {_short(x.dtype)} and {_short(y.dtype)}'}")
        print(f"{n_differ} of {len(common)} common tensors differ, {len(common) - n_differ} have the same bits; {len(alone)} stand in one only")
        return bool(fields or alone or n_differ)


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
