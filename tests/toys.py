"""Tiny random models made with transformers, saved as Hugging Face folders, with awkward sizes on purpose."""

import json
import os

import torch

# kv heads != heads, head_dim != hidden / heads, odd ffn and vocabulary
AWKWARD = dict(hidden_size=48, intermediate_size=77, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
               head_dim=10, vocab_size=101, max_position_embeddings=128)
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16}
# name -> (transformers prefix, sizes)
MODELS = {
    "llama": ("Llama", AWKWARD),
    "llama-tied-scaled": ("Llama", {**AWKWARD, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama-9-3": ("Llama", {**AWKWARD, "hidden_size": 45, "num_attention_heads": 9, "num_key_value_heads": 3}),        # SmolLM2's heads
    "llama-2-like": ("Llama", {**AWKWARD, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12,
                               "intermediate_size": 128, "vocab_size": 96}),                        # divides by 2, as Meta's must
    "mistral-window": ("Mistral", {**AWKWARD, "sliding_window": 4}),
    "qwen2": ("Qwen2", {**AWKWARD, "head_dim": 8}),
    "qwen3": ("Qwen3", AWKWARD),
}


def make_hf(folder, name="llama", seed=0, dtype=torch.float32, **more):
    """Save a random model of MODELS under folder; returns it. Weights are large enough for attention to matter."""
    import transformers
    prefix, sizes = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, prefix + "Config")(**{**sizes, **more})
    model = getattr(transformers, prefix + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 if p.dim() > 1 else p + torch.randn_like(p) * 0.1)
    model.to(dtype).save_pretrained(folder)
    return model


def add_bytes_tokenizer(folder):
    """The toy tokenizer: 256 bytes, bos 256, eos 257, pad 258."""
    with open(os.path.join(folder, "tokenizer.bytes.json"), "w") as file:
        json.dump({"kind": "bytes"}, file)


def logits_of(model, rows):
    """Full-vocabulary logits [T, V] of a model of ours for packed rows of ids; the ranks' parts gathered."""
    from llama_rlhf.models.transformer import Rows
    from llama_rlhf.parallel import groups
    hidden = model(torch.tensor([t for row in rows for t in row]), Rows.packed([len(row) for row in rows]))
    return torch.cat([part.to(hidden.dtype) for part in
                      map(torch.tensor, groups.gather_objects((hidden @ model.head_weight.t()).detach().tolist()))], -1)
