"""What must hold is seen when it does, and named when a rank departs from it."""

import json

import pytest
import torch
from ranks import run_ranks, run_script
from toys import add_bytes_tokenizer, make_hf


def drifted(folder, fault, tp):
    """On every rank: what the checks at the start say after `fault` was done to rank 1 alone; "" when they are content."""
    from llama_rlhf import invariants
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.parallel import groups
    from llama_rlhf.trainer import Trainer, response_logprobs
    groups.initialize(tp, device="cpu")
    model = load_model(folder, dtype=torch.float32)
    trainer = Trainer(model, lr=1e-2, total_steps=3)
    trainer.step([0], lambda _: -response_logprobs(model, [[1, 2, 3, 4]], [1]).sum(), lambda _: 3)
    step = 1
    with torch.no_grad():
        if groups.rank() == 1 and fault == "norm":
            model.norm.weight[0] += 1e-3
        if groups.rank() == 1 and fault == "matrix":
            model.layers[0].attention.wqkv.weight[0, 0] += 1e-3
        if groups.rank() == 1 and fault == "skipped":
            trainer.skipped_steps += 1
        if groups.rank() == 1 and fault == "step":
            step += 1
    try:
        invariants.running({"model": model}, {"model": trainer}, step=step, grad_norm=1.0, texts=[[1, 2, 3, 4]])
        return ""
    except ValueError as error:
        return str(error)
    finally:
        groups.shutdown()


@pytest.mark.parametrize("fault,tp,named", [
    ("none", 2, ""), ("none", 1, ""), ("norm", 2, "replicated parameters are equal on all ranks: model norm.weight"),
    ("norm", 1, "norm.weight"), ("matrix", 1, "data-parallel replicas hold equal weights: model layers.0.attention.wq.weight"),
    ("skipped", 2, "model's optimizer steps"), ("step", 2, "step: 1 on rank 0, 2 on rank 1")])
def test_a_rank_that_departs_is_named_on_every_rank(fault, tp, named, tmp_path):
    make_hf(tmp_path, "llama")
    for said in run_ranks(2, drifted, str(tmp_path), fault, tp):
        assert named in said and bool(said) == (fault != "none"), said


def test_a_rank_without_heads_departs_from_nobody(tmp_path):
    """Three ranks, two heads that share keys: the first rank's empty part of them was compared with what the others hold, and no training began."""
    make_hf(tmp_path, "llama", num_attention_heads=2, num_key_value_heads=1)
    assert run_ranks(3, drifted, str(tmp_path), "none", 3) == [""] * 3


def test_texts_need_one_beginning_and_an_end():
    from types import SimpleNamespace

    from llama_rlhf.invariants import _texts
    tokenizer = SimpleNamespace(bos_id=1, eos_ids=(2,))
    row = lambda tokens, **more: SimpleNamespace(id=7, tokens=tokens, prompt_len=1, **more)  # noqa: E731
    begin, end = _texts([row([1, 5, 2])], tokenizer, 9, False)
    assert begin.ok and end.ok
    assert _texts([row([1, 1, 5, 2])], tokenizer, 9, True)[0].ok is False and _texts([row([5, 2])], tokenizer, 9, False)[0].ok is False
    assert _texts([row([1, 5, 5])], tokenizer, 9, False)[1].ok is False
    assert _texts([row([1, 5, 5])], tokenizer, 3, False)[1].ok is True          # cut at max_seq_len
    assert _texts([row([1, 5, 5], responses=[[1, 5, 5]])], tokenizer, 9, False)[1].ok is None


@pytest.mark.parametrize("lora_rank", [-1, 4])
def test_the_doctor_prints_a_table_and_stops(lora_rank, tmp_path):
    make_hf(tmp_path / "hf", "llama", vocab_size=263)
    add_bytes_tokenizer(tmp_path / "hf")
    (tmp_path / "train.json").write_text(json.dumps([{"instruction": f"{a}+1?", "output": f"#### {a + 1}"} for a in range(8)]))
    ranks = run_script(2, "solver_train.py", ckpt_dir=tmp_path / "hf", save_dir=tmp_path / "run", train_file=tmp_path / "train.json", max_seq_len=64,
                       dtype="fp32", lora_rank=lora_rank, doctor=True)
    assert [code for code, *_ in ranks] == [0, 0], ranks
    table = ranks[0][1]
    for line in ("ok     replicated parameters", "ok     each text has one beginning", "ok     the last label is the end token", "cached decoding equals the full forward",
                 "the ratio of unchanged weights is 1"):
        assert line in table, table
    assert " 0 failed" in table and ("new adapters change nothing" in table) == (lora_rank > 0)
    assert not list((tmp_path / "run").glob("epoch-*"))
