"""Choosing among several answers, and how sure an accuracy is. Plain numbers in, plain numbers out.

Everywhere `n` counts samples, `c` (or `correct`) the correct ones among them. An answer is any hashable value in one
spelling per meaning, as `tasks.gsm8k.extract_tolerant` returns it; None is "no answer" and never gets a vote.
"""

from collections import Counter
from math import comb, isfinite, log, sqrt

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
    tail = sum(comb(b + c, i) for i in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2 ** (b + c))


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


def best_of_n_kl_bound(n):
    """Upper bound, in nats, on KL(best-of-n policy || base policy): ln n - (n-1)/n.

    Often quoted as an equality; that it is only a bound is shown by Beirami et al. 2024, arXiv:2401.01879.
    """
    if n < 1:
        raise ValueError(f"n={n}: needs n >= 1")
    return log(n) - (n - 1) / n


# ----------------------------------------------------------------------------------------------------------------
# Voting


def majority_vote(answers):
    """The most frequent answer (self-consistency, Wang et al. 2022, arXiv:2203.11171); None if nobody answered.

    Of equally frequent answers the one seen first wins.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts, key=counts.get, default=None)  # a Counter keeps first-seen order, and max the first maximum


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
    return max(totals, key=totals.get, default=None)


def top_vote(answers, scores, m):
    """Majority vote among the m best-scored samples (Cobbe et al. 2021, arXiv:2110.14168; m of 3 to 5).

    Samples without an answer are left out before the m best are chosen. Ties go to the better-scored answer.
    """
    _check_votes(answers, scores)
    if m < 1:
        raise ValueError(f"m={m}: needs m >= 1")
    voters = sorted((-score, i) for i, score in enumerate(scores) if answers[i] is not None)
    return majority_vote([answers[i] for _, i in voters[:m]])


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
