"""Rollouts: prompts answered by the actor, and all that the update needs to know about the answers.

    rollout = collect(roles, prompts, tokenizer, reward, settings, iteration=0, clock=Clock())

Data-parallel replicas share the prompts; then everything is gathered, so every rank holds the whole buffer. It is small beside
the models, and group baselines, whitening and statistics become plain functions of it: the same numbers on any number of ranks.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from llama_rlhf.checkpoint.formats import check_torch_zip
from llama_rlhf.data import pack
from llama_rlhf.generation import Statistics, generate
from llama_rlhf.models.transformer import ValueModel
from llama_rlhf.parallel import groups
from llama_rlhf.reward import normalise, score_responses
from llama_rlhf.sampling import Sampling
from llama_rlhf.tasks import import_file, running
from llama_rlhf.trainer import response_logprobs, response_values

_LARGEST = torch.finfo(torch.float32).max
_PASS_TOKENS = 4096         # forward passes without gradient go by packs of about this many tokens


@dataclass(frozen=True)
class Prompt:
    """id: its number in the file, the key of its random numbers.  problem: what the task's rule needs; None without a task."""

    id: int
    text: str
    tokens: list[int]
    problem: Any = None


@dataclass(frozen=True)
class RolloutSettings:
    """How responses are drawn and judged."""

    n_samples: int = 1
    temperature: float = 1.0
    max_new_tokens: int = 256
    min_response_tokens: int = 1        # besides the end token
    bad_score: float = -1.0             # of a response without an end token, or too short, or whose score is not finite
    bootstrap_truncated: bool = False   # a response without an end token: no score, the critic's value of its last state instead
    batch_size: int = 64                # responses generated together
    max_cache_gb: float = -1.0          # of their keys and values on a rank, 10^9 bytes; -1: what there is
    cuda_graphs: str = "auto"           # see generation.steps
    seed: int = 0


@dataclass
class Response:
    """One answer. tokens: prompt and response. Per-token tensors are [L] fp32 on the CPU: L response tokens, the end token included."""

    prompt: int
    sample: int
    tokens: list[int]
    prompt_length: int
    finished: bool
    text: str
    correct: bool | None
    parts: dict[str, float]             # score by source
    generator_logprobs: torch.Tensor
    logprobs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    values: torch.Tensor | None = None
    value_after: float = 0.0            # the critic's, of the state after the last token (bootstrap_truncated only)


@dataclass
class Rollout:
    """The buffer of one iteration, B responses, the same on every rank. Tensors on the CPU, fp32; [B, S] is 0 beyond a response.

    Index t of [B, S] is the decision to emit response token t; values[i, t] is of the state before it (docs/PPO.md).
    """

    prompts: list[int]
    samples: list[int]
    tokens: list[list[int]]
    prompt_lengths: list[int]
    finished: list[bool]
    texts: list[str]
    correct: list[bool | None]
    parts: list[dict[str, float]]
    scores: torch.Tensor                # [B] what is optimised, after the rule for bad responses
    bad: torch.Tensor                   # [B] bool: the rule set the score
    mask: torch.Tensor                  # [B, S] bool
    generator_logprobs: torch.Tensor    # [B, S] as the generator computed them (its own precision and batching)
    logprobs: torch.Tensor              # [B, S] under the trainer's forward: the "old" ones of the ratio
    entropy: torch.Tensor               # [B, S]
    ref_logprobs: torch.Tensor | None
    values: torch.Tensor | None
    value_after: torch.Tensor           # [B]
    temperature: float                  # at which all log-probabilities are
    counts: dict[str, int] = field(default_factory=dict)    # truncated, too_short, not_finite
    bootstrapped: bool = False          # RolloutSettings.bootstrap_truncated

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def response_lengths(self) -> list[int]:
        return [len(row) - n for row, n in zip(self.tokens, self.prompt_lengths)]

    @property
    def group_ids(self) -> torch.Tensor:
        """[B] equal for the responses to one prompt"""
        return torch.tensor(self.prompts)

    def packed(self, padded: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """The valid entries of these rows of a [B, S] tensor, in order: [N] on this rank's device."""
        return torch.cat([padded[i, :n] for i in rows for n in (len(self.tokens[i]) - self.prompt_lengths[i],)]).to(groups.device())

    @classmethod
    def of(cls, responses: list[Response], settings: RolloutSettings) -> Rollout:
        lengths = [len(r.tokens) - r.prompt_length for r in responses]
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]

        def padded(name):
            parts = [getattr(r, name) for r in responses]
            return None if parts[0] is None else torch.zeros(mask.shape).masked_scatter(mask, torch.cat(parts))

        scores, bad, counts = judge(responses, settings)
        return cls([r.prompt for r in responses], [r.sample for r in responses], [r.tokens for r in responses],
                   [r.prompt_length for r in responses], [r.finished for r in responses], [r.text for r in responses],
                   [r.correct for r in responses], [r.parts for r in responses], torch.tensor(scores), torch.tensor(bad), mask,
                   padded("generator_logprobs"), padded("logprobs"), padded("entropy"), padded("ref_logprobs"), padded("values"),
                   torch.tensor([r.value_after for r in responses]), settings.temperature, counts, settings.bootstrap_truncated)

    def save(self, path: str) -> None:
        """For a later `load`, and to look at: a dictionary of the fields above."""
        torch.save({f.name: getattr(self, f.name) for f in fields(self)}, path)

    @classmethod
    def load(cls, path: str) -> Rollout:
        """ValueError when the file is not one of `save`."""
        try:
            check_torch_zip(path, whole=True)
            return cls(**torch.load(path, weights_only=True))
        except FileNotFoundError:
            raise
        except Exception as error:      # noqa: BLE001  an unpickler raises nearly anything
            raise ValueError(f"{path} is not a rollout of this version ({(str(error).splitlines() or [type(error).__name__])[0]}). "
                             "Give a rollout-N.pt that ppo_train.py --save_rollouts wrote.") from error


def judge(responses: list[Response], settings: RolloutSettings) -> tuple[list[float], list[bool], dict[str, int]]:
    """The score of each response, whether it was set by the rule for bad ones, and how many of each kind there were.

    The rule: a response without an end token (truncated), one with fewer than min_response_tokens tokens before it (too short),
    and one whose score is not finite, in fp32, get bad_score, whatever their sources say. With bootstrap_truncated a truncated one gets 0:
    the critic's value of its last state stands for what would have followed.
    """
    scores, bad, counts = [], [], {"truncated": 0, "too_short": 0, "not_finite": 0}
    for r in responses:
        score, n_before_end = sum(r.parts.values()), len(r.tokens) - r.prompt_length - r.finished
        fault = "truncated" if not r.finished else "too_short" if n_before_end < settings.min_response_tokens else \
            "not_finite" if not abs(score) <= _LARGEST else None
        if fault:
            counts[fault] += 1
            score = 0.0 if fault == "truncated" and settings.bootstrap_truncated else settings.bad_score
        scores.append(float(score))
        bad.append(fault is not None)
    return scores, bad, counts


@dataclass
class Reward:
    """What a response is worth: a weighted sum of a reward model, the task's rule, and a function of the user's.

    model: scores prompt and response; normalised by the offset and scale in its checkpoint.
    task, rule, rule_weight: 1 for a right answer, 0 for a wrong one, under the task's rule (some give parts of 1). With weight 0
    it is only recorded.
    function: (prompt text, response text, reference label or None) -> number.
    """

    model: ValueModel | None = None
    model_weight: float = 1.0
    task: Any = None
    rule: str = "D"
    rule_weight: float = 0.0
    function: Callable | None = None
    function_weight: float = 1.0

    def judge_text(self, prompt: Prompt, text: str, finished: bool) -> tuple[bool | None, dict[str, float]]:
        """(right or not, weighted parts) from what needs no model."""
        correct, parts = None, {}
        if self.task is not None and prompt.problem is not None:
            with running(f"the task's score failed for prompt {prompt.id}"):
                score = self.task.score(prompt.problem, text, finished, rule=self.rule, reward=True)
            correct = score["correct"][self.rule]
            if self.rule_weight:
                parts["rule"] = self.rule_weight * score["score"]
        if self.function is not None:
            with running(f"the reward function failed for prompt {prompt.id}"), torch.no_grad():        # whatever it switches on, here and no longer
                value = self.function(prompt.text, text, getattr(prompt.problem, "label", None))
            try:
                parts["function"] = self.function_weight * float(value)
            except OverflowError:       # of a number too large for a float: not finite, as the rule for bad responses has it
                parts["function"] = math.inf
            except (TypeError, ValueError):
                raise ValueError(f"the reward function returned {value!r} for prompt {prompt.id}; it must return a number") from None
        return correct, parts


def load_reward_function(spec: str) -> Callable:
    """The function named by "path/to/file.py:name". Runs that file: it is the user's own code."""
    path, _, name = spec.rpartition(":")
    if not path or not os.path.isfile(path):
        raise FileNotFoundError(f"--reward_function {spec}: give FILE.py:NAME of a function (prompt, response, label) -> number")
    function = getattr(import_file(path), name, None)
    if not callable(function) or len(inspect.signature(function).parameters) != 3:
        raise ValueError(f"--reward_function {spec}: {path} has no function {name}(prompt, response, label)")
    return function


def _per_response(function, rows: list[Response], names: tuple[str, ...], *, more: int = 0) -> None:
    """function(tokens, prompt lengths) -> a packed tensor for each name; each response receives its own part, of its tokens and so many `more`."""
    for places in pack(range(len(rows)), [len(r.tokens) for r in rows], max_tokens=_PASS_TOKENS):
        mine = [rows[i] for i in places]
        results = function([r.tokens for r in mine], [r.prompt_length for r in mine])
        for name, values in zip(names, results):
            for r, part in zip(mine, values.float().cpu().split([len(r.tokens) - r.prompt_length + more for r in mine])):
                setattr(r, name, part.clone())      # a view would be sent with all of its pack


@torch.no_grad()
def collect(roles, prompts: list[Prompt], tokenizer, reward: Reward, settings: RolloutSettings, *, iteration: int, clock) -> tuple[Rollout, Statistics]:
    """Collective. Let the actor answer every prompt n_samples times and look at the answers with every role.

    roles: see roles.Roles.  clock: see runlog.Clock; the phases are generate, score, forward.
    Returns the rollout, rows ordered by prompt and sample, and the generator's statistics of this replica.
    """
    mine = prompts[groups.dp_rank()::groups.dp_size()]
    statistics, rows = Statistics(), []
    with clock("generate"), roles.using(roles.actor):
        completions = generate(roles.actor, [p.tokens for p in mine], eos_ids=tokenizer.eos_ids, max_new_tokens=settings.max_new_tokens,
                               max_batch_size=settings.batch_size, max_cache_gb=settings.max_cache_gb, cuda_graphs=settings.cuda_graphs, n_samples=settings.n_samples, with_logprobs=True,
                               sampling=Sampling(settings.temperature, seed=(settings.seed << 24) + iteration),
                               request_ids=[p.id for p in mine], statistics=statistics)
    with clock("score"), groups.together("scoring responses by rule and function"):
        for prompt, samples in zip(mine, completions):
            for c in samples:
                text = tokenizer.decode(c.tokens)
                # every rank of a replica has the same texts, but a user's function may be random: the first rank's word counts
                correct, parts = reward.judge_text(prompt, text, c.finished) if groups.tp_rank() == 0 else (None, {})
                rows.append(Response(prompt.id, c.sample, prompt.tokens + c.tokens, len(prompt.tokens), c.finished, text, correct, parts,
                                     torch.tensor(c.logprobs)))
    with clock("forward"):
        with roles.using(roles.actor):
            _per_response(lambda tokens, lengths: response_logprobs(roles.actor, tokens, lengths, temperature=settings.temperature,
                                                                    with_entropy=True), rows, ("logprobs", "entropy"))
        if roles.reference is not None:
            with roles.using(roles.reference):
                _per_response(lambda tokens, lengths: (response_logprobs(roles.reference, tokens, lengths, temperature=settings.temperature),),
                              rows, ("ref_logprobs",))
        if roles.critic is not None:
            with roles.using(roles.critic):
                cuts = settings.bootstrap_truncated      # asks for the state after the last token as well
                _per_response(lambda tokens, lengths: (response_values(roles.critic, tokens, lengths, where="both" if cuts else "before"),), rows, ("values",), more=int(cuts))
                for r in rows if cuts else ():
                    assert r.values is not None
                    r.values, r.value_after = r.values[:-1].clone(), 0.0 if r.finished else float(r.values[-1])
    if reward.model is not None:
        with clock("score"), roles.using(reward.model):
            raw = score_responses(reward.model, [r.tokens for r in rows], [r.prompt_length for r in rows])
            for r, score in zip(rows, normalise(reward.model.score, raw).tolist()):
                r.parts["model"] = reward.model_weight * score
    gathered = groups.gather_objects(rows if groups.tp_rank() == 0 else [])
    order = {prompt.id: place for place, prompt in enumerate(prompts)}
    everything = sorted((r for part in gathered for r in part), key=lambda r: (order[r.prompt], r.sample))
    return Rollout.of(everything, settings), statistics
