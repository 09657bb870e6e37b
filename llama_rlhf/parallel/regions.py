"""Collectives over the tensor-parallel group, as autograd operators (the f and g of Megatron-LM, arXiv:1909.08053, section 3).

copy:   identity forward, all-reduce backward   (entry of a column-parallel layer)
reduce: all-reduce forward, identity backward   (exit of a row-parallel layer)
Every call and its bytes are counted in `traffic`, so a test can hold the program to the number it promises.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist

from llama_rlhf.parallel import groups

traffic: Counter = Counter()      # "all_reduce" -> calls, "all_reduce_bytes" -> bytes of this rank's operand, ...


def all_reduce_(tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """In place, over the tensor-parallel group. op: sum or max."""
    if groups.tp_size() > 1:
        traffic["all_reduce"] += 1
        traffic["all_reduce_bytes"] += tensor.numel() * tensor.element_size()
        if (shared := groups.shared_memory()) is not None:
            return shared.all_reduce_(tensor, op)
        dist.all_reduce(tensor, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=groups.tp_group())
    return tensor


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """[...] on each rank -> [tp, ...]; the shape must be the same on all ranks."""
    if groups.tp_size() == 1:
        return tensor[None]
    traffic["all_gather"] += 1
    traffic["all_gather_bytes"] += tensor.numel() * tensor.element_size()
    if (shared := groups.shared_memory()) is not None:
        return shared.all_gather(tensor)
    parts = [torch.empty_like(tensor) for _ in range(groups.tp_size())]
    dist.all_gather(parts, tensor.contiguous(), group=groups.tp_group())
    return torch.stack(parts)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce_(grad.clone())    # autograd may hand the same tensor to another branch: never reduce it in place


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return all_reduce_(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def copy_to_tp(x: torch.Tensor) -> torch.Tensor:
    """x is replicated and enters computation that differs by rank: its gradient is the sum over ranks."""
    return _Copy.apply(x) if groups.tp_size() > 1 and x.requires_grad else x


def reduce_from_tp(x: torch.Tensor) -> torch.Tensor:
    """x is a partial sum, made for this call: add it up over ranks, in place."""
    if groups.tp_size() == 1:
        return x
    return _Reduce.apply(x) if x.requires_grad else all_reduce_(x)
