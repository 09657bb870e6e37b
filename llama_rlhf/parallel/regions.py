"""Collectives over the tensor-parallel group, as autograd operators (the f and g of Megatron-LM, arXiv:1909.08053, section 3).

copy:   identity forward, all-reduce backward   (entry of a column-parallel layer)
reduce: all-reduce forward, identity backward   (exit of a row-parallel layer)
With sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2) the tokens between those two are divided among the
ranks, each holding ceil(T / tp) rows, the last ones zeros; the bytes that travel are the same:
gather:  all-gather forward, reduce-scatter backward   in the place of copy (see layers)
scatter: reduce-scatter forward, all-gather backward   in the place of reduce
gather_same, split: the same without sums, for what every rank computes alike
Every call and its bytes are counted in `traffic`, so a test can hold the program to the number it promises.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from llama_rlhf.parallel import groups

traffic: Counter = Counter()      # "all_reduce" -> calls, "all_reduce_bytes" -> bytes of this rank's operand, ...
# torch 2.13 renamed them, and warns of the older names
_all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce_(tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """In place, over the tensor-parallel group. op: sum or max."""
    if groups.tp_size() > 1:
        _count("all_reduce", tensor)
        _reduce_(tensor, op)
    return tensor


def _count(call: str, tensor: torch.Tensor) -> None:
    traffic[call] += 1
    traffic[f"{call}_bytes"] += tensor.numel() * tensor.element_size()


def _reduce_(tensor: torch.Tensor, op: str) -> torch.Tensor:
    if (shared := groups.shared_memory()) is not None:
        return shared.all_reduce_(tensor, op)
    dist.all_reduce(tensor, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=groups.tp_group())
    return tensor


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """[...] on each rank -> [tp, ...]; the shape must be the same on all ranks."""
    if groups.tp_size() == 1:
        return tensor[None]
    _count("all_gather", tensor)
    if (shared := groups.shared_memory()) is not None:
        return shared.all_gather(tensor)
    whole = tensor.new_empty(groups.tp_size(), *tensor.shape)       # a list of parts would be gathered in one piece, copied apart and together again
    _all_gather_single(whole.view(-1), tensor.contiguous().view(-1), group=groups.tp_group())
    return whole


def all_gather_tokens(x: torch.Tensor, n: int) -> torch.Tensor:
    """This rank's rows [ceil(n / tp), ...] -> all n of them."""
    return all_gather(x).flatten(0, 1)[:n]


def reduce_scatter_tokens(x: torch.Tensor) -> torch.Tensor:
    """Partial sums [n, ...] -> this rank's rows [ceil(n / tp), ...] of their sum over ranks."""
    _count("reduce_scatter", x)
    if not x.is_cuda or groups.shared_memory() is not None:     # on a CPU nothing travels far: the sum is simply made everywhere
        return own_tokens(_reduce_(x.clone(), "sum")).clone()
    each = -(-len(x) // groups.tp_size())
    own = x.new_empty(each, *x.shape[1:])
    _reduce_scatter_single(own, _filled(x, each * groups.tp_size()).contiguous(), group=groups.tp_group())
    return own


def own_tokens(x: torch.Tensor) -> torch.Tensor:
    """All n rows -> this rank's [ceil(n / tp), ...]."""
    each = -(-len(x) // groups.tp_size())
    return _filled(x[groups.tp_rank() * each:(groups.tp_rank() + 1) * each], each)


def _filled(x: torch.Tensor, n: int) -> torch.Tensor:
    """x with rows of zeros below, n in all."""
    return torch.cat([x, x.new_zeros(n - len(x), *x.shape[1:])]) if len(x) < n else x


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.n = len(x)
        return reduce_scatter_tokens(x)

    @staticmethod
    def backward(ctx, grad):
        return all_gather_tokens(grad, ctx.n)


class _GatherSame(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, n):
        return all_gather_tokens(x, n)

    @staticmethod
    def backward(ctx, grad):
        return own_tokens(grad), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.n = len(x)
        return own_tokens(x).clone()

    @staticmethod
    def backward(ctx, grad):
        return all_gather_tokens(grad, ctx.n)


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


def scatter_from_tp(x: torch.Tensor) -> torch.Tensor:
    """x: partial sums of all tokens -> the sum's rows of this rank."""
    return _Scatter.apply(x)


def gather_same(x: torch.Tensor, n: int) -> torch.Tensor:
    """This rank's rows -> all n; what follows is computed by all ranks alike, so each has the whole gradient of its rows."""
    return _GatherSame.apply(x, n)


def split_tokens(x: torch.Tensor) -> torch.Tensor:
    """What all ranks have alike -> this rank's rows."""
    return _Split.apply(x)
