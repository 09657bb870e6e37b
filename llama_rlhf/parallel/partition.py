"""Who owns which part of every weight, for any number of ranks: nothing needs to divide.

Weights are cut in units (query heads, kv heads, ffn rows, vocabulary rows). Rank r of n holds the query heads
floor(r*H/n) .. floor((r+1)*H/n) and every kv head those queries read, so a kv head can be held by several ranks; on disk it
belongs to the first of them only. With more ranks than query heads some ranks hold none: they have no part in attention, but in
everything else. All slicing, loading, saving and gradient bookkeeping derives from the ranges below.
"""

from __future__ import annotations

from llama_rlhf.config import ModelConfig

Range = tuple[int, int]     # start, stop


def even_ranges(size: int, n: int) -> tuple[Range, ...]:
    """n contiguous ranges covering 0..size, lengths differing by at most one."""
    return tuple((r * size // n, (r + 1) * size // n) for r in range(n))


class Partition:
    """The cut of one model over n tensor-parallel ranks.

    held[kind][r]: rows (start, stop) of the full dimension in rank r's memory; kinds: q, kv, ffn, vocab, hidden.
    owned[kind][r]: the same without repetition, in order: what rank r writes to its shard and counts in a norm.
    Raises ValueError, naming sizes that work, when a rank would be left without a word of the vocabulary.
    """

    def __init__(self, config: ModelConfig, n: int):
        if n < 1:
            raise ValueError(f"the number of tensor-parallel ranks must be at least 1, not {n}")
        if n > config.vocab_size:
            raise ValueError(f"a vocabulary of {config.vocab_size} cannot be cut for {n} ranks: a rank would have none of it. "
                             f"Use 1 to {config.vocab_size} ranks.")
        self.heads = even_ranges(config.n_heads, n)
        group = config.n_heads // config.n_kv_heads
        first_kv = lambda start, stop: start // group if start < stop else -(-start // group)  # noqa: E731
        self.kv_heads = tuple((first_kv(start, stop), -(-stop // group)) for start, stop in self.heads)
        self.group = group
        owned_kv, done = [], 0
        for _, stop in self.kv_heads:           # a kv head belongs to the first rank that holds it
            owned_kv.append((done, max(done, stop)))
            done = max(done, stop)
        d = config.head_dim
        scale = lambda ranges: tuple((start * d, stop * d) for start, stop in ranges)  # noqa: E731
        self.held = {"q": scale(self.heads), "kv": scale(self.kv_heads), "ffn": even_ranges(config.ffn_dim, n),
                     "vocab": even_ranges(config.vocab_size, n), "hidden": even_ranges(config.dim, n)}
        self.owned = {**self.held, "kv": scale(owned_kv)}
        self.full = {kind: ranges[-1][1] for kind, ranges in self.held.items()}
        self.kv_shared = self.held["kv"] != self.owned["kv"]     # some kv head lives on more than one rank

    def kv_of_query(self, rank: int) -> list[int]:
        """For each query head of the rank, the index of its kv head among those the rank holds."""
        (start, stop), first = self.heads[rank], self.kv_heads[rank][0]
        return [h // self.group - first for h in range(start, stop)]
