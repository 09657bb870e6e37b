"""Reward models: the loss that trains one, what it says of a response, and how far that can be trusted.

A reward model is a ValueModel and `score`, what its manifest says of the raw number u at the last token:

    {"loss": "pairwise" | "mse" | "bce", "form": "linear" | "sigmoid", "offset": mean, "scale": std}

form: "sigmoid" means that the model reports p = sigmoid(u), as one trained with cross entropy does; "linear" that it reports u.
offset and scale are mean and deviation of what it reports for responses of its training data.
"""

from __future__ import annotations

import math
import random

import torch

from llama_rlhf.advantages import RunningMoments
from llama_rlhf.checkpoint.formats import open_checkpoint
from llama_rlhf.checkpoint.shards import inspect
from llama_rlhf.data import Judged, pack, token_pieces
from llama_rlhf.losses import pairwise_loss, prediction_rows, token_logprobs, verifier_loss
from llama_rlhf.models.transformer import CausalLM, Rows, ValueModel
from llama_rlhf.parallel import groups
from llama_rlhf.scoring import calibration, pair_accuracy, score_by_length
from llama_rlhf.trainer import final_scores, response_values

FORMS = {"pairwise": "linear", "mse": "linear", "bce": "sigmoid"}       # the losses there are, and what a model trained with one reports
_PACK_TOKENS = 8192
_MEASURED_RESPONSES = 1024      # whose scores give offset and scale: their mean is then known to 3 % of the deviation


class JointModel(CausalLM, ValueModel):
    """Both heads on one decoder: a verifier that goes on predicting tokens while it learns to judge. Its saves have both, to be continued from;
    who loads one as a ValueModel leaves the language-model head out."""


# ---- training


def choose_loss(asked: str, kind: str, file: str, *, margin: float = 0.0, centre: float = 0.0, lm_loss_weight: float = 0.0) -> str:
    """The loss for data of this kind (see data.JUDGED); ValueError where it, or an option, does not go with them."""
    if asked not in ("auto", *FORMS):
        raise ValueError(f"--loss {asked!r}: use auto, {', '.join(FORMS)}")
    loss = asked if asked != "auto" else "mse" if kind == "labels" else "pairwise"
    if loss != "pairwise" and kind in ("pairs", "ranking"):
        raise ValueError(f"--loss {loss} needs responses labelled right or wrong, but {file} compares responses ({kind}). Use --loss pairwise.")
    if loss == "pairwise" and lm_loss_weight:
        raise ValueError("--lm_loss_weight goes with --loss mse or bce: comparisons do not say which solutions are right")
    if loss != "pairwise" and (margin or centre):
        raise ValueError(f"--margin and --centre are for pairs; --loss {loss} compares nothing")
    return loss


def objective(model: ValueModel, examples: list[Judged], *, loss: str, margin: float = 0.0, centre: float = 0.0,
              lm_loss_weight: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of a micro-batch, summed, and how many of its judgements are right (detached; there are `count_judgements` of them).

    pairwise: a problem's pairs share its weight 1, so the sum is to be divided by the number of problems; each response is computed
    once (Ouyang et al. 2022, arXiv:2203.02155, section 3.5).  margin: of pairs that state none.  centre: see pairwise_loss.
    mse, bce: at every response token, against the label; to be divided by the number of response tokens (Cobbe et al. 2021,
    arXiv:2110.14168, section 4.2).  lm_loss_weight: of -log p of each token of right solutions; needs a JointModel. Cobbe et al.
    take it over the reference solutions; sampled right ones stand for them here, and wrong ones are not to be imitated.
    """
    responses = [response for example in examples for response in example.responses]
    device = groups.device()
    if loss == "pairwise":
        starts = [0]
        for example in examples:
            starts.append(starts[-1] + len(example.responses))
        pairs = [(start + better, start + worse, margin if own is None else own, 1 / len(example.pairs))
                 for start, example in zip(starts, examples) for better, worse, own in example.pairs]
        better, worse, margins, weights = (torch.tensor(column, device=device) for column in zip(*pairs))
        scores = final_scores(model, responses)
        losses = pairwise_loss(scores[better], scores[worse], margin=margins, centre=centre)
        right = (scores[better] > scores[worse]) + 0.5 * (scores[better] == scores[worse])
        return (weights * losses).sum(), right.sum().detach()

    lengths, prompt_lengths = [len(response) for response in responses], [example.prompt_len for example in examples]
    n_tokens = torch.tensor(lengths, device=device) - torch.tensor(prompt_lengths, device=device)
    labels, weights = (torch.tensor(values, dtype=torch.float32, device=device) for values in
                       zip(*((example.label, example.weight) for example in examples)))
    before, after = (index.to(device) for index in prediction_rows(lengths, prompt_lengths))
    flat = torch.tensor([token for response in responses for token in response], device=device)
    teaches = lm_loss_weight and any(example.label for example in examples)
    hidden = model(flat, Rows.packed(lengths, device), at=None if teaches else after)
    predictions = model.values(hidden[after] if teaches else hidden)
    of_token = torch.arange(len(examples), device=device).repeat_interleave(n_tokens)       # which example each token belongs to
    losses = verifier_loss(predictions, labels[of_token], loss)
    if teaches:
        assert isinstance(model, JointModel)
        taught = labels[of_token] == 1
        logprobs = token_logprobs(hidden[before[taught]], model.head_weight, flat[after[taught]], vocab_start=model.vocab_start)
        losses = losses.index_add(0, taught.nonzero()[:, 0], -lm_loss_weight * logprobs)
    last = predictions.detach()[n_tokens.cumsum(0) - 1]
    return (weights[of_token] * losses).sum(), ((last > (0.5 if loss == "mse" else 0.0)) == (labels == 1)).sum()


def count(examples: list[Judged], loss: str) -> int:
    """What the sum of `objective` is divided by."""
    return len(examples) if loss == "pairwise" else sum(len(example.responses[0]) - example.prompt_len for example in examples)


def count_judgements(examples: list[Judged], loss: str) -> int:
    return sum(len(example.pairs) for example in examples) if loss == "pairwise" else len(examples)


# ---- scores


def check_reward_model(path: str) -> None:
    """ValueError unless this checkpoint is a reward model: before hours of work that end with loading it."""
    with open_checkpoint(path) as checkpoint:
        contents = inspect(checkpoint)
    if not contents.has_value_head or not (contents.manifest or {}).get("score"):
        lacks = "says nothing about its scores" if contents.has_value_head else "has no value head"
        raise ValueError(f"{path} {lacks}: it is not a reward model. Train one with verifier_train.py, or give the folder that it saved.")


@torch.no_grad()
def score_responses(model: ValueModel, tokens: list[list[int]], prompt_lengths: list[int], *, max_tokens: int = _PACK_TOKENS) -> torch.Tensor:
    """The raw score of each prompt + response, read at its last token. [rows] fp32. All tensor-parallel ranks give the same rows.

    max_tokens: in one pass, unless a row is longer.  Raises ValueError for a response without a token: there is nothing to judge.
    """
    if empty := [i for i, (row, n) in enumerate(zip(tokens, prompt_lengths, strict=True)) if len(row) <= n]:
        raise ValueError(f"response {empty[0] + 1} has no tokens, not even an end token: it cannot be scored")
    scores = torch.zeros(len(tokens), dtype=torch.float32, device=groups.device())
    lengths = [len(row) for row in tokens]
    by_length = sorted(range(len(tokens)), key=lengths.__getitem__)         # rows of one pass have similar lengths
    for places in pack(by_length, lengths, max_tokens=max_tokens):
        scores[places] = final_scores(model, [tokens[i] for i in places])
    return scores


def score_together(model: ValueModel, tokens: list[list[int]], prompt_lengths: list[int]) -> list[float]:
    """Collective. The same with the data-parallel replicas sharing the rows. ValueError on every rank if one is not finite."""
    mine = range(groups.dp_rank(), len(tokens), groups.dp_size())
    raw = score_responses(model, [tokens[i] for i in mine], [prompt_lengths[i] for i in mine]).tolist()
    parts = groups.gather_objects(list(zip(mine, raw)) if groups.tp_rank() == 0 else [])
    scores = [score for _, score in sorted(pair for part in parts for pair in part)]
    if bad := [i for i, score in enumerate(scores) if not math.isfinite(score)]:
        raise ValueError(f"the score of response {bad[0] + 1} is {scores[bad[0]]}: the verifier's weights are damaged or its training "
                         f"diverged ({len(bad)} of {len(scores)} scores are not finite)")
    return scores


def measure_score(model: ValueModel, examples: list[Judged], loss: str) -> dict:
    """Collective. `score` of this model, from a fixed random choice of the responses of its training data."""
    rows = [(response, example.prompt_len) for example in examples for response in example.responses]
    rows = random.Random(0).sample(rows, min(len(rows), _MEASURED_RESPONSES))
    raw = torch.tensor(score_together(model, [row for row, _ in rows], [n for _, n in rows]), dtype=torch.float64)
    moments = RunningMoments()
    moments.update(_reported(FORMS[loss], raw))
    return {"loss": loss, "form": FORMS[loss], "offset": moments.mean, "scale": moments.std, "n": moments.n}


def normalise(score: dict | None, raw: torch.Tensor) -> torch.Tensor:
    """What the model reports, in deviations from its mean; the raw scores where `score` is None."""
    return raw if score is None else (_reported(score["form"], raw) - score["offset"]) / score["scale"]


def probability(score: dict, raw: torch.Tensor) -> torch.Tensor:
    """That a response is right, in [0, 1]. For a pairwise model: that it beats the average training response."""
    if score["loss"] == "pairwise":
        return torch.sigmoid(raw - score["offset"])
    return _reported(score["form"], raw).clamp(0, 1)


def _reported(form: str, raw: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(raw) if form == "sigmoid" else raw


@torch.no_grad()
def fold_head(model: ValueModel, weight: float = 1.0) -> None:
    """Rescale the value head so that it gives weight times the normalised score, as a critic that starts from this reward model has to.

    Linear: exact. Sigmoid: to first order around u = 0, p = 1/2 + u/4; near 0 and 1 the critic has to learn the rest.
    """
    if model.score is None:
        return
    slope, at_zero = (0.25, 0.5) if model.score["form"] == "sigmoid" else (1.0, 0.0)
    head, scale = model.value_head, weight / model.score["scale"]
    head.weight.mul_(slope * scale)
    head.bias.mul_(slope).add_(at_zero - model.score["offset"]).mul_(scale)
    model.score = None


# ---- evaluation


def evaluate_verifier(model: ValueModel, examples: list[Judged], score: dict) -> dict:
    """Collective. `verifier_metrics` of held-out examples."""
    rows, lengths, problems, pairs, labels = [], [], [], [], []
    for example in examples:
        pairs += [(len(rows) + better, len(rows) + worse) for better, worse, _ in example.pairs]
        rows += [(response, example.prompt_len) for response in example.responses]
        problems += [example.id] * len(example.responses)
        labels += [example.label] * len(example.responses)
    lengths = [len(response) - n for response, n in rows]
    scores = score_together(model, [row for row, _ in rows], [n for _, n in rows])
    return verifier_metrics(scores, lengths, problems, score, pairs or pairs_by_label(problems, labels),
                            None if pairs else labels)


@torch.no_grad()
def scored_responses(model: ValueModel, tokenizer, examples: list[Judged], score: dict, n_problems: int = 4) -> list[dict]:
    """Collective. For people to look at: a better and a worse response to some problems, and after every token the probability
    that the response is right (see `probability`). [{"id", "prompt", "judged", "pieces", "probabilities"}]
    """
    if score["loss"] == "pairwise":
        chosen = [(example, place, side) for example in examples[:n_problems] for place, side in zip(example.pairs[0][:2], ("better", "worse"))]
    else:
        by_problem: dict[str, dict] = {}
        for example in examples:
            by_problem.setdefault(example.id, {}).setdefault("right" if example.label else "wrong", example)
        most_telling = sorted(by_problem.values(), key=len, reverse=True)[:n_problems]
        chosen = [(example, 0, side) for found in most_telling for side, example in sorted(found.items())]
    result, was_training = [], model.training
    model.eval()
    try:
        for example, place, side in chosen:
            row, n = example.responses[place], example.prompt_len
            values = probability(score, response_values(model, [row], [n], where="after").double())
            result.append({"id": example.id, "prompt": tokenizer.decode(row[:n]), "judged": side, "pieces": token_pieces(tokenizer, row[n:]),
                           "probabilities": [round(value, 4) for value in values.tolist()]})
    finally:
        model.train(was_training)
    return result


def pairs_by_label(problems: list, labels: list) -> list[tuple[int, int]]:
    """(right, wrong) places of all pairs of responses to one problem."""
    members = {}
    for i, (problem, label) in enumerate(zip(problems, labels)):
        members.setdefault(problem, ([], []))[not label].append(i)
    return [(i, j) for right, wrong in members.values() for i in right for j in wrong]


def verifier_metrics(raw: list[float], lengths: list[int], problems: list, score: dict, pairs: list[tuple[int, int]], labels: list | None) -> dict:
    """What scores are worth. pairs: (better, worse) places in `raw`, both of one problem. lengths: of responses, in tokens.

    pair_accuracy weighs pairs equally; auc_within_problem, its mean over problems with a pair, weighs those equally. Calibration
    is that of the probability to be right (mse, bce), or of the probability with which the higher-scored of a pair is the better one.
    """
    by_problem = {}
    for better, worse in pairs:
        by_problem.setdefault(problems[better], []).append((raw[better], raw[worse]))
    within = [pair_accuracy(of_problem) for of_problem in by_problem.values()]
    metrics = {"n_responses": len(raw), "n_problems": len(set(problems)), "n_pairs": len(pairs), "n_problems_with_pairs": len(within),
               "pair_accuracy": pair_accuracy([pair for of_problem in by_problem.values() for pair in of_problem]),
               "auc_within_problem": sum(within) / len(within) if within else None}
    if score["loss"] == "pairwise":
        gaps = torch.tensor([raw[better] - raw[worse] for better, worse in pairs], dtype=torch.float64)
        metrics["loss"] = float(torch.nn.functional.softplus(-gaps).mean()) if pairs else None
        p, outcomes = torch.sigmoid(gaps.abs()).tolist(), ((gaps > 0) + 0.5 * (gaps == 0)).tolist()
    else:
        assert labels is not None
        p, outcomes = probability(score, torch.tensor(raw, dtype=torch.float64)).tolist(), [float(label) for label in labels]
        metrics["brier"] = sum((a - b) ** 2 for a, b in zip(p, outcomes)) / len(p)
        metrics["share_right"] = sum(outcomes) / len(outcomes)
    metrics["calibration_error"], metrics["calibration"] = calibration(p, outcomes)
    moments = RunningMoments()
    moments.update(torch.tensor(raw))
    return metrics | {"score_mean": moments.mean, "score_std": math.sqrt(moments.variance), "by_length": score_by_length(raw, lengths)}


def show_verifier(metrics: dict) -> str:
    """The metrics in a few lines for people."""
    share = lambda value: "none" if value is None else f"{value:.1%}"  # noqa: E731
    length = metrics["by_length"]
    trend = "none" if length["correlation"] is None else f"{length['correlation']:+.2f}"
    right = f", {metrics['share_right']:.1%} of them right, squared error {metrics['brier']:.4f}" if "brier" in metrics else ""
    return "\n".join([
        f"pair accuracy {share(metrics['pair_accuracy'])} over {metrics['n_pairs']} pairs; within a problem "
        f"{share(metrics['auc_within_problem'])}, mean of {metrics['n_problems_with_pairs']} problems; {metrics['n_responses']} responses{right}",
        f"calibration error {share(metrics['calibration_error'])}; predicted -> found: "
        + ", ".join(f"{row['probability']:.2f} -> {row['share']:.2f} ({row['n']})" for row in metrics["calibration"]),
        f"correlation of score and length {trend}; mean score by length: "
        + ", ".join(f"up to {quarter['longest']} tokens {quarter['score']:.3f}" for quarter in length["quarters"])])
