"""Everything differentiated: tensors in, tensors out. Log-probabilities and losses are fp32 whatever the model's dtype."""

from __future__ import annotations

import torch

from llama_rlhf.parallel.regions import all_reduce_

_CHUNK_BYTES = 16 << 20     # fp32 logits alive at a time, per rank, on a CPU (about its cache); ten times that on a GPU
_MIN_CHUNK = 64             # rows: smaller products run far below the matmul rate


def chunk_rows(vocab_local: int, device: torch.device) -> int:
    return max(_MIN_CHUNK, _CHUNK_BYTES * (10 if device.type == "cuda" else 1) // (4 * max(1, vocab_local)))


class _TokenLogprobs(torch.autograd.Function):
    """log p(target) and, on request, the entropy, from hidden states and this rank's rows of the head.

    With z = h W^T / T over the whole vocabulary: lse = max + log sum exp(z - max), the max and the sum taken over ranks
    (Megatron-LM, arXiv:1909.08053, section 3, and ALGORITHM 1 of its vocabulary-parallel cross entropy).
    dz = g * (onehot - p) + g_H * -p * (z - lse + H). The logits exist one chunk of rows at a time, in both directions.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_start, temperature, with_entropy):
        n, step = hidden.shape[0], chunk_rows(weight.shape[0], hidden.device)
        local = targets - vocab_start
        mine = (local >= 0) & (local < weight.shape[0])
        local = local.clamp(0, weight.shape[0] - 1)
        top, total, chosen, weighted = hidden.new_zeros(4, n, dtype=torch.float32)
        for i in range(0, n, step):
            c = slice(i, i + step)
            z = (hidden[c] @ weight.t()).float().div_(temperature)
            chosen[c] = z.gather(1, local[c, None])[:, 0].where(mine[c], 0.0)
            top[c] = z.amax(-1)
            e = (z - top[c, None]).exp_()
            total[c] = e.sum(-1)
            if with_entropy:
                weighted[c] = e.mul_(z).sum(-1)
        high = all_reduce_(top.clone(), "max")
        rescale = (top - high).exp()
        sums = all_reduce_(torch.stack([total * rescale, chosen, weighted * rescale]))
        lse = high + sums[0].log()
        logprobs = sums[1] - lse
        entropy = lse - sums[2] / sums[0] if with_entropy else None
        ctx.save_for_backward(hidden, weight, local, mine, lse, entropy)
        ctx.temperature, ctx.step = temperature, step
        return logprobs, entropy

    @staticmethod
    def backward(ctx, g, g_entropy):
        hidden, weight, local, mine, lse, entropy = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for i in range(0, hidden.shape[0], ctx.step):
            c = slice(i, i + ctx.step)
            logp = (hidden[c] @ weight.t()).float().div_(ctx.temperature).sub_(lse[c, None])
            p = logp.exp()
            if entropy is not None and g_entropy is not None:
                dz = logp.add_(entropy[c, None]).mul_(p).mul_(-g_entropy[c, None])
                dz.addcmul_(p, -g[c, None].expand_as(p))
            else:
                dz = p.mul_(-g[c, None])
            dz.scatter_add_(1, local[c, None], (g[c] * mine[c])[:, None])
            dz = dz.div_(ctx.temperature).to(hidden.dtype)
            if d_hidden is not None:
                torch.matmul(dz, weight, out=d_hidden[c])
            if d_weight is not None:
                d_weight += dz.t() @ hidden[c]
        if d_hidden is not None:
            all_reduce_(d_hidden)           # each rank saw only its own vocabulary rows
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None


def token_logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, vocab_start: int = 0,
                   temperature: float = 1.0, with_entropy: bool = False):
    """log p(targets[i]) under softmax(hidden[i] W^T / temperature).  The one place where the shift by one happens is the
    caller's choice of rows: hidden[i] must be the state that PREDICTS targets[i] (see `prediction_rows`).

    hidden: [N, dim]; weight: [this rank's vocabulary rows, dim]; targets: [N] global ids; vocab_start: this rank's first id.
    Returns logprobs [N] fp32, and entropy [N] in nats when with_entropy.
    """
    logprobs, entropy = _TokenLogprobs.apply(hidden, weight, targets, vocab_start, temperature, with_entropy)
    return (logprobs, entropy) if with_entropy else logprobs


def prediction_rows(lengths: list[int], prompt_lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """For packed rows of prompt + response: the packed index that predicts each response token, and that of the token itself.

    Row of length L with prompt P starting at offset o: states o+P-1 .. o+L-2 predict tokens o+P .. o+L-1.
    Returns two [N] long tensors on the CPU.  A prompt of length 0 has no state before its first token: ValueError.
    """
    if any(p < 1 for p in prompt_lengths):
        raise ValueError("a row needs at least one prompt token: nothing precedes, hence predicts, the first token")
    targets, offset = [], 0
    for length, prompt in zip(lengths, prompt_lengths):
        targets.append(torch.arange(offset + prompt, offset + length))
        offset += length
    tokens = torch.cat(targets) if targets else torch.zeros(0, dtype=torch.long)
    return tokens - 1, tokens


