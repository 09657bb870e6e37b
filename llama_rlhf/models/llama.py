"""LLaMA 1, 2, 3, 3.1, 3.2, and everything saved as "llama": TinyLlama, SmolLM2.

The reference family: RMSNorm, rotary positions, SwiGLU, no biases; grouped kv heads from LLaMA-2-70B on.
LLaMA-3.1 and later stretch the rotary wavelengths (rope_scaling "llama3").
On disk: Meta's names and interleaved rotary order are the native ones; Hugging Face's q and k are re-ordered.
The embedding is cut on hidden in the files of LLaMA-1/2 and on vocabulary from LLaMA-3 on, as Meta's are.
"""

from __future__ import annotations

from llama_rlhf.config import ModelConfig
from llama_rlhf.models.family import GGUF_NAMES, HF_NAMES, Family, hf_llama_shape, hf_rope, write_hf_llama_shape


def read_hf(c: dict) -> ModelConfig:
    for key in ("attention_bias", "mlp_bias"):
        if c.get(key):
            raise ValueError(f"config.json: {key}=true is not supported for the llama family")
    theta, scaling = hf_rope(c)
    as_llama_2 = not c.get("tie_word_embeddings") and theta == 10000.0 and scaling is None
    return hf_llama_shape("llama", c, embedding_cut="hidden" if as_llama_2 else "vocab")


def write_hf(config: ModelConfig) -> dict:
    return write_hf_llama_shape(config, "LlamaForCausalLM", "llama", attention_bias=False, mlp_bias=False)


def ffn_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's rule: params.json holds no width. Two thirds of 4 dim, times the multiplier, rounded up to multiple_of."""
    width = int(2 * 4 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


def read_params(p: dict, vocab_size: int) -> ModelConfig:
    """Meta's params.json. vocab_size: counted in the weights (the file often says -1)."""
    if missing := [key for key in ("dim", "n_layers", "n_heads") if key not in p]:
        raise ValueError(f"params.json lacks {missing}; found {sorted(p)}")
    theta, scaling = float(p.get("rope_theta", 10000.0)), p.get("rope_scaling")
    if p.get("use_scaled_rope") and scaling is None:
        # Meta's files carry only the flag; the factor is 8 for 3.1 and, by the published configs, 32 for 3.2's 1B and 3B
        scaling = {"rope_type": "llama3", "factor": 32.0 if p["dim"] <= 3072 else 8.0, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    llama_3 = theta != 10000.0 or scaling is not None
    return ModelConfig(
        family="llama", dim=p["dim"], n_layers=p["n_layers"], n_heads=p["n_heads"],
        n_kv_heads=p.get("n_kv_heads") or p["n_heads"], head_dim=p.get("head_dim") or p["dim"] // p["n_heads"],
        ffn_dim=p.get("hidden_dim") or ffn_width(p["dim"], p.get("multiple_of", 256), p.get("ffn_dim_multiplier")),
        vocab_size=vocab_size, norm_eps=p.get("norm_eps", 1e-5), rope_theta=theta, rope_scaling=scaling,
        max_seq_len=(131072 if scaling else 8192) if llama_3 else 4096 if "n_kv_heads" in p or p.get("norm_eps") == 1e-5 else 2048,
        embedding_cut="vocab" if llama_3 else "hidden")


def write_params(config: ModelConfig) -> dict:
    """params.json that Meta's own loader takes as keyword arguments: its keys only, unless the model needs another."""
    params = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads, "norm_eps": config.norm_eps,
              "vocab_size": config.vocab_size}
    if config.n_kv_heads != config.n_heads:
        params["n_kv_heads"] = config.n_kv_heads
    base = int(2 * 4 * config.dim / 3)
    for multiple_of, multiplier in ((256, None), (4096, 1.3), (1024, 1.3), (256, 1.5), (256, 1.0), (config.ffn_dim, None),
                                    (config.ffn_dim, (config.ffn_dim - 0.5) / base)):
        if ffn_width(config.dim, multiple_of, multiplier) == config.ffn_dim:
            params["multiple_of"] = multiple_of
            if multiplier is not None:
                params["ffn_dim_multiplier"] = multiplier
            break
    if config.rope_theta != 10000.0:
        params["rope_theta"] = config.rope_theta
    if config.rope_scaling is not None:
        params["use_scaled_rope"] = config.rope_scaling["rope_type"] == "llama3"
    if config.head_dim * config.n_heads != config.dim:
        params["head_dim"] = config.head_dim
    return params


FAMILY = Family("llama", read_hf, write_hf, HF_NAMES, ("llama",), GGUF_NAMES, ("llama",))
