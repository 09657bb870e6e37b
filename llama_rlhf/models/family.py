"""What a family file fills in: how to read its config, and how its foreign tensor names map to the native ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from llama_rlhf.config import ModelConfig


@dataclass(frozen=True)
class Source:
    """Where a native tensor lies in a foreign file.

    name: the foreign tensor; {n} is the layer, {e} the expert.
    rope: its rows are in Hugging Face's half-split rotary order and are re-ordered head by head on the way.
    part, parts: the native tensor is the part-th of `parts` equal blocks of rows (fused projections).
    by_head: those blocks alternate head by head (q, k, v of head 0, q, k, v of head 1, ...) instead of following each other.
    stacked: one foreign tensor holds all experts, [experts, rows, columns] or [experts * rows, columns]; expert: which one.
    transposed: the foreign block is [in, out].
    """

    name: str
    rope: bool = False
    part: int = 0
    parts: int = 1
    by_head: bool = False
    stacked: bool = False
    transposed: bool = False
    expert: int = 0


@dataclass(frozen=True)
class Family:
    """One row of models.FAMILIES.

    read_hf: config.json -> ModelConfig.  write_hf: the reverse, for export.
    hf, gguf: native name -> Source, with {n} for the layer number and {e} for the expert.
    other_layouts: further tables of the same form that published or re-saved files follow; names not in them are native.
    hf_model_types: values of "model_type" in config.json that mean this family; gguf_architectures: likewise in GGUF.
    write_params: ModelConfig -> the params.json that stands beside our shards; None: as Meta's.
    """

    name: str
    read_hf: Callable[[dict], ModelConfig]
    write_hf: Callable[[ModelConfig], dict]
    hf: dict[str, Source]
    hf_model_types: tuple[str, ...]
    gguf: dict[str, Source] = field(default_factory=dict)
    gguf_architectures: tuple[str, ...] = ()
    other_layouts: tuple[dict[str, Source], ...] = ()
    write_params: Callable[[ModelConfig], dict] | None = None


_NUMBERS = re.compile(r"^(layers)\.(\d+)\.|\b(experts)\.(\d+)\.")


def lookup(table: dict[str, Source], native: str) -> Source | None:
    """The foreign source of a native tensor name, its layer and expert filled in."""
    numbers: dict[str, int] = {}

    def generalise(match):
        numbers["n" if match[1] else "e"] = int(match[2] or match[4])
        return "layers.{n}." if match[1] else "experts.{e}."

    source = table.get(_NUMBERS.sub(generalise, native))
    return source and replace(source, name=source.name.format(**numbers), expert=numbers.get("e", 0) if source.stacked else 0)


# Hugging Face's names of a LLaMA-shaped decoder; every family but BLOOM and the first Qwen starts from them.
HF_NAMES = {
    "tok_embeddings.weight": Source("model.embed_tokens.weight"),
    "layers.{n}.attention_norm.weight": Source("model.layers.{n}.input_layernorm.weight"),
    "layers.{n}.attention.wq.weight": Source("model.layers.{n}.self_attn.q_proj.weight", rope=True),
    "layers.{n}.attention.wk.weight": Source("model.layers.{n}.self_attn.k_proj.weight", rope=True),
    "layers.{n}.attention.wv.weight": Source("model.layers.{n}.self_attn.v_proj.weight"),
    "layers.{n}.attention.wo.weight": Source("model.layers.{n}.self_attn.o_proj.weight"),
    "layers.{n}.ffn_norm.weight": Source("model.layers.{n}.post_attention_layernorm.weight"),
    "layers.{n}.feed_forward.w1.weight": Source("model.layers.{n}.mlp.gate_proj.weight"),
    "layers.{n}.feed_forward.w3.weight": Source("model.layers.{n}.mlp.up_proj.weight"),
    "layers.{n}.feed_forward.w2.weight": Source("model.layers.{n}.mlp.down_proj.weight"),
    "norm.weight": Source("model.norm.weight"),
    "output.weight": Source("lm_head.weight"),
}

# GGUF's names. For the architecture "llama" its exporter has already put q and k into interleaved order: no rope here.
GGUF_NAMES = {
    "tok_embeddings.weight": Source("token_embd.weight"),
    "layers.{n}.attention_norm.weight": Source("blk.{n}.attn_norm.weight"),
    "layers.{n}.attention.wq.weight": Source("blk.{n}.attn_q.weight"),
    "layers.{n}.attention.wk.weight": Source("blk.{n}.attn_k.weight"),
    "layers.{n}.attention.wv.weight": Source("blk.{n}.attn_v.weight"),
    "layers.{n}.attention.wo.weight": Source("blk.{n}.attn_output.weight"),
    "layers.{n}.ffn_norm.weight": Source("blk.{n}.ffn_norm.weight"),
    "layers.{n}.feed_forward.w1.weight": Source("blk.{n}.ffn_gate.weight"),
    "layers.{n}.feed_forward.w3.weight": Source("blk.{n}.ffn_up.weight"),
    "layers.{n}.feed_forward.w2.weight": Source("blk.{n}.ffn_down.weight"),
    "norm.weight": Source("output_norm.weight"),
    "output.weight": Source("output.weight"),
}


def expert_names(prefix: str, gate: str, down: str, up: str) -> dict[str, Source]:
    """Router and per-expert files: {prefix}.gate, {prefix}.experts.E.{gate, down, up}."""
    return {"layers.{n}.feed_forward.gate.weight": Source(f"{prefix}.gate.weight"),
            **{f"layers.{{n}}.feed_forward.experts.{{e}}.{native}.weight": Source(f"{prefix}.experts.{{e}}.{foreign}.weight")
               for native, foreign in (("w1", gate), ("w2", down), ("w3", up))}}


# how transformers 5 holds experts in memory: gate and up rows in one tensor, all experts in another dimension
STACKED_EXPERTS = {
    "layers.{n}.feed_forward.gate.weight": Source("model.layers.{n}.mlp.gate.weight"),
    "layers.{n}.feed_forward.experts.{e}.w1.weight": Source("model.layers.{n}.mlp.experts.gate_up_proj", part=0, parts=2, stacked=True),
    "layers.{n}.feed_forward.experts.{e}.w3.weight": Source("model.layers.{n}.mlp.experts.gate_up_proj", part=1, parts=2, stacked=True),
    "layers.{n}.feed_forward.experts.{e}.w2.weight": Source("model.layers.{n}.mlp.experts.down_proj", stacked=True),
}


def hf_rope(c: dict) -> tuple[float, dict | None]:
    """rope theta and scaling from config.json, in both spellings: rope_theta + rope_scaling, or transformers 5's rope_parameters."""
    if c.get("rope_parameters") and c.get("rope_scaling"):
        # a scaling written by hand into what transformers 5 has saved: it drops rope_parameters then, their rope_theta too
        new, old = (hf_rope({"rope_theta": c.get("rope_theta"), key: c[key]}) for key in ("rope_parameters", "rope_scaling"))
        if new[1] != old[1]:
            raise ValueError("config.json: rope_parameters and rope_scaling disagree. Write the scaling into rope_parameters, beside rope_theta, and remove rope_scaling.")
    parameters = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    if nested := sorted(key for key, value in parameters.items() if isinstance(value, dict)):
        raise ValueError(f"config.json: rotary positions that differ by layer ({', '.join(nested)}) are not supported")
    if (part := parameters.pop("partial_rotary_factor", None) or c.get("partial_rotary_factor") or 1) != 1:
        raise ValueError(f"config.json: partial_rotary_factor={part} is not supported: whole heads are turned")
    theta = float(parameters.pop("rope_theta", None) or c.get("rope_theta") or 10000.0)
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    original, inside = c.get("original_max_position_embeddings"), parameters.get("original_max_position_embeddings")
    if kind == "llama3" and None not in (original, inside) and original != inside:
        raise ValueError(f"config.json: original_max_position_embeddings is {original}, and {inside} among the rotary parameters. Remove the wrong one.")
    return theta, None if kind == "default" else {"rope_type": kind, **parameters}


def hf_llama_shape(family: str, c: dict, **switches) -> ModelConfig:
    """The fields every LLaMA-shaped config.json spells alike."""
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    if missing := [key for key in needed if key not in c]:
        raise ValueError(f"config.json lacks {missing}; found {sorted(c)[:12]}")
    if c.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"config.json: hidden_act={c['hidden_act']!r} is not supported for {family}, only 'silu'")
    theta, scaling = hf_rope(c)
    heads = c["num_attention_heads"]
    values = dict(
        family=family, dim=c["hidden_size"], n_layers=c["num_hidden_layers"], n_heads=heads,
        n_kv_heads=c.get("num_key_value_heads") or heads, head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        ffn_dim=c["intermediate_size"], vocab_size=c["vocab_size"], norm_eps=c.get("rms_norm_eps", 1e-6),
        max_seq_len=c.get("max_position_embeddings") or c.get("max_sequence_length") or 2048,
        rope_theta=theta, rope_scaling=scaling, tie_embeddings=bool(c.get("tie_word_embeddings", False)))
    config = ModelConfig(**{**values, **switches})
    windows = ["full_attention" if config.sliding_window is None or i < config.window_first_layer else "sliding_attention" for i in range(config.n_layers)]
    if c.get("layer_types") not in (None, windows):
        raise ValueError(f"config.json: layer_types asks for other layers with a sliding window than {family} models have by sliding_window"
                         + (", use_sliding_window and max_window_layers" if "qwen" in family else ""))
    return config


def write_hf_llama_shape(config: ModelConfig, architecture: str, model_type: str, **more) -> dict:
    """config.json of a LLaMA-shaped model, in the spelling both old and new transformers read."""
    return {"architectures": [architecture], "model_type": model_type, "hidden_size": config.dim,
            "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim, "intermediate_size": config.ffn_dim,
            "vocab_size": config.vocab_size, "rms_norm_eps": config.norm_eps, "max_position_embeddings": config.max_seq_len,
            "rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling, "hidden_act": "silu",
            "tie_word_embeddings": config.tie_embeddings, **more}
