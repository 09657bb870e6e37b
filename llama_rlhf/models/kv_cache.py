"""Preallocated key/value cache: slots x heads x positions, one pair of tensors per layer. Nothing grows, nothing is copied."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class KVCache:
    """Keys and values of up to n_slots rows of up to max_len tokens each.

    The caller says which rows the next forward is about, then runs it:
        begin_prefill(slots, lengths)   rows from position 0, packed, any lengths
        begin_decode(lengths)           one token for each of slots 0..B-1, at position lengths[b]
    Slots in use are kept at the front (see `move`), so decoding reads a view and never gathers.
    stretch: [n_slots], set by models whose rotary base was chosen at prefill; it stays with the row.
    """

    def __init__(self, n_layers: int, n_slots: int, n_heads: int, max_len: int, head_dim: int, *, dtype, device):
        shape = (n_slots, n_heads, max_len, head_dim)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.n_slots, self.max_len = n_slots, max_len
        self.decoding = False
        self.stretch: torch.Tensor | None = None

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.k, *self.v))

    def begin_prefill(self, slots: list[int], lengths: list[int]) -> None:
        if max(lengths) > self.max_len:
            raise ValueError(f"a prompt of {max(lengths)} tokens does not fit the cache of {self.max_len} positions")
        self.decoding, self.slots, self._spans, start = False, slots, [], 0
        for slot, n in zip(slots, lengths):
            self._spans.append((slot, start, n))
            start += n

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v: [T, H, D] of the packed rows given to begin_prefill."""
        for slot, start, n in self._spans:
            self.k[layer][slot, :, :n] = k[start:start + n].transpose(0, 1)
            self.v[layer][slot, :, :n] = v[start:start + n].transpose(0, 1)

    def begin_decode(self, lengths: torch.Tensor, longest: int) -> None:
        """lengths: [B] tokens already cached in slots 0..B-1; longest: their maximum, known to the host."""
        if longest >= self.max_len:
            raise ValueError(f"the cache of {self.max_len} positions is full")
        self.decoding = True
        self._batch, self._span = len(lengths), min(self.max_len, (longest + 32) // 32 * 32)
        self._row, self._at = torch.arange(self._batch, device=lengths.device), lengths
        self._masks: dict[int | None, torch.Tensor] = {}

    def _mask(self, window: int | None, slopes: torch.Tensor | None, n_kv_heads: int) -> torch.Tensor:
        """What this step's queries see, made once per step: bool [B, 1, 1, span]; with ALiBi its biases [B, Hkv, H/Hkv, span]."""
        if window not in self._masks:
            key = torch.arange(self._span, device=self._at.device)
            mask = key <= self._at[:, None]
            if window is not None:
                mask &= self._at[:, None] - key < window
            mask = mask[:, None, None]
            if slopes is not None:
                bias = (slopes[:, None] * key).to(self.k[0].dtype).unflatten(0, (n_kv_heads, -1))
                mask = torch.where(mask, bias, -torch.inf)
            self._masks[window] = mask
        return self._masks[window]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None,
               slopes: torch.Tensor | None = None) -> torch.Tensor:
        """Store this step's k, v ([B, Hkv, D]) and attend to everything cached. q: [B, H, D] -> [B, H, D].

        window: of this layer.  slopes: [H] ALiBi slopes of the query heads.
        """
        cache_k, cache_v = self.k[layer], self.v[layer]
        cache_k[self._row, :, self._at] = k
        cache_v[self._row, :, self._at] = v
        # the queries of one kv head form its "sequence": grouped attention without repeating keys
        grouped = q.unflatten(1, (k.shape[1], -1))                           # [B, Hkv, H/Hkv, D]
        out = F.scaled_dot_product_attention(grouped, cache_k[:self._batch, :, :self._span],
                                             cache_v[:self._batch, :, :self._span], attn_mask=self._mask(window, slopes, k.shape[1]))
        return out.flatten(1, 2)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for cache in (*self.k, *self.v):
            cache[target, :, :length] = cache[source, :, :length]
        if self.stretch is not None:
            self.stretch[target] = self.stretch[source]
