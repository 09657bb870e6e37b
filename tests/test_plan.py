"""Planned bytes against tensors that exist: the same code with real tensors, at 1 and 2 ranks, and loaded models."""

import contextlib
import gc
import importlib
import inspect
import json
import os
from collections import Counter
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks, run_script
from toys import add_bytes_tokenizer, make_hf

from llama_rlhf.parallel.layers import Lora

ROWS = [(30, 4), (21, 3), (80, 2)]


def real_peaks(folder, model_class_name, lora_rank, options):
    """What a step on real tensors takes beyond weights and optimizer, counted as they come and go, and what the plan says of this rank."""
    from llama_rlhf import footprint
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.models import transformer
    from llama_rlhf.parallel import groups
    from llama_rlhf.parallel.layers import Lora
    from llama_rlhf.trainer import Trainer, response_logprobs, response_values
    groups.initialize(device="cpu")
    groups._state["shared_memory"] = None       # gloo: the ranks' common buffer is no tensor that comes and goes
    lora, dtype, model_class = Lora(lora_rank, 8.0) if lora_rank > 0 else None, getattr(torch, options.pop("dtype", "float32")), getattr(transformer, model_class_name)
    recompute = options.pop("recompute", "none")
    model = load_model(folder, model_class, lora=lora, dtype=dtype)
    model.recompute(recompute)
    trainer, live = Trainer(model, lr=1e-3, total_steps=1, **options), footprint._Live(model)
    look = response_logprobs if model_class_name == "CausalLM" else response_values
    batch = [[[7] * length for length, _ in ROWS], [prompt for _, prompt in ROWS]]
    gc.collect()
    with live:
        for _ in range(2):
            live.peaks.clear()
            look(model, *batch).sum().backward()
    trainer.step([0], lambda _: look(model, *batch).sum(), lambda _: 1)
    state = sum(value.nbytes for key, value in trainer.state_tensors().items() if not key.endswith(("step", "counters", "loss_scale")))
    with groups.pretend(groups.tp_size(), groups.tp_rank()):
        planned = footprint.passes(model.config, ROWS, model_class=model_class, lora=lora, dtype=dtype, recompute=recompute, accumulates=True, **options)
    groups.shutdown()
    return {"weights": sum(p.nbytes for p in model.parameters()), "optimizer": state, "peak": max(live.peaks.values())}, dict(planned)


@pytest.mark.parametrize("name,model_class,lora_rank,options", [
    ("llama-9-3", "CausalLM", -1, {}), ("llama-9-3", "CausalLM", 3, {"dtype": "bfloat16"}), ("qwen3", "ValueModel", -1, {"dtype": "bfloat16"}),
    ("llama-9-3", "CausalLM", -1, {"recompute": "2", "dtype": "bfloat16"}), ("llama-9-3", "CausalLM", -1, {"recompute": "mlp", "dtype": "bfloat16"}),
    ("mixtral", "CausalLM", -1, {})])
def test_planned_bytes_are_those_of_a_real_step(name, model_class, lora_rank, options, tmp_path):
    """7 layers, planned from 2 and 3 (every second recomputed: 3 and 5); uneven heads on 2 ranks. Experts: tokens are taken as evenly spread."""
    make_hf(tmp_path, name, num_hidden_layers=7)
    for n in (1, 2):
        for real, planned in run_ranks(n, real_peaks, str(tmp_path), model_class, lora_rank, options):
            assert planned["weights"] == real["weights"] and planned["optimizer"] == real["optimizer"]
            # gloo's thread may hold a tensor that it summed a moment longer: one of [tokens, dim] is 1 % of this peak
            assert planned["peak"] == pytest.approx(real["peak"], rel=0.05 if name == "mixtral" else 0.01 * n), n


def test_every_family_is_planned():
    """Training and generating, on the last of two ranks. (First-generation Qwen was not: its runs ended with a traceback behind the last save.)"""
    from llama_rlhf import footprint
    from llama_rlhf.models import PRESETS
    from llama_rlhf.parallel import groups
    of_family = {config.family: replace(config, n_layers=2, n_experts=min(8, config.n_experts)) for config in reversed(PRESETS.values())}
    assert len(of_family) == 8 and of_family["qwen"].ntk_beyond
    for name, config in of_family.items():
        with groups.pretend(2, 1):
            trained = footprint.passes(config, ROWS, dtype=torch.bfloat16)
            generated = footprint.generating(config, 20, 50, 6, dtype=torch.bfloat16)
        assert config.n_parameters < trained["weights"] < 1.1 * config.n_parameters, name     # half of them, in 2 bytes each
        assert generated["KV cache"] > 0 and generated["activations"] > 0 and generated["decode"] >= generated["KV cache"] + generated["logits"] > generated["KV cache"], name


def test_generation_is_planned_as_it_runs(world_of_one, tmp_path, monkeypatch):
    from llama_rlhf import footprint
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.generation import Statistics, generate
    from llama_rlhf.parallel import groups
    from llama_rlhf.sampling import Sampling
    make_hf(tmp_path, "llama-9-3", num_hidden_layers=5)
    model, statistics = load_model(str(tmp_path)), Statistics()
    live = footprint._Live(model)
    # no weight copies: they are no tensors whose storage can be counted
    monkeypatch.setattr("llama_rlhf.generation.weights_held", lambda model, n_rows: contextlib.nullcontext())
    monkeypatch.setattr("llama_rlhf.generation.held", lambda weight, n_rows: weight)
    with live:
        generate(model, [[3] * 20] * 6, eos_ids=(999,), max_new_tokens=30, max_batch_size=6, sampling=Sampling(1.0), with_logprobs=True, statistics=statistics)
    with groups.pretend(1):
        planned = footprint.generating(model.config, 20, 50, 6, dtype=torch.float32)
    assert planned["KV cache"] == statistics.cache_bytes
    assert planned["weight copies"] == sum(p.nbytes for p in model.parameters() if p.dim() == 2) - (model.tok_embeddings.weight.nbytes if model.output is not None else 0)
    assert planned["peak"] - planned["weight copies"] == pytest.approx(max(live.peaks.values()), rel=0.05)


def test_70b_on_a_laptop():
    """No checkpoint, no data, no torchrun: 17.25 GB of weights on each of 8 ranks (docs/LARGE_MODELS.md), and what the flags add; docs/TRAINING.md quotes it."""
    (code, out, err), = run_script(1, "solver_train.py", model_type="llama-2-70b", plan=True, model_parallel_size=8, dtype="bf16")
    assert code == 0, err
    with open(os.path.join(os.path.dirname(__file__), "..", "docs", "TRAINING.md")) as file:
        assert out.strip() in file.read(), f"docs/TRAINING.md shows another plan than\n{out}"
    table = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith("solver"))
    weights, copies, optimizer, gradients, *_ = map(float, table["solver"].split())
    assert 17.24 < weights < 17.26 and abs(optimizer - 6 * weights) < 0.01 and abs(gradients - 2 * weights) < 0.01
    (code, out, err), = run_script(1, "solver_train.py", plan=True)
    assert code == 1 and "--plan needs --model_type" in err
    (code, out, err), = run_script(1, "solver_train.py", model_type="llama-2-70b", plan=True, model_parallel_size=8, plan_ranks=12)
    assert code == 1 and "--model_parallel_size 8 does not divide the 12 ranks" in err


@pytest.mark.parametrize("precision,each", [("master", 12), ("kahan", 10)])
def test_optimizer_state_shared_among_many_replicas_is_that_of_the_largest_share(precision, each):
    """7B on 8 replicas: an eighth of it and a little, as whole parameters are shared out. (From two and three layers it looked like the embedding alone.)"""
    from llama_rlhf import footprint
    from llama_rlhf.models import preset
    from llama_rlhf.parallel import groups
    for replicas in (8, 64):
        with groups.pretend(1, 0, replicas, "cpu"):
            planned = footprint.passes(preset("llama-2-7b"), [(4, 1)], dtype=torch.bfloat16, precision=precision, zero=1)["optimizer"]
        share = each * preset("llama-2-7b").n_parameters / replicas
        assert share <= planned <= share + each * 32000 * 4096


def test_the_rank_that_needs_most_is_planned_where_heads_do_not_divide():
    """9 heads on 4 ranks read keys and values of 1, 2, 1 and 1 heads: the last has the most weights, the second twice the cache."""
    from llama_rlhf.models import preset
    from llama_rlhf.models.transformer import CausalLM
    from llama_rlhf.parallel import groups
    cache = []
    for rank in range(4):
        with groups.pretend(4, rank):
            cache.append(CausalLM(preset("smollm2-135m"), dtype=torch.bfloat16).cache_bytes(64, 512))
    assert cache[1] == max(cache) == 2 * cache[3]
    (code, out, err), = run_script(1, "solver_evaluate.py", model_type="smollm2-135m", plan=True, plan_ranks=4, dtype="bf16", max_new_tokens=256, max_batch_size=64)
    assert code == 0, err
    planned = float(next(line for line in out.splitlines() if line.startswith("solver")).split()[-1])
    assert "64 rows of up to 512 tokens" in out and planned == pytest.approx(max(cache) / 1e9, abs=1e-3)


def flags_of(script, **given):
    """A script's flags as plans get them, planned without a checkpoint."""
    main = importlib.import_module(script).main
    return {**{name: p.default for name, p in inspect.signature(main).parameters.items()}, "ckpt_dir": "", "actor_ckpt_dir": "", "plan": True, "device": "cpu", "dtype": "bf16", **given}


def test_a_gpu_that_is_not_there_cannot_be_planned_for(monkeypatch):
    """Whether torch was built for one or not: its drivers are asked what the card can do."""
    from llama_rlhf import plan
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version in ("13.0", None):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(ValueError, match="--device cuda: torch sees no CUDA device and cannot plan for one. Leave --device out"):
            plan.plan_training(flags_of("solver_train", model_type="smollm2-135m", device="cuda", max_seq_len=64))


def test_roles_share_a_base_only_with_adapters(monkeypatch):
    from llama_rlhf import plan
    from llama_rlhf.models import preset
    small = replace(preset("smollm2-135m"), n_layers=3, vocab_size=999)
    monkeypatch.setattr(plan, "preset", lambda name: small)
    monkeypatch.setattr(plan, "_PASS_TOKENS", 64)
    monkeypatch.setattr(plan, "_PACK_TOKENS", 64)
    alone = plan.plan_ppo(flags_of("ppo_train", model_type="small", reward_model_ckpt_dir="any", max_new_tokens=16))
    shared = plan.plan_ppo(flags_of("ppo_train", model_type="small", reward_model_ckpt_dir="any", max_new_tokens=16, lora_rank=16))
    base = 2 * small.n_parameters
    for planned in (alone, shared):
        assert list(planned.roles) == ["actor", "reference", "critic", "reward"] and planned.roles["reference"]["optimizer"] == 0
        assert all(planned.roles["actor"][kind] > 0 for kind in ("weight copies", "optimizer", "gradients", "KV cache"))
        peaks, stay = planned.passing, sum(kinds["weights"] + kinds["optimizer"] for kinds in planned.roles.values())
        assert planned.total == planned.shared + stay + peaks and ("base of all roles" in str(planned)) == (planned is shared)
    assert sum(kinds["weights"] for kinds in alone.roles.values()) == pytest.approx(4 * base, rel=0.2)      # critic and reward model have a row for a vocabulary
    adapters = [kinds["weights"] for kinds in shared.roles.values()]
    assert shared.shared == base and adapters[1] == 0 and all(0 < adapters[i] < 0.2 * base for i in (0, 2, 3))


def test_plans_ask_for_what_the_scripts_do(monkeypatch):
    """Which models, with which rows, slots and lengths; by hand, with nothing computed."""
    from llama_rlhf import plan
    from llama_rlhf.models import preset
    asked, plans = [], []
    config = replace(preset("smollm2-135m"), n_layers=2, max_seq_len=200)
    monkeypatch.setattr(plan, "preset", lambda name: config)
    monkeypatch.setattr(plan, "_PACK_TOKENS", 300)
    monkeypatch.setattr(plan, "_PASS_TOKENS", 150)
    monkeypatch.setattr(plan, "passes", lambda config, rows, model_class=None, trains=True, **more: asked.append((model_class.__name__, trains, rows, more)) or Counter(weights=3, adapters=1, peak=2))
    monkeypatch.setattr(plan, "generating", lambda config, prompt, longest, slots, **more: asked.append((prompt, longest, slots, more)) or Counter(weights=3, adapters=1, peak=2))

    def plan_of(script, planner, given=(), **flags):
        asked.clear()
        plans.append(planner(flags_of(script, model_type="any", model_parallel_size=1, **flags), **dict(given)))
        return [seen[:-1] for seen in asked]

    rows = [(100, 1)] * 3
    solver = dict(max_seq_len=100, max_batch_size=3, max_new_tokens=30, eval_batch_size=50)
    assert plan_of("solver_train", plan.plan_training, **solver) == [("CausalLM", True, rows)]
    assert not asked[0][-1]["accumulates"] and asked[0][-1]["zero"] == 0 and asked[0][-1]["lora"] is None
    assert plan_of("solver_train", plan.plan_training, **solver, label_file="x", accumulation_steps=2, zero=1, optimizer_precision="kahan", activation_checkpointing="all",
                   sequence_parallel=True, lora_rank=3, lora_alpha=6.0) == [("CausalLM", True, rows), (70, 100, 50)]
    assert plans[-1].adapts and plans[-1].recomputes and not (plans[0].adapts or plans[0].recomputes)
    assert asked[0][-1] == dict(accumulates=True, zero=1, precision="kahan", recompute="all", sequence_parallel=True, lora=Lora(3, 6.0), dtype=torch.bfloat16)
    assert plan_of("solver_train", plan.plan_training, dict(prompts=[5, 9, 7] * 2, rows=rows[:2]), **solver, label_file="x", plan_ranks=4) == [("CausalLM", True, rows[:2]), (9, 39, 2)]
    for batch, n in ((dict(max_batch_size=3, max_batch_tokens=250), 2), (dict(max_batch_size=-1, max_batch_tokens=450), 4), (dict(max_batch_size=3, max_batch_tokens=20), 1)):
        assert plan_of("solver_train", plan.plan_training, max_seq_len=100, **batch) == [("CausalLM", True, [(100, 1)] * n)]

    verifier = dict(max_seq_len=100, max_batch_size=3)
    assert plan_of("verifier_train", plan.plan_training, **verifier, lm_loss_weight=0.0) == [("ValueModel", True, rows * 2), ("ValueModel", False, rows)]     # pairs; a pack of 300 tokens
    assert plan_of("verifier_train", plan.plan_training, **verifier, lm_loss_weight=0.5, loss="mse") == [("JointModel", True, rows), ("JointModel", False, rows)]
    assert plan_of("verifier_train", plan.plan_training, dict(rows=rows, scored=[(50, 3), (60, 2)]), **verifier, lm_loss_weight=0.0)[1][2] == [(60, 1)]

    chosen = dict(max_new_tokens=30, max_batch_size=8, num_samples_per_prompt=3)
    assert plan_of("solver_evaluate", plan.plan_evaluation, **chosen) == [(30, 60, 8)]
    assert plan_of("solver_evaluate", plan.plan_evaluation, dict(prompts=[10, 20]), **chosen, plan_ranks=2) == [(20, 50, 3)]
    assert plan_of("solver_evaluate", plan.plan_evaluation, dict(prompts=[10, 20]), **chosen, max_seq_len=40, verifier_ckpt_dir="x") == \
        [(20, 40, 6), ("ValueModel", False, [(40, 1)] * 7)]
    assert plans[-1].total == 3 + 2     # one after the other
    assert plan_of("solver_evaluate", plan.plan_evaluation, dict(prompts=[10, 20]), **chosen, max_seq_len=90) == [(20, 50, 6)]
    assert plan_of("solver_evaluate", plan.plan_evaluation, **chosen, samples_file="s", verifier_ckpt_dir="x") == [("ValueModel", False, [(60, 1)] * 5)]

    drawn = dict(max_new_tokens=30, max_batch_size=2, max_buffer_size=12, rollout_batch_size=9, kl_coef=0.1)
    actor, train = ("CausalLM", False, [(60, 1)] * 2), [(60, 1)] * 2
    critic = [("ValueModel", False, train), ("ValueModel", True, train)]
    reward = ("ValueModel", False, [(60, 1)] * 5)
    assert plan_of("ppo_train", plan.plan_ppo, **drawn, reward_model_ckpt_dir="x", lora_rank=3) == [actor, ("CausalLM", True, train), (30, 60, 9), actor, *critic, reward]
    assert [seen[-1]["lora"] is None for seen in asked] == [False] * 3 + [True] + [False] * 3 and asked[1][-1]["accumulates"]
    assert plan_of("ppo_train", plan.plan_ppo, **{**drawn, "kl_coef": 0.0}, reward_model_ckpt_dir="x", reward_model_weight=0.0, algorithm="grpo", plan_ranks=2, label_file="x") == \
        [actor, ("CausalLM", True, train), (30, 60, 6), (30, 60, 64)]
    assert plan_of("ppo_train", plan.plan_ppo, dict(prompts=[4, 10], tested=[20, 15, 3]), **drawn, algorithm="grpo", max_seq_len=45, label_file="x", plan_ranks=2)[2:4] == \
        [(10, 40, 6), (20, 45, 2)]

    for flags, said in ((dict(max_seq_len=201), "--max_seq_len 201 is more than the model's 200"), (dict(accumulation_steps=0), "--accumulation_steps 0: must be at least 1")):
        with pytest.raises(ValueError, match=said):
            plan_of("solver_train", plan.plan_training, **flags)
    # --max_cache_gb is what docs/TROUBLESHOOTING.md names against a large cache; a plan showed the same with it
    row = 2 * 2 * 3 * 64 * 60 * 2 / 1e9         # keys and values, layers, heads, their width, positions, bytes
    for limit, n in ((3.5 * row, 3), (0.1 * row, 1), (99 * row, 8)):
        assert plan_of("solver_evaluate", plan.plan_evaluation, **chosen, max_cache_gb=limit) == [(30, 60, n)]
        assert plan_of("ppo_train", plan.plan_ppo, **{**drawn, "rollout_batch_size": 8}, algorithm="grpo", max_cache_gb=limit)[2] == (30, 60, n)


def test_the_total_of_a_plan_by_hand(monkeypatch):
    """Roles at once, of a base in common, and in turn; what is beside the tensors."""
    from llama_rlhf import plan
    from llama_rlhf.parallel import groups
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    a, b = [Counter(weights=100, adapters=10, optimizer=40, peak=7), Counter(weights=100, adapters=10, peak=9)], [Counter(weights=93, adapters=5, peak=20)]
    for options, total in (({}, 100 + 40 + 93 + 20), (dict(share=True), 90 + 10 + 40 + 5 + 20), (dict(in_turn=True), 140 + 9)):
        planned = plan.Plan("", {"a": a, "b": b}, **options)
        assert (planned.total, planned.passing) == (total, 20) and planned.roles["a"]["optimizer"] == 40
    large = [Counter(weights=2 * 10 ** 9, peak=10 ** 9)]
    trained = [Counter(weights=2 * 10 ** 9, optimizer=1, peak=10 ** 9)]
    for tp, device, uses, options, besides in ((1, "cpu", large, {}, 115_000_000), (2, "cpu", large, {}, 115_000_000), (1, "cpu", trained, {}, 330_000_000),
                                               (3, "cpu", trained, dict(adapts=True, recomputes=True), 320_000_000 + 3 * (16 << 20)), (2, "cuda", trained, {}, 0)):
        planned = plan.Plan("", {"a": uses}, **options)
        with groups.pretend(tp, 0, 1, device):
            assert planned.besides == besides and planned.line(4 * 10 ** 9).endswith(f"peak 4.000 GB ({4e9 / (planned.total + besides) - 1:+.1%})")
            assert planned.beside(7) == {"planned_bytes": planned.total, "besides_bytes": besides, "peak_bytes": 7, "planned": planned.roles}


def test_what_a_step_of_replicas_adds_to_a_plan_by_hand():
    """Buckets that travel, a bucket's fp32 values, gradients of several micro-batches, adapters beside a value head."""
    from llama_rlhf import footprint
    from llama_rlhf.models import preset
    from llama_rlhf.models.transformer import ValueModel
    from llama_rlhf.parallel import groups
    from llama_rlhf.parallel.layers import Lora
    config = replace(preset("smollm2-135m"), n_layers=3, vocab_size=999)
    plan = lambda dp=1, **more: footprint.passes(config, [(8, 2), (5, 1)], dtype=torch.bfloat16, **more)  # noqa: E731
    with groups.pretend(1, 0, 1, "cpu"):
        one, kahan, several = plan(), plan(precision="kahan"), plan(accumulates=True)
        value = footprint.passes(config, [(8, 2)], model_class=ValueModel, lora=Lora(2, 4.0), dtype=torch.float32)
        without = footprint.passes(config, [(8, 2)], model_class=ValueModel, lora=Lora(2, 4.0), dtype=torch.float32, trains=False)
    with groups.pretend(1, 0, 2, "cpu"):
        two = plan()
    gradients, largest = 4 * config.n_parameters, 4 * 2 * config.ffn_dim * config.dim       # w1 and w3 are one
    assert one["gradients"] == one["update"] == gradients
    assert two["update"] - gradients == 3 * (32 << 20) + largest and kahan["update"] - gradients == (64 << 20) + largest
    assert two["peak"] == two["update"] and several["first block"] > one["first block"] and several["loss"] > one["loss"] + gradients / 2
    assert value["optimizer"] == 2 * value["adapters"] == 2 * value["gradients"] and value["adapters"] == without["adapters"]
    assert value["weights"] - value["adapters"] == 4 * (config.n_parameters)
    assert without["activations"] == without["forward"] > 0 and one["loss"] == one["activations"] + one["logits"] > one["logits"] > 0


@pytest.mark.parametrize("script,more", [("solver_train.py", {}), ("verifier_train.py", {"lora_rank": 4}), ("solver_evaluate.py", {}),
                                         ("ppo_train.py", {"lora_rank": 4, "max_buffer_size": 4, "minibatch_size": 4, "max_new_tokens": 4, "max_iterations": 1, "dtype": "fp32"})])
def test_a_run_records_planned_and_measured_bytes(script, more, tmp_path):
    make_hf(tmp_path / "hf", "llama-9-3", vocab_size=263, max_position_embeddings=96)
    add_bytes_tokenizer(tmp_path / "hf")
    (tmp_path / "train.json").write_text(json.dumps([{"instruction": f"{a}+1?", "output": f"{a}+1={a + 1}\n#### {a + 1}"} for a in range(8)]))
    where = {"solver_evaluate.py": dict(ckpt_dir=tmp_path / "hf", label_file=tmp_path / "train.json", max_new_tokens=4),
             "ppo_train.py": dict(actor_ckpt_dir=tmp_path / "hf", actor_save_dir=tmp_path / "run", train_file=tmp_path / "train.json")}.get(script) or \
        dict(ckpt_dir=tmp_path / "hf", save_dir=tmp_path / "run", train_file=tmp_path / "train.json", max_seq_len=96, max_steps=2, zero=1, model_parallel_size=1)
    ranks = run_script(2, script, plans=True, log_dir=tmp_path / "log", **where, **more)
    assert all(code == 0 for code, *_ in ranks), ranks
    assert "memory of this rank: planned" in ranks[0][1] and ranks[1][1] == ""
    if script == "solver_evaluate.py":
        memory = json.loads((tmp_path / "log/metrics.json").read_text())["memory"]
    else:
        memory, = [m for m in map(json.loads, open(tmp_path / "log/metrics.jsonl")) if m["kind"] == "memory"]
    assert 0 < memory["planned_bytes"] and memory["planned"] and memory["peak_bytes"] > 0
