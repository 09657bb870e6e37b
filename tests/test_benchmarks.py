"""The benchmarks: the same work on both sides, and nothing lost by running them."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

BENCHMARKS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "benchmarks")
sys.path.append(BENCHMARKS)


@pytest.mark.parametrize("name", ["split", "large_model"])
def test_a_benchmark_leaves_the_folder_it_is_given_as_it_was(name, tmp_path, monkeypatch, world_of_one):
    """--folder was where a disk is; split.py removed a folder `source` there, even after it had refused to write to it, large_model.py all there was."""
    import large_model
    import split

    from llama_rlhf import models
    from llama_rlhf.parallel import groups
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "weights").write_text("mine")
    monkeypatch.setattr(split, "make_checkpoint", lambda folder, *_: os.makedirs(folder) or (10, 5))
    monkeypatch.setattr(split, "split", lambda *_: (1.0, 5, ""))
    small = replace(models.preset("tinyllama-1.1b"), dim=8, n_heads=2, n_kv_heads=1, head_dim=4, ffn_dim=8, vocab_size=16)
    monkeypatch.setattr(models, "preset", lambda _: small)
    monkeypatch.setattr(groups, "initialize", lambda **_: None)
    monkeypatch.setattr(large_model.subprocess, "run", lambda *_, **__: None)       # the ranks
    {"split": split, "large_model": large_model}[name].main(folder=str(tmp_path), n=1)
    assert os.listdir(tmp_path) == ["source"] and (tmp_path / "source" / "weights").read_text() == "mine"


def test_sides_that_have_not_done_the_same_end_the_benchmark():
    """TRL's RewardTrainer read the reward a token before ours, losses 0.656 and 0.758, and the ratio of the times was printed beside them."""
    from ppo import agree
    agree("losses", {"ours": 1.4465, "trl": 1.4451}, 2e-2)
    for theirs in (0.758, float("nan")):
        with pytest.raises(SystemExit, match="losses: ours 0.656, trl"):
            agree("losses", {"ours": 0.656, "trl": theirs}, 2e-2)


def test_kernels_that_give_something_else_are_not_timed():
    import torch
    from kernels import same
    usual = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    same(usual, usual.bfloat16(), usual + 1e-6)
    for other in (usual.flip(0), usual * float("nan")):
        with pytest.raises(SystemExit, match="one of them is wrong"):
            same(usual, usual, other)


def test_a_side_that_ends_says_why():
    from training import Side
    with pytest.raises(SystemExit, match="(?s)no module of that name.*a side ended"):
        Side([sys.executable, "-c", "import sys; sys.exit('no module of that name')"]).step()


@pytest.mark.parametrize("side,micro_batch", [("sft", 4), ("reward", 4), ("sft_defaults", 3)])
def test_rows_that_trl_would_leave_out_are_refused(side, micro_batch, tmp_path):
    (tmp_path / "steps.json").write_text(json.dumps([[{}] * 6]))
    done = subprocess.run([sys.executable, os.path.join(BENCHMARKS, "training_peer.py"), "--side", side, "--model", "", "--steps", tmp_path / "steps.json",
                           "--micro_batch", str(micro_batch)], capture_output=True, text=True)
    assert done.returncode == 1 and "does not divide them" in done.stderr


def test_fine_tuning_beside_ppo_has_as_many_tokens_as_it(monkeypatch):
    """Prompts shorter than --new_tokens made shorter rows for fine-tuning than for PPO: 972 of 1024 tokens."""
    from types import SimpleNamespace

    import ppo
    import roles

    from llama_rlhf import trainer
    from llama_rlhf.checkpoint import shards
    counted = []

    class Recorder:
        def __init__(self, *_, **__):
            pass

        def step(self, batches, loss_sum, count):
            counted.extend(count(batch) for batch in batches)

    monkeypatch.setattr(ppo, "prompts_of", lambda *_: [[5, 6], [7], [8] * 9])
    monkeypatch.setattr(shards, "load_model", lambda *_, **__: None)
    monkeypatch.setattr(trainer, "Trainer", Recorder)
    roles.fine_tuning(SimpleNamespace(model="", n_rows=3, lora_rank=1, dtype="fp32", new_tokens=5, max_batch_size=2, iterations=1))
    assert counted == [10, 5]
