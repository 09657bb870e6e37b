"""One optimizer step, the same for every objective: accumulation, exact normalisation, clipping, fp32 updates of low-precision weights.

The loss of a step is (sum over its tokens, all micro-batches and replicas) / (their global count), so any split into
micro-batches and ranks gives the same gradient.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from llama_rlhf.losses import prediction_rows, token_logprobs
from llama_rlhf.models.transformer import CausalLM, Rows, Transformer, ValueModel, recompute_period
from llama_rlhf.parallel import groups
from llama_rlhf.parallel.gradients import ReplicaSum, copy_from_replicas, copy_shared_from_owners, gradient_norm, sync_partial_gradients
from llama_rlhf.parallel.layers import walk

_BUCKET = 16 << 20              # weights whose fp32 values exist at a time, where they are put together for the update
_SCALE_GROWS_AFTER = 2000       # steps without an overflow (as torch's GradScaler)


def learning_rate(step: int, *, peak: float, total_steps: int, warmup_steps: int, final_ratio: float = 0.0, schedule: str = "cosine") -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up (step+1)/warmup, then cosine or linear to final_ratio * peak, or constant."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule]
    return peak * (final_ratio + (1 - final_ratio) * shape)


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the step's tokens, nats; n_tokens: global; grad_norm: before clipping; skipped: not finite, or a spike; nothing changed."""

    loss: float
    n_tokens: int
    grad_norm: float
    lr: float
    skipped: bool


class Trainer:
    """AdamW with warm-up and decay on a model's trainable parameters.

    At small learning rates an update is below bf16's spacing and would be lost. precision says where the rest of a bf16 weight is:
    "master": in an fp32 copy (fp16 too).  "kahan": in 16 more bits, what rounding lost (compensated as in Kahan's sum, to fp32's last
    place), 2 bytes less per weight; the fp32 values exist for a bucket at a time. fp32 parameters are their own masters. Gradients of
    low-precision parameters are accumulated in fp32. In an fp16 model the loss is scaled; an overflow skips the step on all ranks and
    halves the scale, which doubles again later.
    zero: 1 gives each data-parallel replica the optimizer state of a share of the parameters (Rajbhandari et al. 2020, arXiv:1910.02054,
    stage 1); it updates those and sends them to the others. The weights are the same, to the bit.
    """

    def __init__(self, model: Transformer, *, lr: float, total_steps: int, warmup_steps: int = 0, final_lr_ratio: float = 0.0,
                 schedule: str = "cosine", weight_decay: float = 0.01, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
                 max_grad_norm: float = 1.0, max_skipped_steps: int = 10, precision: str = "master", zero: int = 0, skip_grad_norm_above: float = -1.0):
        if schedule not in ("cosine", "linear", "constant"):
            raise ValueError(f"--lr_schedule {schedule!r}: use cosine, linear or constant")
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        check_options(precision, zero, {p.dtype for _, p in named})
        groups.keep_freed_memory()
        self.model: Any = model         # a CausalLM or a ValueModel, whichever the loss is of
        self.max_grad_norm, self.max_skipped_steps = max_grad_norm, max_skipped_steps
        self.spike, self.last_save = skip_grad_norm_above if skip_grad_norm_above > 0 else math.inf, ""
        self._rate: dict = dict(peak=lr, total_steps=total_steps, warmup_steps=warmup_steps, final_ratio=final_lr_ratio, schedule=schedule)
        self.n_steps = self.skipped_in_a_row = self.skipped_steps = self._steps_at_scale = 0
        self.loss_scale = 2.0 ** 16 if any(p.dtype == torch.float16 for p in model.parameters()) else None
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self._gradients: dict[torch.nn.Parameter, torch.Tensor] = {}        # fp32 sums of low-precision parameters
        self._replica_sum = ReplicaSum(self.parameters, self.gradient_of) if groups.dp_size() > 1 else None
        self._is_last = False           # of the step's micro-batches: gradients are then complete
        for p in self.parameters:
            if p.dtype != torch.float32 or self._replica_sum:
                p.register_post_accumulate_grad_hook(self._accumulate)
        self.sharded = zero == 1 and groups.dp_size() > 1
        self._owners = _shares(model, self.names) if self.sharded else [groups.dp_rank()] * len(named)
        # name, parameter and fp32 values of what this replica updates; with compensation the values are empty but during the update
        self.own: list[tuple[str, torch.nn.Parameter, torch.Tensor]] = []
        self._rest: dict[torch.nn.Parameter, torch.Tensor] = {}             # int16: fp32 bits of the value minus those of the parameter
        for (name, p), owner in zip(named, self._owners):
            if owner != groups.dp_rank():
                continue
            if p.dtype == torch.float32:
                master: torch.Tensor = p
            elif precision == "master":
                master = p.detach().float().requires_grad_()
            else:
                master, self._rest[p] = torch.nn.Parameter(torch.empty(0, device=p.device)), torch.zeros_like(p, dtype=torch.int16)
            self.own.append((name, p, master))
        # decay shrinks matrices only: not biases, norm gains, or the embedding (and the head, which may be the same matrix)
        decays = {name: p.dim() >= 2 and not name.startswith(("tok_embeddings", "output", "value_head")) for name, p in named}
        self.sizes = {kind: sum(p.numel() for name, p in named if decays[name] == d) for kind, d in (("decayed", True), ("not decayed", False))}
        self.optimizer = torch.optim.AdamW(
            [{"params": [master for name, _, master in self.own if decays[name] == d], "weight_decay": weight_decay * d} for d in (True, False)],
            lr=lr, betas=betas, eps=eps, fused=True)
        # as AdamW would at its first step; now, so that what stays lies together, below what comes and goes
        for _, p, master in self.own:
            self.optimizer.state[master] = {"step": torch.zeros((), device=p.device), **{key: torch.zeros_like(p, dtype=torch.float32) for key in ("exp_avg", "exp_avg_sq")}}

    def _accumulate(self, parameter: torch.nn.Parameter) -> None:
        """Backward has found a gradient."""
        if parameter.dtype != torch.float32:
            assert parameter.grad is not None
            total = self._gradients.get(parameter)
            if total is None:
                self._gradients[parameter] = parameter.grad.float()
            else:
                total.add_(parameter.grad)
            parameter.grad = None
        if self._is_last and self._replica_sum:
            self._replica_sum.ready(parameter)

    def gradient_of(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        return self._gradients.get(parameter, parameter.grad)

    def describe(self) -> str:
        return (f"training {sum(self.sizes.values()) / 1e6:.2f} M of {sum(p.numel() for p in self.model.parameters()) / 1e6:.2f} M weights on this rank; "
                + ", ".join(f"{n / 1e6:.2f} M {name}" for name, n in self.sizes.items())
                + (f"; optimizer state of {sum(p.numel() for _, p, _ in self.own) / 1e6:.2f} M" if self.sharded else ""))

    @property
    def state_bytes(self) -> int:
        """Of moments, masters and compensation on this rank."""
        return sum(_state_bytes(p, "kahan" if p in self._rest else "master") for _, p, _ in self.own)

    def counters(self) -> dict:
        """For the log: steps skipped so far and, in an fp16 model, the loss scale."""
        return {"skipped": self.skipped_steps, **({"loss_scale": self.loss_scale} if self.loss_scale else {})}

    def step(self, micro_batches: Sequence, loss_sum: Callable, count: Callable[..., int]) -> StepResult:
        """One optimizer step over this replica's micro-batches. Collective: every rank calls it the same number of times.

        loss_sum(micro_batch) -> differentiable sum of losses over its tokens; count(micro_batch) -> how many those are.
        A non-finite gradient anywhere, or a norm above skip_grad_norm_above, skips the step on all ranks; FloatingPointError after
        max_skipped_steps in a row (overflows of an fp16 model count at the smallest scale of the loss only).
        """
        scale = self.loss_scale or 1.0
        n_tokens = int(self._sum_over_replicas(sum(count(batch) for batch in micro_batches)))
        total = torch.zeros((), dtype=torch.float64, device=groups.device())
        filled = [batch for batch in micro_batches if count(batch)]
        for i, batch in enumerate(filled):
            self._is_last = i + 1 == len(filled)
            loss = loss_sum(batch)
            (loss * scale / max(1, n_tokens)).backward()
            total += loss.detach()
        self._is_last = False
        for p in self.parameters:       # a replica without data still takes part in the sums
            if self.gradient_of(p) is None:
                self._gradients[p] = torch.zeros_like(p, dtype=torch.float32)
        if self._replica_sum:
            self._replica_sum.finish()
        sync_partial_gradients(self.model, self.gradient_of)
        mean_loss, grad_norm = self._sum_over_replicas(total) / max(1, n_tokens), float(gradient_norm(self.model, self.gradient_of)) / scale
        lr = learning_rate(self.n_steps, **self._rate)
        finite = math.isfinite(grad_norm) and math.isfinite(mean_loss)
        usable = finite and grad_norm <= self.spike
        if usable:
            self._update(lr, (min(1.0, self.max_grad_norm / (grad_norm + 1e-6)) if self.max_grad_norm > 0 else 1.0) / scale)
            self.n_steps, self.skipped_in_a_row = self.n_steps + 1, 0
        else:
            self.skipped_steps, self.skipped_in_a_row = self.skipped_steps + 1, self.skipped_in_a_row + 1
        if self.loss_scale:
            self._steps_at_scale = self._steps_at_scale + 1 if finite else 0
            if not finite:
                self.loss_scale = max(1.0, scale / 2)
                groups.log(f"overflow: step skipped, loss scale {scale:g} -> {self.loss_scale:g}")
            elif self._steps_at_scale % _SCALE_GROWS_AFTER == 0:
                self.loss_scale = scale * 2
        self._gradients.clear()
        for p in self.parameters:
            p.grad = None
        recomputes = getattr(self.model, "recomputes", False)
        if self.n_steps % 8 == 0 or recomputes:      # who recomputes has little memory: fetching the pages again costs a percent
            groups.release_freed_memory(always=recomputes)
        if self.skipped_in_a_row >= self.max_skipped_steps and (scale == 1.0 or finite):
            raise FloatingPointError(
                f"{self.skipped_in_a_row} steps in a row were skipped: loss or gradient not finite{f', or its norm above {self.spike:g}' if self.spike < math.inf else ''} "
                f"(last: loss {mean_loss:g}, gradient norm {grad_norm:g}). Lower --lr (PPO: --actor_lr or --critic_lr), use --dtype fp32, or look at the data. "
                f"{f'The last good checkpoint is {self.last_save}' if self.last_save else 'Nothing has been saved yet'}.")
        return StepResult(mean_loss, n_tokens, grad_norm, lr, not usable)

    def _update(self, lr: float, factor: float) -> None:
        """One AdamW step on the gradients times factor."""
        gradients = {p: self.gradient_of(p) for _, p, _ in self.own}
        if factor != 1.0 and (own := [grad for grad in gradients.values() if grad is not None]):      # a replica may own nothing
            torch._foreach_mul_(own, factor)
        for p in gradients:
            p.grad = None       # of an fp32 parameter, which is its own master: it must be stepped with its bucket only
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for bucket in self._buckets():
            for _, p, master in bucket:
                if p in self._rest:
                    master.data = _joined(p, self._rest[p])
                master.grad = gradients[p]
            self.optimizer.step()           # of those that have a gradient: the bucket
            with torch.no_grad():
                for _, p, master in bucket:
                    if p in self._rest:
                        _split(master, p, self._rest[p])
                        master.data = master.data.new_empty(0)
                    elif master is not p:
                        p.copy_(master)
                    master.grad = None
        with torch.no_grad():
            if groups.tp_size() > 1:
                # the holders' kv heads and what lies beyond their bits; where a master is a tensor of its own the parameter follows from it
                masters = {p: master for _, p, master in self.own if p not in self._rest}
                copy_shared_from_owners(self.model, masters.get)
                copy_shared_from_owners(self.model, {p: p for p in self.parameters if masters.get(p) is not p}.get)
                if self._rest:
                    copy_shared_from_owners(self.model, self._rest.get)
            if self.sharded:
                copy_from_replicas(self.parameters, self._owners)

    def _buckets(self) -> list[list]:
        """`own` in parts whose fp32 values may exist together; all of it where they always do."""
        if not self._rest:
            return [self.own]
        buckets, filled = [[]], 0
        for entry in self.own:
            if buckets[-1] and filled + entry[1].numel() > _BUCKET:
                buckets.append([])
                filled = 0
            buckets[-1].append(entry)
            filled += entry[1].numel()
        return buckets

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """What the next step depends on besides the weights: masters (or compensation) and moments by parameter name, of this rank or, with
        `sharded`, of its share, and the counters."""
        return {"counters": torch.tensor([self.n_steps, self.skipped_steps, self.skipped_in_a_row, self._steps_at_scale]),
                "loss_scale": torch.tensor(self.loss_scale or 1.0)} | self._tensors_by_name()

    def _tensors_by_name(self) -> dict[str, torch.Tensor]:
        found = {}
        for name, p, master in self.own:
            found |= {f"{name}.{key}": value for key, value in self.optimizer.state[master].items()}
            if p in self._rest:
                found[f"{name}.rest"] = self._rest[p]
            elif master is not p:
                found[f"{name}.master"] = master.detach()
        return found

    def load_state_tensors(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state_tensors` of a run with the same parameters on this rank. ValueError when they differ."""
        mine, counters = self._tensors_by_name(), state["counters"].tolist()
        shapes = lambda tensors: {key: x.shape for key, x in tensors.items() if key not in ("counters", "loss_scale") and not key.endswith(".step")}  # noqa: E731
        found, expected = shapes(state), shapes(mine)
        if counters[0] and found != expected:
            raise ValueError("the saved optimizer state belongs to other parameters, another dtype or precision, or another number of ranks. Resume "
                             "with the settings the run was started with, or start a new run from its weights.")
        self.n_steps, self.skipped_steps, self.skipped_in_a_row, self._steps_at_scale = (*counters, 0)[:4]
        self.loss_scale = float(state["loss_scale"]) if self.loss_scale else None
        for key, target in mine.items() if found else ():
            target.copy_(state[key])

    def move_state(self, device: torch.device) -> None:
        """Masters, compensation and moments to another device, between steps (see roles.Roles.using)."""
        waits = device.type == "cpu"         # a copy to the host that does not block may be read before it has arrived
        for _, p, master in self.own:
            if p in self._rest:
                self._rest[p] = self._rest[p].to(device, non_blocking=not waits)
            if master is not p:
                master.data = master.data.to(device, non_blocking=not waits)
            for key, value in self.optimizer.state[master].items():
                self.optimizer.state[master][key] = value.to(device, non_blocking=not waits)

    @staticmethod
    def _sum_over_replicas(value) -> float:
        if groups.dp_size() == 1:
            return float(value)
        tensor = torch.as_tensor(float(value), dtype=torch.float64, device=groups.device())
        dist.all_reduce(tensor, group=groups.dp_group())
        return float(tensor)


def check_options(precision: str, zero: int, dtypes: set[torch.dtype], recompute: str = "none", compiles: bool = False) -> None:
    """ValueError for options that do not exist or do not go with trained parameters of these dtypes."""
    recompute_period(recompute)
    if precision not in ("master", "kahan"):
        raise ValueError(f"--optimizer_precision {precision!r}: use master or kahan")
    if precision == "kahan" and torch.float16 in dtypes:
        raise ValueError("--optimizer_precision kahan extends bf16 to fp32, which fp16 is no part of: use master, or --dtype bf16")
    if compiles and groups.device().type != "cuda":
        raise ValueError("--compile is for CUDA: on a CPU it has not been seen to pay. Leave it out")
    if zero not in (0, 1):
        raise ValueError(f"--zero {zero}: use 0, or 1 to share the optimizer state among the data-parallel replicas")


def _shares(model, names: list[str]) -> list[int]:
    """The replica that updates each parameter: the largest left goes to the one with the least. By full sizes: alike on all tensor-parallel ranks."""
    size = {name: sum(torch.Size(piece.shape).numel() for _, piece in pieces) for name, _, _, _, pieces in walk(model)}
    loads, owner = [0] * groups.dp_size(), {}
    for name in sorted(names, key=lambda name: -size[name]):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += size[name]
    return [owner[name] for name in names]


def _state_bytes(p: torch.Tensor, precision: str) -> int:
    return (8 + (0 if p.dtype == torch.float32 else {"master": 4, "kahan": 2}[precision])) * p.numel()


def largest_share(model, precision: str) -> int:
    """Bytes of optimizer state on the replica that gets most of it with `zero`."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    loads: Counter = Counter()
    for (_, p), owner in zip(named, _shares(model, [name for name, _ in named])):
        loads[owner] += _state_bytes(p, precision)
    return max(loads.values())


def _joined(p: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """The fp32 values whose bits are those of bf16 p, then 16 zeros, plus rest."""
    return p.detach().view(torch.int16).to(torch.int32).bitwise_left_shift_(16).add_(rest).view(torch.float32)


def _split(value: torch.Tensor, p: torch.Tensor, rest: torch.Tensor) -> None:
    """p = value rounded to bf16, and what is left, so that _joined gives value again (of exact ties that round down, its neighbour)."""
    p.copy_(value)
    bits = p.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    rest.copy_(torch.sub(value.detach().view(torch.int32), bits, out=bits).clamp_(max=32767))


def response_logprobs(model: CausalLM, tokens: list[list[int]], prompt_lengths: list[int], **options):
    """log p of every response token of rows of prompt + response, packed. Returns [N] fp32 (and entropy, on request).

    options: see losses.token_logprobs (temperature, with_entropy).
    """
    lengths, device = [len(row) for row in tokens], groups.device()
    flat = torch.tensor([t for row in tokens for t in row], device=device)
    states, targets = (index.to(device) for index in prediction_rows(lengths, prompt_lengths))
    hidden = model(flat, Rows.packed(lengths, device, prompt_lengths), at=states)
    return token_logprobs(hidden, model.head_weight, flat[targets], vocab_start=model.vocab_start, **options)


def response_values(model: ValueModel, tokens: list[list[int]], prompt_lengths: list[int], *, where: str = "before") -> torch.Tensor:
    """Values of states of rows of prompt + response, packed, fp32: those in which each response token was chosen ("before"), those after each
    token ("after"), or both, one more than tokens in each row ("both").

    The former are a critic's V_t; the latter a verifier's opinion of the solution so far, the last of each row its score.
    """
    lengths, device = [len(row) for row in tokens], groups.device()
    before, after = prediction_rows(lengths, prompt_lengths)
    at = torch.cat([before, torch.tensor(lengths).cumsum(0) - 1]).sort().values if where == "both" else {"before": before, "after": after}[where]
    return model.values(model(torch.tensor([t for row in tokens for t in row], device=device), Rows.packed(lengths, device), at=at.to(device)))


def final_scores(model: ValueModel, tokens: list[list[int]]) -> torch.Tensor:
    """The value of the state after the last token of each row: a reward model's score. Returns [rows] fp32."""
    lengths, device = [len(row) for row in tokens], groups.device()
    last = torch.tensor(lengths, device=device).cumsum(0) - 1
    return model.values(model(torch.tensor([t for row in tokens for t in row], device=device), Rows.packed(lengths, device), at=last))
