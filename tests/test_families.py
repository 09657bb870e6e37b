"""What each family adds to the decoder: experts, ALiBi, scaling beyond the training length; and every file layout it comes in.

References: transformers in fp32, a formula written out here, or the same weights read through another door.
"""

import json
import math
import os
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks
from test_training import collectives, merged, train
from toys import MODELS, logits_of, make_hf, make_reference, measure, save_as_qwen1

NEW = ["mixtral", "qwen3-moe", "bloom"]


# ---- reading ---------------------------------------------------------------------------------------------------------


def view_of(path):
    """Every native tensor of a checkpoint, through the converter."""
    from llama_rlhf.checkpoint.convert import NativeView, load_config
    from llama_rlhf.checkpoint.formats import open_checkpoint
    from llama_rlhf.checkpoint.shards import native_tensors
    from llama_rlhf.models.transformer import CausalLM
    checkpoint = open_checkpoint(str(path))
    config, _ = load_config(checkpoint)
    return NativeView(checkpoint, config, native_tensors(CausalLM(config)))


def assert_same_model(path, reference):
    """Bit-equal natives, whole and in the slices of three ranks; configs equal but for what only one side can say."""
    from llama_rlhf.parallel.partition import Partition
    a, b = view_of(path), view_of(reference)
    assert replace(a.config, max_seq_len=1, embedding_cut="vocab") == replace(b.config, max_seq_len=1, embedding_cut="vocab")
    assert a.wanted.keys() == b.wanted.keys()
    for native, piece in a.wanted.items():
        whole = b.read(native)
        assert torch.equal(a.read(native), whole), native
        if piece.dim is not None:
            for start, stop in Partition(a.config, 3).held[piece.kind]:
                assert torch.equal(a.read(native, start, stop), whole.narrow(piece.dim, start, stop - start)), (native, start)
    return a.config


def natives_of(folder):
    view = view_of(folder)
    return {native: view.read(native).clone() for native in view.wanted}


@pytest.mark.parametrize("name", ["llama", "qwen1", "qwen3", "mixtral"])
def test_a_rank_reads_its_own_part_of_the_files_and_no_more(name, world_of_one, tmp_path, monkeypatch):
    from llama_rlhf.checkpoint.formats import Checkpoint
    from llama_rlhf.parallel.partition import Partition
    make_hf(tmp_path, name)
    view, n_read, read = view_of(tmp_path), [], Checkpoint.read
    plan = Partition(view.config, 4)

    def counted(self, *arguments):
        x = read(self, *arguments)
        n_read.append(x.numel())
        return x

    monkeypatch.setattr(Checkpoint, "read", counted)
    for rank in range(4):
        n_read.clear()
        held = [view.read(native, *plan.held[piece.kind][rank]) if piece.kind else view.read(native) for native, piece in view.wanted.items()]
        assert sum(n_read) == sum(x.numel() for x in held) < sum(torch.Size(piece.shape).numel() for piece in view.wanted.values()) / 2


def write_json(path, value):
    with open(path, "w") as file:
        json.dump(value, file)


def read_json(path):
    with open(path) as file:
        return json.load(file)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_stacked_experts_of_a_live_transformers_5_model_are_read(name, world_of_one, tmp_path):
    """gate_up_proj [E, 2 ffn, dim] holds all gates before all ups: a plain cut would give rank 0 only gates."""
    model = make_hf(tmp_path / "files", name)
    assert any(key.endswith("experts.gate_up_proj") for key in model.state_dict())
    os.makedirs(tmp_path / "memory")
    torch.save(model.state_dict(), tmp_path / "memory" / "pytorch_model.bin")
    write_json(tmp_path / "memory" / "config.json", model.config.to_dict())
    assert_same_model(tmp_path / "memory", tmp_path / "files")


@pytest.mark.parametrize("name", ["llama-tied-scaled", "bloom"])
def test_a_tied_matrix_saved_as_the_head_is_the_embedding(name, world_of_one, tmp_path):
    """safetensors.torch.save_model keeps one name of shared tensors, lm_head.weight: transformers loads that, here the embedding was missing."""
    from safetensors.torch import load_file, save_model
    model = make_hf(tmp_path / "usual", name)
    model.save_pretrained(tmp_path / "head")
    save_model(model, str(tmp_path / "head" / "model.safetensors"), metadata={"format": "pt"})
    names = load_file(tmp_path / "head" / "model.safetensors")
    assert "lm_head.weight" in names and not any("embed_tokens" in n or n.endswith("word_embeddings.weight") for n in names)
    assert_same_model(tmp_path / "head", tmp_path / "usual")


def test_the_hub_files_of_mixtral_are_a_union_with_joined_experts(world_of_one, tmp_path):
    """consolidated.NN.pt: whole tensors spread over files, experts joined by rows, w2's blocks transposed, q and k native."""
    model = make_hf(tmp_path / "hf", "mixtral")
    natives, c = natives_of(tmp_path / "hf"), model.config
    files = [{} for _ in range(8)]
    for i, (native, x) in enumerate(natives.items()):
        if ".feed_forward." not in native:
            files[i % 8][native] = x
    for n in range(c.num_hidden_layers):
        prefix, hub = f"layers.{n}.feed_forward", f"layers.{n}.block_sparse_moe"
        files[0][f"{hub}.gate.weight"] = natives[f"{prefix}.gate.weight"]
        for i, x in ((1, 3), (3, 5)):
            files[x][f"{hub}.w{i}"] = torch.cat([natives[f"{prefix}.experts.{e}.w{i}.weight"] for e in range(c.num_local_experts)])
        files[7][f"{hub}.w2"] = torch.cat([natives[f"{prefix}.experts.{e}.w2.weight"].t() for e in range(c.num_local_experts)])
    os.makedirs(tmp_path / "hub")
    for i, tensors in enumerate(files):
        torch.save(tensors, tmp_path / "hub" / f"consolidated.{i:02d}.pt")
    write_json(tmp_path / "hub" / "params.json", {
        "hidden_size": c.hidden_size, "num_hidden_layers": c.num_hidden_layers, "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads, "intermediate_size": c.intermediate_size, "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_parameters["rope_theta"], "vocab_size": c.vocab_size, "num_local_experts": c.num_local_experts,
        "num_experts_per_tok": c.num_experts_per_tok, "head_dim": c.head_dim})
    assert assert_same_model(tmp_path / "hub", tmp_path / "hf").family == "mixtral"


@pytest.mark.parametrize("name,file", [("mixtral", "consolidated.00.pth"), ("mistral-window", "consolidated.00.pth"),
                                       ("mistral-window", "consolidated.safetensors")])
def test_mistrals_own_files_are_read_and_its_params_written(name, file, world_of_one, tmp_path):
    """One file, .pth or (v0.3) .safetensors, with native names and rotary order; theta 1e4 without a key and with a window."""
    from llama_rlhf.models import write_params
    from safetensors.torch import save_file
    make_hf(tmp_path / "hf", name)
    os.makedirs(tmp_path / "tar")
    (save_file if file.endswith(".safetensors") else torch.save)(natives_of(tmp_path / "hf"), tmp_path / "tar" / file)
    config = view_of(tmp_path / "hf").config
    params = write_params(config)
    assert {"dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size"} <= params.keys()
    assert params.get("moe") == ({"num_experts": 5, "num_experts_per_tok": 2} if name == "mixtral" else None)
    if name == "mistral-window":
        assert params.pop("rope_theta") == 1e4
    write_json(tmp_path / "tar" / "params.json", params)
    assert assert_same_model(tmp_path / "tar", tmp_path / "hf") == replace(config, max_seq_len=32768)      # the file does not say


@pytest.mark.parametrize("cut,theta", [("hidden", 1e4), ("vocab", 5e5)])
def test_metas_shards_are_read_with_either_cut_of_the_embedding(cut, theta, world_of_one, tmp_path):
    """LLaMA-1/2 cut tok_embeddings on hidden, LLaMA-3 on vocabulary; rope.freqs of old files is not a weight."""
    from llama_rlhf.models.llama import write_params
    from llama_rlhf.parallel.partition import Partition
    make_hf(tmp_path / "hf", "llama-2-like", rope_parameters={"rope_type": "default", "rope_theta": theta}, rms_norm_eps=1e-5)
    view = view_of(tmp_path / "hf")
    assert view.config.embedding_cut == cut
    plan, shards = Partition(view.config, 2), [{"rope.freqs": torch.ones(6)} for _ in range(2)]
    for native, piece in view.wanted.items():
        dim, kind = (1, "hidden") if native == "tok_embeddings.weight" and cut == "hidden" else (piece.dim, piece.kind)
        for shard, (start, stop) in zip(shards, plan.held[kind] if dim is not None else [(0, 0)] * 2):
            shard[native] = view.read(native) if dim is None else view.read(native).narrow(dim, start, stop - start).clone()
    os.makedirs(tmp_path / "meta")
    for i, shard in enumerate(shards):
        torch.save(shard, tmp_path / "meta" / f"consolidated.{i:02d}.pth")
    write_json(tmp_path / "meta" / "params.json", {**write_params(view.config), "vocab_size": -1})
    assert_same_model(tmp_path / "meta", tmp_path / "hf")


@pytest.mark.parametrize("twice", [False, True])
def test_llama_3_2_holds_embedding_and_head_once(twice, world_of_one, tmp_path):
    """Meta's params.json does not say so: output.weight is absent, or both names stand for the same bytes. Equal bytes that stand
    there twice are two matrices."""
    from llama_rlhf.models import llama3_scaling
    from llama_rlhf.models.llama import write_params
    make_hf(tmp_path / "hf", "llama-tied-scaled", rope_parameters={**llama3_scaling(32.0), "rope_theta": 5e5}, rms_norm_eps=1e-5)
    natives, params = natives_of(tmp_path / "hf"), write_params(view_of(tmp_path / "hf").config)
    for folder, head in (("meta", {"output.weight": natives["tok_embeddings.weight"]} if twice else {}),
                         ("untied", {"output.weight": natives["tok_embeddings.weight"].clone()})):
        os.makedirs(tmp_path / folder)
        torch.save({**natives, **head}, tmp_path / folder / "consolidated.00.pth")
        write_json(tmp_path / folder / "params.json", params)
    assert assert_same_model(tmp_path / "meta", tmp_path / "hf").tie_embeddings
    assert not view_of(tmp_path / "untied").config.tie_embeddings


@pytest.mark.parametrize("spelling", [{"n_embed": 48, "num_attention_heads": 6, "n_layer": 2}, {"hidden_size": 48, "n_head": 6, "n_layer": 2},
                                      {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2}])
def test_bloom_is_read_with_and_without_its_prefix_in_every_spelling(spelling, world_of_one, tmp_path):
    from safetensors.torch import load_file, save_file
    make_hf(tmp_path / "hf", "bloom")
    os.makedirs(tmp_path / "short")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(name.startswith("transformer.") for name in tensors)
    save_file({name.removeprefix("transformer."): x for name, x in tensors.items()}, tmp_path / "short" / "model.safetensors")
    write_json(tmp_path / "short" / "config.json", {"model_type": "bloom", "vocab_size": 101, "layer_norm_epsilon": 1e-5, **spelling})
    assert_same_model(tmp_path / "short", tmp_path / "hf")


def test_the_oldest_first_generation_qwen_is_read_and_its_buffers_ignored(world_of_one, tmp_path):
    """Its config says n_embd, ffn_hidden_size, padded_vocab_size; scaling switches that are absent are on, as in its code."""
    from safetensors.torch import load_file, save_file
    make_hf(tmp_path / "new", "qwen1")
    os.makedirs(tmp_path / "old")
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    save_file({**tensors, "transformer.h.0.attn.masked_bias": torch.zeros(1), "transformer.rotary_emb.inv_freq": torch.zeros(6),
               "transformer.h.1.attn.logn_tensor": torch.zeros(1)}, tmp_path / "old" / "model.safetensors")
    c = read_json(tmp_path / "new" / "config.json")
    write_json(tmp_path / "old" / "config.json", {
        "model_type": "qwen", "n_embd": 48, "n_head": 4, "n_layer": 2, "ffn_hidden_size": c["intermediate_size"], "seq_length": 128,
        "padded_vocab_size": 101, "vocab_size": 99, "n_positions": 512, "kv_channels": 12, "rotary_emb_base": 10000})
    config = assert_same_model(tmp_path / "old", tmp_path / "new")
    assert (config.ntk_beyond, config.logn_beyond, config.max_seq_len) == (128, 128, 512)


@pytest.mark.parametrize("name", ["llama", "llama-tied-scaled", "qwen2"])
def test_gguf_files_are_the_same_model(name, world_of_one, tmp_path):
    """Written as llama.cpp's converter does: q and k of "llama" permuted, of "qwen2" not; LLaMA-3's scaling as a tensor of factors."""
    gguf = pytest.importorskip("gguf")
    more = {}
    if name == "llama-tied-scaled":     # the factors only say 8: the other numbers must be LLaMA-3's own
        more = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                                    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}
    model = make_hf(tmp_path / "hf", name, **more)
    c, architecture = model.config, "qwen2" if name == "qwen2" else "llama"
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), architecture)
    for key, value in {"block_count": c.num_hidden_layers, "embedding_length": c.hidden_size, "feed_forward_length": c.intermediate_size,
                       "attention.head_count": c.num_attention_heads, "attention.head_count_kv": c.num_key_value_heads,
                       "attention.key_length": c.head_dim, "context_length": c.max_position_embeddings}.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", c.rms_norm_eps)
    writer.add_float32(f"{architecture}.rope.freq_base", c.rope_parameters["rope_theta"])
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers.": "blk.",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
             "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    for key, x in model.state_dict().items():
        if c.tie_word_embeddings and key == "lm_head.weight":
            continue
        for old, new in names.items():
            key = key.replace(old, new)
        if architecture == "llama" and (".attn_q." in key or ".attn_k." in key):
            heads = c.num_attention_heads if ".attn_q." in key else c.num_key_value_heads
            x = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        writer.add_tensor(key, x.numpy())
    if more:        # by hand for head_dim 10, theta 5e5: wavelengths 6.3, 87, 1197 are kept, 16522 and 227981 stretched
        writer.add_tensor("rope_freqs.weight", torch.tensor([1.0, 1.0, 1.0, 8.0, 8.0]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_same_model(tmp_path / "model.gguf", tmp_path / "hf")


def test_foreign_and_missing_tensors_are_named(world_of_one, tmp_path):
    from llama_rlhf.checkpoint.formats import CheckpointError
    from safetensors.torch import load_file, save_file
    make_hf(tmp_path, "mixtral")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    shared = "model.layers.1.block_sparse_moe.shared_expert.w1.weight"
    save_file({**tensors, shared: torch.zeros(2, 2)}, file)
    with pytest.raises(CheckpointError, match=f"not understood: {shared}"):
        view_of(tmp_path)
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"missing: layers\.1\.feed_forward\.experts\.3\.w2\.weight"):
        view_of(tmp_path)


def test_a_config_of_too_many_layers_is_refused_before_they_are_laid_out(world_of_one, tmp_path):
    from llama_rlhf.checkpoint.formats import CheckpointError
    from llama_rlhf.checkpoint.shards import load_model
    make_hf(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1000}))
    with pytest.raises(CheckpointError, match=r"the config asks for \d{8} parameters, the files hold \d{5}\."):
        load_model(str(tmp_path))


def test_a_head_that_differs_from_the_embedding_is_used_although_the_config_ties_them(world_of_one, tmp_path):
    """As transformers 5 does. An exporter that saved the tied head again leaves them one."""
    from llama_rlhf.checkpoint.convert import load_config
    from llama_rlhf.checkpoint.formats import open_checkpoint
    from llama_rlhf.checkpoint.shards import load_model
    from safetensors.torch import load_file, save_file
    make_hf(tmp_path, "llama-tied-scaled", vocab_size=4100)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    last = embedding.clone()
    last[-1, -1] += 1                   # the two are compared part by part
    for head, tied in ((embedding.clone(), True), (torch.randn_like(embedding), False), (last, False)):
        save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with open_checkpoint(str(tmp_path)) as checkpoint:
            config, notes = load_config(checkpoint)
        assert config.tie_embeddings == tied and len(notes) == (not tied)
        assert torch.equal(load_model(str(tmp_path)).head_weight, head)


def test_linear_rotary_scaling_of_gguf_files_in_both_spellings():
    from llama_rlhf.models import config_from_gguf
    header = {"general.architecture": "llama", **{f"llama.{key}": value for key, value in {
        "embedding_length": 64, "block_count": 1, "attention.head_count": 4, "feed_forward_length": 96, "attention.layer_norm_rms_epsilon": 1e-5, "context_length": 99}.items()}}
    for keys, factor in (({}, None), ({"scale_linear": 8.0}, 8.0), ({"scaling.factor": 4.0}, 4.0), ({"scaling.type": "linear", "scaling.factor": 4.0}, 4.0),
                         ({"scaling.type": "none", "scaling.factor": 4.0}, None), ({"scaling.factor": 1.0}, None)):
        config = config_from_gguf({**header, **{f"llama.rope.{key}": value for key, value in keys.items()}}, 50, True)
        assert config.rope_scaling == (factor and {"rope_type": "linear", "factor": factor})
    with pytest.raises(ValueError, match="rope scaling 'yarn' is not supported"):
        config_from_gguf({**header, "llama.rope.scaling.type": "yarn"}, 50, True)


BASE = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 50}
MOE = {"model_type": "qwen3_moe", "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2, **BASE}
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("c,expected", [
    ({"model_type": "llama", **BASE, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_theta": 5e5, "rope_scaling": LINEAR}),
    ({"model_type": "llama", **BASE, "rope_parameters": {"rope_theta": 5e5, **LINEAR}}, {"rope_theta": 5e5, "rope_scaling": LINEAR}),
    ({"model_type": "llama", **BASE, "max_sequence_length": 77}, {"max_seq_len": 77, "n_kv_heads": 4, "norm_eps": 1e-6, "rope_theta": 1e4}),
    ({"model_type": "mistral", **BASE}, {"sliding_window": 4096}),
    ({"model_type": "mistral", **BASE, "sliding_window": None}, {"sliding_window": None}),
    ({"model_type": "mixtral", **BASE, "num_key_value_heads": 2}, {"rope_theta": 1e6, "norm_eps": 1e-5, "sliding_window": None, "n_experts": 8, "n_active_experts": 2,
                                         "normalise_routing": True, "fp32_routing": True}),
    ({"model_type": "qwen2", **BASE, "sliding_window": 8, "use_sliding_window": False}, {"sliding_window": None, "qkv_bias": True}),
    ({"model_type": "qwen2", **BASE, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3},
     {"sliding_window": 8, "window_first_layer": 3}),
    ({"model_type": "qwen2", **BASE, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 4}, {"sliding_window": None}),
    ({"model_type": "qwen2", **BASE, "sliding_window": 8, "use_sliding_window": True}, {"sliding_window": None}),       # its default is from layer 28 on
    ({"model_type": "qwen2", **BASE, "num_hidden_layers": 30, "use_sliding_window": True}, {"sliding_window": 4096, "window_first_layer": 28}),
    ({"model_type": "qwen3", **BASE}, {"head_dim": 128, "qk_norm": True}),
    (MOE, {"ffn_dim": 24, "normalise_routing": False, "fp32_routing": False, "head_dim": 16, "qk_norm": True}),
    ({**MOE, "use_sliding_window": True, "sliding_window": 8}, {"sliding_window": 8, "window_first_layer": 0}),
    ({"model_type": "mistral", **BASE, "sliding_window": 8, "layer_types": ["sliding_attention"] * 4}, {"sliding_window": 8}),
    ({"model_type": "llama", **BASE, "rope_parameters": {"rope_theta": 5e5, **LINEAR}, "rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 1.0},
     {"rope_theta": 5e5, "rope_scaling": LINEAR}),
    ({**MOE, "norm_topk_prob": True, "head_dim": 128}, {"normalise_routing": True, "head_dim": 128}),
    ({"model_type": "qwen", **BASE, "kv_channels": 16, "seq_length": 8192, "max_position_embeddings": 32768, "use_dynamic_ntk": False,
      "use_logn_attn": False}, {"ffn_dim": 48, "ntk_beyond": None, "logn_beyond": None, "max_seq_len": 8192}),
])
def test_config_spellings(c, expected):
    from llama_rlhf.models import config_from_hf
    config = config_from_hf(c).to_dict()
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("c,complaint", [
    ({"model_type": "gpt2", **BASE}, "model_type 'gpt2' is not supported"),
    ({**MOE, "mlp_only_layers": [0]}, "experts in every layer"),
    ({**MOE, "decoder_sparse_step": 2}, "experts in every layer"),
    ({**MOE, "num_experts_per_tok": 9}, "n_active_experts=9 must be 1 to n_experts=8"),
    *(({"model_type": kind, **BASE, "hidden_act": "relu"}, f"hidden_act='relu' is not supported for {kind}") for kind in ("llama", "mistral", "mixtral", "qwen2", "qwen3")),
    ({"model_type": "bloom", "vocab_size": 9, "n_head": 2, "n_layer": 1}, "lacks hidden_size or n_embed"),
    ({"model_type": "bloom", **BASE, "apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ({"model_type": "llama", **BASE, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
    ({"model_type": "llama", **BASE, "rope_scaling": {"rope_type": ["linear"], "factor": 4.0}}, r"\['linear'\] is not supported"),
    ({"model_type": "qwen2", **BASE, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2,
      "layer_types": ["sliding_attention"] * 4}, "layer_types asks for other layers .* use_sliding_window and max_window_layers"),
    ({"model_type": "mistral", **BASE, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types asks for other layers"),
    ({"model_type": "qwen2", **BASE, "layer_types": ["sliding_attention"] * 4}, "layer_types asks for other layers"),
    ({**MOE, "use_sliding_window": True, "max_window_layers": 2}, "max_window_layers=2 is not supported for qwen3_moe"),
    *(({"model_type": "llama", **BASE, **more}, "partial_rotary_factor=0.5 is not supported") for more in
      ({"partial_rotary_factor": 0.5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}})),
    ({"model_type": "qwen3", **BASE, "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 77.0}}}, "by layer \\(full_attention\\)"),
    ({"model_type": "llama", **BASE, "original_max_position_embeddings": 16, "rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 64}}, "original_max_position_embeddings is 16, and 64"),
    # the scaling that a model card tells one to add, in a file that transformers 5 has saved
    ({"model_type": "qwen3", **BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": LINEAR}, "rope_parameters and rope_scaling disagree"),
])
def test_configs_that_cannot_be_honoured_are_refused(c, complaint):
    from llama_rlhf.models import config_from_hf
    with pytest.raises(ValueError, match=complaint):
        config_from_hf(c)


def test_params_and_gguf_headers_that_cannot_be_honoured_are_refused():
    from llama_rlhf.models import config_from_gguf, config_from_params
    params = {"dim": 64, "n_layers": 2, "head_dim": 16, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": 50}
    assert config_from_params(params, 50).family == "mistral"
    for key, value in (("yarn", {"factor": 16}), ("_sliding_window", [None, 8]), ("use_biases", True)):
        with pytest.raises(ValueError, match=f"params.json: {key} is not supported for the mistral family"):
            config_from_params({**params, key: value}, 50)
    header = {"embedding_length": 64, "block_count": 1, "attention.head_count": 4, "feed_forward_length": 96, "attention.layer_norm_rms_epsilon": 1e-5, "context_length": 99}
    for turned in (16, 8):
        given = {"general.architecture": "llama", **{f"llama.{key}": value for key, value in {**header, "rope.dimension_count": turned}.items()}}
        if turned == 16:
            assert config_from_gguf(given, 50, True).head_dim == 16
        else:
            with pytest.raises(ValueError, match="turns 8 of a head's 16 numbers"):
                config_from_gguf(given, 50, True)


def test_every_presets_config_json_reads_back_as_itself():
    from llama_rlhf.models import FAMILIES, PRESETS, config_from_hf
    for name, config in PRESETS.items():
        assert config_from_hf(FAMILIES[config.family].write_hf(config)) == config, name


# ---- any number of ranks, any number of shards -----------------------------------------------------------------------


def test_more_ranks_than_heads_with_sizes_that_nothing_divides(world_of_one, tmp_path):
    """7 ranks, 6 heads: one rank has none. 2 kv heads, shared by 3 ranks each; 13 or 29 expert rows, 101 words."""
    names = ("llama", "qwen3", *NEW)
    for name in names:
        make_reference(str(tmp_path / name), name, (7,))
    for rank in run_ranks(7, measure, [str(tmp_path / name) for name in names]):
        for name, result in zip(names, rank):
            assert result["logits"] < 1e-4 and result["gradients"] < 1e-4 and result["tokens"] and result["round trip"], name


def save_with_adapters(folder, target, value_head):
    """Save the model with adapters (and a value head) that are not what a new one would have."""
    from llama_rlhf.checkpoint.shards import load_model, save_model
    from llama_rlhf.models.transformer import CausalLM, ValueModel
    from llama_rlhf.parallel import groups
    from llama_rlhf.parallel.layers import Lora, piece_of, walk
    groups.initialize(device="cpu")
    model = load_model(folder, ValueModel if value_head else CausalLM, lora=Lora(3, 6.0), seed=1)
    for *_, parameter, pieces in walk(model):
        for native, piece in pieces:
            if native.endswith(("lora_b", "value_head.bias")):
                full = torch.randn(piece.shape, generator=torch.Generator().manual_seed(len(native)))
                part = full if piece.dim is None else full.narrow(piece.dim, piece.held[0], piece.held[1] - piece.held[0])
                piece_of(parameter.data, piece).copy_(part)
    save_model(model, target, companions=folder)
    groups.shutdown()


@pytest.mark.parametrize("name,value_head", [("mixtral", False), ("bloom", True)])
def test_three_shards_become_five_become_one_with_adapters_and_value_head(name, value_head, world_of_one, tmp_path):
    from llama_rlhf.checkpoint.formats import open_checkpoint
    from llama_rlhf.checkpoint.shards import split_checkpoint
    make_hf(tmp_path / "hf", name)
    run_ranks(1, save_with_adapters, str(tmp_path / "hf"), str(tmp_path / "one"), value_head)
    run_ranks(3, save_with_adapters, str(tmp_path / "hf"), str(tmp_path / "three"), value_head)
    split_checkpoint(str(tmp_path / "three"), str(tmp_path / "five"), 5)
    split_checkpoint(str(tmp_path / "five"), str(tmp_path / "merged"), 1)
    a, b = (open_checkpoint(str(tmp_path / name)).files[0] for name in ("one", "merged"))
    assert a.infos == b.infos
    assert any("lora_b" in name for name in a.infos) and ("value_head.bias" in a.infos) == value_head
    assert not any("experts" in name and "lora" in name for name in a.infos), "experts take no adapters"
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.infos)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,lora_rank", [("mixtral", -1), ("mixtral", 3), ("qwen3-moe", -1), ("bloom", -1), ("bloom", 3)])
def test_gradients_and_three_steps_are_the_same_at_1_2_3_ranks(name, lora_rank, tmp_path):
    """Routers, experts, norm biases, biases added after the reduce. 1e-5 in fp32; what is replicated agrees to the bit."""
    make_hf(tmp_path, name)
    one = run_ranks(1, train, str(tmp_path), lora_rank, [[0, 1, 2, 3]], 3)
    first = merged(one, 0)
    routers = [native for native in first if native.endswith("feed_forward.gate.weight")]
    assert len(routers) == (2 if lora_rank < 0 and name != "bloom" else 0)
    assert all(first[native].abs().max() > 1e-3 for native in routers)
    assert (lora_rank < 0) == any("experts" in native or native.endswith("tok_norm.bias") for native in first)
    for n in (2, 3):
        many = run_ranks(n, train, str(tmp_path), lora_rank, [[0, 1, 2, 3]], 3)
        for which in (0, 1):
            a, b = merged(one, which), merged(many, which)
            assert a.keys() == b.keys()
            for native in a:
                assert (a[native] - b[native]).abs().max() < 1e-5, (("gradient", "weight")[which], native, n)
        assert torch.allclose(torch.tensor(one[0][3]), torch.tensor(many[0][3]), rtol=1e-4)
        for output in many[1:]:
            assert output[4] == many[0][4], "replicated parameters differ in bits"
            assert all(output[0][native] == many[0][0][native] for native in routers), "router gradients differ between ranks"


def test_experts_cost_one_all_reduce_forward_and_one_more_backward(tmp_path):
    """Forward as the dense model: 2 per layer, 1 for the embedding, 2 small ones in the loss. Backward: the experts' input and
    the routing weights, [T, k], are summed."""
    make_hf(tmp_path, "mixtral")
    assert run_ranks(2, collectives, str(tmp_path), -1) == [(2 * 2 + 1 + 2, 2 * 3 + 1)] * 2


# ---- mixture of experts ----------------------------------------------------------------------------------------------


def lopsided(model):
    """Every token chooses expert 0 first and never expert 4: one embedding coordinate is constant, and the routers read it."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 4.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.experts.down_proj[:, 0] = 0
            layer.post_attention_layernorm.weight[0] = 1.0
            layer.mlp.gate.weight[0, 0], layer.mlp.gate.weight[4, 0] = 8.0, -8.0


def test_an_expert_with_all_tokens_and_one_with_none(world_of_one, tmp_path):
    from llama_rlhf.checkpoint.shards import load_model
    make_reference(str(tmp_path), "mixtral", (2,), change=lopsided)
    for rank in run_ranks(2, measure, [str(tmp_path)]):
        assert rank[0]["logits"] < 1e-4 and rank[0]["gradients"] < 1e-4 and rank[0]["tokens"]
    model = load_model(str(tmp_path / "model"))
    loads = []
    for block in model.layers:
        block.feed_forward.gate.register_forward_hook(lambda _, __, out: loads.append(torch.bincount(out[0].flatten(), minlength=5)))
    hidden = model(*packed([[1, 2, 3, 4], [5]]))
    assert all(load[0] == 5 and load[4] == 0 for load in loads)
    hidden.sum().backward()
    experts = model.layers[0].feed_forward.experts
    unused = experts.w13.grad.view(5, -1)[4], experts.w2.grad.view(5, -1)[4]
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in unused)


def packed(rows):
    from llama_rlhf.models.transformer import Rows
    return torch.tensor([t for row in rows for t in row]), Rows.packed([len(row) for row in rows])


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_the_grouped_kernel_and_the_loop_over_experts_agree(dtype, tolerance, world_of_one, monkeypatch):
    """CUDA takes the grouped matrix product, a CPU the loop. Expert 2 has no tokens; weights, values and gradients are of size 1."""
    from llama_rlhf.models import PRESETS
    from llama_rlhf.parallel import layers
    from llama_rlhf.parallel.partition import Partition
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    plan = Partition(replace(PRESETS["mixtral-8x7b"], dim=16, ffn_dim=24), 1)
    experts = layers.ParallelExperts(4, 16, 24, plan, dtype=dtype)
    torch.manual_seed(0)
    for name in ("w13", "w2"):
        setattr(experts, name, torch.nn.Parameter(torch.randn(getattr(experts, name).shape).to(dtype) / 4))
    x, target = torch.randn(9, 16).to(dtype), torch.randn(9, 16).to(dtype)
    chosen, results = torch.tensor([0, 1, 3])[torch.randint(0, 3, (9, 2))], []
    for grouped in (False, True):
        monkeypatch.setattr(layers, "_has_grouped_mm", lambda *_: grouped)
        inputs = x.clone().requires_grad_(), torch.full((9, 2), 0.5, requires_grad=True)
        out = experts(inputs[0], chosen, inputs[1])
        results.append([out, *torch.autograd.grad((out * target).sum(), [*inputs, *experts.parameters()])])
    for loop, kernel in zip(*results):
        assert loop.shape == kernel.shape and loop.abs().max() > 0.1
        assert (loop.float() - kernel.float()).abs().max() < tolerance


def test_the_grouped_kernel_waits_for_no_device(world_of_one, monkeypatch):
    """Forward and backward run on tensors that have no values, which whoever reads one back stops at; plans do so too."""
    from llama_rlhf.models import PRESETS
    from llama_rlhf.parallel import layers
    from llama_rlhf.parallel.partition import Partition
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    monkeypatch.setattr(layers, "_has_grouped_mm", lambda *_: True)
    experts = layers.ParallelExperts(4, 16, 24, Partition(replace(PRESETS["mixtral-8x7b"], dim=16, ffn_dim=24), 1), dtype=torch.bfloat16)
    x = torch.empty(9, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    experts(x, torch.empty(9, 2, dtype=torch.long, device="meta"), torch.empty(9, 2, device="meta")).sum().backward()
    assert x.grad.shape == x.shape and experts.w13.grad.shape == experts.w13.shape


@pytest.mark.parametrize("normalise", [True, False])
def test_routing_weights_are_renormalised_only_if_the_config_says_so(normalise, world_of_one, tmp_path):
    from llama_rlhf.checkpoint.shards import load_model
    reference = make_hf(tmp_path, "qwen3-moe", norm_topk_prob=normalise)
    model, row = load_model(str(tmp_path)), [5, 17, 90, 3, 3, 64, 20]
    with torch.no_grad():
        expected, got = reference(torch.tensor([row])).logits[0], logits_of(model, [row])
        for block in model.layers:
            block.feed_forward.gate.normalise = not normalise
        other = logits_of(model, [row])
    assert (got - expected).abs().max() < 1e-4
    assert (other - expected).abs().max() > 1e-2


def test_routing_weights_keep_fp32_for_mixtral_and_follow_the_model_for_qwen3(world_of_one, tmp_path):
    from llama_rlhf.checkpoint.shards import load_model
    for name, dtype in (("mixtral", torch.float32), ("qwen3-moe", torch.bfloat16)):
        make_hf(tmp_path / name, name)
        model = load_model(str(tmp_path / name), dtype=torch.bfloat16)
        chosen, weights = model.layers[0].feed_forward.gate(torch.randn(7, 48, generator=torch.Generator().manual_seed(0)).bfloat16())
        assert weights.dtype == dtype and chosen.shape == weights.shape
        assert (weights.float().sum(-1) - 1).abs().max() < (1e-6 if dtype == torch.float32 else 1e-2)


# ---- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bloom", "mixtral", "mistral-window"])
def test_rows_do_not_see_each_other(name, world_of_one, tmp_path):
    """fp32 rounding at most: the experts' matrix products have other shapes when other tokens are there."""
    from llama_rlhf.checkpoint.shards import load_model
    make_hf(tmp_path, name)
    model = load_model(str(tmp_path))
    with torch.no_grad():
        a, b = logits_of(model, [[1, 2, 3], [4, 5, 6, 7]]), logits_of(model, [[9, 9, 9, 9, 9], [4, 5, 6, 7]])
        alone = logits_of(model, [[4, 5, 6, 7]])
    assert (a[3:] - b[5:]).abs().max() < 1e-5 and (a[3:] - alone).abs().max() < 1e-5
    assert (a[:3] - b[:3]).abs().max() > 1e-2


def test_alibi_slopes_of_published_head_counts():
    """8 heads: 1/2 .. 1/256 (the paper). 12 heads: those, then the odd powers of 16 heads' ratio 2^-1/2."""
    from llama_rlhf.models.transformer import alibi_slopes
    eight = [2.0 ** -i for i in range(1, 9)]
    assert alibi_slopes(8).tolist() == eight
    assert torch.allclose(alibi_slopes(12), torch.tensor(eight + [2.0 ** -(i / 2) for i in (1, 3, 5, 7)]))


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
                                     MODELS["llama-tied-scaled"][1]["rope_parameters"]])
def test_scaled_rotary_positions_beyond_the_original_length(scaling, world_of_one, tmp_path):
    from llama_rlhf.checkpoint.shards import load_model
    reference = make_hf(tmp_path, "llama", rope_parameters=scaling)
    row = [(7 * i + 3) % 101 for i in range(100)]       # six times the original 16
    with torch.no_grad():
        assert (logits_of(load_model(str(tmp_path)), [row]) - reference(torch.tensor([row])).logits[0]).abs().max() < 1e-4


TRAINED = 8         # of the model in the next test


def beyond_training(length):
    """(stretch of the rotary base, log-n factor of each position) by Qwen's published formulas, in float64."""
    stretch = max(2 ** math.ceil(math.log2(length / TRAINED) + 1) - 1, 1)
    return stretch, [math.log(p + 1) / math.log(TRAINED) if p + 1 > TRAINED else 1.0 for p in range(400)]


def reference_logits(model, row, prefilled):
    """A Qwen2 of transformers made to do it: another theta, and q_proj's output multiplied per position (rotation is linear)."""
    stretch, factors = beyond_training(prefilled)
    d = model.config.head_dim
    rotary = model.model.rotary_emb
    plain = rotary.inv_freq.clone()
    rotary.inv_freq.copy_(torch.tensor([(1e4 * stretch ** (d / (d - 2))) ** (-i / d) for i in range(0, d, 2)]))
    hooks = [layer.self_attn.q_proj.register_forward_hook(lambda _, __, q: q * torch.tensor(factors[:q.shape[1]])[None, :, None])
             for layer in model.model.layers]
    with torch.no_grad():
        logits = model(torch.tensor([row])).logits[0]
    rotary.inv_freq.copy_(plain)
    for hook in hooks:
        hook.remove()
    return logits


def test_first_generation_qwen_beyond_its_training_length(world_of_one, tmp_path):
    """Rows of 3, 9, 20 and 40 tokens trained for 8 stretch by 1, 3, 7 and 15 in one batch; each keeps its stretch while it
    grows. What training and PPO compute for prompt and response together is what generated it, in either mode of the module."""
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.generation import generate
    from llama_rlhf.trainer import response_logprobs
    assert [beyond_training(n)[0] for n in (3, 8, 9, 20, 40)] == [1, 1, 3, 7, 15]
    reference = make_hf(tmp_path / "hf", "qwen1")
    save_as_qwen1(reference, tmp_path / "qwen", seq_length=TRAINED)
    model = load_model(str(tmp_path / "qwen"))
    rows = [[(5 * i + n) % 101 for i in range(n)] for n in (3, 9, 20, 40)]
    with torch.no_grad():
        plain = torch.cat([reference(torch.tensor([row])).logits[0] for row in rows])
        logits = logits_of(model, rows)
    assert (logits - torch.cat([reference_logits(reference, row, len(row)) for row in rows])).abs().max() < 1e-4
    assert (logits[3:] - plain[3:]).abs().max() > 1e-2
    # two samples of each in three slots: rows are copied from slot to slot, and their stretch with them
    texts = generate(model, rows, eos_ids=(), max_new_tokens=15, max_batch_size=3, n_samples=2, with_logprobs=True)
    for row, (text, again) in zip(rows, texts):
        logits = reference_logits(reference, row + text.tokens, len(row))[len(row) - 1:-1]
        assert logits.argmax(-1).tolist() == text.tokens == again.tokens
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(text.tokens)[:, None])[:, 0]
        assert (wanted - torch.tensor(text.logprobs)).abs().max() < 1e-4
    generated = torch.tensor([logprob for text, _ in texts for logprob in text.logprobs])
    for mode in (True, False):
        again = response_logprobs(model.train(mode), [row + text.tokens for row, (text, _) in zip(rows, texts)], [len(row) for row in rows])
        assert (again - generated).abs().max() < 1e-5
