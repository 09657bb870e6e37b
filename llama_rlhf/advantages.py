"""From scores to advantages: pure functions of one complete rollout buffer, and a table with one row per algorithm.

Tensors are [B, S] (responses, response tokens) beside a bool mask [B, S]; index t is the decision to emit token t. What lies
outside the mask, NaN included, has no effect, and results are 0 there. Every rank holds the whole buffer: nothing communicates.
Sums over the buffer run in fp64 (small tensors, and a large common offset would drown fp32); results are fp32, or fp64 for fp64 input.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


def _fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """-beta * kl at every valid token, plus the response's score [B] at its last one (Ouyang et al. 2022, arXiv:2203.02155, eq. 2). [B, S]"""
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)      # one valid token from here on
    return (-beta * _fp32(kl)).where(mask, 0.0) + _fp32(scores)[:, None].where(is_last, 0.0)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95, bootstrap: Tensor | None = None):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16). Returns advantages, returns: [B, S].

    Positions outside the mask (padding, tool text) are stepped over: neither discounted nor a reset.
    bootstrap: [B], the value after the last token of a response cut by the length limit, 0 for one that ended; None: all ended.
    returns = advantages + values, the critic's target: neither of the two is whitened here.
    """
    rewards, values = _fp32(rewards), _fp32(values)
    advantages = torch.zeros_like(values)
    next_advantage = values.new_zeros(len(values))
    next_value = next_advantage if bootstrap is None else bootstrap.to(values)
    for t in reversed(range(mask.shape[1])):
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        next_advantage = advantage.where(mask[:, t], next_advantage)
        next_value = values[:, t].where(mask[:, t], next_value)
        advantages[:, t] = next_advantage.where(mask[:, t], 0.0)
    return advantages, (advantages + values).where(mask, 0.0)


def rewards_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """The discounted sum of the rewards from t on. [B, S]. It is what GAE gives when lam is 1 and every value 0."""
    return gae(rewards, torch.zeros_like(_fp32(rewards)), mask, gamma=gamma, lam=1.0)[0]


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over all valid entries, variance biased; shift_mean=False adds the mean back afterwards.

    Fewer than two valid entries have no spread to divide by: returned as they are.
    """
    valid, dtype = x[mask].double(), _fp32(x).dtype
    if len(valid) < 2:
        return x.to(dtype).where(mask, 0.0)
    mean, scale = valid.mean(), (valid.var(correction=0) + 1e-8).rsqrt()
    return ((x.double() - mean) * scale + (0.0 if shift_mean else mean)).to(dtype).where(mask, 0.0)


def _within_groups(scores: Tensor, group_ids: Tensor, rule: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """rule(scores - their mean, scores), fp64, for each group; exact zeros for a group of equal scores. Rows come in any order."""
    result = torch.zeros_like(_fp32(scores))
    for group in group_ids.unique():
        members = group_ids == group
        own = scores[members].double()
        if len(own) < 2:
            raise ValueError(f"group {int(group)} has one response, and nothing to compare it with: use --num_samples_per_prompt 2 or more")
        if (own != own[0]).any():
            result[members] = rule(own - own.mean(), own).to(result)
    return result


def grpo_advantages(scores: Tensor, group_ids: Tensor) -> Tensor:
    """(score - group mean) / (group std + 1e-6), std with n - 1 (Shao et al. 2024, arXiv:2402.03300). scores, group_ids (int), result: [B]."""
    return _within_groups(scores, group_ids, lambda centred, own: centred / (own.std() + 1e-6))


def dr_grpo_advantages(scores: Tensor, group_ids: Tensor) -> Tensor:
    """score - group mean: GRPO without the division, which favours easy and hopeless prompts (Liu et al. 2025, arXiv:2503.20783). [B]"""
    return _within_groups(scores, group_ids, lambda centred, own: centred)


def rloo_advantages(scores: Tensor, group_ids: Tensor) -> Tensor:
    """score - mean of the OTHER members = n/(n-1) * (score - group mean) (Ahmadian et al. 2024, arXiv:2402.14740). [B]"""
    return _within_groups(scores, group_ids, lambda centred, own: centred * len(own) / (len(own) - 1))


@dataclass(frozen=True)
class Settings:
    """gamma, lam: discount and GAE's lambda; beta: the KL coefficient of this buffer; whiten_rewards: PPO's option, mean kept."""

    gamma: float = 1.0
    lam: float = 0.95
    beta: float = 0.0
    whiten_rewards: bool = False


@dataclass(frozen=True)
class Advantages:
    advantages: Tensor          # [B, S], what the policy loss takes
    unwhitened: Tensor          # [B, S], the same before whitening, for the statistics
    returns: Tensor | None      # [B, S], the critic's targets; None without a critic
    rewards: Tensor             # [B, S], score and KL part as the environment paid them


def _with_critic(*, rewards, mask, values, bootstrap, settings, **_):
    if settings.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    return gae(rewards, values, mask, gamma=settings.gamma, lam=settings.lam, bootstrap=bootstrap)


def _to_go(*, rewards, mask, settings, **_):
    return rewards_to_go(rewards, mask, settings.gamma), None


def _by_group(rule: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """The response's total (its score, less its KL where that is in the reward) against its group's; the same for all its tokens."""
    return lambda *, totals, mask, group_ids, **_: (rule(totals, group_ids)[:, None].where(mask, 0.0), None)


@dataclass(frozen=True)
class Algorithm:
    """One row: how advantages are made, how token losses are averaged, where the KL to the reference goes."""

    advantages: Callable        # (rewards, totals, mask, values, bootstrap, group_ids, settings) -> advantages [B, S], returns or None
    whitens: bool               # advantages are whitened over the buffer
    aggregation: str            # see losses.aggregation_weights
    kl_in: str                  # "reward" | "loss"
    kl_estimator: str           # see losses.kl_estimate
    kl_coef: float              # when the run names none
    uses_critic: bool = False
    needs_group: bool = False   # compares the responses to one prompt
    clips: bool = True          # the ratio is clipped; if not, clip_low = clip_high = infinity

    @property
    def unused(self) -> list[str]:
        """Flags of ppo_train.py that change nothing, beside those that `check_algorithm` refuses."""
        return ([] if self.uses_critic else ["lam", "value_clip", "critic_lr", "critic_warmup"]) + ([] if self.clips else ["clip", "clip_high"]) \
            + (["gamma"] if self.needs_group else [])


ALGORITHMS: dict[str, Algorithm] = {
    # Schulman et al. 2017, arXiv:1707.06347; for language models: Ouyang et al. 2022, arXiv:2203.02155
    "ppo":         Algorithm(_with_critic, True, "token-mean", "reward", "k1", 0.05, uses_critic=True),
    # Shao et al. 2024, arXiv:2402.03300
    "grpo":        Algorithm(_by_group(grpo_advantages), False, "seq-mean-token-mean", "loss", "k3", 0.04, needs_group=True),
    # Liu et al. 2025, arXiv:2503.20783; the paper has no KL term: coefficient 0
    "dr_grpo":     Algorithm(_by_group(dr_grpo_advantages), False, "fixed-length", "loss", "k3", 0.0, needs_group=True),
    # Ahmadian et al. 2024, arXiv:2402.14740
    "rloo":        Algorithm(_by_group(rloo_advantages), False, "seq-mean-token-sum", "reward", "k1", 0.05, needs_group=True, clips=False),
    # Hu 2025, arXiv:2501.03262
    "reinforce++": Algorithm(_to_go, True, "token-mean", "reward", "k1", 0.05),
}


@torch.no_grad()
def make_advantages(algorithm: str, scores: Tensor, kl: Tensor, mask: Tensor, *, settings: Settings, values: Tensor | None = None,
                    bootstrap: Tensor | None = None, group_ids: Tensor | None = None) -> Advantages:
    """Advantages of one buffer by the row `algorithm` of ALGORITHMS, detached.

    scores: [B]; kl: [B, S] per token, by the row's estimator, used only if the row puts it in the reward; values: [B, S] for a
    critic; bootstrap: see gae; group_ids: [B] ints, equal for the responses to one prompt, for the group methods.
    """
    row = ALGORITHMS[algorithm]
    assert mask.dtype == torch.bool and scores.shape == mask.shape[:1] and kl.shape == mask.shape
    assert not row.uses_critic or values is not None, "this algorithm needs the critic's values"
    assert not row.needs_group or group_ids is not None, "this algorithm needs group_ids"
    assert row.uses_critic or bootstrap is None, "a bootstrap value, but no critic"
    beta = settings.beta if row.kl_in == "reward" else 0.0
    rewards = shaped_rewards(scores, kl, mask, beta)
    totals = _fp32(scores) - beta * _fp32(kl).where(mask, 0.0).sum(1)
    unwhitened, returns = row.advantages(rewards=rewards, totals=totals, mask=mask, values=values, bootstrap=bootstrap,
                                         group_ids=group_ids, settings=settings)
    return Advantages(whiten(unwhitened, mask) if row.whitens else unwhitened, unwhitened, returns, rewards)


def named(name: str) -> Algorithm:
    """The row `name`."""
    if name not in ALGORITHMS:
        near = difflib.get_close_matches(str(name).lower(), ALGORITHMS, 1, 0.5)
        raise ValueError(f"--algorithm {name!r} is none of {', '.join(ALGORITHMS)}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return ALGORITHMS[name]


def check_algorithm(name: str, *, n_samples_per_prompt: int = 1, has_critic_ckpt: bool = False, kl_coef: float = 0.0, kl_target: float | None = None,
                    kl_horizon: float = 10_000, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None,
                    value_clip: float | None = 0.2, gamma: float = 1.0, lam: float = 0.95, whiten_rewards: bool = False,
                    bootstrap_truncated: bool = False) -> Algorithm:
    """The row `name`, if the run's options can go together with it; otherwise ValueError naming the first that cannot."""
    row = named(name)
    critic, adaptive = row.uses_critic, kl_target is not None
    problems = [        # comparisons are written so that NaN fails them
        (n_samples_per_prompt < 1, f"--num_samples_per_prompt {n_samples_per_prompt} must be at least 1"),
        (row.needs_group and n_samples_per_prompt < 2,
         f"{name} compares the responses to one prompt with each other: --num_samples_per_prompt {n_samples_per_prompt} must be at least 2"),
        (has_critic_ckpt and not critic, f"{name} has no critic: leave --critic_ckpt_dir out, or use --algorithm ppo"),
        (whiten_rewards and not critic, f"--whiten_rewards belongs to ppo, not to {name}"),
        (bootstrap_truncated and not critic, f"--bootstrap_truncated needs the value of a critic, and {name} has none"),
        (not 0 <= kl_coef < math.inf, f"--kl_coef {kl_coef} must be 0 or more: the KL to the reference is a cost"),
        (adaptive and row.kl_in == "loss",
         f"--kl_target adapts the KL coefficient in the reward, but {name} has its KL in the loss: use a fixed --kl_coef"),
        (kl_target is not None and not 0 < kl_target < math.inf, f"--kl_target {kl_target} must be more than 0 (nats per response)"),
        (adaptive and not kl_coef > 0, f"--kl_target changes --kl_coef by factors, so it cannot start from {kl_coef}"),
        (adaptive and not kl_horizon > 0, f"--kl_horizon {kl_horizon} must be more than 0"),
        (row.clips and not (clip_low > 0 and clip_high > 0), f"clip ranges must be more than 0, not {clip_low} below and {clip_high} above"),
        (dual_clip is not None and not dual_clip > 1, f"--dual_clip {dual_clip} must be more than 1: it caps a ratio that grew (3 is usual)"),
        (dual_clip is not None and not row.clips, f"{name} does not clip: leave --dual_clip out"),
        (critic and value_clip is not None and not value_clip > 0, f"--value_clip {value_clip} must be more than 0, or none"),
        (not 0 <= gamma <= 1, f"--gamma {gamma} must lie between 0 and 1"),
        (not 0 <= lam <= 1, f"--lam {lam} must lie between 0 and 1"),
    ]
    for wrong, message in problems:
        if wrong:
            raise ValueError(message)
    return row


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over valid tokens, biased; values as the rollout had them. NaN if the returns are all equal."""
    values, returns = values[mask].double(), returns[mask].double()
    if len(returns) == 0 or not (returns != returns[0]).any():
        return math.nan
    return 1.0 - float((returns - values).var(correction=0) / returns.var(correction=0))


@dataclass
class KLController:
    """The coefficient of the KL in the reward: fixed, or with a target steered towards it (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    target: nats per response, summed over its tokens; horizon: in responses. Fed the same numbers, every rank holds the same coefficient.
    """

    coefficient: float
    target: float | None = None
    horizon: float = 10_000

    def update(self, mean_kl_per_sequence: float, n_sequences: int) -> float:
        """The new coefficient, after n_sequences more. ValueError if the mean is NaN."""
        if math.isnan(mean_kl_per_sequence):
            raise ValueError("the KL to the reference is not a number: log-probabilities of the policy or of the reference are broken")
        if self.target is not None:
            error = max(-0.2, min(0.2, mean_kl_per_sequence / self.target - 1.0))
            self.coefficient *= 1.0 + error * min(1.0, n_sequences / self.horizon)     # the cap, not in the paper, keeps it positive
        return self.coefficient

    def state(self) -> dict:
        return {"coefficient": self.coefficient}

    def load(self, state: dict) -> None:
        """An adapted coefficient goes on where it was; a fixed one is what the command line says now."""
        if self.target is not None:
            self.coefficient = state["coefficient"]


@dataclass
class RunningMoments:
    """Count, mean and sum of squared deviations of all numbers seen; parts merge exactly (Chan et al. 1979)."""

    n: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def update(self, x: Tensor) -> None:
        if x.numel():
            x = x.flatten().double()
            apart = x - x[0]        # of equal numbers exactly 0: the mean of the numbers themselves may differ from them in its last digit
            self.merge(RunningMoments(x.numel(), float(x[0] + apart.mean()), float((apart - apart.mean()).square().sum())))

    def merge(self, other: RunningMoments) -> None:
        n, delta = self.n + other.n, other.mean - self.mean
        if n:
            self.mean += delta * other.n / n
            self.m2 += other.m2 + delta * delta * self.n * other.n / n
            self.n = n

    @property
    def variance(self) -> float:
        return self.m2 / self.n if self.n else 0.0

    @property
    def std(self) -> float:
        """Biased; 1 while there is no spread, so that it can be divided by."""
        return math.sqrt(self.variance) or 1.0

    def state(self) -> dict:
        return asdict(self)

    def load(self, state: dict) -> None:
        self.n, self.mean, self.m2 = state["n"], state["mean"], state["m2"]


@dataclass
class Ema:
    """Exponential moving average that starts at the first number."""

    decay: float = 0.9
    value: float | None = None

    def update(self, x: float) -> float:
        self.value = x if self.value is None else self.decay * self.value + (1.0 - self.decay) * x
        return self.value

    def state(self) -> dict:
        return {"value": self.value}

    def load(self, state: dict) -> None:
        self.value = state["value"]
