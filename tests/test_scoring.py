"""Votes, pass@k and intervals, against numbers worked out elsewhere and against plain enumeration."""

import itertools
import math
import random
from statistics import NormalDist

import pytest

from llama_rlhf import scoring
from llama_rlhf.scoring import (
    best_of_k,
    best_of_n,
    majority_vote,
    mcnemar_exact,
    pass_at_k,
    score_by_length,
    top_vote,
    weighted_vote,
    wilson_interval,
)

ANSWERS = ["8", "8", "7", "7", "7", "12"]
SCORES = [0.9, 0.8, 0.2, 0.3, 0.1, 0.95]


@pytest.mark.parametrize(
    "n, c, k, expected",
    [
        (10, 3, 1, 0.3),
        (10, 3, 5, 0.91666667),
        (10, 3, 10, 1),
        (4, 1, 2, 0.5),
        (5, 0, 3, 0),
        (5, 5, 1, 1),
        (8, 3, 4, 0.92857143),
        (100, 5, 10, 0.41624763),
    ],
)
def test_pass_at_k_known_values(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-8)


def test_pass_at_k_equals_the_share_of_subsets_with_a_correct_sample():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([i < c for i in range(n)], k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_stays_finite_for_many_samples():
    assert 0 < pass_at_k(20_000, 1, 100) == pytest.approx(100 / 20_000)


@pytest.mark.parametrize("n, c, k", [(2, 0, 5), (2, 2, 3), (5, 6, 1), (5, -1, 1), (5, 2, 0), (0, 0, 1)])
def test_pass_at_k_refuses_what_has_no_meaning(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    "scores, expected",
    [
        ([0.1, 0.4, 0.35, 0.8], [0.5, 0.83333333, 1, 1]),
        ([0.9, 0.4, 0.35, 0.8], [0.5, 0.5, 0.25, 0]),  # a bad verifier gets worse with k
    ],
)
def test_best_of_k_known_values(scores, expected):
    got = [best_of_k(scores, [0, 1, 0, 1], k) for k in (1, 2, 3, 4)]
    assert got == pytest.approx(expected, abs=1e-8)


def test_best_of_k_equals_picking_the_best_of_every_subset():
    r = random.Random(0)
    for _ in range(60):
        n = r.randint(1, 7)
        scores = [r.randint(0, 3) for _ in range(n)]  # few values, so ties are common
        correct = [r.random() < 0.5 for _ in range(n)]
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(range(n), k))
            hits = sum(correct[max(subset, key=lambda i: scores[i])] for subset in subsets)  # max keeps the first
            assert best_of_k(scores, correct, k) == pytest.approx(hits / len(subsets), abs=1e-12)


def test_best_of_k_with_the_truth_as_score_is_pass_at_k():
    correct = [0, 1, 0, 0, 1, 0]
    for k in range(1, 7):
        assert best_of_k(correct, correct, k) == pytest.approx(pass_at_k(6, 2, k))


def test_best_of_k_at_n_is_best_of_n():
    assert best_of_n(SCORES) == 5 and ANSWERS[best_of_n(SCORES)] == "12"
    assert best_of_n([0.5, 0.9, 0.9]) == 1
    assert best_of_k([0.5, 0.9, 0.9], [0, 1, 0], 3) == 1


def test_the_three_votes_differ_where_they_should():
    assert majority_vote(ANSWERS) == "7"
    assert weighted_vote(ANSWERS, SCORES) == "8"  # 1.7 against 0.6 and 0.95
    assert top_vote(ANSWERS, SCORES, 3) == "8"
    assert top_vote(ANSWERS, SCORES, 1) == "12"
    assert top_vote(ANSWERS, SCORES, 100) == "7"


def test_no_answer_never_wins_a_vote():
    assert majority_vote([None, None, None, "5"]) == "5"
    assert weighted_vote([None, None, "5"], [1.0, 1.0, 0.1]) == "5"
    assert top_vote([None, None, "5"], [1.0, 1.0, 0.1], 1) == "5"
    assert majority_vote([None]) is majority_vote([]) is weighted_vote([None], [1.0]) is None


def test_ties_go_to_the_answer_seen_first_and_in_top_vote_to_the_better_scored():
    assert majority_vote(["3", "9", "9", "3"]) == "3"
    assert majority_vote(["9", "3", "3", "9"]) == "9"
    assert weighted_vote(["9", "3"], [0.5, 0.5]) == "9"
    assert top_vote(["9", "3", "4"], [0.5, 0.7, 0.1], 2) == "3"


@pytest.mark.parametrize(
    "correct, n, low, high",
    [(660, 1319, 0.47343336, 0.52732259), (8, 10, 0.49015685, 0.94331905), (0, 10, 0, 0.27754017)],
)
def test_wilson_interval_known_values(correct, n, low, high):
    assert wilson_interval(correct, n, z=1.96) == pytest.approx((low, high), abs=1e-7)


def test_wilson_default_is_95_percent():
    assert wilson_interval(8, 10) == pytest.approx(wilson_interval(8, 10, NormalDist().inv_cdf(0.975)), abs=1e-7)


def test_wilson_bounds_are_where_the_score_test_just_rejects():
    """The definition: at either end p, the observed share lies exactly z standard errors (computed from p) away."""
    z = 1.6
    for correct, n in [(3, 17), (1, 40), (250, 300)]:
        for p in wilson_interval(correct, n, z):
            assert abs(correct / n - p) / math.sqrt(p * (1 - p) / n) == pytest.approx(z)


def test_wilson_interval_mirrors_and_stays_within_zero_and_one():
    low, high = wilson_interval(10, 10)
    assert (1 - high, 1 - low) == pytest.approx(wilson_interval(0, 10))
    assert 0 < low < high <= 1


def test_scores_that_never_vary_have_no_correlation_with_length():
    """fmean of equal numbers need not be that number: a collapsed verifier was said to prefer long, or short, responses."""
    r = random.Random(0)
    for _ in range(200):
        constant, varying = [r.random()] * r.randint(2, 30), r.random()
        lengths = list(range(len(constant)))
        assert score_by_length(constant, lengths)["correlation"] is None and score_by_length(lengths, constant)["correlation"] is None
        assert score_by_length([varying, *constant], [0, *lengths])["correlation"] is not None


def test_means_of_scores_and_lengths_are_taken_once(monkeypatch):
    """Taken anew for every answer, they made 25,600 answers last 40 seconds."""
    taken, mean = [], scoring.fmean
    monkeypatch.setattr(scoring, "fmean", lambda values: taken.append(1) or mean(values))
    score_by_length([i * 7 % 11 / 11 for i in range(100)], list(range(100)))
    assert len(taken) == 6      # two, and one of each quarter


@pytest.mark.parametrize("b, c, p", [(15, 5, 0.04138947), (30, 10, 0.00222143), (3, 1, 0.625), (0, 0, 1), (4, 4, 1)])
def test_mcnemar_known_values(b, c, p):
    assert mcnemar_exact(b, c) == pytest.approx(p, abs=1e-8)
    assert mcnemar_exact(c, b) == mcnemar_exact(b, c)


def test_mcnemar_of_many_problems_takes_one_binomial_coefficient(monkeypatch):
    """One for each term took two minutes at 16,000 problems that each side alone had right."""
    taken = []
    monkeypatch.setattr(scoring, "comb", lambda n, k: taken.append(k) or math.comb(n, k))
    assert mcnemar_exact(5000, 5200) == pytest.approx(NormalDist().cdf(-199 / 10200**0.5) * 2, rel=1e-3)
    assert taken == [5000]


def test_mcnemar_equals_counting_coin_flips():
    for b, c in [(0, 5), (1, 6), (2, 4), (5, 3)]:
        flips = list(itertools.product([0, 1], repeat=b + c))
        as_extreme = sum(abs(2 * sum(flip) - (b + c)) >= abs(b - c) for flip in flips)
        assert mcnemar_exact(b, c) == pytest.approx(as_extreme / len(flips))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: wilson_interval(5, 0), "correct=5 of n=0"),
        (lambda: wilson_interval(0, 0), "n >= 1"),
        (lambda: wilson_interval(11, 10), "correct=11 of n=10"),
        (lambda: mcnemar_exact(-1, 2), "cannot be negative"),
        (lambda: best_of_k([0.1, 0.2], [1], 1), "2 scores but 1 entries"),
        (lambda: best_of_k([0.1, 0.2], [1, 0], 3), "k=3, n=2"),
        (lambda: best_of_n([]), "scores is empty"),
        (lambda: best_of_n([0.1, math.nan]), r"scores\[1\] is nan"),
        (lambda: weighted_vote(["1"], [0.1, 0.2]), "1 answers but 2 scores"),
        (lambda: top_vote(["1"], [0.1], 0), "m=0"),
    ],
)
def test_meaningless_input_is_refused_with_its_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()
