"""Text from a CausalLM: packed prefill, cached decoding, continuous batching.

A row is one sample of one prompt. Rows occupy cache slots; a finished row leaves at once and the next prompt takes its place,
so the batch stays full until the prompts run out. Several samples of a prompt prefill once and share the copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from llama_rlhf.models.transformer import CausalLM, Rows
from llama_rlhf.parallel import groups
from llama_rlhf.parallel.layers import held, weights_held
from llama_rlhf.sampling import Sampling, choose

_PREFILL_TOKENS = 8192      # prompts prefill in packs of about this many tokens


@dataclass
class Completion:
    """One generated response. tokens: the ids, the end token included when it was generated; finished: it was."""

    prompt: int
    sample: int
    tokens: list[int]
    finished: bool
    logprobs: list[float] | None = None


@dataclass
class Statistics:
    """What a call of `generate` did; rates are over its wall time."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    decode_steps: int = 0
    decode_rows: int = 0            # rows computed, over all decode steps: every one gives a token of a response
    slot_steps: int = 0             # slots x steps: what a static batch of the same size would have computed
    cache_bytes: int = 0
    seconds: float = 0.0
    prefill_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0


@dataclass
class _Row:
    prompt: int
    sample: int
    length: int                     # of the prompt
    limit: int                      # new tokens at most
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@torch.inference_mode()
def generate(model: CausalLM, prompts: list[list[int]], *, eos_ids: tuple[int, ...], max_new_tokens: int = 256,
             min_new_tokens: int = 0, max_batch_size: int = 64, max_seq_len: int | None = None, n_samples: int = 1,
             sampling: Sampling = Sampling(), with_logprobs: bool = False, stop: Callable[[list[int]], bool] | None = None,
             on_step: Callable[[int, int], None] | None = None, on_token: Callable[[int, int, int], None] | None = None,
             statistics: Statistics | None = None, request_ids: list[int] | None = None) -> list[list[Completion]]:
    """Complete every prompt n_samples times. The same call on every tensor-parallel rank returns the same result.

    prompts: token ids, beginning-of-text included where the tokenizer has one.
    max_seq_len: prompt + response at most (default: the model's own); rows that reach it end unfinished.
    stop: tells from a row's new tokens whether it must end there (stop strings).
    request_ids: the prompts' keys for the random numbers (default: their places in the list); replicas that share a list of
          prompts pass the places in the whole list, so that no two draw the same numbers.
    on_step(finished rows, all rows) after each step; on_token(prompt, sample, id) for each token as it comes.
    Returns [prompt][sample] Completion. ValueError for an empty prompt or one that leaves no room for a token.
    """
    max_seq_len = min(max_seq_len or model.config.max_seq_len, model.config.max_seq_len)
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < max_seq_len:
            raise ValueError(f"prompt {i + 1} has {len(prompt)} tokens; 1 to {max_seq_len - 1} fit max_seq_len={max_seq_len} "
                             "with room for a token. Shorten or drop it, or raise --max_seq_len.")
    results: list[list[Completion | None]] = [[None] * n_samples for _ in prompts]
    if not prompts or max_new_tokens < 1:
        return [[Completion(i, s, [], False) for s in range(n_samples)] for i in range(len(prompts))]
    groups.keep_freed_memory()
    stats = statistics or Statistics()
    began = time.perf_counter()
    device, total = groups.device(), len(prompts) * n_samples
    longest = min(max_seq_len, max(map(len, prompts)) + max_new_tokens)
    n_slots = min(max_batch_size, total)
    cache = model.new_cache(n_slots, longest)
    vocab, weight = model.partition.held["vocab"], held(model.head_weight, n_slots)
    # long prompts first: the batch drains evenly at the end
    waiting = [(i, s) for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])) for s in range(n_samples)][::-1]
    keys = list(range(len(prompts))) if request_ids is None else list(request_ids)
    active: list[_Row] = []         # active[b] lives in slot b
    eos = torch.tensor(sorted(eos_ids), device=device)
    lengths = torch.zeros(n_slots, dtype=torch.long, device=device)     # tokens cached in each slot
    current = torch.zeros(n_slots, dtype=torch.long, device=device)     # the token each row decodes next
    identity = torch.zeros(2, n_slots, dtype=torch.long, device=device)  # prompt and sample of each slot

    def pick(hidden, rows: list[_Row], ids, positions):
        young = [len(row.tokens) < min_new_tokens for row in rows] if min_new_tokens else ()
        banned = (torch.tensor(young, device=device), eos.tolist()) if any(young) else None
        return choose(hidden, weight, vocab, sampling, (ids[0], ids[1], positions), banned=banned, with_logprobs=with_logprobs)

    def prefill() -> None:
        """Fill the free slots: one packed forward over the new prompts, copies for further samples of the same prompt."""
        new: list[_Row] = []
        packed, n_tokens = [], 0
        while waiting and len(active) + len(new) < n_slots:
            i, s = waiting[-1]
            fresh = not new or new[-1].prompt != i
            if fresh and n_tokens and n_tokens + len(prompts[i]) > _PREFILL_TOKENS:
                break
            waiting.pop()
            if fresh:
                packed.append((len(active) + len(new), prompts[i]))
                n_tokens += len(prompts[i])
            new.append(_Row(i, s, len(prompts[i]), min(max_new_tokens, max_seq_len - len(prompts[i]))))
        sizes = [len(prompt) for _, prompt in packed]
        cache.begin_prefill([slot for slot, _ in packed], sizes)
        hidden = model(torch.tensor([t for _, prompt in packed for t in prompt], device=device), Rows.packed(sizes, device), cache)
        hidden = hidden[torch.tensor(sizes).cumsum(0) - 1]
        first = len(active)
        source, owner = [], {}
        for n, (slot, _) in enumerate(packed):
            owner[new[slot - first].prompt] = (n, slot)
        for b, row in enumerate(new):
            n, slot = owner[row.prompt]
            source.append(n)
            if first + b != slot:
                cache.move(slot, first + b, row.length)
        here = slice(first, first + len(new))
        identity[:, here] = torch.tensor([[keys[row.prompt] for row in new], [row.sample for row in new]])
        lengths[here] = torch.tensor([row.length for row in new])
        token, logprob = pick(hidden[torch.tensor(source)], new, identity[:, here], lengths[here])
        active.extend(new)
        stats.prompt_tokens += n_tokens
        accept(first, token, logprob)

    def accept(first: int, token: torch.Tensor, logprob: torch.Tensor | None) -> None:
        """Append one token to each of the rows from slot `first` on; let the finished ones leave."""
        current[first:first + len(token)] = token
        ended = torch.isin(token, eos).tolist()
        ids, values = token.tolist(), None if logprob is None else logprob.tolist()
        done = []
        for b, row in enumerate(active[first:first + len(ids)]):
            row.tokens.append(ids[b])
            if values is not None:
                row.logprobs.append(values[b])
            if on_token is not None:
                on_token(row.prompt, row.sample, ids[b])
            if ended[b] or len(row.tokens) >= row.limit or (stop is not None and stop(row.tokens)):
                results[row.prompt][row.sample] = Completion(row.prompt, row.sample, row.tokens, ended[b], row.logprobs if with_logprobs else None)
                done.append(first + b)
        stats.new_tokens += len(ids)
        for slot in reversed(done):             # the last row moves into the hole, so that rows stay at the front
            last = len(active) - 1
            if slot != last:
                active[slot] = active[last]
                cache.move(last, slot, active[slot].length + len(active[slot].tokens) - 1)
                for state in (lengths, current, identity):
                    state[..., slot] = state[..., last]
            active.pop()

    try:
        with weights_held(model, n_slots):
            while waiting or active:
                if waiting and (not active or n_slots - len(active) >= max(1, n_slots // 16)):
                    start = time.perf_counter()
                    prefill()
                    stats.prefill_seconds += time.perf_counter() - start
                    continue
                n = len(active)
                cache.begin_decode(lengths[:n], max(row.length + len(row.tokens) for row in active) - 1)
                hidden = model(current[:n], Rows([1] * n, lengths[:n]), cache)
                lengths[:n] += 1
                token, logprob = pick(hidden, active, identity[:, :n], lengths[:n])
                stats.decode_steps += 1
                stats.decode_rows += n
                stats.slot_steps += n_slots
                accept(0, token, logprob)
                if on_step is not None:
                    on_step(total - len(waiting) - len(active), total)
    finally:
        groups.release_freed_memory()
    stats.cache_bytes = max(stats.cache_bytes, cache.peak_bytes)
    stats.seconds += time.perf_counter() - began
    return results
