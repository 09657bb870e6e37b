"""Rows on the packed token axis, and causal attention inside each of them: on a GPU by flash attention over rows of any lengths, on a CPU by
batched products, elsewhere by torch's fused kernel on rows padded to one length."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from llama_rlhf.parallel import groups

_varlen_attn: Any = None
_groups_heads = False
try:
    from torch.nn.attention.varlen import varlen_attn
    _arguments = inspect.signature(varlen_attn).parameters
    if "window_size" in _arguments:         # older torch: no such module, or fewer arguments
        _varlen_attn, _groups_heads = varlen_attn, "enable_gqa" in _arguments
except ImportError:
    pass

# on a CPU products beat the fused kernel, most of all in backward (benchmarks/kernels.py); in fp32 up to rows of
_PRODUCTS_FP32 = 1024
_QUERIES = 128              # of a row that attend together in products: the keys after the last of them are left out
_GRID_CELLS = 1 << 19       # scores per head that exist at a time
_KEPT_KEYS = 6              # times the head's width: the longest rows whose probabilities are kept for backward


@dataclass
class Grid:
    """Neighbouring rows of about one length, which attention computes together, padded on the right to the longest.

    tokens: where they stand on the packed axis.  cells: [N] their places among rows x longest; None: they fill it.
    """

    n_rows: int
    longest: int
    tokens: slice
    cells: torch.Tensor | None


@dataclass
class Rows:
    """How the packed token axis divides into rows.

    lengths: tokens of each row, in order (python ints: slicing must not wait for a device).
    positions: [T] position of each token in its own row.
    prompts: tokens of each row that are given at once when it is generated; None: all of them.
    behind: tokens that every row has before these, in a cache (see KVCache.keep_prefix).
    """

    lengths: list[int]
    positions: torch.Tensor
    prompts: list[int] | None = None
    behind: int = 0

    @classmethod
    def packed(cls, lengths: list[int], device=None, prompts: list[int] | None = None, *, behind: int = 0) -> Rows:
        positions = torch.cat([torch.arange(behind, behind + n) for n in lengths]) if lengths else torch.zeros(0, dtype=torch.long)
        return cls(list(lengths), positions.to(device or groups.device()), prompts, behind)

    def by_length(self) -> tuple[Rows, torch.Tensor | None]:
        """The same rows, longest first, and where their tokens stood: [T] (None: the order is the same)."""
        order = sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i])
        if order == list(range(len(order))):
            return self, None
        ends = list(itertools.accumulate(self.lengths))
        tokens = torch.cat([torch.arange(ends[i] - self.lengths[i], ends[i]) for i in order]).to(self.positions.device)
        prompts = None if self.prompts is None else [self.prompts[i] for i in order]
        return Rows([self.lengths[i] for i in order], self.positions[tokens], prompts), tokens

    @functools.cached_property
    def ends(self) -> torch.Tensor:
        """[rows + 1] int32: where each row begins, and the end of the last."""
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32).to(self.positions.device)

    @functools.cached_property
    def grids(self) -> list[Grid]:
        """On a GPU all rows share a grid: one kernel launch counts more than padding. On a CPU neighbours of similar length do."""
        device, grids, first, start = self.positions.device, [], 0, 0
        while first < len(self.lengths):
            longest, last = self.lengths[first], first + 1
            while last < len(self.lengths):
                n = self.lengths[last]
                similar = 0.7 * longest <= n <= longest and (last + 1 - first) * longest * min(longest, _QUERIES) <= _GRID_CELLS
                if not (similar or self.positions.is_cuda):
                    break
                longest, last = max(longest, n), last + 1
            lengths = self.lengths[first:last]
            cells = None if min(lengths) == longest else \
                torch.cat([torch.arange(n) + i * longest for i, n in enumerate(lengths)]).to(device)
            grids.append(Grid(len(lengths), longest, slice(start, start + sum(lengths)), cells))
            first, start = last, start + sum(lengths)
        return grids


class Take(torch.autograd.Function):
    """x[index] for an index without repetitions: backward copies, where torch would add."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.n = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        index, = ctx.saved_tensors
        return grad.new_zeros(ctx.n, *grad.shape[1:]).index_copy_(0, index, grad), None


def packed_attention(q, k, v, rows: Rows, kv_of_query: torch.Tensor | None, window: int | None, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Causal attention inside each row. q: [T, H, D]; k, v: [T, Hkv, D] -> [T, H, D].

    kv_of_query: [H] index of each query's kv head when the grouping is not uniform on this rank, else None.
    window: keys that a query sees at most, itself included.
    bias: [H, n, n] for the longest row's n, added to the scores; it holds the causal mask (ALiBi).
    """
    if kv_of_query is not None:
        k, v = k[:, kv_of_query], v[:, kv_of_query]
    if not q.is_cuda and (q.dtype != torch.float32 or max(rows.lengths) <= _PRODUCTS_FP32):
        return _ProductAttention.apply(q, k, v, rows.grids, window, bias)
    if bias is None and _takes_any_lengths(q):
        longest, grouped = max(rows.lengths), q.shape[1] != k.shape[1]
        if grouped and not _groups_heads:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return _varlen_attn(q, k, v, rows.ends, rows.ends, longest, longest, window_size=(-1 if window is None else window - 1, 0),
                            **({"enable_gqa": grouped} if _groups_heads else {}))
    out = [_fused(q[grid.tokens], k[grid.tokens], v[grid.tokens], grid, window, bias) for grid in rows.grids]
    return out[0] if len(out) == 1 else torch.cat(out)


def _takes_any_lengths(q: torch.Tensor) -> bool:
    """Whether torch's flash attention over packed rows computes it: half precision, Ampere or later."""
    return _varlen_attn is not None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 \
        and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _fused(q, k, v, grid: Grid, window: int | None, bias: torch.Tensor | None) -> torch.Tensor:
    """The rows of one grid by torch's kernel. Right padding needs no mask: causality already hides later tokens, and the padded
    queries are dropped."""
    n_rows, n, n_kv_heads = grid.n_rows, grid.longest, k.shape[1]
    if grid.cells is not None:
        q, k, v = (x.new_zeros(n_rows * n, *x.shape[1:]).index_copy(0, grid.cells, x) for x in (q, k, v))
    q, k, v = (x.unflatten(0, (n_rows, n)).transpose(1, 2) for x in (q, k, v))                      # [rows, H, n, D]
    mask = None if bias is None else bias[:, :n, :n].to(q.dtype)
    if window is not None and n > window:
        distance = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
        mask = (distance >= 0) & (distance < window)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != n_kv_heads)
    out = out.transpose(1, 2).flatten(0, 1)
    return out if grid.cells is None else Take.apply(out, grid.cells)


class _ProductAttention(torch.autograd.Function):
    """packed_attention by batched products over the grids, a stretch of queries at a time, whose later keys are not multiplied.

    Backward, with the probabilities P: dV = P^T dO, dS = P * (dP - sum(dP * P)) with dP = dO V^T, dQ = dS K, dK = dS^T Q. Those of short rows are kept
    for it, with heads of 64 and more about a quarter of what a block keeps anyway, at most; of long ones they are computed again.
    """

    @staticmethod
    def forward(ctx, q, k, v, grids, window, bias):
        kept, out = [], torch.empty_like(q)
        for grid in grids:
            queries, keys, values = _spread(grid, q, k, v)
            found = torch.empty_like(queries)
            for seen, here in _stretches(grid.longest, window):
                p = _probabilities(_flat(queries, here), _flat(keys, seen), grid, seen, here, window, bias)
                if _keeps(grid, q) and any(ctx.needs_input_grad):
                    kept.append(p)
                found[..., here, :] = torch.bmm(p, _flat(values, seen)).view(found[..., here, :].shape)
            _collect(found, grid, out)
        ctx.save_for_backward(q, k, v, bias, *kept)
        ctx.grids, ctx.window = grids, window
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, bias, *kept = ctx.saved_tensors
        d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
        scale, kept = q.shape[-1] ** -0.5, iter(kept)
        for grid in ctx.grids:
            queries, keys, values, outs = _spread(grid, q, k, v, grad)
            found, found_k, found_v = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
            for seen, here in _stretches(grid.longest, ctx.window):
                at, at_k, at_v, out = _flat(queries, here), _flat(keys, seen), _flat(values, seen), _flat(outs, here)
                p = next(kept) if _keeps(grid, q) else _probabilities(at, at_k, grid, seen, here, ctx.window, bias)
                d_scores = torch.ops.aten._softmax_backward_data(torch.bmm(out, at_v.transpose(1, 2)), p, -1, p.dtype)
                found[..., here, :] = torch.baddbmm(at, d_scores, at_k, beta=0, alpha=scale).view(found[..., here, :].shape)
                found_k[..., seen, :] += torch.baddbmm(at_k, d_scores.transpose(1, 2), at, beta=0, alpha=scale).view(found_k[..., seen, :].shape)
                found_v[..., seen, :] += torch.bmm(p.transpose(1, 2), out).view(found_v[..., seen, :].shape)
            for x, d_x in ((found, d_q), (found_k, d_k), (found_v, d_v)):
                _collect(x, grid, d_x)
        return d_q, d_k, d_v, None, None, None


def _keeps(grid: Grid, q: torch.Tensor) -> bool:
    return grid.longest <= _KEPT_KEYS * q.shape[-1]


def _spread(grid: Grid, q: torch.Tensor, k: torch.Tensor, *more: torch.Tensor) -> list[torch.Tensor]:
    """The packed tokens of a grid [t, H, D], each -> [rows, Hkv, H/Hkv, n, D], zeros behind short rows."""
    spread = []
    for x in (q, k, *more):
        x = x[grid.tokens]
        if grid.cells is not None:
            x = x.new_zeros(grid.n_rows * grid.longest, *x.shape[1:]).index_copy_(0, grid.cells, x)
        x = x.view(grid.n_rows, grid.longest, k.shape[1], -1, x.shape[-1]).permute(0, 2, 3, 1, 4)
        spread.append(x.contiguous() if x.shape[2] == 1 else x)     # keys and values are read by every stretch
    return spread


def _collect(x: torch.Tensor, grid: Grid, out: torch.Tensor) -> None:
    """The reverse of _spread, into the grid's place in out."""
    x, out = x.permute(0, 3, 1, 2, 4).reshape(-1, *out.shape[1:]), out[grid.tokens]
    out.copy_(x if grid.cells is None else x[grid.cells])


def _flat(x: torch.Tensor, part: slice) -> torch.Tensor:
    """[rows, Hkv, G, n, D] -> a stretch of n as products take it: [rows Hkv, G m, D]."""
    return x[..., part, :].flatten(2, 3).flatten(0, 1)


def _stretches(n: int, window: int | None) -> list[tuple[slice, slice]]:
    """(keys, queries) of a row of n tokens: stretches of about equal length, each with the keys that any of its queries sees."""
    number = -(-n // _QUERIES)
    ends = [i * n // number for i in range(number + 1)]
    return [(slice(0 if window is None else max(0, start - window + 1), end), slice(start, end)) for start, end in itertools.pairwise(ends)]


def _probabilities(q, k, grid: Grid, seen: slice, here: slice, window: int | None, bias: torch.Tensor | None) -> torch.Tensor:
    """[rows Hkv, G m, keys] from q [rows Hkv, G m, D] and k [rows Hkv, keys, D]: the stretch `here` of a row's queries on its keys `seen`."""
    m, n_keys = here.stop - here.start, seen.stop - seen.start
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
    table = scores.view(grid.n_rows, -1, m, n_keys)                                                 # [rows, H, m, keys]
    if bias is not None:
        table += bias[:, here, seen].to(q.dtype)
    else:
        table[..., here.start - seen.start:] += torch.full((m, m), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    if window is not None and here.stop - seen.start > window:
        table += torch.full((m, n_keys), -math.inf, dtype=q.dtype, device=q.device).tril(here.start - seen.start - window)
    return scores.softmax(-1)
