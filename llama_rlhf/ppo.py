"""The update of PPO and its relatives: one rollout buffer in, optimizer steps of critic and actor out, and what happened in them.

Advantages and returns are fixed before the first step (advantages.make_advantages), so critic and actor do not wait for each
other: the critic takes all its steps, then the actor. One minibatch is one optimizer step; its rows, drawn from the same
permutation on every rank, are dealt to the data-parallel replicas by length, so the steps do not depend on how many there are.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.distributed as dist

from llama_rlhf.advantages import Advantages, Algorithm, explained_variance
from llama_rlhf.data import deal, pack
from llama_rlhf.losses import aggregation_weights, kl_estimate, policy_loss, value_loss
from llama_rlhf.parallel import groups
from llama_rlhf.rollout import Rollout
from llama_rlhf.trainer import Trainer, response_logprobs, response_values


@dataclass(frozen=True)
class UpdateSettings:
    """epochs: passes over the buffer; minibatch_size: responses per optimizer step, all replicas together; max_batch_size and
    max_batch_tokens: of a micro-batch on one replica.  target_kl: no more actor steps on this buffer once approx_kl exceeds 1.5 times
    it; None: never.  The rest: see losses."""

    epochs: int = 2
    minibatch_size: int = 24
    max_batch_size: int = 6
    max_batch_tokens: int | None = None
    temperature: float = 1.0
    max_new_tokens: int = 256
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    entropy_coef: float = 0.0
    kl_coef: float = 0.0            # of the KL in the loss, where the algorithm has it there
    target_kl: float | None = None
    seed: int = 0


def minibatches(n: int, settings: UpdateSettings, iteration: int, epoch: int) -> list[list[int]]:
    """Row numbers of each optimizer step of one pass; the last one may be smaller. The same on every rank."""
    order = list(range(n))
    random.Random(f"{settings.seed}/{iteration}/{epoch}").shuffle(order)
    return [order[i:i + settings.minibatch_size] for i in range(0, n, settings.minibatch_size)]


def micro_batches(rows: list[int], lengths: list[int], settings: UpdateSettings) -> list[list[int]]:
    """This replica's share of one optimizer step, cut into micro-batches."""
    mine = deal(rows, lengths, groups.dp_size())[groups.dp_rank()]
    return pack(mine, lengths, max_tokens=settings.max_batch_tokens, max_rows=settings.max_batch_size) or [[]]


class Sums:
    """Sums, counts and extremes of per-token statistics; `totals` adds up the data-parallel replicas."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64, device=groups.device()))
        self._tops: dict[str, torch.Tensor] = defaultdict(lambda: torch.full((), -math.inf, dtype=torch.float64, device=groups.device()))

    def add(self, **values: torch.Tensor) -> None:
        for name, x in values.items():
            self._sums[name] += torch.stack([x.sum(dtype=torch.float64), x.new_tensor(x.numel(), dtype=torch.float64)])

    def top(self, **values: torch.Tensor) -> None:
        for name, x in values.items():
            self._tops[name] = torch.maximum(self._tops[name], x.max().double())

    def totals(self, names: tuple[str, ...], tops: tuple[str, ...] = ()) -> dict[str, float]:
        """Collective. name -> mean over all tokens of all replicas (NaN without tokens); tops: maxima. The names must be the same everywhere."""
        result = {}
        for chosen, table, op in ((names, self._sums, dist.ReduceOp.SUM), (tops, self._tops, dist.ReduceOp.MAX)):
            if chosen:
                stacked = torch.stack([table[name] for name in chosen])
                if groups.dp_size() > 1:
                    dist.all_reduce(stacked, op, group=groups.dp_group())
                result |= dict(zip(chosen, stacked.tolist()))
        return {name: value if name in tops else value[0] / value[1] if value[1] else math.nan for name, value in result.items()}


def update_critic(trainer: Trainer, rollout: Rollout, made: Advantages, settings: UpdateSettings, iteration: int) -> dict[str, float]:
    """Collective. The critic's optimizer steps on one buffer; returns its statistics (docs/PPO.md names them)."""
    lengths, total_lengths, sums, norms = rollout.response_lengths, [len(row) for row in rollout.tokens], Sums(), []
    old_values, returns = rollout.values, made.returns
    assert old_values is not None and returns is not None

    def loss_sum(rows):
        values = response_values(trainer.model, [rollout.tokens[i] for i in rows], [rollout.prompt_lengths[i] for i in rows])
        loss, clipped = value_loss(values, rollout.packed(old_values, rows), rollout.packed(returns, rows), clip=settings.value_clip)
        sums.add(value_loss=loss.detach(), value_clipfrac=clipped)
        return loss.sum()

    for epoch in range(settings.epochs):
        for rows in minibatches(len(rollout), settings, iteration, epoch):
            norms.append(trainer.step(micro_batches(rows, total_lengths, settings), loss_sum, lambda rows: sum(lengths[i] for i in rows)))
    return {**sums.totals(("value_loss", "value_clipfrac")), **_steps("critic", norms),
            "explained_variance": explained_variance(old_values, returns, rollout.mask)}


def update_actor(trainer: Trainer, rollout: Rollout, made: Advantages, algorithm: Algorithm, settings: UpdateSettings, iteration: int) -> dict[str, float]:
    """Collective. The actor's optimizer steps on one buffer; returns its statistics (docs/PPO.md names them)."""
    lengths, total_lengths, norms = rollout.response_lengths, [len(row) for row in rollout.tokens], []
    clips = (settings.clip_low, settings.clip_high) if algorithm.clips else (math.inf, math.inf)
    kl_coef = settings.kl_coef if algorithm.kl_in == "loss" else 0.0
    whole, step_sums, first = Sums(), Sums(), {}

    def loss_sum(rows):
        result = response_logprobs(trainer.model, [rollout.tokens[i] for i in rows], [rollout.prompt_lengths[i] for i in rows],
                                   temperature=settings.temperature, with_entropy=settings.entropy_coef != 0)
        logprobs, entropy = result if settings.entropy_coef else (result, None)
        loss, seen = policy_loss(logprobs, rollout.packed(rollout.logprobs, rows), rollout.packed(made.advantages, rows), clip_low=clips[0],
                                 clip_high=clips[1], dual_clip=settings.dual_clip)
        whole.add(policy_loss=loss.detach(), ratio_mean=seen["ratio"], approx_kl=seen["approx_kl"], old_approx_kl=seen["old_approx_kl"],
                  clipfrac=seen["clipped"], outsidefrac=seen["outside"], clipfrac_lower=seen["lower_clipped"])
        whole.top(ratio_max=seen["ratio"], minus_ratio_min=-seen["ratio"], ratio_gap=(seen["ratio"] - 1).abs())
        step_sums.add(approx_kl=seen["approx_kl"])
        if kl_coef:
            assert rollout.ref_logprobs is not None
            kl = kl_estimate(logprobs, rollout.packed(rollout.ref_logprobs, rows), algorithm.kl_estimator)
            whole.add(kl_loss=kl.detach())
            loss = loss + kl_coef * kl
        if entropy is not None:
            loss = loss - settings.entropy_coef * entropy
        weights, _ = aggregation_weights([lengths[i] for i in rows], algorithm.aggregation, settings.max_new_tokens)
        return (loss * weights.to(loss.device)).sum()

    def count(rows):
        return aggregation_weights([lengths[i] for i in rows], algorithm.aggregation, settings.max_new_tokens)[1]

    stopped = False
    for epoch in range(settings.epochs):
        for rows in minibatches(len(rollout), settings, iteration, epoch):
            step_sums = Sums()
            norms.append(trainer.step(micro_batches(rows, total_lengths, settings), loss_sum, count))
            if not first:       # the weights were those of the rollout: every ratio is 1 but for rounding
                first = {"first_ratio_gap": whole.totals((), ("ratio_gap",))["ratio_gap"]}
            if settings.target_kl is not None and step_sums.totals(("approx_kl",))["approx_kl"] > 1.5 * settings.target_kl:
                stopped = True
                break
        if stopped:
            break
    names = ("policy_loss", "ratio_mean", "approx_kl", "old_approx_kl", "clipfrac", "outsidefrac", "clipfrac_lower", *(("kl_loss",) if kl_coef else ()))
    result = {**whole.totals(names, ("ratio_max", "minus_ratio_min")), **first, **_steps("actor", norms), "stopped_early": stopped}
    result["ratio_min"] = -result.pop("minus_ratio_min")
    return result


def _steps(role: str, results: list) -> dict[str, float]:
    """What the optimizer steps of one role have in common: mean norm before clipping, its maximum, last rate, steps, skipped ones."""
    norms = [r.grad_norm for r in results if math.isfinite(r.grad_norm)]
    return {f"{role}_grad_norm": sum(norms) / len(norms) if norms else math.nan, f"{role}_grad_norm_max": max(norms, default=math.nan),
            f"{role}_lr": results[-1].lr, f"{role}_steps": len(results), f"{role}_skipped": sum(r.skipped for r in results)}


def rollout_statistics(rollout: Rollout, made: Advantages, kl: torch.Tensor | None) -> dict[str, float]:
    """What the buffer looks like before the update. kl: [B, S] the k1 estimate against the reference, None without one."""
    mask, lengths, scores = rollout.mask, torch.tensor(rollout.response_lengths, dtype=torch.float32), rollout.scores
    valid = lambda x: x[mask]  # noqa: E731
    gap = (valid(rollout.logprobs) - valid(rollout.generator_logprobs)).abs()
    result = {"score": scores.mean(), "score_std": scores.std(correction=0), "score_min": scores.min(), "score_max": scores.max(),
              "reward": made.rewards.sum(1).mean(), "entropy": valid(rollout.entropy).mean(),
              "advantage_mean": valid(made.unwhitened).mean(), "advantage_std": valid(made.unwhitened).std(correction=0),
              "response_length": lengths.mean(), "response_length_max": lengths.max(), "response_length_min": lengths.min(),
              "finished_share": sum(rollout.finished) / len(rollout), "generator_gap_mean": gap.exp().mean(), "generator_gap_max": gap.max()}
    if kl is not None:
        per_row = kl.sum(1)
        result |= {"kl_token": valid(kl).mean(), "kl_sequence": per_row.mean(), "kl_k3_token": (torch.expm1(-valid(kl)) + valid(kl)).mean(),
                   "kl_max": valid(kl).abs().max()}
    if made.returns is not None:
        result |= {"value_mean": valid(rollout.values).mean(), "return_mean": valid(made.returns).mean()}
    if rollout.correct[0] is not None:
        result["accuracy"] = sum(map(bool, rollout.correct)) / len(rollout)
    for source in rollout.parts[0]:
        result[f"score_{source}"] = sum(parts[source] for parts in rollout.parts) / len(rollout)
    if len(set(rollout.samples)) > 1:
        members: dict[int, list[float]] = defaultdict(list)
        for prompt, score in zip(rollout.prompts, scores.tolist()):
            members[prompt].append(score)
        equal = [max(group) == min(group) for group in members.values()]
        result["equal_groups"] = sum(equal) / len(equal)        # nothing to learn from these without a critic
    return {name: float(value) for name, value in result.items()} | rollout.counts


def warnings(statistics: dict[str, float], fp32: bool) -> list[str]:
    """What a person should look at, each with its usual cause; docs/PPO.md says more."""
    s = defaultdict(lambda: math.nan, statistics)
    found = [
        (fp32 and s["first_ratio_gap"] > 1e-3, f"the first minibatch's ratio is off 1 by {s['first_ratio_gap']:.1e}: the trainer's forward is not repeatable"),
        (s["clipfrac"] > 0.4, f"{s['clipfrac']:.0%} of tokens clipped: lower --actor_lr or --inner_epochs"),
        (s["approx_kl"] > 0.1, f"approx_kl {s['approx_kl']:.2f} in one buffer: lower --actor_lr or --inner_epochs, or set --target_kl"),
        (s["ratio_max"] > 10, f"a ratio reached {s['ratio_max']:.1f}: lower --actor_lr"),
        (s["kl_sequence"] < -1.0, f"KL to the reference {s['kl_sequence']:.2f} nats per response is far below 0: sampling and scoring disagree"),
        (s["finished_share"] == 0, "no response reached an end token, so all count as cut off and their scores tell nothing: raise --max_new_tokens"),
    ]
    return [message for wrong, message in found if wrong]
