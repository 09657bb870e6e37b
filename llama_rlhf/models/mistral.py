"""Mistral 7B v0.1, v0.2, v0.3.

LLaMA with grouped kv heads and, in v0.1 only, a sliding window: a query sees 4096 keys, itself included.
rope theta 1e4 in v0.1, 1e6 later. A window that is absent from config.json means 4096 there, null means none.
Native files: one unsharded consolidated.00.pth (or .safetensors), Meta's names, params.json with hidden_dim.
Our shards cut the embedding on hidden, as LLaMA-2's.
"""

from __future__ import annotations

from dataclasses import replace

from llama_rlhf.config import ModelConfig
from llama_rlhf.models.family import GGUF_NAMES, HF_NAMES, Family, hf_llama_shape, write_hf_llama_shape
from llama_rlhf.models.llama import read_params as read_llama_params


def read_hf(c: dict) -> ModelConfig:
    return hf_llama_shape("mistral", c, embedding_cut="hidden", sliding_window=c.get("sliding_window", 4096))


def write_hf(config: ModelConfig) -> dict:
    return write_hf_llama_shape(config, "MistralForCausalLM", "mistral", sliding_window=config.sliding_window)


def read_params(p: dict, vocab_size: int) -> ModelConfig:
    """Mistral's params.json, Mixtral's when it has "moe". Without rope_theta: 1e4 when there is a window (v0.1), else 1e6."""
    if unknown := sorted(key for key in ("_sliding_window", "yarn", "llama_4_scaling", "use_biases", "q_lora_rank", "vision_encoder") if p.get(key)):
        raise ValueError(f"params.json: {', '.join(unknown)} is not supported for the mistral family")
    window = p.get("sliding_window")
    theta = float(p.get("rope_theta") or (1e4 if window else 1e6))
    config = read_llama_params({**p, "rope_theta": theta}, vocab_size)
    config = replace(config, family="mistral", sliding_window=window, max_seq_len=32768, embedding_cut="hidden")
    if moe := p.get("moe"):
        config = replace(config, family="mixtral", n_experts=moe["num_experts"], n_active_experts=moe["num_experts_per_tok"],
                         fp32_routing=True)
    return config


def write_params(config: ModelConfig) -> dict:
    """params.json with the keys of Mistral's own loader, which reads our shard when there is only one."""
    return {"dim": config.dim, "n_layers": config.n_layers, "head_dim": config.head_dim, "hidden_dim": config.ffn_dim,
            "n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads, "norm_eps": config.norm_eps,
            "vocab_size": config.vocab_size, "rope_theta": config.rope_theta,
            **({"sliding_window": config.sliding_window} if config.sliding_window else {}),
            **({"moe": {"num_experts": config.n_experts, "num_experts_per_tok": config.n_active_experts}} if config.n_experts else {})}


FAMILY = Family("mistral", read_hf, write_hf, HF_NAMES, ("mistral",), GGUF_NAMES, write_params=write_params)
