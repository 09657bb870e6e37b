"""Advantages, rewards, whitening and running statistics against numbers worked out by hand (the project's algorithm notes, T1-T20).

Inputs are fp64 and tolerances 1e-6, the precision the expected numbers are printed with; where a case runs in fp32, 1e-5.
"""

import math
import re
from pathlib import Path

import pytest
import torch

from llama_rlhf.advantages import (ALGORITHMS, Ema, KLController, RunningMoments, Settings, check_algorithm, dr_grpo_advantages, explained_variance,
                                   gae, grpo_advantages, make_advantages, rewards_to_go, rloo_advantages, shaped_rewards, whiten)

NAN = float("nan")


def t(*rows):
    return torch.tensor(rows if isinstance(rows[0], list) else list(rows), dtype=torch.float64)


def valid(*lengths, width=None):
    return torch.arange(width or max(lengths))[None] < torch.tensor(lengths)[:, None]


def near(got, expected, tolerance=1e-6):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)
    return True


def random_buffer(seed=0, n=6, width=7, dtype=torch.float64):
    """Ragged responses, one with a hole, in groups of two; everything outside the mask is NaN."""
    g = torch.Generator().manual_seed(seed)
    mask = valid(*torch.randint(1, width + 1, (n,), generator=g).tolist(), width=width)
    mask[0] = True
    mask[0, 2:4] = False
    kl, values = (torch.randn(n, width, generator=g, dtype=dtype).masked_fill(~mask, NAN) for _ in range(2))
    return dict(scores=torch.randn(n, generator=g, dtype=dtype), kl=kl, mask=mask, values=values, group_ids=torch.tensor([4, 9, 4, 7, 9, 7])[:n])


# ---- T1: GAE

@pytest.mark.parametrize("lam,bootstrap,advantages,returns", [
    (0.95, None, [0.46575, 0.385, 0.3], [0.96575, 0.985, 1.0]),
    (1.0, None, [0.5, 0.4, 0.3], [1, 1, 1]),
    (0.0, None, [0.1, 0.1, 0.3], [0.6, 0.7, 1]),
    (0.95, 0.8, [1.18775, 1.145, 1.1], [1.68775, 1.745, 1.8])])
@pytest.mark.parametrize("padding", [0, 3])
def test_gae_matches_hand_computed_values_with_and_without_padding_and_bootstrap(lam, bootstrap, advantages, returns, padding):
    pad = [NAN] * padding
    got = gae(t([0, 0, 1] + pad), t([0.5, 0.6, 0.7] + pad), valid(3, width=3 + padding), gamma=1.0, lam=lam,
              bootstrap=None if bootstrap is None else t(bootstrap))
    assert near(got[0], [advantages + [0] * padding]) and near(got[1], [returns + [0] * padding])


def test_gae_discounts_with_gamma_and_lambda():
    advantages, returns = gae(t([0.1, -0.2, 0.3, 1]), t([0.2, 0.4, -0.1, 0.5]), valid(4), gamma=0.99, lam=0.9)
    assert near(advantages, [[0.73738848, 0.4953855, 1.3405, 0.5]]) and near(returns, [[0.93738848, 0.8953855, 1.2405, 1]])


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.8)])
def test_gae_steps_over_a_hole_as_if_it_were_not_there(gamma, lam):
    mask = torch.tensor([[True, True, False, False, True]])
    advantages, returns = gae(t([0, 0, 9, 9, 1]), t([0.5, 0.6, 99, 99, 0.7]), mask, gamma=gamma, lam=lam)
    dense = gae(t([0, 0, 1]), t([0.5, 0.6, 0.7]), valid(3), gamma=gamma, lam=lam)
    assert torch.equal(advantages[mask], dense[0][0]) and torch.equal(returns[mask], dense[1][0])
    assert not advantages[~mask].any() and not returns[~mask].any()
    if gamma == 1.0:
        assert near(advantages, [[0.46575, 0.385, 0, 0, 0.3]]) and near(returns, [[0.96575, 0.985, 0, 0, 1]])


def test_gae_bootstraps_only_the_rows_that_were_cut():
    rewards, values = t([0, 0, 1], [0, 0, 1]), t([0.5, 0.6, 0.7], [0.5, 0.6, 0.7])
    advantages, _ = gae(rewards, values, valid(3, 3), bootstrap=t(0.0, 0.8))
    assert near(advantages, [[0.46575, 0.385, 0.3], [1.18775, 1.145, 1.1]])
    # the value after the last token is one step away, as any next value
    assert near(gae(t([0, 1]), t([0.5, 0.6]), valid(2), gamma=0.5, lam=0.8, bootstrap=t(0.8))[0], [[0.12, 0.8]])


def test_with_lambda_one_the_advantage_is_the_reward_to_go_minus_the_value():
    b = random_buffer(1)
    rewards = shaped_rewards(b["scores"], b["kl"], b["mask"], 0.1)
    advantages, returns = gae(rewards, b["values"], b["mask"], gamma=1.0, lam=1.0)
    to_go = torch.stack([torch.stack([row[i:].sum() for i in range(len(row))]) for row in rewards])     # by hand: holes pay nothing
    near(advantages[b["mask"]], (to_go - b["values"])[b["mask"]], 1e-12)
    near(returns[b["mask"]], to_go[b["mask"]], 1e-12)
    near(rewards_to_go(rewards, b["mask"])[b["mask"]], to_go[b["mask"]], 1e-12)


# ---- T4, T15: rewards

def test_shaped_rewards_put_the_score_on_the_last_valid_token_and_the_kl_on_each():
    rewards = shaped_rewards(t(1.5), t([0.2, -0.5, 0, -1]), valid(4), 0.05)
    assert near(rewards, [[-0.01, 0.025, 0, 1.55]]) and near(rewards.sum(), 1.565)


@pytest.mark.parametrize("mask,expected", [([1, 1, 0, 0], [-0.1, 0.9, 0, 0]), ([1, 0, 1, 0], [-0.1, 0, 0.9, 0]), ([0, 0, 0, 1], [0, 0, 0, 0.9]),
                                           ([0, 0, 0, 0], [0, 0, 0, 0])])
def test_shaped_rewards_find_the_last_valid_token_whatever_the_mask(mask, expected):
    mask = torch.tensor([mask]).bool()
    assert near(shaped_rewards(t(1.0), torch.ones(1, 4, dtype=torch.float64).masked_fill(~mask, NAN), mask, 0.1), [expected])


def test_differences_of_token_scores_sum_to_the_last_one_but_the_scores_themselves_reward_length():
    scores = t([0.2, 0.6, 0.9])
    differences = scores.diff(dim=1, prepend=torch.zeros(1, 1))
    assert near(differences, [[0.2, 0.4, 0.3]])
    terminal = shaped_rewards(scores[:, -1], torch.zeros(1, 3), valid(3), 0.0)
    assert near(rewards_to_go(differences, valid(3))[0, 0], 0.9) and near(rewards_to_go(terminal, valid(3))[0, 0], 0.9)
    assert near(rewards_to_go(scores, valid(3))[0, 0], 1.7)     # the wrong way


# ---- T5: whitening

def test_whitening_uses_every_valid_entry_of_the_buffer_and_the_biased_variance():
    x, mask = t([1, 2, 3, NAN], [4, -1, NAN, NAN]), valid(3, 2, width=4)
    white = whiten(x, mask)
    assert near(white, [[-0.46499055, 0.11624764, 0.69748583, 0], [1.27872402, -1.62746694, 0, 0]])
    assert near(whiten(x, mask, shift_mean=False), [[1.33500945, 1.91624764, 2.49748583, 0], [3.07872402, 0.17253306, 0, 0]])
    for wrong in ([-0.4159002, 0.10397505, 0.62385029],         # Bessel's variance, 3.7
                  [-1.22474486, 0, 1.22474486],                 # each row (or rank) by itself
                  [(v - 1.125) / math.sqrt(2.609375) for v in (1, 2, 3)]):      # the padding's zeros included
        assert (white[0, :3] - t(*wrong)).abs().max() > 0.01


def test_whitened_entries_have_mean_zero_and_variance_one_even_far_from_zero_in_fp32():
    b = random_buffer(2)
    for offset, dtype, tolerance in [(0, torch.float64, 1e-6), (1000, torch.float32, 1e-5)]:
        white = whiten((b["values"] + offset).to(dtype), b["mask"])
        assert white.dtype == dtype and not white[~b["mask"]].any()
        near(white[b["mask"]].double().mean(), 0.0, tolerance)
        near(white[b["mask"]].double().var(correction=0), 1.0, tolerance)


def test_whitening_equal_entries_gives_zeros_and_a_single_one_is_left_alone():
    assert not whiten(torch.full((3, 4), 100.1), torch.ones(3, 4).bool()).any()
    assert near(whiten(t([5.0, NAN]), valid(1, width=2)), [[5.0, 0]])
    assert near(whiten(t([NAN, NAN]), torch.zeros(1, 2).bool()), [[0, 0]])


# ---- T10: groups

def test_group_advantages_of_right_and_wrong_answers():
    scores, one_group = t(1, 0, 0, 1, 1, 0, 0, 0), torch.zeros(8, dtype=torch.long)
    right = scores == 1
    for rule, high, low in [(grpo_advantages, 1.2076124, -0.72456744), (dr_grpo_advantages, 0.625, -0.375),
                            (rloo_advantages, 0.71428571, -0.42857143)]:
        assert near(rule(scores, one_group), torch.where(right, high, low))
    assert (grpo_advantages(scores, one_group) - torch.where(right, 1.29099178, -0.77459507)).abs().min() > 0.01     # the biased std


def test_group_advantages_of_graded_scores():
    scores, one_group = t(1, 0, 0, 0.5), torch.full((4,), 3)
    assert near(grpo_advantages(scores, one_group), [1.30557969, -0.78334782, -0.78334782, 0.26111594])
    assert (grpo_advantages(scores, one_group)[0] - 1.50755309).abs() > 0.1
    assert near(rloo_advantages(scores, one_group), [0.83333333, -0.5, -0.5, 0.16666667])
    others = t(*[scores[i] - scores[torch.arange(4) != i].mean() for i in range(4)])
    assert near(rloo_advantages(scores, one_group), others, 1e-12)


@pytest.mark.parametrize("rule", [grpo_advantages, dr_grpo_advantages, rloo_advantages])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_a_group_of_equal_scores_has_advantages_of_exactly_zero(rule, dtype):
    """0.1 + 0.1 + 0.1 over 3 is not 0.1 in floating point, and the noise over (noise + 1e-6) need not be small."""
    for value in (1, 0.1, 12345.678):
        scores = torch.full((6,), value, dtype=torch.float64).to(dtype)
        assert rule(scores, torch.tensor([0, 1, 0, 1, 0, 1])).tolist() == [0.0] * 6


@pytest.mark.parametrize("rule", [grpo_advantages, dr_grpo_advantages, rloo_advantages])
def test_groups_are_independent_of_row_order_of_other_groups_and_of_a_constant(rule):
    g = torch.Generator().manual_seed(3)
    scores, ids = torch.randn(12, generator=g, dtype=torch.float64), torch.tensor([5, 2, 5, 5, 2, 8, 8, 5, 2, 8, 2, 2])
    plain, order = rule(scores, ids), torch.randperm(12, generator=g)
    near(rule(scores[order], ids[order]), plain[order], 1e-12)
    alone = torch.cat([rule(scores[ids == i], ids[ids == i]) for i in (2, 5, 8)])
    near(alone, torch.cat([plain[ids == i] for i in (2, 5, 8)]), 1e-12)
    near(rule(scores + 100.0 * ids, ids), plain, 1e-11)
    for i in (2, 5, 8):
        near(plain[ids == i].sum(), 0.0, 1e-12)


def test_a_group_of_one_is_an_error_that_names_the_flag():
    for rule in (grpo_advantages, dr_grpo_advantages, rloo_advantages):
        with pytest.raises(ValueError, match="group 7 has one response.*--num_samples_per_prompt 2"):
            rule(t(1, 0, 1), torch.tensor([1, 7, 1]))


# ---- the table: T11, T20 and properties of every row

def test_ppo_shapes_rewards_estimates_and_whitens_the_buffer():
    """T20. Row 0's KL and score are T4's; row 1's are chosen to give the rewards .02 and -.5."""
    got = make_advantages("ppo", t(1.5, -0.5), t([0.2, -0.5, 0, -1], [-0.4, 0, NAN, NAN]), valid(4, 2), settings=Settings(beta=0.05),
                          values=t([0.5, 0.6, 0.7, 0.8], [0.1, 0.2, NAN, NAN]))
    assert near(got.rewards, [[-0.01, 0.025, 0, 1.55], [0.02, -0.5, 0, 0]])
    assert near(got.unwhitened, [[0.94203125, 0.896875, 0.8125, 0.75], [-0.545, -0.7, 0, 0]])
    assert near(got.returns, [[1.44203125, 1.496875, 1.5125, 1.55], [-0.445, -0.5, 0, 0]])
    assert near(got.advantages, [[0.8342501, 0.76959227, 0.64877832, 0.55928652], [-1.29498376, -1.51692344, 0, 0]])


def test_ppo_bootstraps_and_whitens_rewards_on_request():
    kl, values, mask = torch.zeros(1, 3), t([0.5, 0.6, 0.7]), valid(3)
    cut = make_advantages("ppo", t(1.0), kl, mask, settings=Settings(), values=values, bootstrap=t(0.8))
    assert near(cut.unwhitened, [[1.18775, 1.145, 1.1]])
    got = make_advantages("ppo", t(1.0), kl, mask, settings=Settings(whiten_rewards=True), values=values)
    std = math.sqrt(2 / 9)
    assert near(got.rewards, [[0, 0, 1]])       # as they were paid
    near(got.unwhitened, gae(t([1 / 3 - 1 / 3 / std, 1 / 3 - 1 / 3 / std, 1 / 3 + 2 / 3 / std]), values, mask)[0])


def test_reinforce_plus_plus_whitens_the_reward_to_go():
    got = make_advantages("reinforce++", t(1, 0), t([0.1, 0.2, 0], [0.3, -0.1, NAN]), valid(3, 2), settings=Settings(beta=0.1))
    assert near(got.unwhitened, [[0.97, 0.98, 1], [-0.02, 0.01, 0]]) and got.returns is None
    assert near(got.advantages, [[0.78865042, 0.80929572, 0.85058632], [-1.25523418, -1.19329828, 0]])
    later = make_advantages("reinforce++", t(1), t([0, 0, 0]), valid(3), settings=Settings(gamma=0.5))
    assert near(later.unwhitened, [[0.25, 0.5, 1]])


def test_group_methods_give_every_token_its_response_s_advantage_and_only_rloo_charges_the_kl():
    scores, kl, mask, ids = t(1, 0, 0, 0.5), t(*[[0.2, 0.1], [0, 0], [0.4, NAN], [0, 0.2]]), valid(2, 2, 1, 2), torch.zeros(4, dtype=torch.long)
    for name, per_response in [("grpo", [1.30557969, -0.78334782, -0.78334782, 0.26111594]), ("dr_grpo", [0.625, -0.375, -0.375, 0.125]),
                               ("rloo", [0.97 - 0.44 / 3, 0 - 1.41 / 3, -0.04 - 1.45 / 3, 0.48 - 0.93 / 3])]:   # totals less the others' means
        got = make_advantages(name, scores, kl, mask, settings=Settings(beta=0.1), group_ids=ids)
        assert near(got.advantages, t(per_response).T * mask, 1e-6) and got.returns is None
        paid = [[-0.02, 0.99], [0, 0], [-0.04, 0], [0, 0.48]] if name == "rloo" else [[0, 1], [0, 0], [0, 0], [0, 0.5]]
        assert near(got.rewards, paid)


def advantages_of(name, b, **settings):
    row = ALGORITHMS[name]
    return make_advantages(name, b["scores"], b["kl"], b["mask"], settings=Settings(beta=0.1, **settings),
                           values=b["values"] if row.uses_critic else None, group_ids=b["group_ids"])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_row_ignores_what_lies_outside_the_mask_and_commutes_with_the_order_of_rows(name):
    b = random_buffer(4)
    got = advantages_of(name, b)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = advantages_of(name, {key: x[order] for key, x in b.items()})
    wider = advantages_of(name, {key: torch.nn.functional.pad(x, (0, 3), value=False if key == "mask" else NAN) if x.dim() == 2 else x
                                 for key, x in b.items()})
    for field in ("advantages", "unwhitened", "returns", "rewards"):
        x, y, z = getattr(got, field), getattr(moved, field), getattr(wider, field)
        if x is None:
            assert y is None and z is None and field == "returns" and not ALGORITHMS[name].uses_critic
            continue
        assert x.isfinite().all() and not x[~b["mask"]].any() and x[b["mask"]].any() and not x.requires_grad
        near(y, x[order], 1e-12)
        near(z, torch.nn.functional.pad(x, (0, 3)), 1e-12)
    if ALGORITHMS[name].whitens:
        near(got.advantages[b["mask"]].mean(), 0.0)
        near(got.advantages[b["mask"]].var(correction=0), 1.0)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_empty_mask_gives_zeros_and_no_nan(name):
    b = random_buffer(5)
    b["mask"] = torch.zeros_like(b["mask"])
    got = advantages_of(name, b, whiten_rewards=name == "ppo")
    for x in (got.advantages, got.unwhitened, got.rewards, *([] if got.returns is None else [got.returns])):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_bf16_and_whole_number_inputs_are_computed_in_fp32_and_detached(name):
    b = random_buffer(6, dtype=torch.float32)
    b["scores"] = torch.tensor([0, 1, 1, 0, 0, 1])
    b["kl"], b["values"] = b["kl"].bfloat16().requires_grad_(), b["values"].bfloat16().requires_grad_()
    got = advantages_of(name, b)
    assert got.advantages.dtype == got.rewards.dtype == torch.float32 and not got.advantages.requires_grad
    exact = advantages_of(name, {key: x.detach().double() if key in ("scores", "kl", "values") else x for key, x in b.items()})
    near(got.advantages, exact.advantages, 1e-5)


def test_the_table_in_the_guide_is_the_table_of_the_program():
    """Averaging, clipping and KL of a row are wired by its words alone; no test noticed another word."""
    words = {"tokens": "token-mean", "responses, each by its own tokens": "seq-mean-token-mean", "responses × `--max_new_tokens`": "fixed-length",
             "responses (sum over tokens)": "seq-mean-token-sum"}
    guide = (Path(__file__).parent.parent / "docs" / "PPO.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| `([\w+]+)` \| (.*) \| (.*) \| (.*) \| (yes|no) \|$", guide, re.M)
    assert [name for name, *_ in found] == list(ALGORITHMS)
    for name, advantage, averaged, kl, critic in found:
        row = ALGORITHMS[name]
        assert row.aggregation == words[averaged.removesuffix(", no clipping")] and row.clips == ("no clipping" not in averaged)
        assert (row.whitens, row.needs_group, row.uses_critic) == ("whitened" in advantage, "group" in advantage or "other" in advantage, critic == "yes")
        assert kl == (f"{row.kl_estimator} in the {row.kl_in}, {row.kl_coef:g}" if row.kl_coef else f"none (`--kl_coef` adds {row.kl_estimator} to the {row.kl_in})")


def test_check_algorithm_accepts_every_row_with_fitting_options():
    for name, row in ALGORITHMS.items():
        assert check_algorithm(name, n_samples_per_prompt=4, kl_coef=0.05, has_critic_ckpt=row.uses_critic) is row
    assert check_algorithm("dr_grpo", n_samples_per_prompt=2, kl_coef=0.0)
    assert check_algorithm("ppo", kl_coef=0.1, kl_target=6.0, dual_clip=3.0, value_clip=None, whiten_rewards=True, bootstrap_truncated=True)


@pytest.mark.parametrize("name,options,message", [
    ("gpro", {}, "'gpro' is none of ppo, grpo.*did you mean 'grpo'"), ("PPO", {}, "did you mean 'ppo'"), ("sft", {}, "is none of"),
    ("grpo", {"n_samples_per_prompt": 1}, "--num_samples_per_prompt 1 must be at least 2"), ("rloo", {}, "at least 2"),
    ("ppo", {"n_samples_per_prompt": 0}, "at least 1"),
    ("reinforce++", {"has_critic_ckpt": True}, "no critic"), ("reinforce++", {"whiten_rewards": True}, "whiten_rewards"),
    ("reinforce++", {"bootstrap_truncated": True}, "bootstrap_truncated"),
    ("ppo", {"kl_coef": -0.1}, "--kl_coef -0.1"), ("ppo", {"kl_coef": NAN}, "--kl_coef nan"),
    ("grpo", {"n_samples_per_prompt": 2, "kl_coef": 0.1, "kl_target": 6}, "--kl_target.*in the loss"),
    ("ppo", {"kl_coef": 0.1, "kl_target": 0}, "--kl_target 0"), ("ppo", {"kl_target": 6}, "cannot start from 0.0"),
    ("ppo", {"kl_coef": 0.1, "kl_target": 6, "kl_horizon": 0}, "--kl_horizon"),
    ("ppo", {"clip_low": 0}, "clip ranges"), ("ppo", {"clip_high": -1}, "clip ranges"), ("ppo", {"dual_clip": 1.0}, "--dual_clip 1.0"),
    ("rloo", {"n_samples_per_prompt": 2, "dual_clip": 3.0}, "does not clip"), ("ppo", {"value_clip": 0.0}, "--value_clip 0.0"),
    ("ppo", {"gamma": 1.1}, "--gamma 1.1"), ("ppo", {"lam": -0.1}, "--lam -0.1"), ("ppo", {"gamma": NAN}, "--gamma nan")])
def test_check_algorithm_names_what_cannot_go_together(name, options, message):
    with pytest.raises(ValueError, match=message):
        check_algorithm(name, **options)


def test_what_an_algorithm_does_not_use_are_flags():
    import inspect

    import ppo_train
    assert {name for row in ALGORITHMS.values() for name in row.unused} <= set(inspect.signature(ppo_train.main).parameters)
    assert ALGORITHMS["ppo"].unused == []


# ---- T8 (explained variance), T3, T5 (moments), T9: running statistics

def test_explained_variance_is_that_of_the_valid_tokens():
    values, returns = t([0.5, 0.6, 0.7, -0.2]), t([0.9, 0.5, 1, -0.4])
    assert explained_variance(values, returns, valid(4)) == pytest.approx(0.78688525, abs=1e-6)
    padded = torch.cat([values, t([99, NAN])], 1), torch.cat([returns, t([0, NAN])], 1)
    assert explained_variance(*padded, valid(4, width=6)) == pytest.approx(0.78688525, abs=1e-6)
    assert explained_variance(values + 7, returns, valid(4)) == pytest.approx(0.78688525, abs=1e-6)     # an offset does not count
    assert explained_variance(returns, returns, valid(4)) == 1


def test_explained_variance_of_equal_returns_or_of_nothing_is_nan():
    assert math.isnan(explained_variance(t([0.5, 0.6, 0.7]), t([0.1, 0.1, 0.1]), valid(3)))
    assert math.isnan(explained_variance(t([0.5]), t([0.1]), torch.zeros(1, 1).bool()))


@pytest.mark.parametrize("kl,expected", [(12, 0.201024), (1, 0.198976), (6.3, 0.200256), (-2, 0.198976), (6, 0.2)])
def test_adaptive_kl_moves_the_coefficient_towards_its_target_by_a_clipped_step(kl, expected):
    assert KLController(0.2, target=6.0, horizon=10_000).update(kl, 256) == pytest.approx(expected, abs=1e-9)


def test_adaptive_kl_stays_positive_survives_a_checkpoint_and_a_fixed_one_stays():
    controller = KLController(0.2, target=6.0, horizon=10)
    for _ in range(50):
        assert controller.update(0.0, 1000) > 0
    resumed = KLController(0.2, target=6.0, horizon=10)
    resumed.load(controller.state())
    assert resumed.update(9.0, 3) == controller.update(9.0, 3)
    fixed = KLController(0.05)
    assert fixed.update(100.0, 1000) == 0.05
    fixed.load({"coefficient": 0.3})
    assert fixed.coefficient == 0.05
    with pytest.raises(ValueError, match="not a number"):
        controller.update(NAN, 4)


def test_running_moments_of_parts_merge_to_those_of_the_whole():
    a, b = RunningMoments(), RunningMoments()
    a.update(torch.tensor([1, 2, 3]))
    b.update(torch.tensor([4.0, -1.0]))
    assert (a.n, a.mean, a.variance) == (3, 2, pytest.approx(2 / 3)) and (b.n, b.mean, b.variance) == (2, 1.5, 6.25)
    a.merge(b)
    assert (a.n, a.mean, a.variance, a.std) == (5, pytest.approx(1.8), pytest.approx(2.96), pytest.approx(math.sqrt(2.96)))
    assert a.variance != pytest.approx((3 * 2 / 3 + 2 * 6.25) / 5)      # the wrong way: without the distance of the means
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) + 1e4
    parts = RunningMoments()
    for part in x.split(77):
        parts.update(part)
    assert parts.mean == pytest.approx(float(x.double().mean()), rel=1e-12)
    assert parts.std == pytest.approx(float(x.double().std(correction=0)), rel=1e-9)
    resumed = RunningMoments()
    resumed.load(parts.state())
    assert resumed == parts


def test_running_moments_of_nothing_divide_by_one():
    moments = RunningMoments()
    moments.update(torch.zeros(0))
    moments.merge(RunningMoments())
    assert moments == RunningMoments() and moments.std == 1.0
    moments.update(torch.full((5,), 3.0))
    assert (moments.n, moments.mean, moments.variance, moments.std) == (5, 3.0, 0.0, 1.0)


@pytest.mark.parametrize("n", [9, 18, 49])
def test_running_moments_of_equal_numbers_divide_by_one_whatever_their_digits(n):
    """Their mean in fp64 differs from them in its last digit, and what a verifier says alike of all was divided by 1e-16."""
    equal, moments = torch.full((n,), 0.3, dtype=torch.float64).sigmoid(), RunningMoments()
    for _ in range(2):
        moments.update(equal)
    assert (moments.mean, moments.std) == (equal[0], 1.0)


def test_ema_starts_at_the_first_value_and_resumes():
    ema = Ema(0.9)
    assert [ema.update(x) for x in (1, 2, 0)] == pytest.approx([1, 1.1, 0.99], abs=1e-9)
    resumed = Ema(0.9)
    resumed.load(ema.state())
    assert resumed.update(4) == pytest.approx(1.291, abs=1e-9)
