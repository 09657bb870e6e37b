"""Write an untrained small model and arithmetic problems in GSM8K's form: all that the experiment of run.sh starts from.

    python examples/arithmetic/make.py --out_dir runs/arithmetic --seed 0

A problem is a chain such as "8+5-3+9". Solutions are of two kinds, both right: a careful one shows its steps,
"8+5=13\\n13-3=10\\n10+9=19\\n#### 19", a hasty one only the answer, "#### 19". The demonstrations for fine-tuning are mostly
hasty, so that is what the model learns to do, and it is bad at it: steps are easy for it, whole chains are not. Nothing but the
reward says that showing the work pays.

    model/        a LLaMA-shaped model as a Hugging Face folder, random weights, one token per byte
    train.json    demonstrations, a share of --careful with steps
    prompts.json  for reinforcement learning: other problems
    test.json     held out: other problems again

No problem stands twice. The seed decides everything, weights and problems, byte for byte. Needs torch and safetensors only.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file

# ----------------------------------------------------------------------------------------------------------------
# Problems


def draw(generator, n_terms=5):
    """(question, careful solution, hasty solution): digits 1 to 9 added and subtracted, all totals from 0 to 19."""
    total = generator.randint(1, 9)
    question, steps = str(total), []
    for _ in range(n_terms - 1):
        digit, sign = generator.randint(1, 9), generator.choice("+-")
        if not 0 <= (total + digit if sign == "+" else total - digit) < 20:
            sign = "-" if sign == "+" else "+"
        result = total + digit if sign == "+" else total - digit
        question += f"{sign}{digit}"
        steps.append(f"{total}{sign}{digit}={result}\n")
        total = result
    return question, "".join(steps) + f"#### {total}", f"#### {total}"


def make_problems(counts, seed, careful):
    """[records of each file]: all distinct, the numbers of records as in `counts`; a share `careful` with steps."""
    generator = random.Random(f"arithmetic/{seed}")  # a string seeds alike in every Python build
    problems = {}
    while len(problems) < sum(counts):
        question, shown, bare = draw(generator)
        problems.setdefault(question, shown if generator.random() < careful else bare)
    records = iter([{"instruction": question, "output": solution} for question, solution in problems.items()])
    return [[next(records) for _ in range(count)] for count in counts]


# ----------------------------------------------------------------------------------------------------------------
# Model

VOCAB_SIZE = 260  # 256 bytes, <bos>, <eos>, <pad>, and one that makes it even


def make_model(seed, *, dim, ffn_dim, n_layers, n_heads, max_seq_len, std):
    """(config.json, tensors): weights from N(0, std^2); those that write into the residual stream smaller by
    sqrt(2 n_layers), as in GPT-2."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", "hidden_act": "silu",
        "hidden_size": dim, "intermediate_size": ffn_dim, "num_hidden_layers": n_layers, "num_attention_heads": n_heads,
        "num_key_value_heads": n_heads, "vocab_size": VOCAB_SIZE, "max_position_embeddings": max_seq_len,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": False, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=std):
        return torch.randn(shape, generator=generator) * std

    small = std / (2 * n_layers) ** 0.5
    tensors = {"model.embed_tokens.weight": normal(VOCAB_SIZE, dim)}
    for n in range(n_layers):
        layer = f"model.layers.{n}."
        tensors |= {
            layer + "input_layernorm.weight": torch.ones(dim),
            layer + "self_attn.q_proj.weight": normal(dim, dim),
            layer + "self_attn.k_proj.weight": normal(dim, dim),
            layer + "self_attn.v_proj.weight": normal(dim, dim),
            layer + "self_attn.o_proj.weight": normal(dim, dim, std=small),
            layer + "post_attention_layernorm.weight": torch.ones(dim),
            layer + "mlp.gate_proj.weight": normal(ffn_dim, dim),
            layer + "mlp.up_proj.weight": normal(ffn_dim, dim),
            layer + "mlp.down_proj.weight": normal(dim, ffn_dim, std=small),
        }
    tensors |= {"model.norm.weight": torch.ones(dim), "lm_head.weight": normal(VOCAB_SIZE, dim)}
    return config, tensors


# ----------------------------------------------------------------------------------------------------------------


def main(args):
    out = Path(args.out_dir)
    (out / "model").mkdir(parents=True)
    counts = {"train.json": args.n_train, "prompts.json": args.n_prompts, "test.json": args.n_test}
    for name, records in zip(counts, make_problems(list(counts.values()), args.seed, args.careful)):
        lines = ",\n".join(json.dumps(record) for record in records)
        (out / name).write_text(f"[\n{lines}\n]\n")
    config, tensors = make_model(args.seed, dim=args.dim, ffn_dim=args.ffn_dim, n_layers=args.n_layers, n_heads=args.n_heads, max_seq_len=64, std=args.std)
    (out / "model" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "model" / "tokenizer.bytes.json").write_text(json.dumps({"kind": "bytes", "vocab_size": VOCAB_SIZE}) + "\n")
    save_file(tensors, out / "model" / "model.safetensors", metadata={"format": "pt"})
    print(f"{out}: {sum(t.numel() for t in tensors.values())} weights; {counts}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out_dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n_train", type=int, default=16000)
    parser.add_argument("--n_prompts", type=int, default=4000)
    parser.add_argument("--n_test", type=int, default=1000)
    parser.add_argument("--careful", type=float, default=0.4, help="share of solutions that show their steps")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--ffn_dim", type=int, default=384)
    parser.add_argument("--n_layers", type=int, default=4)
    parser.add_argument("--n_heads", type=int, default=4)
    parser.add_argument("--std", type=float, default=0.08)
    main(parser.parse_args())
