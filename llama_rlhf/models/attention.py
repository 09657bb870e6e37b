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

# on a CPU products beat the fused kernel, most of all in backward (benchmarks/kernels.py); in fp32 up to rows of
_PRODUCTS_FP32 = 1024
_QUERIES = 128              # of a row that attend together in products: the keys after the last of them are left out
_GRID_CELLS = 1 << 19       # scores per head that exist at a time
_BEHIND_TOKENS = 8192       # of whole rows whose keys and values are put together at a time, where rows have tokens before them
_KEPT_MASKS = 512           # the longest rows whose masks are kept from block to block
_KEPT_KEYS = 6              # times the head's width: the longest rows whose probabilities are kept for backward


@dataclass
class Grid:
    """Neighbouring rows of about one length, which attention computes together, padded on the right to the longest.

    lengths: of the rows.  tokens: where they stand on the packed axis.
    """

    lengths: list[int]
    tokens: slice
    device: torch.device

    def __post_init__(self):
        self.n_rows, self.longest = len(self.lengths), max(self.lengths)
        self._routes: dict[tuple, tuple[torch.Tensor, ...]] = {}
        self._masks: dict[tuple, torch.Tensor] = {}

    @functools.cached_property
    def cells(self) -> torch.Tensor | None:
        """[N] the tokens' places among rows x longest; None: they fill it."""
        if min(self.lengths) == self.longest:
            return None
        return run_together([i * self.longest for i in range(self.n_rows)], self.lengths).to(self.device)

    @functools.cached_property
    def gaps(self) -> torch.Tensor:
        """The other places."""
        return run_together([i * self.longest + n for i, n in enumerate(self.lengths)], [self.longest - n for n in self.lengths]).to(self.device)

    def routes(self, n_heads: int, width: int, ends: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        """How the heads of the tokens come to stand as products take them, and back: stretch by stretch of the positions between `ends`, there
        [rows, n_heads, positions]. Made once for all blocks.

        width: heads between a token and the next where they come from.
        Returns indices: where each place takes its head from (behind short rows from their last token); where each head of a token went,
        token by token; the places behind short rows.
        """
        key = n_heads, width, ends
        if key not in self._routes:
            n, device = torch.tensor(self.lengths, device=self.device), self.device
            tokens = (n.cumsum(0) - n)[:, None] + torch.arange(self.longest, device=device).minimum(n[:, None] - 1)
            source = tokens[:, None] * width + torch.arange(n_heads, device=device)[:, None]              # [rows, heads, positions]
            there, place, first = [], torch.empty_like(source), 0
            for start, stop in itertools.pairwise(ends):
                part = source[..., start:stop]
                place[..., start:stop] = torch.arange(first, first + part.numel(), device=device).view(part.shape)
                there.append(part.flatten())
                first += part.numel()
            place = place.transpose(1, 2).flatten(0, 1)                                                   # [rows x positions, heads]
            went, behind = (place, place[:0]) if self.cells is None else (place[self.cells], place[self.gaps])
            self._routes[key] = torch.cat(there), went.flatten(), behind.flatten()
        return self._routes[key]

    def spread(self, x: torch.Tensor, ends: tuple[int, ...], *, with_zeros: bool = False) -> torch.Tensor:
        """All packed tokens [T, H, D] -> this grid's [places, D] (see `routes`). with_zeros: behind short rows, where else something finite stands."""
        x, d = x[self.tokens], x.shape[-1]
        if x.stride()[1:] != (d, 1) or x.stride(0) % d:
            x = x.contiguous()
        width = x.stride(0) // d            # more than H where x is a part of something wider
        there, _, behind = self.routes(x.shape[1], width, ends)
        spread = x.as_strided(((len(x) - 1) * width + x.shape[1], d), (d, 1)).index_select(0, there)
        return spread.index_fill_(0, behind, 0) if with_zeros and len(behind) else spread

    def collect(self, spread: torch.Tensor, ends: tuple[int, ...], out: torch.Tensor) -> None:
        """The reverse of `spread`, into the grid's place in out: [T, H, D], without gaps."""
        out = out[self.tokens]
        torch.index_select(spread, 0, self.routes(out.shape[1], out.shape[1], ends)[1], out=out.view(-1, out.shape[-1]))

    def mask(self, seen: slice, here: slice, window: int | None, repeated: int, dtype: torch.dtype) -> torch.Tensor:
        """[1, repeated x queries `here`, keys `seen`]: 0 where a query sees a key, else -inf. Made once for all blocks where that is not much."""
        key = seen.start, seen.stop, here.start, here.stop, window, repeated, dtype
        if (mask := self._masks.get(key)) is None:
            sees = _sees(here, seen, window, self.device)
            mask = torch.zeros(sees.shape, dtype=dtype, device=self.device).masked_fill_(~sees, -math.inf).repeat(repeated, 1)[None]
            if self.longest <= _KEPT_MASKS:
                self._masks[key] = mask
        return mask


def run_together(starts: list[int], lengths: list[int]) -> torch.Tensor:
    """start, start + 1, ... of each row, so many as its length, row after row: [sum of lengths], on the CPU."""
    total = sum(lengths)
    begins = torch.tensor(list(zip(starts, itertools.accumulate(lengths, initial=0), lengths)), dtype=torch.long).view(-1, 3)
    return torch.arange(total) + (begins[:, 0] - begins[:, 1]).repeat_interleave(begins[:, 2], output_size=total)


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
        positions = run_together([behind] * len(lengths), lengths)
        return cls(list(lengths), positions.to(device or groups.device()), prompts, behind)

    def by_length(self) -> tuple[Rows, torch.Tensor | None]:
        """The same rows, longest first, and where their tokens stood: [T] (None: the order is the same)."""
        order = sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i])
        if order == list(range(len(order))):
            return self, None
        ends = list(itertools.accumulate(self.lengths))
        tokens = run_together([ends[i] - self.lengths[i] for i in order], [self.lengths[i] for i in order]).to(self.positions.device)
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
                fits = not self.behind or (last + 1 - first) * (max(longest, n) + self.behind) <= _BEHIND_TOKENS
                if not (fits and (similar or self.positions.is_cuda)):
                    break
                longest, last = max(longest, n), last + 1
            lengths = self.lengths[first:last]
            grids.append(Grid(lengths, slice(start, start + sum(lengths)), device))
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
        (attend, shares_heads), longest, grouped = _varlen(), max(rows.lengths), q.shape[1] != k.shape[1]
        if grouped and not shares_heads:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return attend(q, k, v, rows.ends, rows.ends, longest, longest, window_size=(-1 if window is None else window - 1, 0),
                      **({"enable_gqa": grouped} if shares_heads else {}))
    out = [_fused(q[grid.tokens], k[grid.tokens], v[grid.tokens], grid, window, bias) for grid in rows.grids]
    return out[0] if len(out) == 1 else torch.cat(out)


def attention_behind(q, k, v, before: tuple[torch.Tensor, torch.Tensor], rows: Rows, window: int | None, bias: torch.Tensor | None = None) -> torch.Tensor:
    """packed_attention of rows that have the same rows.behind tokens before theirs. before: those tokens' keys and values, [behind, Hkv, D]. No gradient."""
    out, d = torch.empty_like(q), q.shape[-1]
    for grid in rows.grids:
        ends, whole = _ends(grid.longest), (0, grid.longest)
        keys, values = (torch.cat([old.transpose(0, 1).expand(grid.n_rows, -1, -1, -1), grid.spread(x, whole).view(grid.n_rows, -1, grid.longest, d)], 2)
                        for old, x in zip(before, (k, v)))                                              # [rows, Hkv, behind + n, D]
        queries, found = grid.spread(q, ends), []
        for (seen, here), at in zip(_stretches(ends, window, rows.behind), _cut(queries, ends, grid.n_rows * keys.shape[1])):
            n = here.stop - here.start
            mask = grid.mask(seen, here, window, at.shape[1] // n, q.dtype)                             # [1, G m, keys]
            if bias is not None:
                mask = mask + bias[:, here, seen].to(q.dtype).view(keys.shape[1], *mask.shape[1:])
            found.append(F.scaled_dot_product_attention(at.view(*keys.shape[:2], -1, d), keys[:, :, seen], values[:, :, seen], attn_mask=mask[None]).reshape(-1, d))
        grid.collect(torch.cat(found), ends, out)
    return out


def _sees(here: slice, seen: slice, window: int | None, device: torch.device) -> torch.Tensor:
    """[queries `here`, keys `seen`] bool: which query of a row sees which key."""
    distance = torch.arange(here.start, here.stop, device=device)[:, None] - torch.arange(seen.start, seen.stop, device=device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


@functools.cache
def _varlen() -> tuple[Any, bool]:
    """torch's flash attention over packed rows, and whether its heads may share keys; None where torch is older. Not imported above: that takes a second
    (it brings torch's compiler), and only GPUs need it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, False
    arguments = inspect.signature(varlen_attn).parameters
    return (varlen_attn, "enable_gqa" in arguments) if "window_size" in arguments else (None, False)


def _takes_any_lengths(q: torch.Tensor) -> bool:
    """Whether torch's flash attention over packed rows computes it: half precision, Ampere or later."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 \
        and torch.cuda.get_device_capability(q.device) >= (8, 0) and _varlen()[0] is not None


def _fused(q, k, v, grid: Grid, window: int | None, bias: torch.Tensor | None) -> torch.Tensor:
    """The rows of one grid by torch's kernel. Right padding needs no mask: causality already hides later tokens, and the padded
    queries are dropped."""
    n_rows, n, n_kv_heads = grid.n_rows, grid.longest, k.shape[1]
    if grid.cells is not None:
        q, k, v = (x.new_zeros(n_rows * n, *x.shape[1:]).index_copy(0, grid.cells, x) for x in (q, k, v))
    q, k, v = (x.unflatten(0, (n_rows, n)).transpose(1, 2) for x in (q, k, v))                      # [rows, H, n, D]
    mask = None if bias is None else bias[:, :n, :n].to(q.dtype)
    if window is not None and n > window:
        mask = _sees(slice(0, n), slice(0, n), window, q.device)
    grouped = q.shape[1] != n_kv_heads
    if grouped and q.is_cuda and (mask is not None or q.dtype == torch.float32 or torch.cuda.get_device_capability(q.device) < (8, 0)):
        # only flash kernels share heads, and here none applies: what torch takes then writes all scores down
        k, v, grouped = k.repeat_interleave(q.shape[1] // n_kv_heads, 1), v.repeat_interleave(q.shape[1] // n_kv_heads, 1), False
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    out = out.transpose(1, 2).flatten(0, 1)
    return out if grid.cells is None else Take.apply(out, grid.cells)


class _ProductAttention(torch.autograd.Function):
    """packed_attention by batched products over the grids, a stretch of queries at a time, whose later keys are not multiplied.

    Backward, with the probabilities P: dV = P^T dO, dS = P * (dP - sum(dP * P)) with dP = dO V^T, dQ = dS K, dK = dS^T Q. Those of short rows are kept
    for it, with heads of 64 and more about a quarter of what a block keeps anyway, at most; of long ones they are computed again. Queries, keys and
    values are kept as products take them.
    """

    @staticmethod
    def forward(ctx, q, k, v, grids, window, bias):
        kept, trains, out = [], any(ctx.needs_input_grad), q.new_empty(q.shape)
        for grid in grids:
            shape = grid.n_rows * k.shape[1], grid.longest, k.shape[-1]
            ends = _ends(grid.longest)
            queries, keys, values = grid.spread(q, ends), grid.spread(k, (0, grid.longest)).view(shape), grid.spread(v, (0, grid.longest)).view(shape)
            found = torch.empty_like(queries)
            kept += [queries, keys, values] if trains else []
            for (seen, here), at, result in zip(_stretches(ends, window), *(_cut(x, ends, shape[0]) for x in (queries, found))):
                p = _probabilities(at, keys[:, seen], grid, seen, here, window, bias)
                if trains and _keeps(grid, q):
                    kept.append(p)
                torch.bmm(p, values[:, seen], out=result)
            grid.collect(found, ends, out)
        ctx.save_for_backward(bias, *kept)
        ctx.grids, ctx.window, ctx.shapes = grids, window, (q.shape, k.shape)
        return out

    @staticmethod
    def backward(ctx, grad):
        (bias, *kept), (shape_q, shape_k), window = ctx.saved_tensors, ctx.shapes, ctx.window
        d_q, d_k, d_v = (grad.new_empty(shape) for shape in (shape_q, shape_k, shape_k))
        kept, scale = iter(kept), shape_q[-1] ** -0.5
        for grid in ctx.grids:
            ends = _ends(grid.longest)
            queries, keys, values = next(kept), next(kept), next(kept)
            stretches = _stretches(ends, window)
            probabilities = [next(kept) if _keeps(grid, queries) else None for _ in stretches]
            outs, found = grid.spread(grad, ends, with_zeros=True), torch.empty_like(queries)
            parts = zip(stretches, probabilities, *(_cut(x, ends, len(keys)) for x in (queries, outs, found)))
            found_k: Any = None
            found_v: Any = None
            for (seen, here), p, at, out, result in reversed(list(parts)):      # the last queries see most keys, without a window all
                at_k, at_v = keys[:, seen], values[:, seen]
                if p is None:
                    p = _probabilities(at, at_k, grid, seen, here, window, bias)
                d_scores = torch.ops.aten._softmax_backward_data(torch.bmm(out, at_v.transpose(1, 2)), p, -1, p.dtype)
                torch.baddbmm(result, d_scores, at_k, beta=0, alpha=scale, out=result)
                found_k = _added(found_k, seen, torch.baddbmm(at_k, d_scores.transpose(1, 2), at, beta=0, alpha=scale), keys)
                found_v = _added(found_v, seen, torch.bmm(p.transpose(1, 2), out), values)
            grid.collect(found, ends, d_q)
            grid.collect(found_k.view(-1, shape_k[-1]), (0, grid.longest), d_k)
            grid.collect(found_v.view(-1, shape_k[-1]), (0, grid.longest), d_v)
        return d_q, d_k, d_v, None, None, None


def _added(total: torch.Tensor | None, seen: slice, part: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient of keys or values x [rows Hkv, n, D] so far, and what comes to those that were seen."""
    if total is None:
        if part.shape == x.shape:
            return part
        total = torch.zeros_like(x)
    total[:, seen] += part
    return total


def _keeps(grid: Grid, q: torch.Tensor) -> bool:
    return grid.longest <= _KEPT_KEYS * q.shape[-1]


def _ends(n: int) -> tuple[int, ...]:
    """Where stretches of about equal length of a row of n tokens begin, and the last one ends; between them at multiples of 32, which a bf16 softmax
    takes half as long for."""
    number = -(-n // _QUERIES)
    unit = min(32, n // number)
    return *(round(i * n / number / unit) * unit for i in range(number)), n


def _stretches(ends: tuple[int, ...], window: int | None, behind: int = 0) -> list[tuple[slice, slice]]:
    """(keys, queries) of each stretch: the keys that any of its queries sees. behind: tokens before the first query."""
    return [(slice(0 if window is None else max(0, behind + start - window + 1), behind + stop), slice(behind + start, behind + stop))
            for start, stop in itertools.pairwise(ends)]


def _cut(spread: torch.Tensor, ends: tuple[int, ...], n: int) -> list[torch.Tensor]:
    """The stretches of spread queries: [n, heads that share keys x positions, D] each, n = rows x kv heads."""
    per_position = len(spread) // ends[-1]
    return [part.view(n, -1, spread.shape[-1]) for part in spread.split([per_position * (stop - start) for start, stop in itertools.pairwise(ends)])]


def _probabilities(q, k, grid: Grid, seen: slice, here: slice, window: int | None, bias: torch.Tensor | None) -> torch.Tensor:
    """[rows Hkv, G m, keys] from q [rows Hkv, G m, D] and k [rows Hkv, keys, D]: the stretch `here` of a row's queries on its keys `seen`."""
    n = here.stop - here.start
    scores = torch.baddbmm(grid.mask(seen, here, window, q.shape[1] // n, q.dtype), q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    if bias is not None:
        scores.view(grid.n_rows, -1, n, k.shape[1]).add_(bias[:, here, seen].to(q.dtype))                # [rows, H, m, keys]
    return scores.softmax(-1)
