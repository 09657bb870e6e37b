"""One optimizer step, the same for every objective: accumulation, exact normalisation, clipping, fp32 master weights.

The loss of a step is (sum over its tokens, all micro-batches and replicas) / (their global count), so any split into
micro-batches and ranks gives the same gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from llama_rlhf.losses import prediction_rows, token_logprobs
from llama_rlhf.models.transformer import CausalLM, Rows, Transformer, ValueModel
from llama_rlhf.parallel import groups
from llama_rlhf.parallel.gradients import copy_shared_from_owners, gradient_norm, sum_over_replicas, sync_partial_gradients


def learning_rate(step: int, *, peak: float, total_steps: int, warmup_steps: int, final_ratio: float = 0.0, schedule: str = "cosine") -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up (step+1)/warmup, then cosine or linear to final_ratio * peak."""
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

    bf16 (or fp16) parameters have fp32 master copies, which accumulate the gradients and take the updates: at small learning
    rates an update is below bf16's spacing and would be lost. fp32 parameters are their own masters.
    """

    def __init__(self, model: Transformer, *, lr: float, total_steps: int, warmup_steps: int = 0, final_lr_ratio: float = 0.0,
                 schedule: str = "cosine", weight_decay: float = 0.01, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
                 max_grad_norm: float = 1.0, max_skipped_steps: int = 10, skip_grad_norm_above: float = -1.0):
        if schedule not in ("cosine", "linear", "constant"):
            raise ValueError(f"--lr_schedule {schedule!r}: use cosine, linear or constant")
        groups.keep_freed_memory()
        self.model, self.max_grad_norm, self.max_skipped_steps = model, max_grad_norm, max_skipped_steps
        self.spike, self.last_save = skip_grad_norm_above if skip_grad_norm_above > 0 else math.inf, ""
        self._rate = dict(peak=lr, total_steps=total_steps, warmup_steps=warmup_steps, final_ratio=final_lr_ratio, schedule=schedule)
        self.n_steps = self.skipped_in_a_row = self.skipped_steps = 0
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self._gradients: dict[torch.nn.Parameter, torch.Tensor] = {}        # fp32 sums of low-precision parameters
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.parameters]
        for p, master in zip(self.parameters, self.masters):
            if master is not p:
                p.register_post_accumulate_grad_hook(self._accumulate)
        # decay shrinks matrices only: not biases, norm gains, or the embedding (and the head, which may be the same matrix)
        decays = [p.dim() >= 2 and not name.startswith(("tok_embeddings", "output", "value_head")) for name, p in named]
        self.groups = {"decayed": [m for m, d in zip(self.masters, decays) if d], "not decayed": [m for m, d in zip(self.masters, decays) if not d]}
        self.optimizer = torch.optim.AdamW(
            [{"params": self.groups["decayed"], "weight_decay": weight_decay}, {"params": self.groups["not decayed"], "weight_decay": 0.0}],
            lr=lr, betas=betas, eps=eps, fused=True)

    def _accumulate(self, parameter: torch.nn.Parameter) -> None:
        total = self._gradients.get(parameter)
        if total is None:
            self._gradients[parameter] = parameter.grad.float()
        else:
            total.add_(parameter.grad)
        parameter.grad = None

    def gradient_of(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        return self._gradients.get(parameter, parameter.grad)

    def describe(self) -> str:
        sizes = {name: sum(p.numel() for p in parameters) for name, parameters in self.groups.items()}
        return (f"training {sum(sizes.values()) / 1e6:.2f} M of {sum(p.numel() for p in self.model.parameters()) / 1e6:.2f} M weights on this rank; "
                + ", ".join(f"{n / 1e6:.2f} M {name}" for name, n in sizes.items()))

    def step(self, micro_batches: Sequence, loss_sum: Callable, count: Callable[..., int]) -> StepResult:
        """One optimizer step over this replica's micro-batches. Collective: every rank calls it the same number of times.

        loss_sum(micro_batch) -> differentiable sum of losses over its tokens; count(micro_batch) -> how many those are.
        A non-finite gradient anywhere, or a norm above skip_grad_norm_above, skips the step on all ranks; FloatingPointError after
        max_skipped_steps in a row.
        """
        n_tokens = int(self._sum_over_replicas(sum(count(batch) for batch in micro_batches)))
        total = torch.zeros((), dtype=torch.float64, device=groups.device())
        for batch in micro_batches:
            if count(batch):
                loss = loss_sum(batch)
                (loss / max(1, n_tokens)).backward()
                total += loss.detach()
        for p in self.parameters:       # a replica without data still takes part in the sums
            if self.gradient_of(p) is None:
                self._gradients[p] = torch.zeros_like(p, dtype=torch.float32)
        sum_over_replicas([self.gradient_of(p) for p in self.parameters])
        sync_partial_gradients(self.model, self.gradient_of)
        norm = gradient_norm(self.model, self.gradient_of)
        mean_loss, grad_norm = self._sum_over_replicas(total) / max(1, n_tokens), float(norm)
        lr = learning_rate(self.n_steps, **self._rate)
        usable = math.isfinite(grad_norm) and math.isfinite(mean_loss) and grad_norm <= self.spike
        if usable:
            self._update(lr, min(1.0, self.max_grad_norm / (grad_norm + 1e-6)) if self.max_grad_norm > 0 else 1.0)
            self.n_steps, self.skipped_in_a_row = self.n_steps + 1, 0
        else:
            self.skipped_steps, self.skipped_in_a_row = self.skipped_steps + 1, self.skipped_in_a_row + 1
        self._gradients.clear()
        self.optimizer.zero_grad(set_to_none=True)
        if self.n_steps % 8 == 0:
            groups.release_freed_memory()
        if self.skipped_in_a_row >= self.max_skipped_steps:
            raise FloatingPointError(
                f"{self.skipped_in_a_row} steps in a row were skipped: loss or gradient not finite{f', or its norm above {self.spike:g}' if self.spike < math.inf else ''} "
                f"(last: loss {mean_loss}, gradient norm {grad_norm}). Lower --lr, use --dtype fp32, or look at the data. "
                f"{f'The last good checkpoint is {self.last_save}' if self.last_save else 'Nothing has been saved yet'}.")
        return StepResult(mean_loss, n_tokens, grad_norm, lr, not usable)

    def _update(self, lr: float, clip: float) -> None:
        gradients = [self.gradient_of(p) for p in self.parameters]
        if clip < 1.0:
            torch._foreach_mul_(gradients, clip)
        for master, gradient in zip(self.masters, gradients):
            master.grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if groups.tp_size() > 1:
            masters = dict(zip(self.parameters, self.masters))
            with torch.no_grad():
                copy_shared_from_owners(self.model, masters.get)
        copies = [(p, master) for p, master in zip(self.parameters, self.masters) if p is not master]
        if copies:
            with torch.no_grad():
                torch._foreach_copy_([p for p, _ in copies], [master for _, master in copies])
                for _, master in copies:
                    master.grad = None

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """What the next step depends on besides the weights: this rank's masters and moments by parameter name, and the counters."""
        state = {"counters": torch.tensor([self.n_steps, self.skipped_steps, self.skipped_in_a_row])}
        for name, p, master in zip(self.names, self.parameters, self.masters):
            state |= {f"{name}.{key}": value for key, value in self.optimizer.state.get(master, {}).items()}
            if master is not p:
                state[f"{name}.master"] = master.detach()
        return state

    def load_state_tensors(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state_tensors` of a run with the same parameters on this rank. ValueError when they differ."""
        expected = {f"{name}.{key}": master.shape for name, p, master in zip(self.names, self.parameters, self.masters)
                    for key in ("exp_avg", "exp_avg_sq", *(("master",) if master is not p else ()))}
        counters = state["counters"].tolist()
        found = {key: value.shape for key, value in state.items() if key in expected}
        if counters[0] and found != expected:
            raise ValueError("the saved optimizer state belongs to other parameters, another dtype or another number of ranks. Resume with "
                             "the settings the run was started with, or start a new run from its weights.")
        self.n_steps, self.skipped_steps, self.skipped_in_a_row = counters
        for name, p, master in zip(self.names, self.parameters, self.masters):
            moments = {key: state[f"{name}.{key}"].to(master.device) for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in state}
            if moments:
                self.optimizer.state[master] = moments
            if master is not p and f"{name}.master" in state:
                with torch.no_grad():
                    master.copy_(state[f"{name}.master"])

    def move_state(self, device: torch.device) -> None:
        """Master copies and moments to another device, between steps (see roles.Roles.using)."""
        waits = device.type == "cpu"         # a copy to the host that does not block may be read before it has arrived
        for p, master in zip(self.parameters, self.masters):
            if master is not p:
                master.data = master.data.to(device, non_blocking=not waits)
            for key, value in self.optimizer.state.get(master, {}).items():
                self.optimizer.state[master][key] = value.to(device, non_blocking=not waits)

    @staticmethod
    def _sum_over_replicas(value) -> float:
        if groups.dp_size() == 1:
            return float(value)
        tensor = torch.as_tensor(float(value), dtype=torch.float64, device=groups.device())
        dist.all_reduce(tensor, group=groups.dp_group())
        return float(tensor)


def response_logprobs(model: CausalLM, tokens: list[list[int]], prompt_lengths: list[int], **options):
    """log p of every response token of rows of prompt + response, packed. Returns [N] fp32 (and entropy, on request).

    options: see losses.token_logprobs (temperature, with_entropy).
    """
    lengths, device = [len(row) for row in tokens], groups.device()
    flat = torch.tensor([t for row in tokens for t in row], device=device)
    states, targets = (index.to(device) for index in prediction_rows(lengths, prompt_lengths))
    hidden = model(flat, Rows.packed(lengths, device))
    return token_logprobs(hidden[states], model.head_weight, flat[targets], vocab_start=model.vocab_start, **options)


def response_values(model: ValueModel, tokens: list[list[int]], prompt_lengths: list[int], *, after: bool = False) -> torch.Tensor:
    """Values of the states in which each response token was chosen, packed: [N] fp32. after=True: of the states after each token.

    The former are a critic's V_t; the latter a verifier's opinion of the solution so far, the last of each row its score.
    """
    lengths, device = [len(row) for row in tokens], groups.device()
    states, after_states = prediction_rows(lengths, prompt_lengths)
    hidden = model(torch.tensor([t for row in tokens for t in row], device=device), Rows.packed(lengths, device))
    return model.values(hidden[(after_states if after else states).to(device)])


def final_scores(model: ValueModel, tokens: list[list[int]]) -> torch.Tensor:
    """The value of the state after the last token of each row: a reward model's score. Returns [rows] fp32."""
    lengths, device = [len(row) for row in tokens], groups.device()
    hidden = model(torch.tensor([t for row in tokens for t in row], device=device), Rows.packed(lengths, device))
    return model.values(hidden[torch.tensor(lengths, device=device).cumsum(0) - 1])
