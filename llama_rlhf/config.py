"""ModelConfig: everything the decoder needs to know about a model. A family file fills it from config.json or params.json."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass


_LIMITS = {"n_layers": 1 << 10, "n_experts": 1 << 10, "n_heads": 1 << 12, "n_kv_heads": 1 << 12, "max_seq_len": 1 << 40}    # else 2 ** 24
_KINDS: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "bool": bool, "str": str, "dict": dict, "None": type(None)}


def _fits(value, kind: str) -> bool:
    """bool is an int to Python, not here; infinity and NaN are no numbers."""
    if kind in ("int", "float") and (isinstance(value, bool) or isinstance(value, float) and not math.isfinite(value)):
        return False
    return isinstance(value, _KINDS[kind])


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one decoder. Checks itself; unknown fields are refused by `from_dict`."""

    family: str                           # row of models.FAMILIES
    dim: int                              # hidden size
    n_layers: int
    n_heads: int                          # query heads
    n_kv_heads: int                       # key/value heads; query head h reads kv head h * n_kv_heads // n_heads
    head_dim: int                         # not always dim / n_heads
    ffn_dim: int                          # width of one gate (or up) projection; per expert in a mixture of experts
    vocab_size: int                       # rows of the embedding, padding rows included
    max_seq_len: int = 2048               # longest sequence the model was trained for (prompt + response)
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None      # {"rope_type": "llama3", factor, low_freq_factor, high_freq_factor, original_max_position_embeddings} or {"rope_type": "linear", factor}
    tie_embeddings: bool = False          # the head is the embedding; no output.weight on disk
    qkv_bias: bool = False                # bias on wq, wk, wv (Qwen 1, 1.5, 2, 2.5)
    qk_norm: bool = False                 # RMSNorm over head_dim on q and k before rotary (Qwen3)
    sliding_window: int | None = None     # a query sees this many keys, itself included
    window_first_layer: int = 0           # layers before this one see everything (some Qwen configs)
    positions: str = "rotary"             # or "alibi": no rotation, a slope per head on the key's position (BLOOM)
    norm: str = "rms"                     # or "layer": LayerNorm with a bias (BLOOM)
    mlp: str = "swiglu"                   # or "gelu": two matrices, tanh form (BLOOM)
    linear_bias: bool = False             # bias on wo and on the feed-forward (BLOOM)
    embedding_norm: bool = False          # a norm right after the embedding (BLOOM)
    n_experts: int = 0                    # feed-forward experts per layer; 0: a dense model
    n_active_experts: int = 0             # experts each token goes to
    normalise_routing: bool = True        # the weights of the chosen experts sum to 1
    fp32_routing: bool = False            # those weights stay fp32 in low-precision models (Mixtral)
    ntk_beyond: int | None = None         # rows with longer prompts stretch the rotary base (first-generation Qwen)
    logn_beyond: int | None = None        # queries at positions past this are scaled by log n (first-generation Qwen)
    embedding_cut: str = "vocab"          # how consolidated.NN.pth cuts tok_embeddings: "hidden" (LLaMA-1/2, Mistral) or "vocab"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not any(_fits(value, kind) for kind in field.type.split(" | ")):
                raise ValueError(f"model config: {field.name} must be {field.type}, not {value!r:.80}")
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "max_seq_len"):
            if not 1 <= getattr(self, name) <= _LIMITS.get(name, 1 << 24):
                raise ValueError(f"model config: {name} must be a positive whole number up to {_LIMITS.get(name, 1 << 24)}, not {getattr(self, name)}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"model config: n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        for name, known in (("positions", ("rotary", "alibi")), ("norm", ("rms", "layer")), ("mlp", ("swiglu", "gelu"))):
            if getattr(self, name) not in known:
                raise ValueError(f"model config: {name}={getattr(self, name)!r} is none of {', '.join(known)}")
        if self.positions == "alibi" and self.sliding_window is not None:
            raise ValueError("model config: a sliding window together with ALiBi positions is not supported")
        if self.n_experts and not 0 < self.n_active_experts <= self.n_experts <= _LIMITS["n_experts"]:
            raise ValueError(f"model config: n_active_experts={self.n_active_experts} must be 1 to n_experts={self.n_experts}, "
                             f"and that at most {_LIMITS['n_experts']}")
        if self.n_experts and (self.mlp != "swiglu" or self.linear_bias):
            raise ValueError("model config: experts are SwiGLU without biases; other kinds are not supported")
        if self.head_dim % 2 and self.positions == "rotary":
            raise ValueError(f"model config: head_dim={self.head_dim} is odd; rotary positions turn pairs of numbers")
        if not self.norm_eps > 0 or not self.rope_theta > 0:
            raise ValueError(f"model config: norm_eps={self.norm_eps} and rope_theta={self.rope_theta} must be positive")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"model config: sliding_window={self.sliding_window} must be at least 1, or none")
        if self.embedding_cut not in ("hidden", "vocab"):
            raise ValueError(f"model config: embedding_cut={self.embedding_cut!r} is neither 'hidden' nor 'vocab'")
        if self.rope_scaling is not None:
            kind = self.rope_scaling.get("rope_type")
            needed = {"llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
                      "linear": {"factor"}}.get(str(kind))
            if needed is None:
                raise ValueError(f"model config: rope_scaling type {kind!r} is not supported (known: llama3, linear)")
            if missing := needed - self.rope_scaling.keys():
                raise ValueError(f"model config: rope_scaling {kind!r} lacks {sorted(missing)}")
            if wrong := sorted(key for key in needed if not _fits(self.rope_scaling[key], "float") or self.rope_scaling[key] <= 0):
                raise ValueError(f"model config: rope_scaling {wrong[0]}={self.rope_scaling[wrong[0]]!r:.80} is not a positive number")

    @property
    def n_parameters(self) -> int:
        """Weights of the full model, the head included once when tied."""
        attention = self.dim * self.head_dim * 2 * (self.n_heads + self.n_kv_heads)
        attention += self.head_dim * (self.n_heads + 2 * self.n_kv_heads) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        feed_forward = (3 if self.mlp == "swiglu" else 2) * self.dim * self.ffn_dim
        if self.n_experts:
            feed_forward = self.n_experts * (feed_forward + self.dim)
        biases = (2 * self.dim + self.ffn_dim * (2 if self.mlp == "swiglu" else 1)) * self.linear_bias
        norm = self.dim * (2 if self.norm == "layer" else 1)
        return self.n_layers * (attention + feed_forward + biases + 2 * norm) + norm * (2 if self.embedding_norm else 1) \
            + self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> ModelConfig:
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := values.keys() - known:
            raise ValueError(f"model config: unknown fields {sorted(unknown)}; this version knows {sorted(known)}")
        return cls(**values)
