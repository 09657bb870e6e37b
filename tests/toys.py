"""Tiny random models made with transformers, saved as Hugging Face folders, with awkward sizes on purpose.

    python tests/toys.py tiny-llama         one of them, with a tokenizer, to try scripts and recipes on
"""

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
    "qwen2-late-window": ("Qwen2", {**AWKWARD, "head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", AWKWARD),
    "qwen1": ("Qwen2", {**AWKWARD, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12}),    # re-saved, see save_as_qwen1
    "mixtral": ("Mixtral", {**AWKWARD, "intermediate_size": 29, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3Moe", {**AWKWARD, "moe_intermediate_size": 13, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "bloom": ("Bloom", dict(hidden_size=48, n_layer=2, n_head=6, vocab_size=101)),      # 6 heads: slopes beyond a power of two
}


def make_hf(folder, name="llama", seed=0, dtype=torch.float32, change=lambda model: None, **more):
    """Save a random model of MODELS under folder; returns it. Weights are large enough for attention to matter.

    change(model): what to do to it first.  more: of its config.
    """
    import transformers
    prefix, sizes = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, prefix + "Config")(**{**sizes, **more})
    config._experts_implementation = "eager"        # one expert after the other, as the papers write it
    model = getattr(transformers, prefix + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 if p.dim() > 1 else p + torch.randn_like(p) * 0.1)
    change(model.to(dtype))
    (save_as_qwen1 if name == "qwen1" else save_pretrained)(model, folder)
    return model


def save_pretrained(model, folder):
    model.save_pretrained(folder)


def weights(folder):
    """Every tensor of a Hugging Face folder."""
    from safetensors.torch import load_file
    files = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    return {name: x for file in files for name, x in load_file(os.path.join(folder, file)).items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def save_as_qwen1(model, folder, **more):
    """A Qwen2 model without grouped heads under first-generation names: up to its training length that is the same model."""
    from safetensors.torch import save_file
    names = {"model.embed_tokens.": "transformer.wte.", "model.norm.": "transformer.ln_f.", "model.layers.": "transformer.h.",
             "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj",
             "mlp.up_proj": "mlp.w1", "mlp.gate_proj": "mlp.w2", "mlp.down_proj": "mlp.c_proj"}
    tensors, state = {}, model.state_dict()
    for name, tensor in state.items():
        if "q_proj" in name:
            tensor = torch.cat([state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            name = name.replace("self_attn.q_proj", "attn.c_attn")
        elif "k_proj" in name or "v_proj" in name:
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = tensor.clone()
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, os.path.join(folder, "model.safetensors"))
    c = model.config
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump({"model_type": "qwen", "hidden_size": c.hidden_size, "num_attention_heads": c.num_attention_heads,
                   "num_hidden_layers": c.num_hidden_layers, "intermediate_size": 2 * c.intermediate_size, "vocab_size": c.vocab_size,
                   "layer_norm_epsilon": c.rms_norm_eps, "kv_channels": c.head_dim, "rotary_emb_base": c.rope_parameters["rope_theta"],
                   "seq_length": c.max_position_embeddings, "max_position_embeddings": 4 * c.max_position_embeddings,
                   "use_dynamic_ntk": True, "use_logn_attn": True, **more}, file)


ROWS = [[5, 17, 90, 3, 3, 64, 20], [42, 6], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]
PROMPTS = [3, 1, 6]         # of ROWS, the tokens that are prompt
EOS = (7, 8)


def make_reference(folder, name, sizes, **options):
    """A random model under folder/model and, beside it, what transformers makes of it: logits of ROWS, greedy continuations, and
    the gradients of the mean response loss, saved under folder/gradients as if they were the weights. The model is also split
    for each of the numbers of ranks, from this process (a world of one): folder/shards-n."""
    from llama_rlhf.checkpoint.shards import split_checkpoint
    reference = make_hf(os.path.join(folder, "model"), name, **options)
    save_pretrained(reference, os.path.join(folder, "transformers"))        # the same files but for first-generation Qwen
    logits = [reference(torch.tensor([row])).logits[0] for row in ROWS]
    losses = [-x[n - 1:-1].log_softmax(-1).gather(1, torch.tensor(row[n:])[:, None]).flatten()
              for row, n, x in zip(ROWS, PROMPTS, logits)]
    torch.cat(losses).mean().backward()
    texts = []
    with torch.no_grad():
        for row in ROWS:
            new = reference.generate(torch.tensor([row]), do_sample=False, max_new_tokens=20, eos_token_id=list(EOS), pad_token_id=0)
            new = new[0, len(row):].tolist()
            logprobs = reference(torch.tensor([row + new])).logits[0].log_softmax(-1)[len(row) - 1:-1]
            texts.append((new, logprobs.gather(1, torch.tensor(new)[:, None]).flatten()))
        torch.save({"logits": torch.cat(logits).detach(), "texts": texts}, os.path.join(folder, "expected.pt"))
        for p in reference.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    (save_as_qwen1 if name == "qwen1" else save_pretrained)(reference, os.path.join(folder, "gradients"))
    for n in sizes:
        split_checkpoint(os.path.join(folder, "model"), os.path.join(folder, f"shards-{n}"), n)


def measure(folders):
    """On every rank: how far our model is from the reference in each of the folders, as a list of
    {"logits", "logprobs", "gradients": largest difference; "tokens", "round trip": equal?; "weights": held by this rank}."""
    from llama_rlhf.parallel import groups
    groups.initialize(device="cpu")
    results = [_measure(str(folder)) for folder in folders]
    groups.shutdown()
    return results


def _measure(folder):
    from llama_rlhf.checkpoint.convert import NativeView
    from llama_rlhf.checkpoint.formats import open_checkpoint
    from llama_rlhf.checkpoint.shards import load_model, native_tensors
    from llama_rlhf.generation import generate
    from llama_rlhf.parallel import groups
    from llama_rlhf.parallel.gradients import sync_partial_gradients
    from llama_rlhf.parallel.layers import piece_of, walk
    from llama_rlhf.trainer import response_logprobs
    expected = torch.load(os.path.join(folder, "expected.pt"))
    model = load_model(os.path.join(folder, "model"))
    with torch.no_grad():
        logits = logits_of(model, ROWS)
    texts = [row[0] for row in generate(model, ROWS, eos_ids=EOS, max_new_tokens=20, max_batch_size=2, with_logprobs=True)]
    equal = [text.tokens for text in texts] == [new for new, _ in expected["texts"]]
    logprobs = max((torch.tensor(text.logprobs) - wanted).abs().max().item()
                   for text, (_, wanted) in zip(texts, expected["texts"])) if equal else float("inf")

    (-response_logprobs(model, ROWS, PROMPTS).mean()).backward()
    sync_partial_gradients(model)
    gradients = 0.0
    with open_checkpoint(os.path.join(folder, "gradients")) as checkpoint:
        view = NativeView(checkpoint, model.config, native_tensors(model))
        for *_, parameter, pieces in walk(model):
            for native, piece in pieces:
                wanted = view.read(native) if piece.dim is None else view.read(native, *piece.held)
                if wanted.numel():
                    gradients = max(gradients, (piece_of(parameter.grad, piece) - wanted).abs().max().item())

    again = load_model(os.path.join(folder, f"shards-{groups.tp_size()}"))
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    return {"logits": (logits - expected["logits"]).abs().max().item(), "logprobs": logprobs, "gradients": gradients, "tokens": equal,
            "round trip": same, "weights": sum(p.numel() for p in model.parameters())}


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


if __name__ == "__main__":
    import sys
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python tests/toys.py FOLDER")
    make_hf(sys.argv[1], "llama-9-3", vocab_size=263, max_position_embeddings=1024)
    add_bytes_tokenizer(sys.argv[1])
