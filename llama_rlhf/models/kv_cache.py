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
    """

    def __init__(self, n_layers: int, n_slots: int, n_heads: int, max_len: int, head_dim: int, *, dtype, device,
                 window: int | None = None):
        shape = (n_slots, n_heads, max_len, head_dim)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.n_slots, self.max_len, self.window = n_slots, max_len, window
        self.decoding = False

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.k, *self.v))

    def begin_prefill(self, slots: list[int], lengths: list[int]) -> None:
        if max(lengths) > self.max_len:
            raise ValueError(f"a prompt of {max(lengths)} tokens does not fit the cache of {self.max_len} positions")
        self.decoding, self._spans, start = False, [], 0
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
        key = torch.arange(self._span, device=lengths.device)
        visible = key <= lengths[:, None]
        if self.window is not None:
            visible &= lengths[:, None] - key < self.window
        self._mask = visible[:, None, None]                                  # [B, 1, 1, span]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store this step's k, v ([B, Hkv, D]) and attend to everything cached. q: [B, H, D] -> [B, H, D]."""
        cache_k, cache_v = self.k[layer], self.v[layer]
        cache_k[self._row, :, self._at] = k
        cache_v[self._row, :, self._at] = v
        # the queries of one kv head form its "sequence": grouped attention without repeating keys
        grouped = q.unflatten(1, (k.shape[1], -1))                           # [B, Hkv, H/Hkv, D]
        out = F.scaled_dot_product_attention(grouped, cache_k[:self._batch, :, :self._span],
                                             cache_v[:self._batch, :, :self._span], attn_mask=self._mask)
        return out.flatten(1, 2)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for cache in (*self.k, *self.v):
            cache[target, :, :length] = cache[source, :, :length]
