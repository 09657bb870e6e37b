"""BLOOM (560m, 1b1, and larger ones of the same shape).

LayerNorm with a bias instead of RMSNorm, one more right after the embedding (tok_norm); biases on every linear layer.
No rotary positions: ALiBi, a slope per head times the key's position, added to the scores.
The feed-forward is two matrices with the tanh form of GELU: w1 widens fourfold, w2 comes back. The head is the embedding.
On disk q, k and v are fused head by head; file names occur with and without the leading "transformer.".
"""

from __future__ import annotations

from dataclasses import replace

from llama_rlhf.config import ModelConfig
from llama_rlhf.models.family import Family, Source


def read_hf(c: dict) -> ModelConfig:
    def first(*names, default=None):
        value = next((c[name] for name in names if c.get(name) is not None), default)
        if value is None:
            raise ValueError(f"config.json lacks {' or '.join(names)}; found {sorted(c)[:12]}")
        return value

    if c.get("apply_residual_connection_post_layernorm"):
        raise ValueError("config.json: apply_residual_connection_post_layernorm=true is not supported for bloom")
    dim, heads = first("hidden_size", "n_embed"), first("num_attention_heads", "n_head")
    return ModelConfig(
        family="bloom", dim=dim, n_layers=first("num_hidden_layers", "n_layer"), n_heads=heads, n_kv_heads=heads,
        head_dim=dim // heads, ffn_dim=c.get("n_inner") or 4 * dim, vocab_size=first("vocab_size"),
        norm_eps=c.get("layer_norm_epsilon", 1e-5), max_seq_len=c.get("seq_length") or 2048,
        tie_embeddings=bool(c.get("tie_word_embeddings", True)), **SWITCHES)


def write_hf(config: ModelConfig) -> dict:
    return {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "hidden_size": config.dim, "n_layer": config.n_layers,
            "n_head": config.n_heads, "vocab_size": config.vocab_size, "layer_norm_epsilon": config.norm_eps,
            "seq_length": config.max_seq_len, "apply_residual_connection_post_layernorm": False,
            "tie_word_embeddings": config.tie_embeddings}


SWITCHES: dict = dict(positions="alibi", norm="layer", mlp="gelu", linear_bias=True, qkv_bias=True, embedding_norm=True)

# every tensor has a weight and a bias, but for the embedding
NAMES = {
    "tok_embeddings.weight": Source("transformer.word_embeddings.weight"),
    "output.weight": Source("lm_head.weight"),
    **{f"{native}.{kind}": replace(source, name=f"transformer.{source.name}.{kind}") for native, source in (
        ("tok_norm", Source("word_embeddings_layernorm")),
        ("layers.{n}.attention_norm", Source("h.{n}.input_layernorm")),
        *((f"layers.{{n}}.attention.w{x}", Source("h.{n}.self_attention.query_key_value", part=i, parts=3, by_head=True))
          for i, x in enumerate("qkv")),
        ("layers.{n}.attention.wo", Source("h.{n}.self_attention.dense")),
        ("layers.{n}.ffn_norm", Source("h.{n}.post_attention_layernorm")),
        ("layers.{n}.feed_forward.w1", Source("h.{n}.mlp.dense_h_to_4h")),
        ("layers.{n}.feed_forward.w2", Source("h.{n}.mlp.dense_4h_to_h")),
        ("norm", Source("ln_f")),
    ) for kind in ("weight", "bias")},
}

FAMILY = Family("bloom", read_hf, write_hf, NAMES, ("bloom",))
