"""Key/value cache: slots x heads x positions, one pair of tensors per layer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from llama_rlhf.models.attention import Rows, attention_behind, packed_attention

_GROWTH = 64        # positions


def _words(x: torch.Tensor) -> torch.Tensor:
    """x [N, d] -> [N, words]: the same memory, in words of 16 bytes where they divide it, because index_copy_ on a CPU moves a number at a time."""
    return x.view(torch.complex128) if x.device.type == "cpu" and x.shape[-1] * x.itemsize % 16 == 0 else x


class KVCache:
    """Keys and values of up to n_slots rows of up to max_len tokens each.

    The caller says which rows the next forward is about, then runs it:
        begin_prefill(slots, rows)      rows from position 0, packed, any lengths; or from behind the tokens of `keep_prefix`
        begin_decode(lengths)           one token for each of slots 0..B-1, at position lengths[b]
    Slots in use are kept at the front (see `move`), so decoding reads a view and never gathers.
    All of it is allocated at once. On a GPU nothing is copied. On a CPU the keys of a layer, and its values, stand at the front of their part, with
    only as many positions as the longest row needs, and some: matrix products there want one block without gaps, and take half the time for it,
    and pages that were never written take no memory.
    stretch: [n_slots], set by models whose rotary base was chosen at prefill; it stays with the row.
    """

    def __init__(self, n_layers: int, n_slots: int, n_heads: int, max_len: int, head_dim: int, *, dtype, device):
        self._on_cpu = torch.device(device).type == "cpu"
        self._shape = (n_slots, n_heads, max_len, head_dim)
        size, options = math.prod(self._shape), dict(dtype=dtype, device=device)
        memory = torch.empty(2 * n_layers, size, **options).unbind() if self._on_cpu else [torch.zeros(size, **options) for _ in range(2 * n_layers)]
        self._memory = memory[:n_layers], memory[n_layers:]
        self.n_slots, self.max_len, self.peak_bytes = n_slots, max_len, 0
        self._lay_out(0 if self._on_cpu else max_len)
        self.decoding = False
        self.stretch: torch.Tensor | None = None
        self._prefix: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _lay_out(self, room: int) -> None:
        n_slots, n_heads, _, head_dim = self._shape
        self.k, self.v = ([part[:n_slots * n_heads * room * head_dim].view(n_slots, n_heads, room, head_dim) for part in parts] for parts in self._memory)
        self.peak_bytes = max(self.peak_bytes, self.n_bytes)

    def _make_room(self, n: int) -> None:
        """At least n positions; on a CPU not many more."""
        held = self.k[0].shape[2]
        if self._on_cpu and (n > held or n + 2 * _GROWTH < held):
            room = min(self.max_len, -(-n // _GROWTH) * _GROWTH)
            kept, before = min(held, room), (*self.k, *self.v)
            self._lay_out(room)
            for old, new in zip(before, (*self.k, *self.v)):        # the same memory
                new[:, :, :kept] = old[:, :, :kept].clone()
                new[:, :, kept:] = 0

    @property
    def n_bytes(self) -> int:
        """Of the positions that there are."""
        return sum(t.nbytes for t in (*self.k, *self.v))

    def begin_prefill(self, slots: list[int], rows: Rows) -> None:
        """These rows will be written to these slots; the other slots keep what they have."""
        longest = rows.behind + max(rows.lengths)
        if longest > self.max_len:
            raise ValueError(f"a prompt of {longest} tokens does not fit the cache of {self.max_len} positions")
        self._make_room(max(longest, self.k[0].shape[2]))
        self.decoding, device = False, rows.positions.device
        self.slots = torch.tensor(slots, device=device)
        slot_of_token = self.slots.repeat_interleave(torch.tensor(rows.lengths, device=device), output_size=sum(rows.lengths))
        self._places = self._place(slot_of_token, rows.positions)

    @property
    def has_prefix(self) -> bool:
        return bool(self._prefix)

    def keep_prefix(self, n: int) -> None:
        """What slot 0 has for its first n tokens is what every row to come begins with."""
        self._prefix = [(k[0, :, :n].transpose(0, 1).clone(), v[0, :, :n].transpose(0, 1).clone()) for k, v in zip(self.k, self.v)]     # [n, H, D]

    def prefill(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows, window: int | None, bias: torch.Tensor | None) -> torch.Tensor:
        """Store k, v ([T, Hkv, D]) of the rows given to begin_prefill, and attend inside each of them. q: [T, H, D] -> [T, H, D]."""
        self._store(layer, k, v)
        if not rows.behind:
            return packed_attention(q, k, v, rows, None, window, bias)
        old = self._prefix[layer]
        for cache, x in zip((self.k[layer], self.v[layer]), old):
            cache[self.slots, :, :rows.behind] = x.transpose(0, 1)
        return attention_behind(q, k, v, old, rows, window, bias)

    def begin_decode(self, lengths: torch.Tensor, longest: int) -> None:
        """lengths: [B] tokens already cached in slots 0..B-1; longest: their maximum, known to the host."""
        if longest >= self.max_len:
            raise ValueError(f"the cache of {self.max_len} positions is full")
        self._make_room(longest + 1)
        self.decoding, self._batch, self._at = True, len(lengths), lengths
        self._span = self.k[0].shape[2] if self._on_cpu else min(self.max_len, (longest + 32) // 32 * 32)
        self._places = self._place(torch.arange(len(lengths), device=lengths.device), lengths)
        self._masks: dict[int | None, torch.Tensor] = {}

    def _store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v: [T, Hkv, D] of the tokens that `_places` is about."""
        for cache, x in ((self.k[layer], k), (self.v[layer], v)):
            _words(cache.view(-1, x.shape[2])).index_copy_(0, self._places, _words(x.reshape(-1, x.shape[2])))

    def _place(self, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """slots, positions: [T] -> [T Hkv]: where the heads of these tokens' keys, and values, stand among those of all slots, heads and positions."""
        _, n_heads, room, _ = self.k[0].shape
        return ((slots[:, None] * n_heads + torch.arange(n_heads, device=slots.device)) * room + positions[:, None]).flatten()

    def _mask(self, window: int | None, slopes: torch.Tensor | None, n_kv_heads: int) -> torch.Tensor:
        """What this step's queries see, added to the scores, made once per step: [B, 1, 1, span]; with ALiBi [B, Hkv, H/Hkv, span]."""
        if window not in self._masks:
            key = torch.arange(self._span, device=self._at.device)
            seen = key <= self._at[:, None]
            if window is not None:
                seen &= self._at[:, None] - key < window
            dtype = self.k[0].dtype
            bias = torch.zeros((), dtype=dtype, device=key.device) if slopes is None else \
                (slopes[:, None] * key).to(dtype).unflatten(0, (n_kv_heads, -1))
            mask = torch.where(seen[:, None, None], bias, -torch.inf)
            if self._multiplies(n_kv_heads):
                mask = mask.expand(-1, n_kv_heads, -1, -1).flatten(0, 1)
            self._masks[window] = mask
        return self._masks[window]

    def _multiplies(self, n_kv_heads: int) -> bool:
        """Whether plain batched products are the faster attention: on a CPU, unless there is little to multiply (benchmarks/kernels.py)."""
        return self._on_cpu and (self.k[0].dtype == torch.float32 or self._batch * n_kv_heads * self._span >= 3072)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None,
               slopes: torch.Tensor | None = None) -> torch.Tensor:
        """Store this step's k, v ([B, Hkv, D]) and attend to everything cached. q: [B, H, D] -> [B, H, D].

        window: of this layer.  slopes: [H] ALiBi slopes of the query heads.
        """
        cache_k, cache_v, (_, n_kv_heads, d) = self.k[layer], self.v[layer], k.shape
        self._store(layer, k, v)
        # the queries of one kv head form its "sequence": grouped attention without repeating keys
        grouped, mask = q.unflatten(1, (n_kv_heads, -1)), self._mask(window, slopes, n_kv_heads)     # [B, Hkv, H/Hkv, D]
        cache_k, cache_v = cache_k[:self._batch, :, :self._span], cache_v[:self._batch, :, :self._span]
        if self._multiplies(n_kv_heads):
            scores = torch.baddbmm(mask, grouped.flatten(0, 1), cache_k.flatten(0, 1).transpose(1, 2), alpha=d ** -0.5)
            return torch.bmm(scores.softmax(-1), cache_v.flatten(0, 1)).view(q.shape)
        return F.scaled_dot_product_attention(grouped, cache_k, cache_v, attn_mask=mask).flatten(1, 2)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for cache in (*self.k, *self.v):
            cache[target, :, :length] = cache[source, :, :length]
        if self.stretch is not None:
            self.stretch[target] = self.stretch[source]
