"""Qwen1.5, 2, 2.5 (dense), Qwen3 (dense), and first-generation Qwen.

Qwen1.5/2/2.5: LLaMA with a bias on q, k and v. Qwen3: no bias, RMSNorm over head_dim on q and k, head_dim of its own.
First generation: q, k, v fused as thirds of c_attn; mlp.w1 is up and w2 is gate; intermediate_size is twice the width.
Rotary order on disk is half-split in all of them, so q and k rows, biases and norm weights are re-ordered when read.
Beyond its training length the first generation re-scales (dynamic NTK, log-n): not built; sequences end at seq_length.
"""

from __future__ import annotations

from llama_rlhf.config import ModelConfig
from llama_rlhf.models.family import GGUF_NAMES, HF_NAMES, Family, Source, hf_llama_shape, write_hf_llama_shape


def _window(c: dict) -> int | None:
    if c.get("use_sliding_window") and c.get("sliding_window"):
        if c.get("max_window_layers", 0) < c["num_hidden_layers"]:
            raise ValueError("config.json: use_sliding_window=true on some layers only is not supported; set it to false "
                             "to attend to everything")
    return None


def read_qwen2(c: dict) -> ModelConfig:
    return hf_llama_shape("qwen2", c, qkv_bias=True, sliding_window=_window(c))


def read_qwen3(c: dict) -> ModelConfig:
    if c.get("attention_bias"):
        raise ValueError("config.json: attention_bias=true is not supported for qwen3")
    return hf_llama_shape("qwen3", c, qk_norm=True, head_dim=c.get("head_dim", 128), sliding_window=_window(c))


def read_qwen1(c: dict) -> ModelConfig:
    if "n_embd" in c and "hidden_size" not in c:            # the oldest spelling
        c = {**c, "hidden_size": c["n_embd"], "num_hidden_layers": c["n_layer"], "num_attention_heads": c["n_head"],
             "intermediate_size": c["ffn_hidden_size"], "vocab_size": c.get("padded_vocab_size", c.get("vocab_size"))}
    return hf_llama_shape("qwen", {**c, "rope_theta": c.get("rotary_emb_base", 10000.0)}, qkv_bias=True,
                          ffn_dim=c["intermediate_size"] // 2, norm_eps=c.get("layer_norm_epsilon", 1e-6),
                          head_dim=c.get("kv_channels", 128), max_seq_len=c.get("seq_length", 8192), tie_embeddings=False)


def write_qwen2(config: ModelConfig) -> dict:
    return write_hf_llama_shape(config, "Qwen2ForCausalLM", "qwen2", use_sliding_window=False)


def write_qwen3(config: ModelConfig) -> dict:
    return write_hf_llama_shape(config, "Qwen3ForCausalLM", "qwen3", attention_bias=False, use_sliding_window=False)


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
QWEN1 = Family("qwen", read_qwen1, write_qwen2, QWEN1_NAMES, ("qwen",))
