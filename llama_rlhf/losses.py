"""Everything differentiated: tensors in, tensors out. Log-probabilities and losses are fp32 whatever the model's dtype."""

from __future__ import annotations

import itertools

import torch

from llama_rlhf.models.attention import run_together
from llama_rlhf.parallel.layers import product_back
from llama_rlhf.parallel.regions import all_reduce_

_KEPT_BYTES = 256 << 20     # logits, all of a micro-batch's, that are kept for backward
_CHUNK_BYTES = 128 << 20    # logits alive at a time where there are more, per rank
_BLOCK_BYTES = 2 << 20      # of them in fp32 at a time on a CPU: about its cache. On a GPU a block is a chunk


def _slices(n: int, rows: int) -> list[slice]:
    return [slice(i, min(n, i + rows)) for i in range(0, n, max(1, rows))]


_row_blocks = _slices       # a plan looks at the first ones only (see footprint)


class _TokenLogprobs(torch.autograd.Function):
    """log p(target) and, on request, the entropy, from hidden states and this rank's rows of the head.

    With z = h W^T / T over the whole vocabulary: lse = max + log sum exp(z - max), the max and the sum taken over ranks
    (Megatron-LM, arXiv:1909.08053, section 3, and ALGORITHM 1 of its vocabulary-parallel cross entropy).
    dz = g * (onehot - p) + g_H * -p * (z - lse + H). A few logits are kept for backward. More exist one
    chunk at a time: forward cuts them by rows, and backward by columns: each slice of the vocabulary then has its whole weight gradient at once.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_start, temperature, with_entropy, keeps):
        ctx.set_materialize_grads(False)        # an entropy that is only looked at costs nothing in backward
        n, vocab = hidden.shape[0], weight.shape[0]
        row = hidden.element_size() * max(1, vocab)
        chunks = _slices(n, n if keeps and n * row <= _KEPT_BYTES else _CHUNK_BYTES // row)
        block = n if hidden.is_cuda else _BLOCK_BYTES // (4 * max(1, vocab))
        local = targets - vocab_start
        mine = (local >= 0) & (local < vocab)
        local = local.clamp(0, vocab - 1)
        top, total, chosen, weighted = hidden.new_zeros(4, n, dtype=torch.float32)
        held = hidden.new_empty(max((c.stop - c.start for c in chunks), default=0), vocab)      # one block for all chunks
        for c in chunks:
            logits = torch.mm(hidden[c], weight.t(), out=held[:c.stop - c.start])
            for part in _row_blocks(len(logits), block):
                b = slice(c.start + part.start, c.start + part.stop)
                z = logits[part].float()
                z = z / temperature if temperature != 1 else z
                chosen[b] = z.gather(1, local[b, None])[:, 0].where(mine[b], 0.0)
                top[b] = z.amax(-1)
                e = (z - top[b, None]).exp_()
                total[b] = e.sum(-1)
                if with_entropy:
                    weighted[b] = e.mul_(z).sum(-1)
        high = all_reduce_(top.clone(), "max")
        rescale = (top - high).exp()
        sums = all_reduce_(torch.stack([total * rescale, chosen, weighted * rescale]))
        lse = high + sums[0].log()
        logprobs = sums[1] - lse
        entropy = lse - sums[2] / sums[0] if with_entropy else None
        ctx.save_for_backward(hidden, weight, local, mine, lse, entropy)
        ctx.temperature, ctx.block = temperature, block
        ctx.logits = logits if len(chunks) == 1 else None
        return logprobs, entropy

    @staticmethod
    def backward(ctx, g, g_entropy):
        hidden, weight, local, mine, lse, entropy = ctx.saved_tensors
        g = torch.zeros_like(lse) if g is None else g
        kept, ctx.logits = ctx.logits, None     # overwritten below
        (n, _), vocab = hidden.shape, len(weight)
        width = max(64, _CHUNK_BYTES // (hidden.element_size() * max(1, n)) // 64 * 64)      # odd widths halve a GPU's rate
        columns = [slice(0, vocab)] if kept is not None else _slices(vocab, width)
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] and len(columns) > 1 else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        held = None if kept is not None else hidden.new_empty(n * (columns[0].stop - columns[0].start))
        for v in columns:
            logits = kept if held is None else torch.mm(hidden, weight[v].t(), out=held[:n * (v.stop - v.start)].view(n, v.stop - v.start))
            for b in _row_blocks(n, max(1, ctx.block * vocab // max(1, logits.shape[1]))):
                logp = torch.sub(logits[b] if ctx.temperature == 1 else logits[b].float() / ctx.temperature, lse[b, None])      # fp32, as lse
                if entropy is not None and g_entropy is not None:
                    p = logp.exp()
                    dz = logp.add_(entropy[b, None]).mul_(p).mul_(-g_entropy[b, None])
                    dz.addcmul_(p, -g[b, None].expand_as(p))
                else:
                    dz = logp.exp_().mul_(-g[b, None])
                here = mine[b] & (local[b] >= v.start) & (local[b] < v.stop)
                dz.scatter_add_(1, (local[b] - v.start).clamp(0, logits.shape[1] - 1)[:, None], (g[b] * here)[:, None])
                logits[b] = dz if ctx.temperature == 1 else dz.div_(ctx.temperature)
            if d_hidden is not None:
                d_hidden += product_back(logits, weight[v])
            elif ctx.needs_input_grad[0]:
                d_hidden = product_back(logits, weight)
            if d_weight is not None:
                torch.mm(logits.t(), hidden, out=d_weight[v])
        if d_hidden is not None:
            d_hidden = all_reduce_(d_hidden.to(hidden.dtype))       # each rank saw only its own vocabulary rows
        return d_hidden, d_weight, None, None, None, None, None


def token_logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, vocab_start: int = 0,
                   temperature: float = 1.0, with_entropy: bool = False):
    """log p(targets[i]) under softmax(hidden[i] W^T / temperature).  The one place where the shift by one happens is the
    caller's choice of rows: hidden[i] must be the state that PREDICTS targets[i] (see `prediction_rows`).

    hidden: [N, dim]; weight: [this rank's vocabulary rows, dim]; targets: [N] global ids; vocab_start: this rank's first id.
    Returns logprobs [N] fp32, and entropy [N] in nats when with_entropy.
    """
    logprobs, entropy = _TokenLogprobs.apply(hidden, weight, targets, vocab_start, temperature, with_entropy, torch.is_grad_enabled())
    return (logprobs, entropy) if with_entropy else logprobs


def prediction_rows(lengths: list[int], prompt_lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """For packed rows of prompt + response: the packed index that predicts each response token, and that of the token itself.

    Row of length L with prompt P starting at offset o: states o+P-1 .. o+L-2 predict tokens o+P .. o+L-1.
    Returns two [N] long tensors on the CPU.  A prompt of length 0 has no state before its first token: ValueError.
    """
    if any(p < 1 for p in prompt_lengths):
        raise ValueError("a row needs at least one prompt token: nothing precedes, hence predicts, the first token")
    begins = itertools.accumulate(lengths, initial=0)
    tokens = run_together([begin + prompt for begin, prompt in zip(begins, prompt_lengths)], [length - prompt for length, prompt in zip(lengths, prompt_lengths)])
    return tokens - 1, tokens


# ---- reinforcement learning and reward models: elementwise on tensors of one shape, packed [N] (response tokens only) in practice.
# fp32, or fp64 for fp64 input. A step's loss is sum(weights * losses over all micro-batches and ranks) / sum(counts): `aggregation_weights`.

_MAX_LOG_RATIO = 20.0       # exp(20) = 5e8 is far outside any clip range, and its square still fits fp32


def _fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: str = "k1") -> torch.Tensor:
    """Estimates of KL(policy || reference) in nats at tokens the policy sampled; differentiable (Schulman 2020, "Approximating KL divergence").

    With d = logprobs - ref_logprobs: k1 d, may be negative; k2 d^2/2, whose gradient as a loss is the KL's own on-policy;
    k3 exp(-d) + d - 1, never negative. k3 is held at d = -20, without gradient below.
    """
    d = _fp32(logprobs) - _fp32(ref_logprobs)
    if kind == "k3":
        d = d.clamp(min=-_MAX_LOG_RATIO)
        return torch.expm1(-d) + d      # exp(-d) - 1 + d would lose the digits of small d, and with them the sign
    if kind not in ("k1", "k2"):
        raise ValueError(f"KL estimator {kind!r}: use k1, k2 or k3")
    return d if kind == "k1" else 0.5 * d * d


def policy_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, *, clip_low: float = 0.2,
                clip_high: float = 0.2, dual_clip: float | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped loss per token, max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) with r = exp(logprobs - old_logprobs)
    (Schulman et al. 2017, arXiv:1707.06347, eq. 7). Clip ranges of infinity: plain importance weighting.

    dual_clip: where A < 0, the loss is at most -dual_clip * A (Ye et al. 2020, arXiv:1912.09729, eq. 5).
    Also returns detached statistics per token: ratio; approx_kl (k3 form) and old_approx_kl (k1 form) of KL(old || new); and
    bools: clipped (the clipped branch was taken), outside (r left the clip range), lower_clipped (dual_clip took over).
    """
    advantages, log_ratio = _fp32(advantages), _fp32(logprobs) - _fp32(old_logprobs)
    held = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = held.exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    clipped = -advantages * bounded > -advantages * ratio       # strictly: inside the range both are the same number
    loss = -advantages * bounded.where(clipped, ratio)
    lower_clipped = torch.zeros_like(clipped)
    if dual_clip is not None:
        cap = -dual_clip * advantages
        lower_clipped = (advantages < 0) & (loss > cap)
        loss = cap.where(lower_clipped, loss)
    statistics = {"ratio": ratio, "approx_kl": torch.expm1(held) - held, "old_approx_kl": -log_ratio, "clipped": clipped,
                  "outside": (ratio < 1 - clip_low) | (ratio > 1 + clip_high), "lower_clipped": lower_clipped}
    return loss, {name: statistic.detach() for name, statistic in statistics.items()}


def value_loss(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *,
               clip: float | None = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token max((V - R)^2, (V_clip - R)^2) / 2, V_clip being V held within clip of old_values; clip None: no second term.

    Also returns a bool tensor: where V_clip's error was the larger, so that the token has no gradient.
    """
    values, old_values, returns = _fp32(values), _fp32(old_values), _fp32(returns)
    squares = (values - returns).square()
    if clip is None:
        return 0.5 * squares, torch.zeros_like(squares, dtype=torch.bool)
    # clamping V itself, not V - old: inside the range V_clip is then V to the last bit, and rounding counts nothing as clipped
    held = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    clipped = held > squares
    return 0.5 * held.where(clipped, squares), clipped.detach()


def aggregation_weights(lengths: list[int], aggregation: str, max_new_tokens: int = 0) -> tuple[torch.Tensor, int]:
    """How the tokens of packed responses of these lengths weigh in a step's loss, and what they add to its denominator.

    token-mean: 1, count tokens. The others count sequences (an empty one does not count): seq-mean-token-mean 1/length,
    seq-mean-token-sum 1, fixed-length 1/max_new_tokens. Returns weights [sum(lengths)] fp32 on the CPU, count.
    """
    if aggregation == "fixed-length" and max_new_tokens < max([1, *lengths]):
        raise ValueError(f"fixed-length aggregation divides by max_new_tokens={max_new_tokens}; the longest response has {max(lengths, default=0)}")
    n_tokens = torch.tensor(lengths, dtype=torch.long)
    ones = torch.ones(len(lengths))
    weights = {"token-mean": ones, "seq-mean-token-mean": 1.0 / n_tokens.clamp(min=1), "seq-mean-token-sum": ones,
               "fixed-length": ones / max(1, max_new_tokens)}
    if aggregation not in weights:
        raise ValueError(f"aggregation {aggregation!r}: use {', '.join(weights)}")
    return weights[aggregation].repeat_interleave(n_tokens), sum(lengths) if aggregation == "token-mean" else sum(n > 0 for n in lengths)


def pairwise_loss(chosen: torch.Tensor, rejected: torch.Tensor, *, margin: float | torch.Tensor = 0.0, centre: float = 0.0) -> torch.Tensor:
    """Bradley-Terry per pair, -log sigmoid(chosen - rejected - margin) (Ouyang et al. 2022, arXiv:2203.02155, eq. 1), as a softplus.

    margin: a number or one per pair; centre: weight of (chosen + rejected)^2, which keeps the scores around 0.
    """
    chosen, rejected = _fp32(chosen), _fp32(rejected)
    return torch.nn.functional.softplus(-(chosen - rejected - margin)) + centre * (chosen + rejected).square()


def verifier_loss(predictions: torch.Tensor, labels: torch.Tensor, kind: str = "mse") -> torch.Tensor:
    """Per token, against its solution's label 0 or 1 (Cobbe et al. 2021, arXiv:2110.14168): mse on the prediction, or bce on it as a logit."""
    predictions, labels = _fp32(predictions), labels.to(_fp32(predictions).dtype)
    if kind == "mse":
        return (predictions - labels).square()
    if kind == "bce":
        return torch.nn.functional.binary_cross_entropy_with_logits(predictions, labels, reduction="none")
    raise ValueError(f"verifier loss {kind!r}: use mse or bce")
