"""ppo_train.py as a user runs it, on toy models: the same numbers on any layout, faults, resumption, one base for four roles."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
from ranks import run_ranks, run_script
from toys import add_bytes_tokenizer, logits_of, make_hf

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROMPTS = [{"instruction": f"{a}+{b}?", "output": f"#### {a + b}"} for a in range(5) for b in range(4)]
SHORT = dict(max_buffer_size=8, minibatch_size=4, max_batch_size=4, max_new_tokens=8, dtype="fp32", max_iterations=2, actor_lr=1e-4, critic_lr=1e-3,
             reward_function="", critic_warmup=0)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A random policy, a reward model saved from it, a reward function, prompts."""
    folder = tmp_path_factory.mktemp("ppo")
    make_hf(folder / "hf", "llama-9-3", vocab_size=263, max_position_embeddings=64)
    add_bytes_tokenizer(folder / "hf")
    # a random model seldom draws the one end token: with 60 of them about a fifth of the tokens end a response
    (folder / "hf/generation_config.json").write_text(json.dumps({"eos_token_id": [257, *range(130, 190)]}))
    run_ranks(1, save_reward_model, str(folder / "hf"), str(folder / "reward"), None)
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    (folder / "rewards.py").write_text(
        "def evens(prompt, response, label):\n    return sum(ord(c) % 2 == 0 for c in response) / 8\n"
        "def sometimes_nan(prompt, response, label):\n    return float('nan') if prompt.startswith('1') else 1.0\n"
        "def broken(prompt, response, label):\n    raise KeyError('no such table')\n"
        "def equal(prompt, response, label):\n    return 1.0\n"
        "def is_none(prompt, response, label):\n    return float(label is None)\n")
    return folder


def save_reward_model(source, target, lora):
    from llama_rlhf.checkpoint.shards import load_model, save_model
    from llama_rlhf.models.transformer import ValueModel
    from llama_rlhf.parallel import groups
    from llama_rlhf.parallel.layers import Lora
    groups.initialize(device="cpu")
    model = load_model(source, ValueModel, lora=lora and Lora(*lora), seed=5)
    if lora:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("lora_b"):
                    p.copy_(torch.randn_like(p) * 0.05)
    save_model(model, target, companions=source, score={"loss": "mse", "offset": 0.25, "scale": 2.0, "form": "linear"})
    groups.shutdown()


def iterations(folder):
    with open(folder / "log/metrics.jsonl") as file:
        records = [json.loads(line) for line in file]
    return [r for r in records if r["kind"] == "iteration"]


def numbers(record):
    """Without what differs from run to run."""
    timing = {"time", "run", "seconds", "phases", "peak_memory_gb", "generated_per_second", "kind", "ratio_gap"}
    return {key: value for key, value in record.items() if key not in timing}


def ppo(toy, save_dir, n=1, **flags):
    ranks = run_script(n, "ppo_train.py", **{**SHORT, "actor_ckpt_dir": toy / "hf", "actor_save_dir": save_dir, "train_file": toy / "prompts.json", **flags})
    return ranks


def ok(ranks):
    assert all(code == 0 for code, *_ in ranks), ranks[0][2][-3000:]
    return ranks[0][1]


def sentence(ranks):
    """The first line of the error; every rank must have failed."""
    assert all(code == 1 for code, *_ in ranks), ranks
    lines = sorted({err.strip().splitlines()[0] for *_, err in ranks})
    return next((line for line in lines if "failed while" not in line), lines[0])


LAYOUTS = {"two tensor-parallel": (2, {}), "two data-parallel": (2, {"model_parallel_size": 1}), "other micro-batches": (1, {"max_batch_size": 3})}


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_numbers_do_not_depend_on_the_layout(algorithm, toy, tmp_path):
    """Reward model, rule, function, KL: two iterations give the same statistics and weights at 1 rank, 2 tensor-parallel, 2 data-parallel
    ranks and for another split into micro-batches (fp32, tolerance for other orders of sums and Adam's division)."""
    flags = dict(algorithm=algorithm, reward_function=f"{toy / 'rewards.py'}:evens", reward_model_ckpt_dir=toy / "reward", rule_weight=0.5)
    out = ok(ppo(toy, tmp_path / "one", **flags))
    assert "iteration 2/2" in out and "saved" in out
    one = iterations(tmp_path / "one")
    assert len(one) == 2 and one[0]["first_ratio_gap"] < 1e-4 and one[0]["kl_sequence"] == 0.0 and one[0]["kl_max"] == 0.0
    assert one[1]["kl_max"] > 0
    for name, (n, more) in LAYOUTS.items():
        folder = tmp_path / name.replace(" ", "-")
        ok(ppo(toy, folder, n, **flags, **more))
        other = iterations(folder)
        for a, b in zip(one, other):
            a, b = numbers(a), numbers(b)
            assert a.keys() == b.keys(), name
            for key in a:
                assert a[key] == pytest.approx(b[key], rel=2e-3, abs=2e-5), (name, key)
    weights = [whole(tmp_path / f) for f in ("one", "two-tensor-parallel", "two-data-parallel", "other-micro-batches")]
    for other in weights[1:]:
        for key, value in weights[0].items():
            torch.testing.assert_close(other[key], value, atol=5e-5, rtol=0, msg=key)


def test_a_step_is_a_quarter_of_the_buffer_whatever_a_micro_batch_is(toy, tmp_path):
    """--max_batch_size, which memory decides, was the least of a step: to lower it made more steps of fewer responses."""
    for rows in (8, 1):
        ok(ppo(toy, tmp_path / f"{rows}", algorithm="reinforce++", kl_coef=0.0, reward_function=f"{toy / 'rewards.py'}:evens", minibatch_size=-1, max_batch_size=rows, max_iterations=1))
    (whole_step,), (single,) = iterations(tmp_path / "8"), iterations(tmp_path / "1")
    assert whole_step["actor_steps"] == single["actor_steps"] == 8 and whole_step["ratio_max"] == pytest.approx(single["ratio_max"], rel=1e-4)


def whole(folder):
    """name -> full tensor of the last save, joined from its shards."""
    save = max(folder.glob("step-*"))
    plan = json.loads((save / "manifest.json").read_text())["plan"]
    shards = [torch.load(path, weights_only=True) for path in sorted(save.glob("consolidated.*.pth"))]
    return {name: shards[0][name] if entry["cut"] is None else torch.cat([s[name] for s in shards], entry["cut"]) for name, entry in plan.items()}


@pytest.mark.parametrize("algorithm,extra", [("dr_grpo", {}), ("rloo", {"clip_high": 0.3}),
                                             ("ppo", {"kl_target": 2.0, "entropy_coef": 0.01, "normalize_scores": True, "target_kl": 1e-9}),
                                             ("reinforce++", {"kl_coef": 0.0})])
def test_every_algorithm_and_option_runs(algorithm, extra, toy, tmp_path):
    out = ok(ppo(toy, tmp_path / "run", algorithm=algorithm, **{"reward_function": f"{toy / 'rewards.py'}:evens", **extra}))
    unused = {"ppo": "", "rloo": "--critic_lr, --critic_warmup, --clip_high"}.get(algorithm, "--critic_lr, --critic_warmup")
    assert f"note: {algorithm} does not use {unused}\n" in out if unused else "does not use" not in out
    first, second = iterations(tmp_path / "run")
    assert all(math.isfinite(r[key]) for r in (first, second) for key in ("policy_loss", "score", "approx_kl", "entropy"))
    assert ("value_loss" in first) == (algorithm == "ppo")
    assert ("kl_sequence" in first) == (algorithm != "dr_grpo" and extra.get("kl_coef") != 0.0)
    if "target_kl" in extra:
        assert first["stopped_early"] and first["actor_steps"] == 2       # the first step's ratio is 1
        assert second["kl_coef"] != first["kl_coef"]
    if algorithm in ("dr_grpo", "rloo"):
        assert "equal_groups" in first


def test_one_frozen_base_serves_four_roles(toy, tmp_path):
    result, = run_ranks(1, _four_roles, str(toy / "hf"), str(tmp_path))
    shared, whole_bytes, all_bytes, differences, kl, digests = result
    assert shared > 0.9 * whole_bytes and all_bytes < 1.6 * whole_bytes      # the toy's adapters are large beside it
    assert max(differences) < 1e-6 and kl == 0.0
    assert digests[0] == digests[1]


def _four_roles(source, folder):
    """Actor, critic and reward model with adapters, reference without, on one base: the same outputs as loaded alone, and the base untouched."""
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.models.transformer import ValueModel
    from llama_rlhf.parallel import groups
    from llama_rlhf.parallel.layers import Lora
    from llama_rlhf.roles import load_roles
    from llama_rlhf.trainer import Trainer, response_logprobs, response_values
    save_reward_model(source, folder + "/reward", (2, 4.0))
    groups.initialize(device="cpu")
    roles = load_roles(actor_dir=source, start_dir=source, critic_dir=folder + "/reward", critic_start_dir=folder + "/reward",
                       reward_dir=folder + "/reward", reward_weight=1.0, needs_reference=True, lora=Lora(2, 4.0), dtype=torch.float32)
    rows, plens = [[256, *range(40, 52)], [256, 60, 61, 62, 63]], [4, 2]
    base = {name: p for name, p in roles.actor.named_parameters() if "lora" not in name}
    digest = lambda: hash(b"".join(p.detach().numpy().tobytes() for p in base.values()))  # noqa: E731
    before = digest()
    alone = dict(actor=load_model(source), reference=load_model(source), critic=load_model(folder + "/reward", ValueModel, lora="stored"),
                 reward=load_model(folder + "/reward", ValueModel, lora="stored"))
    differences = []
    with torch.no_grad():
        kl = (response_logprobs(roles.actor, rows, plens) - response_logprobs(roles.reference, rows, plens)).abs().max().item()
        for name, model in alone.items():
            see = response_logprobs if name in ("actor", "reference") else response_values
            mine = see(getattr(roles, name), rows, plens)
            if name == "critic":        # the reward model's scale is folded into its head: (score - 0.25) / 2
                mine = mine * 2.0 + 0.25
            differences.append((mine - see(model, rows, plens)).abs().max().item())
    whole_bytes = sum(p.nbytes for p in alone["actor"].parameters())
    ids = [{id(p) for p in model.parameters()} for model in roles.all().values()]
    shared = sum(p.nbytes for p in roles.actor.parameters() if all(id(p) in other for other in ids) or
                 "output" in next(n for n, q in roles.actor.named_parameters() if q is p) and id(p) in ids[1])
    for model in (roles.actor, roles.critic):
        trainer = Trainer(model, lr=1e-2, total_steps=3)
        see = response_logprobs if model is roles.actor else response_values
        for _ in range(3):
            trainer.step([[0, 1]], lambda _: -see(model, rows, plens).sum(), lambda _: 12)
    result = shared, whole_bytes, roles.n_bytes(), differences, kl, (before, digest())
    groups.shutdown()
    return result


def test_lora_run_continues_and_evaluates(toy, tmp_path):
    """LoRA actor and critic on two ranks; the saves load everywhere a checkpoint does."""
    ok(ppo(toy, tmp_path / "run", 2, lora_rank=2, label_file=toy / "prompts.json", eval_steps=1, save_steps=1, keep_last=1))
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.name.startswith("step")) in (["step-2"], ["step-1", "step-2"])
    ok(run_script(1, "solver_evaluate.py", ckpt_dir=tmp_path / "run", log_dir=tmp_path / "eval", label_file=toy / "prompts.json", max_new_tokens=4,
                  dtype="fp32"))


@pytest.mark.parametrize("dies_at", [1, 2, 3])
def test_a_run_killed_in_an_evaluation_has_lost_nothing_and_knows_its_best_save(dies_at, toy, tmp_path):
    """kill -9 where an evaluation begins: its iteration is saved, the next start evaluates, once, and the best save is kept as in an undisturbed run."""
    flags = dict(max_iterations=3, epochs=2, save_steps=1, eval_steps=1, keep_last=1, algorithm="rloo", label_file=toy / "prompts.json", device="cpu", write_report="false")
    arguments = {**SHORT, "actor_ckpt_dir": toy / "hf", "actor_save_dir": tmp_path / "run", "train_file": toy / "prompts.json", **flags}
    program = f"""import os, sys, runpy, llama_rlhf.evaluation as module
real = module.evaluate
def evaluate(*args, samples_file, **kwargs):
    step = int(samples_file.rpartition("-")[2].split(".")[0])
    if step == DIES:
        os.kill(os.getpid(), 9)
    return {{**real(*args, samples_file=samples_file, **kwargs), "accuracy": [0.0, 0.3, 0.9, 0.5][step]}}
module.evaluate = evaluate
sys.argv = ["ppo_train.py", *{[f"--{key}={value}" for key, value in arguments.items()]!r}]
runpy.run_path("ppo_train.py", run_name="__main__")"""
    for dies, code in ((dies_at, -9), (-1, 0), (-1, 0)):
        ended = subprocess.run([sys.executable, "-c", program.replace("DIES", str(dies))], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert ended.returncode == code, ended.stderr
        saves = sorted(p.name for p in (tmp_path / "run").glob("step-*"))
        assert saves == (["step-2", "step-3"] if not code or dies_at == 3 else [f"step-{n}" for n in range(max(1, dies_at - 1), dies_at + 1)]), saves
    evaluated = [json.loads(line) for line in open(tmp_path / "run/log/metrics.jsonl")]
    assert [line["step"] for line in evaluated if line["kind"] == "evaluation"] == [0, 1, 2, 3]


@pytest.mark.parametrize("lora_rank,n", [(-1, 1), (2, 2)])
def test_resumed_run_equals_an_undisturbed_one(lora_rank, n, toy, tmp_path):
    """Weights, optimizers, KL coefficient, moments: bit for bit, at 1 rank with full weights and 2 with adapters."""
    flags = dict(lora_rank=lora_rank, save_steps=1, keep_last=-1, max_iterations=3, epochs=2, reward_function=f"{toy / 'rewards.py'}:evens", kl_target=1.0,
                 normalize_scores=True, lr_schedule="linear")
    ok(ppo(toy, tmp_path / "whole", n, **flags))
    ok(ppo(toy, tmp_path / "cut", n, **flags))
    shutil.rmtree(tmp_path / "cut/step-3")      # as if the run had died between the critic's save and the actor's
    assert "already holds" in sentence(ppo(toy, tmp_path / "cut", n, **flags, resume="never"))
    assert "--gamma 0.9 (was 1.0)" in sentence(ppo(toy, tmp_path / "cut", n, **flags, gamma=0.9))
    out = ok(ppo(toy, tmp_path / "cut", n, **flags))
    assert "resumed after iteration 2" in out
    assert numbers(iterations(tmp_path / "whole")[2]) == numbers(iterations(tmp_path / "cut")[-1])
    for role in ("", "critic"):
        for path in sorted((tmp_path / "whole" / role / "step-3").glob("*.pth")):
            a, b = (torch.load(p, weights_only=True) for p in (path, tmp_path / "cut" / role / "step-3" / path.name))
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), path


def test_a_run_killed_in_its_first_save_starts_over(toy, tmp_path):
    """The critic was saved, the actor not: what is there belongs to the same run, and is computed again."""
    flags = dict(max_iterations=1, reward_function=f"{toy / 'rewards.py'}:evens")
    ok(ppo(toy, tmp_path / "run", **flags))
    expected = whole(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/step-1")
    ok(ppo(toy, tmp_path / "run", **flags))
    assert all(torch.equal(a, b) for a, b in zip(expected.values(), whole(tmp_path / "run").values()))


def test_the_critic_may_have_adapters_of_another_rank(toy, tmp_path):
    run_ranks(1, save_reward_model, str(toy / "hf"), str(tmp_path / "reward"), (3, 6.0))
    out = ok(ppo(toy, tmp_path / "run", reward_model_ckpt_dir=tmp_path / "reward", lora_rank=2, max_iterations=99, critic_warmup=1))
    assert "optimizer steps each, the actor's from iteration 2 on (--critic_warmup); ppo" in out
    assert "2 iterations (--epochs 1 has no more) of 8 prompts" in out
    assert "holds adapters of rank 3, alpha 6; it continues with those" in out
    assert "critic: training" in out


def test_a_saved_rollout_replays_to_the_same_update(toy, tmp_path):
    flags = dict(max_iterations=1, reward_function=f"{toy / 'rewards.py'}:evens")
    ok(ppo(toy, tmp_path / "first", save_rollouts=True, **flags))
    ok(ppo(toy, tmp_path / "again", replay=tmp_path / "first/log/rollout-1.pt", **flags))
    a, b = whole(tmp_path / "first"), whole(tmp_path / "again")
    assert all(torch.equal(a[k], b[k]) for k in a)
    replay = tmp_path / "first/log/rollout-1.pt"
    assert "drawn at temperature 1.0, not 0.5" in sentence(ppo(toy, tmp_path / "hot", replay=replay, temperature=0.5, **flags))
    assert "drawn without --bootstrap_truncated" in sentence(ppo(toy, tmp_path / "cut", replay=replay, bootstrap_truncated=True, **flags))
    # the buffer is the file's, whatever --max_buffer_size says
    ok(ppo(toy, tmp_path / "small", replay=replay, **{**flags, "max_buffer_size": 4, "lr_schedule": "linear"}))
    ok(ppo(toy, tmp_path / "large", replay=replay, **{**flags, "max_buffer_size": 8, "lr_schedule": "linear"}))
    small, large = (numbers(iterations(tmp_path / name)[-1]) for name in ("small", "large"))
    assert small == large and small["actor_steps"] == 4 and small["actor_lr"] > 0
    for change, said, more in ((lambda drawn: drawn["tokens"][3].append(10 ** 6), "was drawn by another model: it has", {}),
                               (lambda drawn: drawn["tokens"][3].extend([5] * 500), "of at most 64 here", {}),
                               (lambda drawn: drawn.update(bootstrapped=True), "follow: give that flag", {}),
                               (lambda drawn: drawn.update(bootstrapped=True), "follow: use --algorithm ppo, with that flag", {"algorithm": "reinforce++"})):
        drawn = torch.load(replay, weights_only=True)
        change(drawn)
        torch.save(drawn, tmp_path / "changed.pt")
        assert said in sentence(ppo(toy, tmp_path / "third", replay=tmp_path / "changed.pt", **{**flags, **more})), said
    (tmp_path / "noise.pt").write_bytes(random.Random(0).randbytes(500))
    assert "is not a rollout" in sentence(ppo(toy, tmp_path / "third", replay=tmp_path / "noise.pt", **flags))


def test_a_continued_run_says_that_its_reward_function_changed_and_refuses_another_model_in_the_old_place(toy, tmp_path):
    shutil.copy(toy / "rewards.py", tmp_path / "rewards.py")
    run_ranks(1, save_reward_model, str(toy / "hf"), str(tmp_path / "reward"), None)
    flags = dict(max_iterations=2, save_steps=1, keep_last=-1, reward_function=f"{tmp_path / 'rewards.py'}:equal", reward_model_ckpt_dir=tmp_path / "reward")
    ok(ppo(toy, tmp_path / "run", **flags))
    shutil.rmtree(tmp_path / "run/step-2")
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    assert "has changed" not in ok(ppo(toy, tmp_path / "same", **flags))
    shutil.copytree(tmp_path / "run", tmp_path / "edited")
    with open(tmp_path / "rewards.py", "a") as file:
        file.write("def more(prompt, response, label):\n    return 2.0\n")
    assert f"the file of --reward_function has changed since {tmp_path / 'edited/step-1'} was saved" in ok(ppo(toy, tmp_path / "edited", **flags))
    shutil.rmtree(tmp_path / "reward")
    run_ranks(1, save_reward_model, str(toy / "hf"), str(tmp_path / "reward"), (2, 4.0))
    assert "run with other settings: what the checkpoints held" in sentence(ppo(toy, tmp_path / "run", **flags))


def test_faults_of_rewards_follow_the_stated_rule(toy, tmp_path):
    rewards = toy / "rewards.py"
    ok(ppo(toy, tmp_path / "nan", 2, model_parallel_size=1, reward_function=f"{rewards}:sometimes_nan", max_buffer_size=16, max_new_tokens=24))
    first = iterations(tmp_path / "nan")[0]
    assert first["not_finite"] + first["truncated"] + first["too_short"] > 0 and first["score_min"] == -1.0
    ok(ppo(toy, tmp_path / "equal", reward_function=f"{rewards}:equal", algorithm="grpo", bad_score=1.0))
    same = iterations(tmp_path / "equal")[0]
    assert same["score_std"] == 0 and same["equal_groups"] == 1.0 and same["policy_loss"] == 0.0
    ranks = ppo(toy, tmp_path / "raise", 2, reward_function=f"{rewards}:broken")
    assert all(code == 1 and "no such table" in err for code, _, err in ranks), ranks
    assert "has no function" in sentence(ppo(toy, tmp_path / "name", reward_function=f"{rewards}:missing"))
    # labels: of all prompts, or of none
    for name, lacking in (("none", range(20)), ("one", [16])):
        (tmp_path / f"{name}.json").write_text(json.dumps([{**record, "output": "?"} if n in lacking else record for n, record in enumerate(PROMPTS)]))
    ok(ppo(toy, tmp_path / "unlabelled", train_file=tmp_path / "none.json", reward_function=f"{rewards}:is_none", max_iterations=1, bad_score=1.0))
    assert iterations(tmp_path / "unlabelled")[0]["score"] == 1.0
    flags = dict(train_file=tmp_path / "one.json", max_iterations=1)
    said = sentence(ppo(toy, tmp_path / "partly", reward_function=f"{rewards}:is_none", **flags))
    assert "one.json, line 1, record 17" in said and "19 other records have a label" in said
    ok(ppo(toy, tmp_path / "judged", reward_model_ckpt_dir=toy / "reward", **flags))


def test_the_reward_function_of_the_guide_counts_as_it_says(tmp_path):
    from llama_rlhf.rollout import Prompt, Reward, load_reward_function
    from llama_rlhf.tasks import Problem
    with open(os.path.join(ROOT, "docs/PPO.md")) as file:
        (tmp_path / "rewards.py").write_text(re.search(r"```python\n(.*?)```", file.read(), re.DOTALL)[1])
    reward = Reward(function=load_reward_function(f"{tmp_path / 'rewards.py'}:right_and_short"))
    problem = Problem(id=0, prompt="6 * 7?", solution="", label="42")
    assert reward.judge_text(Prompt(0, "6 * 7?", [1], problem), "It is 42", True)[1]["function"] == pytest.approx(0.992)
    assert reward.judge_text(Prompt(0, "6 * 7?", [1]), "It is 42", True)[1]["function"] == pytest.approx(-0.008)


def test_a_reward_beyond_every_float_is_not_finite_and_gradients_stay_off(tmp_path):
    from llama_rlhf.rollout import Prompt, Reward, load_reward_function
    (tmp_path / "rewards.py").write_text("import torch\n\n\ndef huge(prompt, response, label):\n    torch.set_grad_enabled(True)\n    return 10 ** 400\n")
    with torch.no_grad():
        parts = Reward(function=load_reward_function(f"{tmp_path / 'rewards.py'}:huge")).judge_text(Prompt(7, "p", [1]), "abc", True)[1]
        assert parts == {"function": math.inf} and not torch.is_grad_enabled()


def test_code_of_the_users_that_fails_is_named_with_its_line(tmp_path):
    """A ValueError of a reward function stood alone, "invalid literal for int()", and one that ended the program ended it with exit code 0."""
    from llama_rlhf.rollout import Prompt, Reward, load_reward_function
    file = tmp_path / "rewards.py"
    file.write_text("def number(text):\n    return int(text)\n\n\ndef of(prompt, response, label):\n    return number(response)\n\n\n"
                    "def leaves(prompt, response, label):\n    raise SystemExit(0)\n\n\ndef runs(prompt, response, label):\n    return eval('1 +')\n")
    for name, line, why in (("of", 2, "ValueError: invalid literal for int() with base 10: 'abc'"), ("leaves", 10, "SystemExit: 0"),
                            ("runs", 14, "SyntaxError: invalid syntax (<string>, line 1)")):
        with pytest.raises(ValueError) as error:
            Reward(function=load_reward_function(f"{file}:{name}")).judge_text(Prompt(7, "p", [1]), "abc", True)
        assert str(error.value) == f"the reward function failed for prompt 7: {file}, line {line}: {why}"
    for text, line, why in (("import sys\nsys.exit(0)", 2, "SystemExit: 0"), ("import no_such_package", 1, "ModuleNotFoundError: No module named 'no_such_package'")):
        file.write_text(text)
        with pytest.raises(ValueError) as error:
            load_reward_function(f"{file}:of")
        assert str(error.value) == f"{file} cannot be imported: {file}, line {line}: {why}"


def test_a_continued_run_must_have_its_data_and_room(toy, tmp_path, monkeypatch):
    flags = dict(max_iterations=2, save_steps=1, reward_function=f"{toy / 'rewards.py'}:evens", train_file=tmp_path / "prompts.json")
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    ok(ppo(toy, tmp_path / "run", **flags))
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS[::-1]))
    said = sentence(ppo(toy, tmp_path / "run", 2, **flags))
    assert "with other settings: training data 20 examples with digest" in said and "(was 20 examples with digest" in said


def _with_a_row_of_its_own(flags):
    from ranks import _script

    from llama_rlhf.advantages import ALGORITHMS
    ALGORITHMS["mine"] = ALGORITHMS["grpo"]
    return _script("ppo_train.py", flags)


def test_an_algorithm_is_one_row(toy, tmp_path):
    """The script knew by name which algorithms compare the responses to one prompt: a new one got a single response, and was refused."""
    flags = {**SHORT, "actor_ckpt_dir": toy / "hf", "actor_save_dir": tmp_path, "reward_function": f"{toy / 'rewards.py'}:evens", "train_file": toy / "prompts.json",
             "device": "cpu", "algorithm": "mine", "max_iterations": 1, "write_report": False}
    (code, out, err), = run_ranks(1, _with_a_row_of_its_own, flags)
    assert code == 0 and "x 4 responses" in out and "; mine; " in out, err


def _with_free_space(script, free, flags):
    """script on a disk that has room for so many bytes."""
    import types

    from ranks import _script

    from llama_rlhf.checkpoint import store
    store.shutil.disk_usage = lambda _: types.SimpleNamespace(free=free)
    return _script(script, flags)


@pytest.mark.parametrize("script", ["ppo_train.py", "solver_train.py", "verifier_train.py"])
def test_a_disk_without_room_for_a_save_is_noticed_before_the_first_step(script, toy, tmp_path):
    """Weights, masters and moments of all that is saved: what is written then needs no more than was asked for, and not much less."""
    if script == "ppo_train.py":
        flags = {**SHORT, "actor_ckpt_dir": toy / "hf", "actor_save_dir": tmp_path / "run", "reward_function": f"{toy / 'rewards.py'}:evens"}
    else:
        flags = {"ckpt_dir": toy / "hf", "save_dir": tmp_path / "run", "max_seq_len": 64, "max_steps": 2, "dtype": "fp32"}
    flags |= {"train_file": toy / "prompts.json", "device": "cpu"}
    (code, _, err), = run_ranks(1, _with_free_space, script, 1_200_000, flags)
    said = re.search(r"no space to save in .*/run: ([\d.]+) GB needed", err)
    assert code == 1 and said, err
    assert not list((tmp_path / "run").rglob("step-*")) and not list((tmp_path / "run").rglob("epoch-*"))
    code, _, err = run_script(1, script, **{key: value for key, value in flags.items() if key != "device"})[0]
    assert code == 0, err
    written = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.pth"))
    assert 0.7 * written < float(said[1]) * 1e9 < written
    (code, out, err), = run_ranks(1, _with_free_space, script, 1000, flags)
    assert code == 0, "the finished run has nothing left to save: " + err


@pytest.mark.parametrize("value,not_finite", [(1e39, 1), (-1e39, 1), (math.inf, 1), (math.nan, 1), (3e38, 0)])
def test_a_score_beyond_fp32_is_not_finite(value, not_finite):
    """1e39 is finite in Python and infinite in the buffer: it passed the check, and every advantage became NaN."""
    from llama_rlhf.rollout import Response, RolloutSettings, judge
    scores, bad, counts = judge([Response(1, 0, [1, 2, 3], 1, True, "x", None, {"function": value}, torch.zeros(2))], RolloutSettings())
    assert counts["not_finite"] == not_finite == bad[0] and torch.tensor(scores).isfinite().all()


def test_a_policy_that_only_ends_is_scored_too_short(toy, tmp_path):
    def only_ends(model):
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:1].expand_as(model.model.embed_tokens.weight).clone())
        model.model.norm.weight.fill_(1.0)
        direction = model.model.embed_tokens.weight[0] / model.model.embed_tokens.weight[0].norm()
        model.lm_head.weight.zero_()
        model.lm_head.weight[257] = 10 * direction
    make_hf(tmp_path / "hf", "llama-9-3", vocab_size=263, max_position_embeddings=64, change=only_ends)
    add_bytes_tokenizer(tmp_path / "hf")
    ok(ppo(toy, tmp_path / "run", 2, actor_ckpt_dir=tmp_path / "hf"))
    for record in iterations(tmp_path / "run"):
        assert record["too_short"] == 8 and record["response_length"] == 1.0 and record["score"] == -1.0


@pytest.mark.parametrize("flags,said", [
    ({"algorithm": "pppo"}, "did you mean 'ppo'"), ({"algorithm": "grpo", "num_samples_per_prompt": 1}, "must be at least 2"),
    ({"algorithm": "rloo", "critic_ckpt_dir": "HF"}, "has no critic"), ({"max_new_tokens": 80}, "prompts fit"),
    ({"kl_coef": -0.5}, "--kl_coef -0.5"), ({"temperature": 0.0}, "--temperature 0.0"), ({"temperature": float("inf")}, "--temperature inf must be"),
    ({"max_buffer_size": 9, "num_samples_per_prompt": 2}, "multiple"),
    ({"rule_weight": 0.0}, "no reward"), ({"reward_model_ckpt_dir": "HF"}, "has no value head"), ({"rule": "Z"}, "--rule"),
    ({"minibatch_size": 99}, "--minibatch_size 99"), ({"actor_lr": 0.0}, "--actor_lr 0.0 must be positive"), ({"max_iterations": 0}, "--max_iterations 0"),
    ({"algorithm": "grpo", "critic_save_dir": "HF"}, "leave --critic_save_dir out"), ({"lora_rank": 0}, "--lora_rank 0"), ({"lora_rank": 2, "lora_alpha": 0.0}, "--lora_alpha 0"),
    ({"keep_resident": "perhaps"}, "--keep_resident"),
 ({"seed": 1_700_000_000_000}, "--seed 1700000000000: must be at least -2147483648"),
])
def test_wrong_input_gets_a_sentence(flags, said, toy, tmp_path):
    flags = {key: toy / "hf" if value == "HF" else value for key, value in flags.items()}
    assert said in sentence(ppo(toy, tmp_path / "run", **flags))


def test_roles_must_share_a_tokenizer(toy, tmp_path):
    make_hf(tmp_path / "other", "llama-9-3", vocab_size=263, max_position_embeddings=64)
    add_bytes_tokenizer(tmp_path / "other")
    (tmp_path / "other/tokenizer.bytes.json").write_text(json.dumps({"kind": "bytes", "vocab_size": 262}))
    assert "must share one tokenizer" in sentence(ppo(toy, tmp_path / "run", 2, critic_ckpt_dir=tmp_path / "other"))


def _with_idle_roles_away(flags):
    """ppo_train.py on a machine where idle roles are gone: their weights are NaN outside `using`."""
    from ranks import _script

    from llama_rlhf import roles as module
    load, away = module.load_roles, {}

    def send_away(self, model):
        for p in self._own(model):
            away[id(p)], p.data = p.data, torch.full_like(p.data, float("nan"))

    def fetch(self, model):
        for p in self._own(model):
            p.data = away.pop(id(p))

    def load_and_send_away(**options):
        roles = load(**options)
        roles.moves = True
        for model in roles.all().values():
            roles.send_away(model)
        return roles

    module.Roles.send_away, module.Roles._fetch, module.load_roles = send_away, fetch, load_and_send_away
    return _script("ppo_train.py", flags)


@pytest.mark.parametrize("lora_rank", [-1, 2])
def test_roles_that_wait_elsewhere_change_nothing(lora_rank, toy, tmp_path):
    """Every use of a model brings it back first, and with adapters the shared base never leaves."""
    flags = dict(lora_rank=lora_rank, reward_model_ckpt_dir=toy / "reward", label_file=toy / "prompts.json", save_steps=1)
    ok(ppo(toy, tmp_path / "stay", **flags))
    (code, _, err), = run_ranks(1, _with_idle_roles_away, {"device": "cpu", **SHORT, "actor_ckpt_dir": toy / "hf", "actor_save_dir": tmp_path / "move",
                                                           "train_file": toy / "prompts.json", **flags})
    assert code == 0, err[-2000:]
    (code, out, err), = run_ranks(1, _with_idle_roles_away, {"device": "cpu", **SHORT, "actor_ckpt_dir": toy / "hf", "actor_save_dir": tmp_path / "doctor", "doctor": True,
                                                             "train_file": toy / "prompts.json", **flags})
    assert code == 0 and "reference: weights are finite" in out and "FAILED" not in out, out + err[-2000:]
    for a, b in zip(iterations(tmp_path / "stay"), iterations(tmp_path / "move")):
        assert numbers(a) == numbers(b)
    a, b = whole(tmp_path / "stay"), whole(tmp_path / "move")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_trained_weights_that_wait_are_copied_each_time_frozen_ones_once_and_shared_ones_stay(world_of_one):
    """What comes back from another device is simulated by a copy; and bytes by hand, shared ones once."""
    from llama_rlhf.roles import Roles
    actor, critic = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    critic.base = actor.base = torch.nn.Parameter(torch.ones(5), requires_grad=False)
    actor.weight.requires_grad_(False)
    roles = Roles(actor, critic=critic)
    assert (roles.n_bytes(), roles.n_bytes(training=True)) == (4 * (6 + 2 + 5) + 2 * 8, 4 * 13 + 16 + 12 * 2 + 16 * 8)
    shared, frozen = actor.base.data_ptr(), actor.weight.detach().clone()
    for step in range(3):
        roles.send_away(actor)
        assert torch.equal(actor.weight, frozen) and (step == 0 or (actor.bias == step).all()) and actor.base.data_ptr() == shared
        for p in (actor.weight, actor.bias):
            p.data = torch.full_like(p.data, step + 1.0)


def test_a_buffer_in_which_every_response_was_cut_is_warned_about():
    from llama_rlhf.ppo import warnings
    assert warnings({"finished_share": 0.25}, True) == []
    said, = warnings({"finished_share": 0.0}, True)
    assert "raise --max_new_tokens" in said


class _Sum:
    """In a trainer's place: the loss of each step; nothing is changed."""

    def __init__(self, model):
        self.model, self.found = model, []

    def step(self, micro_batches, loss_sum, count):
        from llama_rlhf.trainer import StepResult
        self.found.append(float(sum(loss_sum(rows).detach() for rows in micro_batches)) / sum(map(count, micro_batches)))
        return StepResult(self.found[-1], 1, 1.0, 0.0, False)


def test_the_loss_of_a_critic_step_is_the_clipped_one_against_the_returns(toy, world_of_one):
    from llama_rlhf.advantages import Advantages
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.models.transformer import ValueModel
    from llama_rlhf.ppo import UpdateSettings, update_critic
    from llama_rlhf.rollout import Response, Rollout, RolloutSettings
    from llama_rlhf.trainer import response_values
    critic, generator, responses, columns = load_model(str(toy / "reward"), ValueModel), torch.Generator().manual_seed(0), [], []
    for i, length in enumerate((5, 1, 3, 7)):
        tokens = torch.randint(40, 250, (i + 2 + length,), generator=generator).tolist()
        values = response_values(critic, [tokens], [i + 2]).detach()
        old, returns = (values + torch.randn(length, generator=generator) * 0.3 for _ in range(2))
        responses.append(Response(i, 0, tokens, i + 2, True, "", None, {}, old, values=old))
        columns.append((values, old, returns))
    rollout, (values, old, returns) = Rollout.of(responses, RolloutSettings()), (torch.cat(column) for column in zip(*columns))
    padded, trainer = torch.zeros(rollout.mask.shape).masked_scatter(rollout.mask, returns), _Sum(critic)
    told = update_critic(trainer, rollout, Advantages(padded, padded, padded, padded), UpdateSettings(epochs=2, minibatch_size=4, max_batch_size=3, value_clip=0.1), 0)
    near, far = (values - returns) ** 2, (torch.minimum(torch.maximum(values, old - 0.1), old + 0.1) - returns) ** 2
    loss = pytest.approx(float(torch.maximum(near, far).mean() / 2), abs=1e-5)
    assert trainer.found == [loss, loss] and told["value_loss"] == loss and told["value_clipfrac"] == pytest.approx(float((far > near).float().mean()))
    assert told["explained_variance"] == pytest.approx(float(1 - (returns - old).var() / returns.var()), abs=1e-5)


@pytest.mark.parametrize("name", ["ppo", "grpo", "dr_grpo", "rloo", "reinforce++"])
def test_the_loss_of_an_actor_step_is_that_of_its_algorithm(name, toy, world_of_one):
    """Written down per token and per response: clipping, the KL and the entropy in the loss, and what it is divided by. Layouts are compared with each other
    elsewhere: a sign could be wrong in all of them."""
    from llama_rlhf.advantages import ALGORITHMS, Advantages
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.ppo import UpdateSettings, update_actor
    from llama_rlhf.rollout import Response, Rollout, RolloutSettings
    generator, lengths, responses, kept = torch.Generator().manual_seed(0), (5, 1, 3, 7), [], []
    actor, temperature = load_model(str(toy / "hf")), 0.7
    for i, length in enumerate(lengths):
        tokens = torch.randint(40, 250, (i + 2 + length,), generator=generator).tolist()
        logp = (logits_of(actor, [tokens]) / temperature).log_softmax(-1)[i + 1:-1]
        logprobs = logp[torch.arange(length), tokens[i + 2:]].detach()
        old, ref = (logprobs + torch.randn(length, generator=generator) * 0.3 for _ in range(2))
        responses.append(Response(i // 2, i % 2, tokens, i + 2, True, "", None, {}, old, old, old, ref))
        kept.append((logprobs, old, ref, torch.randn(length, generator=generator), -(logp.exp() * logp).sum(-1).detach()))
    rollout = Rollout.of(responses, RolloutSettings(temperature=temperature))
    advantages = torch.zeros(rollout.mask.shape).masked_scatter(rollout.mask, torch.cat([a for *_, a, _ in kept]))
    settings = UpdateSettings(epochs=1, minibatch_size=4, max_batch_size=3, temperature=temperature, max_new_tokens=9, clip_low=0.1, clip_high=0.3, entropy_coef=0.2, kl_coef=0.5)
    trainer = _Sum(actor)
    told = update_actor(trainer, rollout, Advantages(advantages, advantages, None, advantages), ALGORITHMS[name], settings, 0)
    per_response, plain, estimates = [], [], []
    for logprobs, old, ref, a, entropy in kept:
        ratio = (logprobs - old).exp()
        loss = -a * ratio if name == "rloo" else torch.maximum(-a * ratio, -a * ratio.clamp(0.9, 1.3))
        plain.append(loss)
        if name in ("grpo", "dr_grpo"):
            estimates.append((ref - logprobs).exp() - (ref - logprobs) - 1)
            loss = loss + 0.5 * estimates[-1]
        per_response.append(loss - 0.2 * entropy)
    expected = {"ppo": torch.cat(per_response).mean(), "reinforce++": torch.cat(per_response).mean(), "grpo": sum(x.mean() for x in per_response) / 4,
                "dr_grpo": sum(x.sum() for x in per_response) / (4 * 9), "rloo": sum(x.sum() for x in per_response) / 4}[name]
    assert trainer.found == [pytest.approx(float(expected), abs=1e-4)]
    logprobs, old, _, a, _ = (torch.cat(column) for column in zip(*kept))
    ratio, outside = (logprobs - old).exp(), ((logprobs - old).exp() - 1.1).abs() > (0.2 if name != "rloo" else math.inf)
    numbers = {"policy_loss": torch.cat(plain).mean(), "ratio_mean": ratio.mean(), "ratio_max": ratio.max(), "ratio_min": ratio.min(), "first_ratio_gap": (ratio - 1).abs().max(),
               "approx_kl": (ratio - 1 - ratio.log()).mean(), "old_approx_kl": (old - logprobs).mean(), "outsidefrac": outside.float().mean(),
               "clipfrac": (outside & ((ratio > 1.1) == (a > 0))).float().mean(), **({"kl_loss": torch.cat(estimates).mean()} if estimates else {})}
    assert {key: told[key] for key in numbers} == {key: pytest.approx(float(value), abs=1e-4) for key, value in numbers.items()}
    assert ("kl_loss" in told) == bool(estimates)


def test_what_a_buffer_looks_like_by_hand(world_of_one):
    from llama_rlhf.advantages import Advantages
    from llama_rlhf.ppo import rollout_statistics
    from llama_rlhf.rollout import Response, Rollout, RolloutSettings
    lengths, scores, one = (2, 1, 3, 1), (1.0, 1.0, 0.0, 2.0), torch.ones(3)
    responses = [Response(i // 2, i % 2, [7] * (2 + n), 2, i > 0, "", score > 0, {"rule": 0.25 * score, "model": 0.75 * score}, -2.0 * one[:n], -1.5 * one[:n] - i, 0.5 * one[:n] + i,
                          -1.0 * one[:n], one[:n] * i) for i, (n, score) in enumerate(zip(lengths, scores))]
    rollout = Rollout.of(responses, RolloutSettings(min_response_tokens=0, bad_score=-3.0))
    kl = (rollout.logprobs - rollout.ref_logprobs).where(rollout.mask, 0.0)
    spread = torch.arange(12.0).view(4, 3).where(rollout.mask, 0.0)
    told = rollout_statistics(rollout, Advantages(spread, 2 * spread, 3 * spread, spread), kl)
    of_token = lambda values: [value for value, n in zip(values, lengths) for _ in range(n)]  # noqa: E731
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    d, valid = [-0.5 - i for i in of_token(range(4))], [0, 1, 3, 6, 7, 8, 9]
    expected = {"score": 0.0, "score_std": math.sqrt(mean([9, 1, 0, 4])), "score_min": -3.0, "score_max": 2.0, "reward": sum(valid) / 4, "entropy": mean([0.5 + i for i in of_token(range(4))]),
                "advantage_mean": 2 * mean(valid), "advantage_std": 2 * math.sqrt(mean([(x - mean(valid)) ** 2 for x in valid])), "response_length": 7 / 4, "response_length_max": 3,
                "response_length_min": 1, "finished_share": 3 / 4, "generator_gap_mean": mean([math.exp(abs(0.5 - i)) for i in of_token(range(4))]), "generator_gap_max": 2.5,
                "kl_token": mean(d), "kl_sequence": sum(d) / 4, "kl_k3_token": mean([math.exp(-x) + x - 1 for x in d]), "kl_max": 3.5, "value_mean": mean(of_token(range(4))),
                "return_mean": 3 * mean(valid), "accuracy": 3 / 4, "score_rule": 0.25, "score_model": 0.75, "equal_groups": 0.0, "truncated": 1, "too_short": 0, "not_finite": 0}
    assert told == {key: pytest.approx(value, abs=1e-5) for key, value in expected.items()}


def test_the_critic_sees_every_response_once(toy, world_of_one, monkeypatch):
    """Values before each token, and after the last one of a response that was cut: one pass, where another was made for the cut ones."""
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.models.transformer import ValueModel
    from llama_rlhf.roles import Roles
    from llama_rlhf.rollout import Prompt, Reward, RolloutSettings, collect
    from llama_rlhf.runlog import Clock
    from llama_rlhf.tokenizer import load_tokenizer
    from llama_rlhf.trainer import final_scores, response_values
    roles = Roles(load_model(str(toy / "hf")))
    roles.critic = load_model(str(toy / "reward"), ValueModel)
    passes, forward = [], roles.critic.forward
    monkeypatch.setattr(roles.critic, "forward", lambda *args, **options: passes.append(1) or forward(*args, **options))
    prompts = [Prompt(i, "", [256, *range(40 + i, 46 + 2 * i)]) for i in range(6)]
    rollout, _ = collect(roles, prompts, load_tokenizer(str(toy / "hf")), Reward(None), RolloutSettings(max_new_tokens=6, bootstrap_truncated=True), iteration=0, clock=Clock())
    assert len(passes) == 1 and 0 < sum(rollout.finished) < 6
    with torch.no_grad():
        for i, (row, n) in enumerate(zip(rollout.tokens, rollout.prompt_lengths)):
            assert (rollout.values[i][rollout.mask[i]] - response_values(roles.critic, [row], [n])).abs().max() < 1e-5
            assert rollout.value_after[i] == pytest.approx(0.0 if rollout.finished[i] else final_scores(roles.critic, [row]).item(), abs=1e-5)
