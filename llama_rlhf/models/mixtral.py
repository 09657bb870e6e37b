"""Mixtral 8x7B.

Mistral without a window whose feed-forward is 8 experts, 2 per token; their weights always sum to 1 and stay in fp32.
Native (Mistral's own tar): feed_forward.experts.E.w1/w2/w3 and feed_forward.gate. Hugging Face: block_sparse_moe.*, per
expert; a live transformers 5 model instead stacks experts as mlp.experts.gate_up_proj and down_proj.
The hub's eight consolidated.NN.pt are no shards: each holds other whole tensors, experts joined by rows, w2 transposed.
"""

from __future__ import annotations

from llama_rlhf.config import ModelConfig
from llama_rlhf.models.family import HF_NAMES, STACKED_EXPERTS, Family, Source, expert_names, hf_llama_shape, write_hf_llama_shape
from llama_rlhf.models.mistral import write_params


def read_hf(c: dict) -> ModelConfig:
    c = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8, "max_position_embeddings": 32768, **c}
    # params.json of the hub's consolidated files may hold the window as a text
    return hf_llama_shape("mixtral", c, embedding_cut="hidden", sliding_window=c.get("sliding_window") and int(c["sliding_window"]),
                          n_experts=c.get("num_local_experts", 8), n_active_experts=c.get("num_experts_per_tok", 2),
                          fp32_routing=True)


def write_hf(config: ModelConfig) -> dict:
    return write_hf_llama_shape(config, "MixtralForCausalLM", "mixtral", sliding_window=config.sliding_window,
                                num_local_experts=config.n_experts, num_experts_per_tok=config.n_active_experts)


# w2's blocks are [in, out]; attention, norms and embeddings have their native names
HUB_CONSOLIDATED = {
    "layers.{n}.feed_forward.gate.weight": Source("layers.{n}.block_sparse_moe.gate.weight"),
    **{f"layers.{{n}}.feed_forward.experts.{{e}}.w{i}.weight":
       Source(f"layers.{{n}}.block_sparse_moe.w{i}", stacked=True, transposed=i == 2) for i in (1, 2, 3)},
}

FAMILY = Family("mixtral", read_hf, write_hf,
                {**HF_NAMES, **expert_names("model.layers.{n}.block_sparse_moe", "w1", "w2", "w3")}, ("mixtral",),
                other_layouts=({**HF_NAMES, **STACKED_EXPERTS}, HUB_CONSOLIDATED), write_params=write_params)
