"""What a GPU computes by kernels of its own is what the CPU computes. Skipped where there is no GPU; with several, the last test uses two."""

import json

import pytest
import torch
from ranks import run_ranks, run_script
from toys import add_bytes_tokenizer, make_hf

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PROMPTS = [[1, 40, 41, 42], [1, 50], [1, *range(60, 80)]]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    make_hf(folder / "hf", "llama", vocab_size=263, max_position_embeddings=128)
    add_bytes_tokenizer(folder / "hf")
    (folder / "train.json").write_text(json.dumps([{"instruction": f"{a}+{b}?", "output": f"#### {a + b}"} for a in range(6) for b in range(6)]))
    return folder


def attention(device, dtype, window):
    """(which form ran, output, gradients) of rows of awkward lengths."""
    from llama_rlhf.models import attention
    from llama_rlhf.parallel import groups
    groups.initialize(device=device)
    torch.manual_seed(0)
    lengths = [130, 1, 77, 64]
    q, k, v, weight = (torch.randn(sum(lengths), heads, 64).to(device, dtype) for heads in (6, 2, 2, 6))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attention.packed_attention(*inputs, attention.Rows.packed(lengths), None, window)
    gradients = torch.autograd.grad((out * weight).sum(), inputs)
    groups.shutdown()
    return attention._takes_any_lengths(q), [x.detach().float().cpu().numpy() for x in (out, *gradients)]


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_attention(window, dtype, tolerance):
    (_, wanted), = run_ranks(1, attention, "cpu", torch.float32, window)
    (any_lengths, found), = run_ranks(1, attention, "cuda", dtype, window, gpus=True)
    from llama_rlhf.models.attention import _varlen
    assert any_lengths == (dtype == torch.bfloat16 and _varlen()[0] is not None and torch.cuda.get_device_capability() >= (8, 0))
    for a, b in zip(found, wanted):
        assert abs(a - b).max() <= tolerance * abs(b).max()


def steps(device, folder, lora):
    """Losses and norms of three optimizer steps in fp32, and samples after them: 2 and 30 rows at once, with recorded decode steps too on a GPU; and
    where the token that all prompts begin with is computed once."""
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf import generation
    from llama_rlhf.parallel import groups
    from llama_rlhf.parallel.layers import Lora
    from llama_rlhf.sampling import Sampling
    from llama_rlhf.trainer import Trainer, response_logprobs
    groups.initialize(device=device)
    model = load_model(folder, lora=Lora(*lora) if lora else None, dtype=torch.float32)
    trainer = Trainer(model, lr=1e-3, total_steps=3, schedule="constant")
    rows = [[1, *range(20, 20 + n)] for n in (9, 30, 17)]
    found = [trainer.step([rows], lambda batch: -response_logprobs(model, batch, [3] * len(batch)).sum(), lambda batch: sum(len(row) - 3 for row in batch)) for _ in range(3)]
    options = dict(eos_ids=(2, 5, 9), max_new_tokens=60, n_samples=12, sampling=Sampling(temperature=1.0))
    tokens = []
    for graphs, n, saves in [(graphs, n, 256) for graphs in (("never", "always") if device == "cuda" else ("never",)) for n in (2, 30)] + [("never", 30, 1)]:
        generation._PREFIX_SAVES = saves
        tokens.append([[c.tokens for c in row] for row in generation.generate(model, PROMPTS, cuda_graphs=graphs, max_batch_size=n, **options)])
    groups.shutdown()
    return [(step.loss, step.grad_norm) for step in found], tokens


@pytest.mark.parametrize("lora", [None, (4, 8.0)])
def test_training_and_generation(toy, lora):
    (wanted, (tokens, *again)), = run_ranks(1, steps, "cpu", str(toy / "hf"), lora)
    (found, all_ways), = run_ranks(1, steps, "cuda", str(toy / "hf"), lora, gpus=True)
    for a, b in zip(found, wanted):
        assert a == pytest.approx(b, rel=1e-4)
    assert len({len(row) for rows in tokens for row in rows}) > 5, "rows end at different times"
    assert again == [tokens] * 2 and all_ways == [tokens] * 5, "plain and recorded steps, 2 and 30 rows at once, the first token shared"


def choices(device):
    """Tokens and their log-probabilities, of flat and of steep rows, in all ways to choose."""
    from llama_rlhf.parallel import groups
    from llama_rlhf.sampling import Sampling, choose
    groups.initialize(device=device)
    device, n = groups.device(), 64
    logits = torch.randn(n, 1000, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 9, n)[:, None]
    keys = (torch.arange(n, device=device),) * 3
    found = [choose(logits.to(device), torch.eye(1000, device=device), [(0, 1000)], Sampling(**options), keys, with_logprobs=True)
             for options in ({}, {"temperature": 0.7}, *({"temperature": 1.0, **some} for some in ({"top_k": 7}, {"top_p": 0.9}, {"top_k": 300, "top_p": 0.8, "min_p": 0.01})))]
    groups.shutdown()
    return [(tokens.tolist(), logprobs.tolist()) for tokens, logprobs in found]


def test_the_same_tokens_are_chosen():
    for (tokens, logprobs), (wanted, wanted_logprobs) in zip(run_ranks(1, choices, "cuda", gpus=True)[0], run_ranks(1, choices, "cpu")[0]):
        assert tokens == wanted and logprobs == pytest.approx(wanted_logprobs, abs=1e-4)


@pytest.mark.parametrize("n", [1, 2])
def test_the_scripts_run_on_gpus(toy, tmp_path, n):
    """Fine-tuning, its verifier, PPO with four roles, bf16, then an evaluation of the result."""
    if n > torch.cuda.device_count():
        pytest.skip(f"needs {n} GPUs")
    common = dict(device="cuda", dtype="bf16", train_file=toy / "train.json", max_batch_size=4, max_seq_len=96)
    for flags in (dict(script="solver_train.py", ckpt_dir=toy / "hf", save_dir=tmp_path / "solver", max_steps=3),
                  dict(script="verifier_train.py", ckpt_dir=tmp_path / "solver", save_dir=tmp_path / "verifier", max_steps=3, lora_rank=4),
                  dict(script="ppo_train.py", actor_ckpt_dir=tmp_path / "solver", critic_ckpt_dir=tmp_path / "verifier", reward_model_ckpt_dir=tmp_path / "verifier",
                       actor_save_dir=tmp_path / "ppo", lora_rank=4, max_buffer_size=8, minibatch_size=4, max_new_tokens=16, max_iterations=2),
                  dict(script="solver_evaluate.py", ckpt_dir=tmp_path / "ppo", log_dir=tmp_path / "log", label_file=toy / "train.json", max_new_tokens=16, limit=8)):
        script = flags.pop("script")
        given = {**common, **flags}
        if script == "solver_evaluate.py":
            del given["train_file"]
        for code, _, err in run_script(n, script, wait=600, **given):
            assert code == 0, (script, err[-3000:])
    assert json.loads((tmp_path / "log/metrics.json").read_text())["n"] == 8


@pytest.mark.parametrize("options", [dict(dtype="fp16", lr=1e-9), dict(dtype="bf16", compile=True),
                                     dict(dtype="bf16", compile=True, activation_checkpointing="all", lora_rank=4)], ids=str)
def test_losses_are_those_of_fp32(toy, tmp_path, options):
    """At every step that neither skipped: fp16 begins with an overflow, after which its weights are a step behind, hence its lr."""
    losses = []
    for name, dtype in (("plain", dict(dtype="fp32", compile=False, activation_checkpointing="none")), ("other", {})):
        (code, _, err), = run_script(1, "solver_train.py", wait=300, device="cuda", ckpt_dir=toy / "hf", save_dir=tmp_path / name, train_file=toy / "train.json",
                                     log_dir=tmp_path / name / "log", max_batch_size=4, max_seq_len=96, max_steps=4, log_steps=1, **{"lr": 1e-3, **options, **dtype})
        assert code == 0, err[-3000:]
        with open(tmp_path / name / "log/metrics.jsonl") as file:
            losses.append([record["loss"] for record in map(json.loads, file) if "grad_norm" in record])
    wanted, found = zip(*((a, b) for a, b in zip(*losses) if b is not None))
    assert len(found) >= 2 and found == pytest.approx(wanted, rel=2e-2)
