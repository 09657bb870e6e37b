"""Policy, value, KL, reward-model losses and their averaging against numbers worked out by hand (the project's algorithm notes, T2-T16).

Inputs are fp64 and tolerances 1e-6, the precision the expected numbers are printed with; token_logprobs is fp32: 1e-6 as well.
"""

import math

import pytest
import torch
from ranks import run_ranks

from llama_rlhf.advantages import Settings, explained_variance, gae, make_advantages, whiten
from llama_rlhf.losses import aggregation_weights, kl_estimate, pairwise_loss, policy_loss, token_logprobs, value_loss, verifier_loss

MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "fixed-length"]


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def near(got, expected, tolerance=1e-6):
    torch.testing.assert_close(torch.as_tensor(got).detach().double(), torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)
    return True


def gradient(loss_of, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss_of(x).sum(), x)[0]


# ---- T2: estimates of the KL

LOGPROBS, REFERENCE = t(-1, -2, -0.5, -3), t(-1.2, -1.5, -0.5, -2)


@pytest.mark.parametrize("kind,values,mean", [
    ("k1", [0.2, -0.5, 0, -1], -0.325), ("k2", [0.02, 0.125, 0, 0.5], 0.16125), ("k3", [0.01873075, 0.14872127, 0, 0.71828183], 0.22143346)])
def test_kl_estimates_per_token(kind, values, mean):
    got = kl_estimate(LOGPROBS, REFERENCE, kind)
    assert near(got, values) and near(got.mean(), mean)


@pytest.mark.parametrize("kind,expected", [("k1", [1, 1, 1, 1]), ("k2", [0.2, -0.5, 0, -1]), ("k3", [0.18126925, -0.64872127, 0, -1.71828183])])
def test_gradients_of_kl_estimates_used_as_losses(kind, expected):
    assert near(gradient(lambda x: kl_estimate(x, REFERENCE, kind), LOGPROBS), expected)


def test_k1_and_k3_have_the_exact_kl_as_mean_and_k2_has_not():
    policy, reference = t(0.5, 0.3, 0.2), t(0.4, 0.4, 0.2)
    mean = {kind: (policy * kl_estimate(policy.log(), reference.log(), kind)).sum() for kind in ("k1", "k2", "k3")}
    assert near(mean["k1"], 0.02526715) and near(mean["k3"], 0.02526715) and near(mean["k2"], 0.02486241)


@pytest.mark.parametrize("kind,same", [("k1", False), ("k2", True), ("k3", False)])
def test_only_k2_has_the_gradient_of_the_kl_on_policy(kind, same):
    """Expected gradient of the loss over tokens drawn from the policy, against the gradient of sum p log(p/q)."""
    logits, q = t(0.3, -0.2, 0.5), t(0.4, 0.4, 0.2)

    def expected_loss(z):
        logp = z.log_softmax(0)
        return (logp.exp().detach() * kl_estimate(logp, q.log(), kind)).sum()

    exact = gradient(lambda z: (z.softmax(0) * (z.log_softmax(0) - q.log())).sum(), logits)
    assert torch.allclose(gradient(expected_loss, logits), exact, rtol=0, atol=1e-12) == same


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_never_negative_and_always_finite(dtype):
    g = torch.Generator().manual_seed(0)
    for scale in (1e-7, 1e-5, 1e-3, 1.0, 100.0):
        d = torch.randn(20_000, generator=g, dtype=dtype) * scale
        k3 = kl_estimate(d, torch.zeros_like(d), "k3")
        assert (k3 >= 0).all() and k3.isfinite().all()
    assert not kl_estimate(t(-1.0), t(-1.0), "k3").any()


def test_an_unknown_kl_estimator_is_refused():
    with pytest.raises(ValueError, match="'k4': use k1, k2 or k3"):
        kl_estimate(LOGPROBS, REFERENCE, "k4")


# ---- T6: policy loss and its averaging

OLD, NEW, ADVANTAGES, LENGTHS = t(-1, -1, -1, -2, -2), t(-0.7, -1.4, -1.05, -2.1, -0.8), t(1, 1, 1, -0.5, -0.5), [3, 2]


def mean_loss(losses, aggregation, lengths=LENGTHS, max_new_tokens=4):
    weights, count = aggregation_weights(lengths, aggregation, max_new_tokens)
    return (weights * losses).sum() / count


def test_policy_loss_per_token_and_its_statistics():
    loss, statistics = policy_loss(NEW, OLD, ADVANTAGES)
    means = {name: float(value.double().mean()) for name, value in statistics.items()}
    assert near(statistics["ratio"], [1.34985881, 0.67032005, 0.95122942, 0.90483742, 3.32011692])
    assert near(loss, [-1.2, -0.67032005, -0.95122942, 0.45241871, 1.66005846])
    assert statistics["clipped"].tolist() == [True, False, False, False, False]
    assert means == pytest.approx({"ratio": 1.43927252, "clipped": 0.2, "outside": 0.6, "old_approx_kl": -0.19, "approx_kl": 0.24927252,
                                   "lower_clipped": 0}, abs=1e-6)
    assert means["approx_kl"] != pytest.approx(0.15579533, abs=0.05)         # the wrong way: over the 8 slots of the padded rows
    assert near(kl_estimate(OLD, NEW, "k2").mean(), 0.17025) and near(kl_estimate(OLD, NEW, "k1").mean(), -0.19)
    assert near(kl_estimate(OLD, NEW, "k3"), statistics["approx_kl"], 1e-12)
    assert near(statistics["ratio"].max(), 3.32011692) and near(statistics["ratio"].min(), 0.67032005)


@pytest.mark.parametrize("aggregation,expected", list(zip(MODES, [-0.14181446, 0.05786105, -0.35453615, -0.08863404])))
def test_each_aggregation_of_the_same_token_losses(aggregation, expected):
    assert near(mean_loss(policy_loss(NEW, OLD, ADVANTAGES)[0], aggregation), expected)


def test_policy_gradient_is_minus_advantage_times_ratio_and_zero_where_clipped():
    got = gradient(lambda new: mean_loss(policy_loss(new, OLD, ADVANTAGES)[0], "token-mean"), NEW)
    assert near(got, [0, -0.13406401, -0.19024588, 0.09048374, 0.33201169])


def test_asymmetric_clip_range():
    loss, _ = policy_loss(NEW, OLD, ADVANTAGES, clip_low=0.2, clip_high=0.28)
    assert near(loss[0], -1.28) and near(mean_loss(loss, "token-mean"), -0.15781446)
    _, statistics = policy_loss(t(0.25, -0.25), t(0, 0), t(1, 1), clip_low=0.3, clip_high=0.2)      # ratios 1.284, .7788
    assert statistics["outside"].tolist() == [True, False]


def test_dual_clip_bounds_the_loss_of_negative_advantages_and_stops_their_gradient():
    new, old, advantages = t(1.5, 1.5), t(0, 0), t(-1, 1)
    loss, statistics = policy_loss(new, old, advantages)
    assert near(statistics["ratio"][0], 4.48168907) and near(loss[0], 4.48168907) and not statistics["lower_clipped"].any()
    loss, statistics = policy_loss(new, old, advantages, dual_clip=3.0)
    assert near(loss, [3.0, -1.2]) and statistics["lower_clipped"].tolist() == [True, False]
    assert gradient(lambda x: policy_loss(x, old, advantages, dual_clip=3.0)[0], new).tolist() == [0, 0]
    assert gradient(lambda x: policy_loss(x, old, advantages)[0], new)[0] == pytest.approx(4.48168907, abs=1e-6)


def test_unchanged_policy_has_ratio_one_no_kl_no_clipping_and_the_plain_policy_gradient():
    g = torch.Generator().manual_seed(0)
    logprobs, advantages = -torch.rand(50, generator=g) * 9, torch.randn(50, generator=g)
    for options in ({}, {"dual_clip": 3.0}, {"clip_low": math.inf, "clip_high": math.inf}):
        loss, statistics = policy_loss(logprobs, logprobs, advantages, **options)
        assert torch.equal(loss, -advantages) and (statistics["ratio"] == 1).all()
        for name in ("approx_kl", "old_approx_kl", "clipped", "outside", "lower_clipped"):
            assert not statistics[name].any()
        assert torch.equal(gradient(lambda x: policy_loss(x, logprobs, advantages, **options)[0], logprobs), -advantages)


def test_infinite_clip_range_is_plain_importance_weighting():
    loss, statistics = policy_loss(NEW, OLD, ADVANTAGES, clip_low=math.inf, clip_high=math.inf)
    assert near(loss, -ADVANTAGES * (NEW - OLD).exp(), 1e-12) and not statistics["clipped"].any() and not statistics["outside"].any()


def test_policy_loss_stays_finite_for_absurd_ratios_and_keeps_statistics_out_of_the_graph():
    new = torch.tensor([0.0, -1000.0], requires_grad=True)
    loss, statistics = policy_loss(new, torch.tensor([-1000.0, 0.0]), torch.tensor([-1.0, -1.0]))
    loss.sum().backward()
    assert loss.isfinite().all() and new.grad.isfinite().all() and near(statistics["ratio"].log(), [20, -20], 1e-5)
    assert not any(value.requires_grad for value in statistics.values())
    half, _ = policy_loss(new.detach().bfloat16(), new.detach().bfloat16(), torch.ones(2).bfloat16())
    assert half.dtype == torch.float32


# ---- T16: one step's loss however it is split

def test_a_step_s_loss_is_over_all_its_tokens_not_a_mean_of_means():
    parts = [t(2, 2, 2, 2), t(5)]
    weighted = [(aggregation_weights([len(part)], "token-mean"), part) for part in parts]
    assert near(sum((w * part).sum() for (w, _), part in weighted) / sum(n for (_, n), _ in weighted), 2.6)
    assert sum(part.mean() for part in parts) / 2 == 3.5        # the wrong way


def test_local_sums_over_the_global_count_average_to_the_global_mean():
    loss, _ = policy_loss(NEW, OLD, ADVANTAGES)
    sums = [loss[:3].sum() * 2 / 5, loss[3:].sum() * 2 / 5]
    assert near(sums[0], -1.12861979) and near(sums[1], 0.84499087) and near(sum(sums) / 2, mean_loss(loss, "token-mean"))
    assert near((loss[:3].mean() + loss[3:].mean()) / 2, 0.05786105) and abs(0.05786105 - mean_loss(loss, "token-mean")) > 0.1       # the wrong way


@pytest.mark.parametrize("aggregation", MODES)
def test_loss_and_gradient_do_not_depend_on_micro_batches_nor_on_the_order_of_responses(aggregation):
    g = torch.Generator().manual_seed(1)
    lengths = [3, 1, 5, 0, 2, 4]
    new, old, advantages = (torch.randn(sum(lengths), generator=g, dtype=torch.float64) for _ in range(3))
    rows = torch.arange(sum(lengths)).split(lengths)

    def loss_of(x, split):
        total, count = 0.0, 0
        for batch in split:
            index = torch.cat([rows[i] for i in batch] or [rows[3]])
            weights, n = aggregation_weights([lengths[i] for i in batch], aggregation, 5)
            total, count = total + (weights * policy_loss(x[index], old[index], advantages[index])[0]).sum(), count + n
        return total / count

    whole = [[0, 1, 2, 3, 4, 5]]
    for split in ([[5, 4, 3, 2, 1, 0]], [[0, 1], [2, 3, 4], [5]], [[2], [3], [], [5, 0], [4, 1]]):
        near(loss_of(new, split), loss_of(new, whole), 1e-7)        # the weights are fp32
        near(gradient(lambda x: loss_of(x, split), new), gradient(lambda x: loss_of(x, whole), new), 1e-7)


def test_aggregation_weights_count_tokens_or_responses_and_skip_empty_ones():
    expected = {"token-mean": ([1, 1, 1, 1, 1], 5), "seq-mean-token-mean": ([1 / 3] * 3 + [1 / 2] * 2, 2),
                "seq-mean-token-sum": ([1, 1, 1, 1, 1], 2), "fixed-length": ([1 / 8] * 5, 2)}
    for aggregation, (weights, count) in expected.items():
        got = aggregation_weights([3, 0, 2], aggregation, 8)
        assert near(got[0], weights, 1e-7) and got[0].dtype == torch.float32 and got[1] == count and isinstance(got[1], int)
        empty = aggregation_weights([], aggregation, 8)
        assert empty[0].shape == (0,) and empty[1] == 0
    for lengths, aggregation, n in [([3], "mean", 8), ([9], "fixed-length", 8), ([1], "fixed-length", 0), ([], "fixed-length", 0)]:
        with pytest.raises(ValueError, match="aggregation"):
            aggregation_weights(lengths, aggregation, n)


# ---- T7: value loss

def test_value_loss_is_half_the_larger_of_the_two_squares():
    values, old, returns = t(1, 0.3, -0.5), t(0.5, 0.4, 0), t(2, 0, -0.1)       # the fourth, masked token of T7 never gets here
    loss, clipped = value_loss(values, old, returns, clip=0.2)
    assert near(loss, [0.845, 0.045, 0.08]) and near(loss.mean(), 0.32333333) and clipped.tolist() == [True, False, False]
    assert near(gradient(lambda v: value_loss(v, old, returns)[0], values), [0, 0.3, -0.4])
    plain, none = value_loss(values, old, returns, clip=None)
    assert near(plain.mean(), 0.20833333) and not none.any()
    assert near(gradient(lambda v: value_loss(v, old, returns, clip=None)[0], values), values - returns)
    sb3 = (old + (values - old).clamp(-0.2, 0.2) - returns).square().mean()
    assert near(sb3, 0.59666667) and abs(sb3 - loss.mean()) > 0.1       # another algorithm's: the clipped prediction only, no half


def test_inside_the_clip_range_no_value_counts_as_clipped():
    """In fp32 old + (V - old) often differs from V in the last bit (37 % of pairs of small numbers), which would show up as clipped tokens."""
    g = torch.Generator().manual_seed(0)
    old, values, returns = (scale * torch.randn(5000, generator=g) for scale in (0.03, 0.03, 1.0))
    loss, clipped = value_loss(values, old, returns, clip=0.2)
    assert not clipped.any() and torch.equal(loss, 0.5 * (values - returns).square())
    assert (old - values).abs().max() < 0.2 and (old + (values - old).clamp(-0.2, 0.2) != values).float().mean() > 0.3


# ---- T8: temperature, entropy, log-probabilities over a split vocabulary

@pytest.mark.parametrize("temperature,logprobs,entropy", [(1.0, [-0.40760596, -1.40760596, -2.40760596], 0.83239558),
                                                          (0.7, [-0.2601184, -1.68868983, -3.11726126], 0.65057265)])
@pytest.mark.parametrize("constant", [0.0, 7.0])
def test_logprobs_and_entropy_at_a_temperature_whatever_is_added_to_all_logits(world_of_one, temperature, logprobs, entropy, constant):
    hidden = (torch.tensor([2.0, 1.0, 0.0]) + constant).repeat(3, 1)
    got = token_logprobs(hidden, torch.eye(3), torch.arange(3), temperature=temperature, with_entropy=True)
    assert near(got[0], logprobs, 2e-6) and near(got[1], [entropy] * 3, 2e-6)
    assert near(got[0].exp(), {1.0: [0.66524096, 0.24472847, 0.09003057], 0.7: [0.7709603, 0.18476143, 0.04427827]}[temperature], 2e-6)


def split_vocabulary():
    from llama_rlhf.parallel import groups
    groups.initialize(device="cpu")
    hidden, head = torch.tensor([[2.0, 1, 0, -1]]).repeat(4, 1), torch.eye(4)
    start = 2 * groups.tp_rank()
    got = token_logprobs(hidden, head[start:start + 2], torch.arange(4), vocab_start=start, with_entropy=True)
    groups.shutdown()
    return [x.tolist() for x in got]


def test_logprobs_and_entropy_over_a_vocabulary_on_two_ranks():
    for logprobs, entropy in run_ranks(2, split_vocabulary):
        assert near(logprobs, [-0.4401897, -1.4401897, -2.4401897, -3.4401897]) and near(entropy, [0.94753696] * 4)


def test_masked_nll_from_logits(world_of_one):
    """T16's supervised case: the first token is prompt."""
    logits = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [1, 1, 1]])
    nll = -token_logprobs(logits, torch.eye(3), torch.tensor([0, 2, 2, 1]))
    assert near(nll, [0.23954477, 2.23954477, 0.23954477, 1.09861229])
    loss = mean_loss(nll[1:], "token-mean", [3])
    assert near(loss, 1.19256727) and near(loss.exp(), 3.29553089, 1e-5)


def test_ratio_uses_log_probabilities_so_that_shifting_all_logits_changes_nothing(world_of_one):
    """An early PPO took exp(logit - old logit), which a constant on all logits changes though the policy is the same."""
    logits, targets, advantages = torch.tensor([[2.0, 1, 0], [0.5, -1, 3]]), torch.tensor([1, 2]), torch.tensor([1.0, -1.0])
    old = token_logprobs(logits, torch.eye(3), targets)
    new = token_logprobs(logits + torch.tensor([[3.0], [-5.0]]), torch.eye(3), targets)
    loss, statistics = policy_loss(new, old, advantages)
    assert near(statistics["ratio"], [1, 1], 2e-6) and near(loss, -advantages, 2e-6)


# ---- T14, T15: reward models and verifiers

def test_pairwise_loss_margin_and_centring():
    chosen, rejected = t(1.2, 0.3), t(0.5, 0.8)
    plain = pairwise_loss(chosen, rejected)
    assert near(plain, [0.40318605, 0.97407698]) and near(plain.mean(), 0.68863152)
    assert near(plain, (chosen.exp() + rejected.exp()).log() - chosen)
    assert near(pairwise_loss(chosen, rejected, margin=0.5).mean(), 0.95570028)
    assert near(pairwise_loss(chosen, rejected, margin=t(0.5, 0.5)), pairwise_loss(chosen, rejected, margin=0.5))
    assert near(pairwise_loss(chosen, rejected, centre=0.01).mean() - plain.mean(), 0.0205)
    assert near(pairwise_loss(t(0.0), t(0.0)), [math.log(2)])


def test_pairwise_loss_is_finite_where_the_sigmoid_is_zero():
    for dtype in (torch.float32, torch.bfloat16):
        loss = pairwise_loss(torch.tensor([-100.0, 100.0], dtype=dtype), torch.zeros(2, dtype=dtype))
        assert loss.dtype == torch.float32 and near(loss, [100.0, 0.0], 1e-5)
    assert gradient(lambda x: pairwise_loss(x, t(0.0)), t(-1000.0)).item() == -1


def test_verifier_loss_over_tokens():
    predictions, labels = t(0.2, 0.6, 0.9, 0.4, 0.1), torch.tensor([1, 1, 1, 0, 0])
    assert near(verifier_loss(predictions, labels).mean(), 0.196) and near(verifier_loss(predictions, labels, "bce").mean(), 0.60683852)
    assert near(verifier_loss(t(0.4), t(1.0), "bce"), [0.51301525]) and near(verifier_loss(t(-1000.0), t(1.0), "bce"), [1000.0])
    assert near(gradient(lambda p: verifier_loss(p, labels), predictions), 2 * (predictions - labels))
    with pytest.raises(ValueError, match="use mse or bce"):
        verifier_loss(predictions, labels, "hinge")


# ---- together

def test_no_tokens_give_a_loss_of_zero_with_a_gradient():
    x = torch.zeros(0, requires_grad=True)
    fixed = x.detach()
    for loss in (policy_loss(x, fixed, fixed)[0], value_loss(x, fixed, fixed)[0], kl_estimate(x, fixed, "k3"), verifier_loss(x, fixed)):
        assert loss.sum() == 0 and loss.requires_grad


def test_from_buffer_to_critic_the_pieces_fit():
    """T20 to the losses: packed by the mask, the first step has loss -mean(advantages) = 0 and a value loss of A^2/2."""
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    values = torch.tensor([[0.5, 0.6, 0.7, 0.8], [0.1, 0.2, 0, 0]], dtype=torch.float64)
    logprobs, reference = torch.stack([LOGPROBS, LOGPROBS]), torch.stack([REFERENCE, REFERENCE])
    kl = kl_estimate(logprobs, reference)
    got = make_advantages("ppo", t(1.5, -0.5), kl, mask, settings=Settings(beta=0.05), values=values)
    assert near(got.rewards[0], [-0.01, 0.025, 0, 1.55]) and near(got.unwhitened[0], [0.94203125, 0.896875, 0.8125, 0.75])
    near(got.unwhitened, gae(got.rewards, values, mask)[0])
    near(got.advantages, whiten(got.unwhitened, mask))
    loss, _ = policy_loss(logprobs[mask], logprobs[mask], got.advantages[mask])
    assert near(mean_loss(loss, "token-mean", [4, 2]), 0.0)
    squares, _ = value_loss(values[mask], values[mask], got.returns[mask])
    near(squares, 0.5 * got.unwhitened[mask].square(), 1e-12)
    assert explained_variance(values, got.returns, mask) < 1
