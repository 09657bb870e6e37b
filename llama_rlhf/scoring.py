"""Choosing among several answers, and how sure an accuracy is. Plain numbers in, plain numbers out.

Everywhere `n` counts samples, `c` (or `correct`) the correct ones among them. An answer is any hashable value in one
spelling per meaning, as `tasks.gsm8k.extract_tolerant` returns it; None is "no answer" and never gets a vote.
"""

from bisect import bisect_left
from collections import Counter
from math import comb, isfinite, sqrt
from statistics import fmean, quantiles

# ----------------------------------------------------------------------------------------------------------------
# How sure is an accuracy


def wilson_interval(correct, n, z=1.959964):
    """(low, high) for an accuracy of correct/n (Wilson 1927); z = 1.959964 gives 95 %.

    Unlike accuracy +- z * standard error it stays inside [0, 1] and does not collapse at 0 or n correct.
    """
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"correct={correct} of n={n}: needs 0 <= correct <= n and n >= 1")
    p = correct / n
    centre = p + z * z / (2 * n)
    half_width = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half_width) / scale), min(1.0, (centre + half_width) / scale)


def mcnemar_exact(b, c):
    """Two-sided exact p-value that two systems answer the same problems equally well (McNemar 1947, binomial form).

    b: problems only the first system solves; c: only the second. Problems both solve or both miss say nothing.
    """
    if b < 0 or c < 0:
        raise ValueError(f"b={b}, c={c}: counts cannot be negative")
    n, k = b + c, min(b, c)
    term = tail = comb(n, k) / 2**n
    while k and term > 1e-18 * tail:  # each term from the one above it: their sum by `comb` takes minutes at 16,000 problems
        term, k = term * k / (n - k + 1), k - 1
        tail += term
    return min(1.0, 2 * tail)


# ----------------------------------------------------------------------------------------------------------------
# Metrics over k of n samples. All are exact expectations over subsets of size k, not "the first k samples".


def pass_at_k(n, c, k):
    """Probability that at least one of k samples, drawn from n of which c are correct, is correct.

    Chen et al. 2021 (Codex), arXiv:2107.03374, section 2.1: 1 - C(n-c, k) / C(n, k), unbiased where
    1 - (1 - c/n)^k is not. Average it over problems.
    """
    if not 0 <= c <= n:
        raise ValueError(f"n={n}, c={c}: needs 0 <= c <= n")
    _check_k(k, n)
    return 1 - comb(n - c, k) / comb(n, k)


def best_of_k(scores, correct, k):
    """Expected accuracy of taking the best-scored of k samples, over all subsets of size k of the n given.

    scores: one number per sample (from a reward model); correct: one truth value per sample. A sample that
    outranks r others is the best of C(r, k-1) of the C(n, k) subsets: the idea of pass@k, with a verifier in place
    of an oracle. At equal scores the earlier sample wins, as in `best_of_n`.
    """
    n = _check_scores(scores)
    if len(correct) != n:
        raise ValueError(f"{n} scores but {len(correct)} entries in correct")
    _check_k(k, n)
    worst_first = sorted(range(n), key=lambda i: (scores[i], -i))
    return sum(comb(rank, k - 1) for rank, i in enumerate(worst_first) if correct[i]) / comb(n, k)


def best_of_n(scores):
    """Index of the best-scored sample; at equal scores the first."""
    return max(range(_check_scores(scores)), key=lambda i: (scores[i], -i))


# ----------------------------------------------------------------------------------------------------------------
# Voting


def majority_vote(answers):
    """The most frequent answer (self-consistency, Wang et al. 2022, arXiv:2203.11171); None if nobody answered.

    Of equally frequent answers the one seen first wins.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts, key=lambda answer: counts[answer], default=None)  # a Counter keeps first-seen order, and max the first maximum


def weighted_vote(answers, scores):
    """The answer with the largest sum of scores (Li et al. 2022, arXiv:2206.02336, "voting verifier").

    Scores should lie in [0, 1], as probabilities do: with negative ones, being repeated counts against an answer.
    Ties as in `majority_vote`.
    """
    _check_votes(answers, scores)
    totals = {}
    for answer, score in zip(answers, scores):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + score
    return max(totals, key=lambda answer: totals[answer], default=None)


def top_vote(answers, scores, m):
    """Majority vote among the m best-scored samples (Cobbe et al. 2021, arXiv:2110.14168; m of 3 to 5).

    Samples without an answer are left out before the m best are chosen. Ties go to the better-scored answer.
    """
    _check_votes(answers, scores)
    if m < 1:
        raise ValueError(f"m={m}: needs m >= 1")
    voters = sorted((-score, i) for i, score in enumerate(scores) if answers[i] is not None)
    return majority_vote([answers[i] for _, i in voters[:m]])


# ----------------------------------------------------------------------------------------------------------------
# All of these on one set of samples

TOP_VOTERS = 3
WAYS = ("first sample", "majority vote", "weighted vote", f"top-{TOP_VOTERS} vote", "best of n")


def selection(problems):
    """How often each of WAYS to choose one of a problem's answers is right, and what k samples give.

    problems: for each, its samples in order, equally many: {"answer", "correct", "score", "weight"}; equal answers are equally right.
    The weight, in [0, 1], is what a sample's vote counts in the weighted vote.
    Returns the metrics, and {way: [right or not, per problem]} for tests against other systems.
    """
    if len(numbers := {len(samples) for samples in problems}) != 1:
        raise ValueError(f"problems have {min(numbers)} to {max(numbers)} samples: accuracies of different n are not to be averaged")
    n, right = numbers.pop(), {way: [] for way in WAYS}
    for samples in problems:
        answers, scores = [s["answer"] for s in samples], [s["score"] for s in samples]
        correct = {s["answer"]: s["correct"] for s in samples if s["answer"] is not None}
        votes = majority_vote(answers), weighted_vote(answers, [s["weight"] for s in samples]), top_vote(answers, scores, TOP_VOTERS)
        best = samples[best_of_n(scores)]["correct"]
        for way, value in zip(WAYS, (samples[0]["correct"], *(correct.get(vote, False) for vote in votes), best)):
            right[way].append(bool(value))
    ways = {way: {"accuracy": fmean(hits), "correct": sum(hits), "interval": list(wilson_interval(sum(hits), len(hits)))}
            for way, hits in right.items()}
    by_k = {}
    for k in sorted({n, *(2**i for i in range(n.bit_length()) if 2**i <= n)}):
        passes = [pass_at_k(len(samples), sum(s["correct"] for s in samples), k) for samples in problems]
        best = [best_of_k([s["score"] for s in samples], [s["correct"] for s in samples], k) for samples in problems]
        by_k[str(k)] = {name: {"accuracy": fmean(values), "interval": list(wilson_interval(sum(values), len(values)))}
                        for name, values in (("pass", passes), ("best", best))}
    pairs = {f"best of n against {way}": compare_paired(right[way], right["best of n"]) for way in WAYS[:2]}
    return {"n_samples": n, "n_problems": len(problems), "ways": ways, "by_k": by_k, "paired": pairs}, right


def compare_paired(was, now):
    """What changed on the same problems, with the exact McNemar test. was, now: truth values per problem."""
    gained, lost = sum(b and not a for a, b in zip(was, now)), sum(a and not b for a, b in zip(was, now))
    return {"n": len(was), "gained": gained, "lost": lost, "p": mcnemar_exact(gained, lost)}


# ----------------------------------------------------------------------------------------------------------------
# How good are scores


def pair_accuracy(pairs):
    """Share of pairs (score of the better, score of the worse) that the scores order rightly; ties count half.

    Over all pairs of right and wrong answers this is the area under the ROC curve. None without a pair.
    """
    return fmean((better > worse) + 0.5 * (better == worse) for better, worse in pairs) if pairs else None


def calibration(probabilities, outcomes, n_bins=10):
    """Expected calibration error (Naeini et al. 2015) and its bins: {"low", "high", "n", "probability", "share"}, no empty ones.

    outcomes: in [0, 1]. A bin holds low < p <= high, the first also p = 0.
    """
    bins = {}
    for p, outcome in zip(probabilities, outcomes, strict=True):
        if not 0 <= p <= 1:
            raise ValueError(f"{p} is no probability")
        place = bisect_left([(i + 1) / n_bins for i in range(n_bins - 1)], p)
        bins.setdefault(place, []).append((p, outcome))
    table = [{"low": i / n_bins, "high": (i + 1) / n_bins, "n": len(members), "probability": fmean(p for p, _ in members),
              "share": fmean(outcome for _, outcome in members)} for i, members in sorted(bins.items())]
    n = sum(row["n"] for row in table)
    return sum(row["n"] * abs(row["probability"] - row["share"]) for row in table) / n if n else None, table


def score_by_length(scores, lengths):
    """Correlation of score and length, and the mean score of each quarter of the lengths. Equal lengths share a quarter.

    The correlation is None where one of them never varies.
    """
    x, y = ([value - mean for value in values] for values, mean in ((lengths, fmean(lengths)), (scores, fmean(scores))))
    norms = sqrt(sum(a * a for a in x)), sqrt(sum(b * b for b in y))
    bounds = quantiles(lengths, n=4, method="inclusive") if len(lengths) > 1 else []
    quarters = {}
    for length, score in zip(lengths, scores, strict=True):
        quarters.setdefault(bisect_left(bounds, length), []).append((length, score))
    varies = all(norms) and len(set(scores)) > 1 and len(set(lengths)) > 1       # the mean of equal numbers may differ from them in its last digit
    return {"correlation": sum(a * b for a, b in zip(x, y)) / (norms[0] * norms[1]) if varies else None,
            "quarters": [{"longest": max(length for length, _ in members), "n": len(members), "score": fmean(score for _, score in members)}
                         for _, members in sorted(quarters.items())]}


def _check_k(k, n):
    if not 1 <= k <= n:
        raise ValueError(f"k={k}, n={n}: needs 1 <= k <= n. Draw at least k samples a problem, or lower k")


def _check_votes(answers, scores):
    _check_scores(scores)
    if len(answers) != len(scores):
        raise ValueError(f"{len(answers)} answers but {len(scores)} scores")


def _check_scores(scores):
    if not len(scores):
        raise ValueError("scores is empty: needs at least one sample")
    for i, score in enumerate(scores):
        if not isfinite(score):  # NaN compares false with everything and would win or lose by position
            raise ValueError(f"scores[{i}] is {score}: scores must be finite")
    return len(scores)
