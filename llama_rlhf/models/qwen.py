"""Qwen1.5, 2, 2.5 (dense), Qwen3 (dense and mixture of experts), and first-generation Qwen.

Qwen1.5/2/2.5: LLaMA with a bias on q, k and v. Qwen3: no bias, RMSNorm over head_dim on q and k, head_dim of its own.
Qwen3-MoE: Qwen3 with experts in every layer; their weights sum to 1 only if norm_topk_prob, and are cast to the model's dtype.
First generation: q, k, v fused as thirds of c_attn; mlp.w1 is up and w2 is gate; intermediate_size is twice the width. Beyond
its training length it stretches the rotary base (dynamic NTK) and scales late queries by log n: here in training as well (its own
code: only in evaluation), so that PPO scores the model that generated.
Rotary order on disk is half-split in all of them, so q and k rows, biases and norm weights are re-ordered when read.
"""

from __future__ import annotations

from dataclasses import replace

from llama_rlhf.config import ModelConfig
from llama_rlhf.models.family import (
    GGUF_NAMES, HF_NAMES, STACKED_EXPERTS, Family, Source, expert_names, hf_llama_shape, write_hf_llama_shape,
)


def _window(c: dict) -> dict:
    """The window switches: with use_sliding_window, layers from max_window_layers on have one."""
    window = c.get("sliding_window", 4096) if c.get("use_sliding_window") else None
    if window is None:
        return {}
    first = c.get("max_window_layers", 28)
    return dict(sliding_window=window, window_first_layer=first) if first < c["num_hidden_layers"] else {}


def _write_window(config: ModelConfig) -> dict:
    if config.sliding_window is None:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True, "sliding_window": config.sliding_window, "max_window_layers": config.window_first_layer}


def read_qwen2(c: dict) -> ModelConfig:
    return hf_llama_shape("qwen2", c, qkv_bias=True, **_window(c))


def read_qwen3(c: dict) -> ModelConfig:
    if c.get("attention_bias"):
        raise ValueError(f"config.json: attention_bias=true is not supported for {c['model_type']}")
    return hf_llama_shape("qwen3", c, qk_norm=True, head_dim=c.get("head_dim") or 128, **_window(c))


def read_qwen3_moe(c: dict) -> ModelConfig:
    if c.get("mlp_only_layers") or c.get("decoder_sparse_step", 1) != 1:
        raise ValueError("config.json: mlp_only_layers or decoder_sparse_step make some layers dense; only models with experts in "
                         "every layer are supported")
    if c.get("use_sliding_window") and c.get("max_window_layers"):
        raise ValueError(f"config.json: use_sliding_window with max_window_layers={c['max_window_layers']} is not supported for qwen3_moe: some versions of transformers "
                         "give every layer the window, others those behind the first of them")
    if missing := [key for key in ("moe_intermediate_size", "num_experts_per_tok") if key not in c]:
        raise ValueError(f"config.json lacks {missing}")
    return replace(read_qwen3({"head_dim": c["hidden_size"] // c["num_attention_heads"], "max_window_layers": 0, **c}), family="qwen3_moe",
                   ffn_dim=c["moe_intermediate_size"], n_experts=c.get("num_experts") or c["num_local_experts"],
                   n_active_experts=c["num_experts_per_tok"], normalise_routing=bool(c.get("norm_topk_prob", False)))


def read_qwen1(c: dict) -> ModelConfig:
    if "n_embd" in c and "hidden_size" not in c:            # the oldest spelling
        c = {**c, "hidden_size": c["n_embd"], "num_hidden_layers": c["n_layer"], "num_attention_heads": c["n_head"],
             "intermediate_size": c["ffn_hidden_size"], "vocab_size": c.get("padded_vocab_size", c.get("vocab_size")),
             "max_position_embeddings": c.get("n_positions")}
    trained = c.get("seq_length") or 8192
    stretches, scales = c.get("use_dynamic_ntk", True), c.get("use_logn_attn", True)
    longest = max(trained, c.get("max_position_embeddings") or 0) if stretches else trained
    return hf_llama_shape("qwen", {**c, "rope_theta": c.get("rotary_emb_base", 10000.0)}, qkv_bias=True,
                          ffn_dim=c["intermediate_size"] // 2, norm_eps=c.get("layer_norm_epsilon", 1e-6),
                          head_dim=c.get("kv_channels", 128), max_seq_len=longest, tie_embeddings=False,
                          ntk_beyond=trained if stretches else None, logn_beyond=trained if scales else None)


def write_qwen1(config: ModelConfig) -> dict:
    return {"architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": config.dim,
            "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads, "intermediate_size": 2 * config.ffn_dim,
            "vocab_size": config.vocab_size, "layer_norm_epsilon": config.norm_eps, "rotary_emb_base": config.rope_theta,
            "kv_channels": config.head_dim, "max_position_embeddings": config.max_seq_len, "no_bias": True,
            "seq_length": config.ntk_beyond or config.logn_beyond or config.max_seq_len, "tie_word_embeddings": False,
            "use_dynamic_ntk": config.ntk_beyond is not None, "use_logn_attn": config.logn_beyond is not None}


def write_qwen2(config: ModelConfig) -> dict:
    return write_hf_llama_shape(config, "Qwen2ForCausalLM", "qwen2", **_write_window(config))


def write_qwen3(config: ModelConfig) -> dict:
    return write_hf_llama_shape(config, "Qwen3ForCausalLM", "qwen3", attention_bias=False, **_write_window(config))


def write_qwen3_moe(config: ModelConfig) -> dict:
    return {**write_hf_llama_shape(config, "Qwen3MoeForCausalLM", "qwen3_moe", attention_bias=False, **_write_window(config)),
            "moe_intermediate_size": config.ffn_dim, "num_experts": config.n_experts, "num_experts_per_tok": config.n_active_experts,
            "norm_topk_prob": config.normalise_routing, "decoder_sparse_step": 1, "mlp_only_layers": []}


BIASES = {f"layers.{{n}}.attention.w{x}.bias": Source(f"model.layers.{{n}}.self_attn.{x}_proj.bias", rope=x != "v")
          for x in "qkv"}
QK_NORMS = {f"layers.{{n}}.attention.{x}_norm.weight": Source(f"model.layers.{{n}}.self_attn.{x}_norm.weight", rope=True)
            for x in "qk"}
QWEN1_NAMES = {
    "tok_embeddings.weight": Source("transformer.wte.weight"),
    "layers.{n}.attention_norm.weight": Source("transformer.h.{n}.ln_1.weight"),
    "layers.{n}.ffn_norm.weight": Source("transformer.h.{n}.ln_2.weight"),
    **{f"layers.{{n}}.attention.w{x}.{kind}": Source(f"transformer.h.{{n}}.attn.c_attn.{kind}", rope=x != "v", part=i, parts=3)
       for i, x in enumerate("qkv") for kind in ("weight", "bias")},
    "layers.{n}.attention.wo.weight": Source("transformer.h.{n}.attn.c_proj.weight"),
    "layers.{n}.feed_forward.w1.weight": Source("transformer.h.{n}.mlp.w2.weight"),
    "layers.{n}.feed_forward.w3.weight": Source("transformer.h.{n}.mlp.w1.weight"),
    "layers.{n}.feed_forward.w2.weight": Source("transformer.h.{n}.mlp.c_proj.weight"),
    "norm.weight": Source("transformer.ln_f.weight"),
    "output.weight": Source("lm_head.weight"),
}
# GGUF keeps Qwen's q and k in half-split order
GGUF_QWEN2 = {native: Source(source.name, rope=".wq." in native or ".wk." in native) for native, source in
              {**GGUF_NAMES, **{f"layers.{{n}}.attention.w{x}.bias": Source(f"blk.{{n}}.attn_{x}.bias") for x in "qkv"}}.items()}

QWEN2 = Family("qwen2", read_qwen2, write_qwen2, {**HF_NAMES, **BIASES}, ("qwen2",), GGUF_QWEN2, ("qwen2",))
QWEN3 = Family("qwen3", read_qwen3, write_qwen3, {**HF_NAMES, **QK_NORMS}, ("qwen3",))
QWEN3_MOE = Family("qwen3_moe", read_qwen3_moe, write_qwen3_moe,
                   {**HF_NAMES, **QK_NORMS, **expert_names("model.layers.{n}.mlp", "gate_proj", "down_proj", "up_proj")},
                   ("qwen3_moe",), other_layouts=({**HF_NAMES, **QK_NORMS, **STACKED_EXPERTS},))
QWEN1 = Family("qwen", read_qwen1, write_qwen1, QWEN1_NAMES, ("qwen",))
