"""Choosing the next token from hidden states, the vocabulary spread over ranks: every rank returns the same tokens.

Greedy: the arg-max of the ranks' arg-maxes. Sampling: one uniform number per row, keyed by (seed, request, sample, position),
inverts the cumulative distribution; so a sample depends neither on its batch nor on its slot, and no noise of vocabulary size
is drawn. Only sums per rank travel, and the few largest logits of each for top-k and top-p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from llama_rlhf.parallel import groups
from llama_rlhf.parallel.layers import product
from llama_rlhf.parallel.regions import all_gather, all_reduce_

LEAST_TEMPERATURE = 1e-4
_CANDIDATES = 256       # tokens that top-p looks at first


@dataclass(frozen=True)
class Sampling:
    """How to choose. temperature 0 is greedy (ties: smallest id); filters are off by default, as reinforcement learning needs, and keep all tokens that tie with the last."""

    temperature: float = 0.0
    top_k: int = 0              # keep the k most likely tokens; 0: all
    top_p: float = 1.0          # keep the smallest set of most likely tokens whose probability reaches top_p
    min_p: float = 0.0          # keep tokens at least min_p times as likely as the most likely one
    seed: int = 0

    def __post_init__(self):
        if not -1 << 63 <= self.seed < 1 << 63:
            raise ValueError(f"--seed {self.seed} must be a number of 64 bits")
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(f"sampling: temperature {self.temperature} and top_k {self.top_k} must be at least 0, "
                             f"top_p {self.top_p} in (0, 1], min_p {self.min_p} in [0, 1]")
        if 0 < self.temperature < LEAST_TEMPERATURE or math.isinf(self.temperature):
            raise ValueError(f"temperature {self.temperature:g}: logits divided by it leave the range of fp32. 0 takes the most likely token, 1 the model's probabilities")


def _mix(x: torch.Tensor) -> torch.Tensor:
    """One round of splitmix64 (Steele et al. 2014, doi:10.1145/2660193.2660195) on int64, wrapping around."""
    def shift(v, n):            # logical right shift
        return (v >> n) & ((1 << (64 - n)) - 1)
    x = x + -7046029254386353131                                # 0x9e3779b97f4a7c15
    x = (x ^ shift(x, 30)) * -4658895280553007687               # 0xbf58476d1ce4e5b9
    x = (x ^ shift(x, 27)) * -7723592293110705685               # 0x94d049bb133111eb
    return x ^ shift(x, 31)


def keyed_uniform(seed: int, request: torch.Tensor, sample: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """float64 in [0, 1) for each row of the int64 keys."""
    x = _mix(torch.full_like(request, seed))
    for key in (request, sample, position):
        x = _mix(x ^ key)
    return ((x >> 11) & ((1 << 53) - 1)).to(torch.float64) / (1 << 53)


def choose(hidden: torch.Tensor, weight: torch.Tensor, vocab_ranges, sampling: Sampling, keys, *,
           banned: tuple[torch.Tensor, list[int]] | None = None, with_logprobs: bool = False):
    """The next token of each row.

    hidden: [B, dim]; weight: [this rank's vocabulary rows, dim], as it is or `held`; vocab_ranges: (start, stop) of every rank.
    keys: (request [B], sample [B], position [B]) int64.  banned: ([B] bool, ids): rows that must not choose these ids (minimum length).
    Returns tokens [B] int64 (-1 on every rank where the logits are not finite), and their log-probabilities [B] fp32 (in what they were drawn from,
    temperature and filters applied; at 1 when greedy) or None.
    """
    logits = product(hidden, weight)
    start, stop = vocab_ranges[groups.tp_rank()]
    if banned is not None:
        rows, ids = banned
        local = [i - start for i in ids if start <= i < stop]
        if local:
            logits[:, local] = logits[:, local].masked_fill(rows[:, None], float("-inf"))
    if sampling.temperature == 0:
        best, token = _largest(logits)
        if groups.tp_size() > 1:
            pairs = all_gather(torch.stack([best.double(), (token + start).double()]))      # [tp, 2, B]; ids are exact in float64
            rank = pairs[:, 0].argmax(0)                            # first rank wins ties: the smallest id; what is not a number wins over all
            best, token = pairs.gather(0, rank.expand(1, 2, -1))[0]
            token = token.long()
        token = token.where(best.isfinite(), -1)
        if not with_logprobs:
            return token, None
    z = logits.float()
    if sampling.temperature:
        z = z.div_(sampling.temperature)
        best = z.amax(-1)
        best = all_reduce_(best.where(~best.isnan(), torch.inf), "max")     # not every reduction lets what is not a number win
    z.sub_(best.float()[:, None])
    p = z.exp()
    if sampling.temperature:
        if sampling.top_k or sampling.top_p < 1 or sampling.min_p:
            p.masked_fill_(z < _threshold(z, p, vocab_ranges, sampling)[:, None], 0)
        token = _invert(p, keyed_uniform(sampling.seed, *keys), start).where(best.isfinite(), -1)
    if not with_logprobs:
        return token, None
    local = token - start
    mine = (local >= 0) & (local < stop - start)
    chosen = z.gather(1, local.clamp(0, stop - start - 1)[:, None])[:, 0].where(mine, 0.0)
    total, chosen = all_reduce_(torch.stack([p.sum(-1), chosen]))
    return token, chosen - total.log()


def _largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits.max(-1), the first place where several are as large. A CPU finds the value in a third of the time that torch's search for its place takes."""
    if logits.is_cuda:
        return logits.max(-1)
    parts = logits.unflatten(1, (math.gcd(logits.shape[1], 32), -1))
    best, part = parts.amax(-1).max(-1)
    return best, part * parts.shape[2] + parts[torch.arange(len(parts)), part].max(-1).indices


def _invert(p: torch.Tensor, u: torch.Tensor, start: int) -> torch.Tensor:
    """Tokens at the point u of the cumulative distribution of p [B, local vocabulary], unnormalised, over all ranks."""
    cumulative = p.cumsum(-1, dtype=torch.float64)
    sums = all_gather(cumulative[:, -1].contiguous())                               # [tp, B]
    before = sums.cumsum(0) - sums
    target = u * sums.sum(0)
    rank = ((target >= before).sum(0) - 1).clamp(min=0)                             # the rank whose part holds the target
    # a rank whose part is empty (all filtered away) repeats its predecessor's boundary: step back to one that holds mass
    for r in range(len(sums) - 1, 0, -1):
        rank = torch.where((rank == r) & (sums[r] == 0), rank - 1, rank)
    inside = target - before.gather(0, rank[None])[0]
    index = torch.searchsorted(cumulative, inside[:, None], right=True)[:, 0]
    # rounding may point past the last token with mass: the first index that reaches the total is that token
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())[:, 0]
    token = torch.minimum(index, last) + start
    return all_reduce_(token.where(rank == groups.tp_rank(), torch.zeros_like(token)))


def _threshold(z: torch.Tensor, p: torch.Tensor, vocab_ranges, sampling: Sampling) -> torch.Tensor:
    """[B]: the least z [B, local vocabulary], maximum 0, that top-k, then top-p of what is left, then min-p keep. p: exp(z)."""
    threshold = z.new_full((z.shape[0],), float("-inf"))
    vocab = max(stop for _, stop in vocab_ranges)
    if 0 < sampling.top_k < vocab:
        threshold = _ordered(z, sampling.top_k, vocab_ranges)[:, sampling.top_k - 1]
    if sampling.top_p < 1:
        kept = p.masked_fill(z < threshold[:, None], 0)
        wanted = sampling.top_p * all_reduce_(kept.sum(-1, dtype=torch.float64))
        rows, n, least = torch.arange(len(z), device=z.device), _CANDIDATES, torch.empty_like(threshold)
        while len(rows):        # those of which more must be sorted: few
            ordered = _ordered(z if len(rows) == len(z) else z[rows], n, vocab_ranges)
            mass = ordered.exp().double()
            number = (mass.cumsum(-1) - mass < wanted[rows, None]).sum(-1).clamp(min=1)
            least[rows] = ordered.gather(1, number[:, None] - 1)[:, 0]
            rows, n = rows[(number == ordered.shape[1]) & (n < vocab)], 16 * n
        threshold = torch.maximum(threshold, least)
    if sampling.min_p:
        threshold = threshold.clamp(min=torch.tensor(sampling.min_p).log().item())
    return threshold


def _ordered(z: torch.Tensor, n: int, vocab_ranges) -> torch.Tensor:
    """The n largest of each row over all ranks, the largest first; -inf behind where there are fewer."""
    of_each = min(n, max(stop - start for start, stop in vocab_ranges))
    mine = z.topk(min(of_each, z.shape[1])).values
    padded = torch.nn.functional.pad(mine, (0, of_each - mine.shape[1]), value=float("-inf"))
    return all_gather(padded).transpose(0, 1).flatten(1).sort(-1, descending=True).values[:, :n]
