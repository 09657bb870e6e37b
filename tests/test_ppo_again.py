"""Whole iterations of ppo_train.py against the same written again: transformers' models on padded rows, loops over tokens in fp64, torch's AdamW.

From the script come the responses with their scores by source (--save_rollouts) and the order of the minibatches; nothing else.
"""

import math
import random

import pytest
import torch
from test_ppo import iterations, numbers, ok, ppo, toy  # noqa: F401

BUFFER, MINIBATCH, EPOCHS, LONGEST = 8, 5, 2, 8         # the last minibatch of a pass is smaller
AGGREGATE = {       # of the losses of each response
    "ppo": lambda losses, longest: torch.cat(losses).mean(),
    "reinforce++": lambda losses, longest: torch.cat(losses).mean(),
    "grpo": lambda losses, longest: sum(x.mean() for x in losses) / len(losses),
    "dr_grpo": lambda losses, longest: sum(x.sum() for x in losses) / (len(losses) * longest),
    "rloo": lambda losses, longest: sum(x.sum() for x in losses) / len(losses)}
CASES = {
    "ppo": dict(bootstrap_truncated=True, normalize_scores=True, kl_target=0.5, kl_horizon=40.0, kl_coef=0.05, entropy_coef=0.02, dual_clip=1.05, value_clip=0.05,
                temperature=0.7, gamma=0.97, lam=0.8, weight_decay=0.1, warmup_ratio=0.3, lr_schedule="cosine", critic_lr=3e-3),
    "reinforce++": dict(kl_coef=0.2, gamma=0.9, clip=0.1, clip_high=0.3, max_grad_norm=0.05, min_response_tokens=2, bad_score=-2.0),
    "grpo": dict(kl_coef=0.5, dual_clip=1.05, entropy_coef=0.01, temperature=1.3), "dr_grpo": dict(kl_coef=0.1), "rloo": dict(kl_coef=0.2, kl_target=0.5, kl_horizon=40.0)}
USUAL = dict(bootstrap_truncated=False, normalize_scores=False, kl_target=None, entropy_coef=0.0, dual_clip=math.inf, value_clip=0.2, temperature=1.0, gamma=1.0, lam=0.95,
             weight_decay=0.0, warmup_ratio=0.0, lr_schedule="linear", clip=0.2, clip_high=0.2, max_grad_norm=1.0, min_response_tokens=1, bad_score=-1.0, actor_lr=3e-3)


def states(model, rows):
    """The final hidden states of each row, computed together, padded."""
    mask = torch.arange(max(map(len, rows)))[None] < torch.tensor([len(row) for row in rows])[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long).masked_scatter(mask, torch.tensor([t for row in rows for t in row]))
    return [hidden[:len(row)] for row, hidden in zip(rows, model.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state)]


def logprobs_and_entropy(model, rows, prompts, temperature):
    """Of each response's tokens."""
    every = [(model.lm_head(hidden[n - 1:-1]) / temperature).log_softmax(-1) for hidden, n in zip(states(model, rows), prompts)]
    return [x[range(len(x)), row[n:]] for x, row, n in zip(every, rows, prompts)], [-(x.exp() * x).sum(-1) for x in every]


def values(critic, rows, prompts):
    """Of the state before each response token, and after the last: one more than tokens."""
    return [critic.lm_head(hidden[n - 1:])[:, 0] for hidden, n in zip(states(critic, rows), prompts)]


class Optimizer:
    def __init__(self, model, lr, f, steps):
        decays = lambda name, p: p.dim() > 1 and "embed_tokens" not in name and "lm_head" not in name  # noqa: E731
        of = lambda kind: [p for name, p in model.named_parameters() if decays(name, p) == kind]  # noqa: E731
        self.groups, self.lr, self.f, self.steps, self.done, self.norms = (of(True), of(False)), lr, f, steps, 0, []
        self.adam = torch.optim.AdamW([{"params": of(True), "weight_decay": f["weight_decay"]}, {"params": of(False), "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-5)

    def step(self, loss):
        loss.backward()
        self.norms.append(float(torch.nn.utils.clip_grad_norm_([p for group in self.groups for p in group], self.f["max_grad_norm"])))
        rises = math.ceil(self.f["warmup_ratio"] * self.steps)
        rest = (self.done - rises) / (self.steps - rises)
        share = (self.done + 1) / rises if self.done < rises else (1 + math.cos(math.pi * rest)) / 2 if self.f["lr_schedule"] == "cosine" else 1 - rest
        for group in self.adam.param_groups:
            group["lr"] = self.rate = share * self.lr
        self.adam.step()
        self.adam.zero_grad()
        self.done += 1

    def statistics(self, role):
        norms, self.norms = self.norms, []
        return {f"{role}_grad_norm": sum(norms) / len(norms), f"{role}_grad_norm_max": max(norms), f"{role}_lr": self.rate, f"{role}_steps": len(norms), f"{role}_skipped": 0}


def iterate(name, f, r, actor, reference, critic, optimizers, kept, iteration):
    """One iteration on the responses of r, a rollout-N.pt. kept: {"scores": [], "kl_coef", "ema"}. Returns what metrics.jsonl is to say."""
    rows, prompts, n_rows = r["tokens"], r["prompt_lengths"], len(r["tokens"])
    lengths, cat = [len(row) - n for row, n in zip(rows, prompts)], lambda x: torch.cat(list(x)).double()
    with torch.no_grad():
        old, entropy = logprobs_and_entropy(actor, rows, prompts, f["temperature"])
        ref, _ = logprobs_and_entropy(reference, rows, prompts, f["temperature"])
        before = values(critic, rows, prompts) if critic else [torch.zeros(n + 1) for n in lengths]
    k1 = [(a - b).double() for a, b in zip(old, ref)]
    short = [n - 1 < f["min_response_tokens"] for n in lengths]
    scores, good = [], []
    for parts, finished, is_short in zip(r["parts"], r["finished"], short):
        good.append(finished and not is_short)
        scores.append(sum(parts.values()) if good[-1] else 0.0 if not finished and f["bootstrap_truncated"] else f["bad_score"])
    if f["normalize_scores"]:
        kept["scores"] += [score for score, is_good in zip(scores, good) if is_good]
        seen = torch.tensor(kept["scores"], dtype=torch.float64)
        scores = [(score - float(seen.mean())) / float(seen.std(correction=0)) if is_good else score for score, is_good in zip(scores, good)]
    charge = 0.0 if "grpo" in name else kept["kl_coef"]
    rewards, advantages, returns, score = [-charge * x for x in k1], [], [], torch.tensor(scores, dtype=torch.float64)
    for i in range(n_rows):
        rewards[i][-1] += scores[i]
    for i in range(n_rows):
        v, follows = before[i].double(), 0.0
        lam, v[-1] = (f["lam"], v[-1] if f["bootstrap_truncated"] and not r["finished"][i] else 0.0) if critic else (1.0, 0.0)
        own = []
        for t in reversed(range(lengths[i])):
            follows = rewards[i][t] + f["gamma"] * v[t + 1] - v[t] + f["gamma"] * lam * follows
            own.insert(0, follows)
        group = [rewards[j].sum() for j in range(n_rows) if r["prompts"][j] == r["prompts"][i]]
        centred, others = rewards[i].sum() - sum(group) / len(group), len(group) - 1
        one = centred / (torch.stack(group).std() + 1e-6) if name == "grpo" else centred if name == "dr_grpo" else centred * len(group) / max(1, others)
        advantages.append(torch.stack(own) if others == 0 else one.expand(lengths[i]))
        returns.append(advantages[i] + v[:-1])
    every, gap = cat(advantages), (cat(old) - r["generator_logprobs"][r["mask"]]).abs()
    whiten = name in ("ppo", "reinforce++")
    used = [(x - every.mean()) / (every.var(correction=0) + 1e-8).sqrt() if whiten else x for x in advantages]
    size, charged = torch.tensor(lengths, dtype=torch.float64), cat(k1)
    kept["ema"] = float(score.mean()) if kept["ema"] is None else 0.9 * kept["ema"] + 0.1 * float(score.mean())
    s = {"score": score.mean(), "score_std": score.std(correction=0), "score_min": score.min(), "score_max": score.max(), "score_ema": kept["ema"],
         **{f"score_{source}": sum(parts[source] for parts in r["parts"]) / n_rows for source in r["parts"][0]}, "accuracy": sum(r["correct"]) / n_rows,
         "reward": sum(x.sum() for x in rewards) / n_rows, "kl_token": charged.mean(), "kl_sequence": charged.sum() / n_rows, "kl_max": charged.abs().max(),
         "kl_k3_token": ((-charged).exp() + charged - 1).mean(), "kl_coef": kept["kl_coef"], "entropy": cat(entropy).mean(), "response_length": size.mean(),
         "response_length_max": size.max(), "response_length_min": size.min(), "finished_share": sum(r["finished"]) / n_rows, "truncated": n_rows - sum(r["finished"]),
         "too_short": sum(a and b for a, b in zip(r["finished"], short)), "not_finite": 0, "advantage_mean": every.mean(), "advantage_std": every.std(correction=0),
         "generator_gap_mean": gap.exp().mean(), "response_tokens": size.sum(), "prompt_tokens": sum(prompts), "step": iteration + 1}
    if not whiten:
        groups = [[scores[j] for j in range(n_rows) if r["prompts"][j] == prompt] for prompt in dict.fromkeys(r["prompts"])]
        s["equal_groups"] = sum(len(set(group)) == 1 for group in groups) / len(groups)
    minibatches, seen = [], {}
    for epoch in range(EPOCHS):
        order = list(range(n_rows))
        random.Random(f"0/{iteration}/{epoch}").shuffle(order)
        minibatches += [order[i:i + MINIBATCH] for i in range(0, n_rows, MINIBATCH)]

    def see(**statistics):
        for key, x in statistics.items():
            seen.setdefault(key, []).append(x.detach().double())

    pick = lambda x, chosen: torch.cat([x[i] for i in chosen]).float()  # noqa: E731
    for chosen in minibatches if critic else ():
        now = torch.cat([v[:-1] for v in values(critic, [rows[i] for i in chosen], [prompts[i] for i in chosen])])
        was, target = pick([v[:-1] for v in before], chosen), pick(returns, chosen)
        plain, held = (now - target) ** 2, (was + (now - was).clamp(-f["value_clip"], f["value_clip"]) - target) ** 2
        see(value_loss=plain.maximum(held) / 2, value_clipfrac=(held > plain) & ((now - was).abs() > f["value_clip"]))
        optimizers[1].step(plain.maximum(held).mean() / 2)
    if critic:
        v, target = cat(v[:-1] for v in before), cat(returns)
        s |= {"value_mean": v.mean(), "return_mean": target.mean(), "explained_variance": 1 - (target - v).var(correction=0) / target.var(correction=0),
              **optimizers[1].statistics("critic")}
    low, high = (-math.inf, math.inf) if name == "rloo" else (1 - f["clip"], 1 + f["clip_high"])
    for chosen in minibatches:
        new, bits = map(torch.cat, logprobs_and_entropy(actor, [rows[i] for i in chosen], [prompts[i] for i in chosen], f["temperature"]))
        log_ratio, a = new - pick(old, chosen), pick(used, chosen)
        ratio, cap = log_ratio.exp(), torch.where(a < 0, -f["dual_clip"] * a, math.inf)
        plain, clipped = -a * ratio, -a * ratio.clamp(low, high)
        loss = plain.maximum(clipped).minimum(cap)
        see(policy_loss=loss, ratio=ratio, approx_kl=ratio - 1 - log_ratio, old_approx_kl=-log_ratio, clipfrac=clipped > plain,
            outsidefrac=(ratio < low) | (ratio > high), clipfrac_lower=plain.maximum(clipped) > cap)
        if "grpo" in name:
            d = new - pick(ref, chosen)
            see(kl_loss=(-d).exp() + d - 1)
            loss = loss + f["kl_coef"] * ((-d).exp() + d - 1)
        optimizers[0].step(AGGREGATE[name]((loss - f["entropy_coef"] * bits).split([lengths[i] for i in chosen]), LONGEST))
    every = torch.cat(seen.pop("ratio"))
    if f["kl_target"]:
        kept["kl_coef"] *= 1 + max(-0.2, min(0.2, float(s["kl_sequence"]) / f["kl_target"] - 1)) * n_rows / f["kl_horizon"]
    return s | {key: torch.cat(x).mean() for key, x in seen.items()} | optimizers[0].statistics("actor") | \
        {"ratio_mean": every.mean(), "ratio_min": every.min(), "ratio_max": every.max(), "stopped_early": False}


@pytest.mark.parametrize("name", CASES)
def test_two_iterations_are_those_written_down_again(name, toy, world_of_one, tmp_path):  # noqa: F811
    """Every statistic, and the weights of actor and critic: from the reward to AdamW's epsilon, with the options that change a number."""
    import transformers

    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.models.transformer import CausalLM, ValueModel
    samples = {} if name in ("ppo", "reinforce++") else {"num_samples_per_prompt": 4}
    critic_flags = {"reward_model_ckpt_dir": toy / "reward", "rule_weight": 0.5} if name == "ppo" else {}
    ok(ppo(toy, tmp_path / "run", algorithm=name, max_buffer_size=BUFFER, minibatch_size=MINIBATCH, inner_epochs=EPOCHS, max_batch_size=3, max_new_tokens=LONGEST,
           save_rollouts=True, reward_function=f"{toy / 'rewards.py'}:evens", **{"actor_lr": USUAL["actor_lr"], **CASES[name]}, **samples, **critic_flags))
    f = USUAL | {"kl_coef": 0.05} | CASES[name]
    load = lambda: transformers.LlamaForCausalLM.from_pretrained(toy / "hf", dtype=torch.float32)  # noqa: E731
    actor, reference, critic, steps = load(), load(), load() if name == "ppo" else None, 2 * EPOCHS * math.ceil(BUFFER / MINIBATCH)
    if critic:
        stored = torch.load(toy / "reward/consolidated.00.pth", weights_only=True)      # a score has offset 0.25 and scale 2
        critic.lm_head = torch.nn.Linear(stored["value_head.weight"].shape[1], 1)
        critic.lm_head.load_state_dict({"weight": stored["value_head.weight"] / 2, "bias": (stored["value_head.bias"] - 0.25) / 2})
    optimizers = [Optimizer(model, lr, f, steps) for model, lr in ((actor, f["actor_lr"]), (critic, f.get("critic_lr"))) if model]
    kept, outside, cut = {"scores": [], "kl_coef": f["kl_coef"], "ema": None}, 0.0, 0
    for iteration, found in enumerate(map(numbers, iterations(tmp_path / "run"))):
        r = torch.load(tmp_path / f"run/log/rollout-{iteration + 1}.pt", weights_only=True)
        expected = iterate(name, f, r, actor, reference, critic, optimizers, kept, iteration)
        assert found.pop("first_ratio_gap") < 1e-4 and found.pop("generator_gap_max") < 1e-4       # rounding alone
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(float(value), rel=1e-3, abs=2e-5), key
        outside, cut = outside + found["outsidefrac"], cut + found["truncated"]
    assert outside > 0.1 or name == "rloo"
    assert cut
    for model, folder in ((actor, "run"), (critic, "run/critic")):
        if model:
            saved, kind = tmp_path / folder / "step-2", CausalLM if model is actor else ValueModel
            ours, head = load_model(str(saved), kind), model.lm_head
            model.lm_head = head if model is actor else load().lm_head
            model.save_pretrained(tmp_path / "again")
            again, start = (dict(load_model(str(path), kind).named_parameters()) for path in (tmp_path / "again", toy / "hf"))
            for key, value in ours.named_parameters():
                expected, least = (dict(head.named_parameters())[key[11:]], 0.0) if key.startswith("value_head.") else (again[key], 1e-3)
                assert (value - expected).abs().max() < 1e-4, key
                assert (value - start[key]).abs().max() > least, f"{key} has hardly moved"
