"""FAMILIES, the named presets, and reading a model's config from whatever stands beside its weights."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

from llama_rlhf.config import ModelConfig
from llama_rlhf.models import bloom, llama, mistral, mixtral, qwen

FAMILIES = {family.name: family for family in (llama.FAMILY, mistral.FAMILY, mixtral.FAMILY, qwen.QWEN1, qwen.QWEN2, qwen.QWEN3,
                                               qwen.QWEN3_MOE, bloom.FAMILY)}


def _llama(dim, n_layers, n_heads, ffn_dim, *, kv=None, head_dim=None, vocab=32000, eps=1e-5, theta=1e4, length=4096, **more):
    return ModelConfig(**{**dict(
        family="llama", dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=kv or n_heads,
        head_dim=head_dim or dim // n_heads, ffn_dim=ffn_dim, vocab_size=vocab, norm_eps=eps, rope_theta=theta,
        max_seq_len=length, embedding_cut="hidden" if theta == 1e4 else "vocab"), **more})


def llama3_scaling(factor: float) -> dict:
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}


def _qwen1(dim, n_layers, n_heads, ffn_dim, vocab, trained=None, **more):
    """trained: the length beyond which positions are re-scaled."""
    return _llama(dim, n_layers, n_heads, ffn_dim, vocab=vocab, eps=1e-6, family="qwen", qkv_bias=True, embedding_cut="vocab",
                  ntk_beyond=trained, logn_beyond=trained, **more)


def _qwen2(dim, n_layers, n_heads, kv, ffn_dim, vocab, tied):
    return _llama(dim, n_layers, n_heads, ffn_dim, kv=kv, vocab=vocab, eps=1e-6, theta=1e6, length=32768, family="qwen2",
                  qkv_bias=True, tie_embeddings=tied)


def _qwen3(dim, n_layers, n_heads, ffn_dim, tied):
    return _llama(dim, n_layers, n_heads, ffn_dim, kv=8, head_dim=128, vocab=151936, eps=1e-6, theta=1e6, length=40960,
                  family="qwen3", qk_norm=True, tie_embeddings=tied)


def _qwen3_moe(dim, n_layers, n_heads, ffn_dim):
    return replace(_qwen3(dim, n_layers, n_heads, ffn_dim, False), family="qwen3_moe", n_kv_heads=4, n_experts=128, n_active_experts=8)


def _bloom(dim):
    return ModelConfig(family="bloom", dim=dim, n_layers=24, n_heads=16, n_kv_heads=16, head_dim=dim // 16, ffn_dim=4 * dim,
                       vocab_size=250880, max_seq_len=2048, tie_embeddings=True, **bloom.SWITCHES)


_mistral = dict(kv=8, family="mistral", embedding_cut="hidden", length=32768)
_mixtral = _llama(4096, 32, 32, 14336, theta=1e6, **{**_mistral, "family": "mixtral"}, n_experts=8, n_active_experts=2, fp32_routing=True)

PRESETS = {
    "llama-1-7b": _llama(4096, 32, 32, 11008, eps=1e-6, length=2048),
    "llama-1-13b": _llama(5120, 40, 40, 13824, eps=1e-6, length=2048),
    "llama-1-33b": _llama(6656, 60, 52, 17920, eps=1e-6, length=2048),
    "llama-2-7b": _llama(4096, 32, 32, 11008),
    "llama-2-13b": _llama(5120, 40, 40, 13824),
    "llama-2-70b": _llama(8192, 80, 64, 28672, kv=8),
    "llama-3-8b": _llama(4096, 32, 32, 14336, kv=8, vocab=128256, theta=5e5, length=8192),
    "llama-3-70b": _llama(8192, 80, 64, 28672, kv=8, vocab=128256, theta=5e5, length=8192),
    "llama-3.1-8b": _llama(4096, 32, 32, 14336, kv=8, vocab=128256, theta=5e5, length=131072, rope_scaling=llama3_scaling(8.0)),
    "llama-3.1-70b": _llama(8192, 80, 64, 28672, kv=8, vocab=128256, theta=5e5, length=131072, rope_scaling=llama3_scaling(8.0)),
    "llama-3.2-1b": _llama(2048, 16, 32, 8192, kv=8, vocab=128256, theta=5e5, length=131072, rope_scaling=llama3_scaling(32.0),
                           tie_embeddings=True),
    "llama-3.2-3b": _llama(3072, 28, 24, 8192, kv=8, vocab=128256, theta=5e5, length=131072, rope_scaling=llama3_scaling(32.0),
                           tie_embeddings=True),
    "tinyllama-1.1b": _llama(2048, 22, 32, 5632, kv=4, length=2048),
    "smollm2-135m": _llama(576, 30, 9, 1536, kv=3, vocab=49152, theta=1e5, length=8192, tie_embeddings=True),
    "mistral-7b-v0.1": _llama(4096, 32, 32, 14336, sliding_window=4096, **_mistral),
    "mistral-7b-instruct-v0.2": _llama(4096, 32, 32, 14336, theta=1e6, **_mistral),
    "mistral-7b-instruct-v0.3": _llama(4096, 32, 32, 14336, vocab=32768, theta=1e6, **_mistral),
    "mixtral-8x7b": _mixtral,
    "mixtral-8x7b-instruct-v0.1": _mixtral,
    "qwen-7b": _qwen1(4096, 32, 32, 11008, 151936, 8192, length=32768),
    "qwen-14b": _qwen1(5120, 40, 40, 13696, 152064, 2048, length=8192),
    "qwen-72b": _qwen1(8192, 80, 64, 24576, 152064, theta=1e6, length=32768),
    "qwen1.5-7b": _qwen2(4096, 32, 32, 32, 11008, 151936, False),
    "qwen1.5-14b": _qwen2(5120, 40, 40, 40, 13696, 152064, False),
    "qwen1.5-72b": _qwen2(8192, 80, 64, 64, 24576, 152064, False),
    "qwen2-0.5b": _qwen2(896, 24, 14, 2, 4864, 151936, True),
    "qwen2-1.5b": _qwen2(1536, 28, 12, 2, 8960, 151936, True),
    "qwen2-7b": _qwen2(3584, 28, 28, 4, 18944, 152064, False),
    "qwen2-72b": _qwen2(8192, 80, 64, 8, 29568, 152064, False),
    "qwen2.5-0.5b": _qwen2(896, 24, 14, 2, 4864, 151936, True),
    "qwen2.5-1.5b": _qwen2(1536, 28, 12, 2, 8960, 151936, True),
    "qwen2.5-3b": _qwen2(2048, 36, 16, 2, 11008, 151936, True),
    "qwen2.5-7b": _qwen2(3584, 28, 28, 4, 18944, 152064, False),
    "qwen2.5-14b": _qwen2(5120, 48, 40, 8, 13824, 152064, False),
    "qwen2.5-32b": _qwen2(5120, 64, 40, 8, 27648, 152064, False),
    "qwen2.5-72b": _qwen2(8192, 80, 64, 8, 29568, 152064, False),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288, False),
    "qwen3-14b": _qwen3(5120, 40, 40, 17408, False),
    "qwen3-32b": _qwen3(5120, 64, 64, 25600, False),
    "qwen3-30b-a3b": _qwen3_moe(2048, 48, 32, 768),
    "qwen3-235b-a22b": _qwen3_moe(4096, 94, 64, 1536),
    "bloom-560m": _bloom(1024),
    "bloom-1b1": _bloom(1536),
}


def preset(model_type: str) -> ModelConfig:
    """The config of a published model by name; ValueError with the nearest names."""
    if model_type not in PRESETS:
        near = difflib.get_close_matches(model_type, PRESETS, 3, 0.4)
        raise ValueError(f"unknown --model_type {model_type!r}{'; did you mean ' + ' or '.join(near) + '?' if near else '.'} "
                         f"Known: {', '.join(PRESETS)}. Leave it out to read the sizes from the checkpoint's own config.json or params.json.")
    return PRESETS[model_type]


def config_from_hf(c: dict) -> ModelConfig:
    """config.json -> ModelConfig, by its model_type; the ValueError names what is unknown."""
    kind = c.get("model_type")
    if any(isinstance(n := c.get(key), int) and n > 1 << 10 for key in ("num_hidden_layers", "n_layer")):
        raise ValueError("config.json: more than 1024 layers; this is not the config of a model")
    for family in FAMILIES.values():
        if kind in family.hf_model_types:
            return family.read_hf(c)
    known = sorted(t for f in FAMILIES.values() for t in f.hf_model_types)
    code = " It asks for Python code of its own (auto_map), which is never run." if "auto_map" in c else ""
    raise ValueError(f"config.json: model_type {kind!r:.80} is not supported (known: {', '.join(known)}).{code}")


def config_from_params(p: dict, vocab_size: int) -> ModelConfig:
    """params.json -> ModelConfig: Meta's; Mistral's, which holds hidden_dim; or that of Mixtral's hub files, in config.json's words."""
    if "num_local_experts" in p:
        return mixtral.read_hf({**p, "vocab_size": vocab_size})
    return (mistral if "hidden_dim" in p and "multiple_of" not in p else llama).read_params(p, vocab_size)


def write_params(config: ModelConfig) -> dict:
    """The params.json beside our shards, in the words of the family's own loader. (Our own loader reads the manifest.)"""
    return (FAMILIES[config.family].write_params or llama.write_params)(config)


def config_from_gguf(metadata: dict, vocab_size: int, has_output: bool) -> ModelConfig:
    """GGUF header -> ModelConfig, without the rotary scaling that a tensor of the file may describe."""
    architecture = metadata.get("general.architecture")
    for family in FAMILIES.values():
        if architecture in family.gguf_architectures:
            break
    else:
        raise ValueError(f"GGUF architecture {architecture!r} is not supported (known: llama, qwen2)")

    def get(key: str, default=None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    if get("expert_count"):
        raise ValueError("this GGUF file holds a mixture of experts, which is supported from safetensors or consolidated files only")
    kind, factor = get("rope.scaling.type"), float(get("rope.scaling.factor") or get("rope.scale_linear") or 1.0)     # older files have no type: linear
    if kind not in (None, "none", "linear"):
        raise ValueError(f"GGUF rope scaling {kind!r} is not supported")
    scaling = {"rope_type": "linear", "factor": factor} if kind != "none" and factor != 1.0 else None
    heads, dim = int(get("attention.head_count")), int(get("embedding_length"))
    head_dim = int(get("attention.key_length", dim // heads))
    if (turned := int(get("rope.dimension_count", head_dim))) != head_dim:
        raise ValueError(f"this GGUF file turns {turned} of a head's {head_dim} numbers (rope.dimension_count); only whole heads are supported")
    return family.read_hf({
        "hidden_size": dim, "num_hidden_layers": int(get("block_count")), "num_attention_heads": heads,
        "num_key_value_heads": int(get("attention.head_count_kv", heads)), "head_dim": head_dim,
        "intermediate_size": int(get("feed_forward_length")), "vocab_size": vocab_size,
        "rms_norm_eps": round(float(get("attention.layer_norm_rms_epsilon")), 12), "rope_theta": float(get("rope.freq_base", 10000.0)), "rope_scaling": scaling,
        "max_position_embeddings": int(get("context_length")), "tie_word_embeddings": not has_output})


def disagreements(a: ModelConfig, b: ModelConfig) -> list[str]:
    """The fields in which two configs differ, as "name: a, not b"."""
    a, b = replace(a, embedding_cut=b.embedding_cut), b
    return [f"{name}: {value!r}, not {b.to_dict()[name]!r}" for name, value in a.to_dict().items() if value != b.to_dict()[name]]
