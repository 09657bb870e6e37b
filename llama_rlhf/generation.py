"""Text from a CausalLM: packed prefill, cached decoding, continuous batching.

A row is one sample of one prompt. Rows occupy cache slots; a finished row leaves at once and the next prompt takes its place,
so the batch stays full until the prompts run out. Several samples of a prompt prefill once and share the copy, and so does what all
prompts begin with: a chat template, a system prompt, worked examples.
Where memory does not suffice for the batch that was asked for, it is halved, on all ranks alike; the tokens stay the same.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from llama_rlhf.decode_graphs import DecodeGraphs, records_steps
from llama_rlhf.models.kv_cache import KVCache
from llama_rlhf.models.transformer import CausalLM, Rows
from llama_rlhf.parallel import groups
from llama_rlhf.parallel.layers import held, weights_held
from llama_rlhf.parallel.regions import all_reduce_
from llama_rlhf.sampling import Sampling, choose

_PREFILL_TOKENS = 8192      # prompts prefill in packs of about this many tokens
_PREFIX_SAVES = 256         # tokens that a common beginning must save to be worth a pass of its own


@dataclass
class Completion:
    """One generated response.

    tokens: the ids, the end token included when it was generated.
    finished: it ended by itself, at an end token or where `stop` said so, not by its length.
    """

    prompt: int
    sample: int
    tokens: list[int]
    finished: bool
    logprobs: list[float] | None = None


@dataclass
class Statistics:
    """What a call of `generate` did; rates are over its wall time."""

    prompt_tokens: int = 0          # that were computed: what all prompts begin with counts once
    new_tokens: int = 0
    decode_rows: int = 0            # rows computed, over all decode steps: every one gives a token of a response
    slot_steps: int = 0             # slots x steps: what a static batch of the same size would have computed
    slots: int = 0                  # rows at once
    cache_bytes: int = 0
    seconds: float = 0.0

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


def generate(model: CausalLM, prompts: list[list[int]], *, on_step: Callable[[int, int], None] | None = None, **options) -> list[list[Completion]]:
    """Complete every prompt n_samples times. The same call on every tensor-parallel rank returns the same result.

    prompts: token ids, beginning-of-text included where the tokenizer has one.
    on_step(finished rows, all rows) after each step.
    options: see `steps`, eos_ids is one that must be given.
    Returns [prompt][sample] Completion. ValueError for an empty prompt or one that leaves no room for a token.
    """
    n_samples = options.get("n_samples", 1)
    results: list[list] = [[None] * n_samples for _ in prompts]
    done = 0
    for _, completed in steps(model, prompts, **options):
        for completion in completed:
            results[completion.prompt][completion.sample] = completion
        done += len(completed)
        if on_step is not None:
            on_step(done, len(prompts) * n_samples)
    return results


@torch.inference_mode()
def steps(model: CausalLM, prompts: list[list[int]], *, eos_ids: tuple[int, ...], max_new_tokens: int = 256, min_new_tokens: int = 0,
          max_batch_size: int = 64, max_cache_gb: float = -1.0, max_seq_len: int | None = None, n_samples: int = 1, sampling: Sampling = Sampling(),
          with_logprobs: bool = False, stop: Callable[[list[int]], bool] | None = None, statistics: Statistics | None = None,
          request_ids: list[int] | None = None, cuda_graphs: str = "auto") -> Iterator[tuple[list[tuple[int, int, int, int]], list[Completion]]]:
    """`generate`, step by step: yields the new tokens of each, as (prompt, sample, place in the response, id), and the rows it completed.

    max_batch_size: rows at once.  max_cache_gb: 10^9 bytes of keys and values on a rank; -1: as much as there is. Fewer rows then run at once.
    max_seq_len: prompt + response at most (default: the model's own); rows that reach it end unfinished.
    stop: tells from a row's new tokens whether it must end there (stop strings).
    request_ids: the prompts' keys for the random numbers (default: their places in the list); replicas that share a list of
          prompts pass the places in the whole list, so that no two draw the same numbers.
    cuda_graphs: whether decode steps are recorded and replayed, see decode_graphs.records_steps.
    The weights must not change before the last step, or until the iterator is closed.
    """
    for name, value, least in (("max_batch_size", max_batch_size, 1), ("n_samples", n_samples, 1), ("max_seq_len", 1 if max_seq_len is None else max_seq_len, 1),
                               ("max_new_tokens", max_new_tokens, 0)):
        if value < least:
            raise ValueError(f"{name} {value} must be at least {least}")
    max_seq_len = min(max_seq_len or model.config.max_seq_len, model.config.max_seq_len)
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < max_seq_len:
            raise ValueError(f"prompt {i + 1} has {len(prompt)} tokens; 1 to {max_seq_len - 1} fit max_seq_len={max_seq_len} "
                             "with room for a token. Shorten or drop it, or raise --max_seq_len.")
    if not prompts or not max_new_tokens:
        yield [], [Completion(i, s, [], False) for i in range(len(prompts)) for s in range(n_samples)]
        return
    records = records_steps(cuda_graphs, model.config)
    groups.keep_freed_memory()
    stats = statistics or Statistics()
    began, longest = time.perf_counter(), min(max_seq_len, max(map(len, prompts)) + max_new_tokens)
    # long prompts first: the batch drains evenly at the end
    waiting = [(i, s) for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])) for s in range(n_samples)][::-1]
    n_slots = min(max_batch_size, len(waiting))
    make = lambda n: _Batch(model, prompts, range(len(prompts)) if request_ids is None else request_ids, n, longest, eos_ids=eos_ids, sampling=sampling,  # noqa: E731
                            min_new_tokens=min_new_tokens, limits=(max_new_tokens, max_seq_len), with_logprobs=with_logprobs, stop=stop, statistics=stats, records=records)
    batch: _Batch | None = None
    try:
        with weights_held(model, n_slots):
            while waiting or batch is not None and batch.active:
                if batch is None:
                    batch = _largest(make, n_slots, _slots_in(model, n_slots, longest, max_cache_gb))
                    n_slots = stats.slots = batch.n_slots
                try:
                    if waiting and (not batch.active or n_slots - len(batch.active) >= max(1, n_slots // 16)):
                        new, completed = batch.prefill(waiting)
                    else:
                        new, completed = batch.decode()
                except RuntimeError as error:
                    # other ranks may be past this point, or wait for this one: only a rank that is alone can go back
                    if not _is_out_of_memory(error) or groups.tp_size() > 1 or n_slots == 1:
                        raise
                    waiting += sorted(((row.prompt, row.sample) for row in batch.active), reverse=True)     # each begins anew
                    print(f"rank {groups.rank()}: out of memory with {n_slots} rows at once; going on with {n_slots // 2}", flush=True)
                    batch, n_slots = None, n_slots // 2
                if batch is None:       # here, where the error no longer holds the batch's tensors
                    _free()
                    continue
                stats.cache_bytes = max(stats.cache_bytes, batch.cache.peak_bytes)
                yield new, completed
    finally:
        groups.release_freed_memory()
        stats.seconds += time.perf_counter() - began


def _slots_in(model: CausalLM, n_slots: int, longest: int, max_cache_gb: float) -> int:
    """Of n_slots, those whose keys and values fit max_cache_gb and, on a CPU, where nothing refuses memory in time, what is free."""
    per_slot = model.cache_bytes(1, longest)
    if groups.tp_size() > 1:        # one may hold more heads
        per_slot = int(_max(per_slot))
    allowed = max_cache_gb * 1e9 if max_cache_gb > 0 else math.inf
    if allowed < per_slot:
        raise ValueError(f"--max_cache_gb {max_cache_gb}: one row of {longest} tokens needs {per_slot / 1e9:.2g}. Raise it, or lower --max_new_tokens.")
    if groups.device().type == "cpu":
        allowed = min(allowed, 0.9 * groups.free_memory() - _pass_bytes(model, n_slots, longest))
    return max(1, int(min(n_slots, allowed / max(1, per_slot))))


def _pass_bytes(model: CausalLM, n_slots: int, longest: int) -> int:
    """What a prefill has in memory at once beside weights and cache: the tokens of a pack in one layer, and the head's logits."""
    config, tp = model.config, groups.tp_size()
    inside = max((config.n_heads + 2 * config.n_kv_heads) * config.head_dim, config.ffn_dim * max(1, config.n_active_experts)) // tp
    tokens = min(_PREFILL_TOKENS + longest, n_slots * longest)
    each = 28 if groups.device().type == "cpu" else 8       # bytes, measured: freed blocks of a CPU do not fit what comes next
    return tokens * (6 * config.dim * model.dtype.itemsize + inside * each) + n_slots * config.vocab_size // tp * 20


def _largest(make: Callable[[int], _Batch], asked: int, n: int) -> _Batch:
    """Collective. A batch of n slots on every tensor-parallel rank or, where memory is short on any of them, of half as many, and so on."""
    while True:
        n, batch, error = -int(_max(-n)), None, None
        try:
            batch = make(n)
        except RuntimeError as caught:
            if not _is_out_of_memory(caught):
                raise
            error = str(caught)
        if not _max(batch is None) and batch is not None:
            break
        batch = None
        _free()
        if n == 1:
            raise torch.OutOfMemoryError(f"no memory for a single row{': ' + error if error else ' on another rank'}. Lower --max_new_tokens or --max_seq_len, "
                                         "use more tensor-parallel ranks, or a smaller dtype.")
        n //= 2
    if n < asked:
        groups.log(f"{n} rows at once instead of {asked}: that is what memory or --max_cache_gb allows")
    return batch


def _prefix(model: CausalLM, prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with, the last of each not counted; 0 where it saves little, or a token's key depends on its row's length."""
    first, last = min(prompts), max(prompts)        # as sequences: what these two share, all share
    n = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    n = min(n, min(map(len, prompts)) - 1)
    return n if model.config.ntk_beyond is None and n * (len(prompts) - 1) >= _PREFIX_SAVES else 0


def _max(value: float) -> float:
    """Over the tensor-parallel ranks."""
    return float(all_reduce_(torch.tensor([float(value)], device=groups.device()), "max"))


def _is_out_of_memory(error: Exception) -> bool:
    """As torch's allocator says it, CUDA itself (kernels, graphs), cuBLAS, or a CPU."""
    words = ("CUDA error: out of memory", "CUDA driver error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _free() -> None:
    if groups.device().type == "cuda":
        torch.cuda.empty_cache()


def _step(model: CausalLM, cache: KVCache, current: torch.Tensor, lengths: torch.Tensor, n: int, longest: int) -> torch.Tensor:
    """[n, dim]: the states of the current tokens of slots 0..n-1."""
    cache.begin_decode(lengths[:n], longest)
    return model(current[:n], Rows([1] * n, lengths[:n]), cache)


class _Batch:
    """The rows that are generated at once. active[b] lives in slot b of the cache."""

    def __init__(self, model: CausalLM, prompts, keys, n_slots: int, longest: int, *, eos_ids, sampling: Sampling, min_new_tokens: int,
                 limits: tuple[int, int], with_logprobs: bool, stop, statistics: Statistics, records: bool):
        self.model, self.prompts, self.keys, self.n_slots = model, prompts, keys, n_slots
        self.behind = _prefix(model, prompts)
        self.sampling, self.min_new_tokens, self.limits, self.with_logprobs, self.stop, self.statistics = \
            sampling, min_new_tokens, limits, with_logprobs, stop, statistics
        device = groups.device()
        self.cache = model.new_cache(n_slots, longest)
        self.vocab, self.weight = model.partition.held["vocab"], held(model.head_weight, n_slots)
        self.eos = frozenset(eos_ids)
        self.lengths = torch.zeros(n_slots, dtype=torch.long, device=device)        # tokens cached in each slot
        self.current = torch.zeros(n_slots, dtype=torch.long, device=device)        # the token each row decodes next
        self.identity = torch.zeros(2, n_slots, dtype=torch.long, device=device)    # key and sample of each slot
        self.active: list[_Row] = []
        step = functools.partial(_step, model, self.cache, self.current, self.lengths)      # a method would keep all of this alive until garbage is collected
        self.forward = DecodeGraphs(step, n_slots, longest) if records else step
        if device.type == "cuda":       # now, when all ranks can still agree on less: what passes through a layer and the head
            torch.empty(_pass_bytes(model, n_slots, longest), dtype=torch.uint8, device=device)

    def prefill(self, waiting: list[tuple[int, int]]):
        """Fill the free slots from the end of `waiting`: one packed forward over the new prompts, copies for further samples of one."""
        behind = self.behind
        if behind and not self.cache.has_prefix:
            self._forward([0], [self.prompts[0][:behind]], 0)
            self.cache.keep_prefix(behind)
            self.statistics.prompt_tokens += behind
        new: list[_Row] = []
        packed, n_tokens = [], 0
        taken = len(waiting)
        while taken and len(self.active) + len(new) < self.n_slots:
            i, s = waiting[taken - 1]
            fresh = not new or new[-1].prompt != i
            if fresh and n_tokens and n_tokens + len(self.prompts[i]) - behind > _PREFILL_TOKENS:
                break
            taken -= 1
            if fresh:
                packed.append((len(self.active) + len(new), self.prompts[i][behind:]))
                n_tokens += len(packed[-1][1])
            new.append(_Row(i, s, len(self.prompts[i]), min(self.limits[0], self.limits[1] - len(self.prompts[i]))))
        hidden = self._forward([slot for slot, _ in packed], [prompt for _, prompt in packed], behind)
        first = len(self.active)
        source, owner = [], {}
        for n, (slot, _) in enumerate(packed):
            owner[new[slot - first].prompt] = (n, slot)
        for b, row in enumerate(new):
            n, slot = owner[row.prompt]
            source.append(n)
            if first + b != slot:
                self.cache.move(slot, first + b, row.length)
        here = slice(first, first + len(new))
        self.identity[:, here] = torch.tensor([[self.keys[row.prompt] for row in new], [row.sample for row in new]])
        self.lengths[here] = torch.tensor([row.length for row in new])
        token, logprob = self._pick(hidden[torch.tensor(source)], new, here)
        del waiting[taken:]
        self.active.extend(new)
        self.statistics.prompt_tokens += n_tokens
        return self._accept(first, token, logprob)

    def _forward(self, slots: list[int], tokens: list[list[int]], behind: int) -> torch.Tensor:
        """Rows of these tokens, so many more before them in the cache, to these slots: [rows, dim] the states of their last."""
        rows = Rows.packed([len(row) for row in tokens], groups.device(), behind=behind)
        self.cache.begin_prefill(slots, rows)
        return self.model(torch.tensor([t for row in tokens for t in row], device=groups.device()), rows, self.cache,
                          at=torch.tensor(rows.lengths, device=groups.device()).cumsum(0) - 1)

    def decode(self):
        """One token more for every active row."""
        n = len(self.active)
        hidden = self.forward(n, max(row.length + len(row.tokens) for row in self.active) - 1)
        self.lengths[:n] += 1
        token, logprob = self._pick(hidden, self.active, slice(0, n))
        self.statistics.decode_rows += n
        self.statistics.slot_steps += self.n_slots
        return self._accept(0, token, logprob)

    def _pick(self, hidden, rows: list[_Row], here: slice):
        young = [len(row.tokens) < self.min_new_tokens for row in rows] if self.min_new_tokens else ()
        banned = (torch.tensor(young, device=hidden.device), sorted(self.eos)) if any(young) else None
        return choose(hidden, self.weight, self.vocab, self.sampling, (*self.identity[:, here], self.lengths[here]), banned=banned,
                      with_logprobs=self.with_logprobs)

    def _accept(self, first: int, token: torch.Tensor, logprob: torch.Tensor | None):
        """Append one token to each of the rows from slot `first` on; let the finished ones leave. Returns what `steps` yields."""
        self.current[first:first + len(token)] = token
        ids, values = token.tolist(), None if logprob is None else logprob.tolist()
        if min(ids) < 0:
            row = self.active[first + ids.index(min(ids))]
            raise FloatingPointError(f"the model's logits are not finite numbers (prompt {row.prompt + 1}, response token {len(row.tokens) + 1}): its weights are "
                                     "damaged or have diverged, or are too large for fp16. Try --dtype bf16 or fp32, or an earlier save.")
        new, completed, holes = [], [], []
        for b, row in enumerate(self.active[first:first + len(ids)]):
            new.append((row.prompt, row.sample, len(row.tokens), ids[b]))
            row.tokens.append(ids[b])
            if values is not None:
                row.logprobs.append(values[b])
            finished = ids[b] in self.eos or self.stop is not None and self.stop(row.tokens)
            if finished or len(row.tokens) >= row.limit:
                completed.append(Completion(row.prompt, row.sample, row.tokens, finished, row.logprobs if self.with_logprobs else None))
                holes.append(first + b)
        self.statistics.new_tokens += len(ids)
        for slot in reversed(holes):            # the last row moves into the hole, so that rows stay at the front
            last = len(self.active) - 1
            if slot != last:
                self.active[slot] = self.active[last]
                self.cache.move(last, slot, self.active[slot].length + len(self.active[slot].tokens) - 1)
                for state in (self.lengths, self.current, self.identity):
                    state[..., slot] = state[..., last]
            self.lengths[last] = 0      # what surplus rows of a recorded step write stays inside the cache
            self.active.pop()
        return new, completed
