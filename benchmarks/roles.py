"""Peak memory of PPO with four roles beside that of fine-tuning one model, both with LoRA, on rows of the same lengths.

    python benchmarks/roles.py --model DIR

Each side runs in a process of its own, with micro-batches of the same size; the peak is resident memory (CUDA: allocated).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def fine_tuning(args):
    from llama_rlhf.checkpoint.shards import load_model
    from llama_rlhf.parallel.layers import Lora
    from llama_rlhf.trainer import Trainer, response_logprobs
    from ppo import prompts_of
    prompts = prompts_of(args.model, args.n_rows)
    model = load_model(args.model, lora=Lora(args.lora_rank, 32.0), dtype=dtype_of(args))
    trainer, rows = Trainer(model, lr=1e-6, total_steps=10), [p + (p * args.new_tokens)[:args.new_tokens] for p in prompts]
    batches = [list(range(i, min(i + args.max_batch_size, args.n_rows))) for i in range(0, args.n_rows, args.max_batch_size)]
    for _ in range(args.iterations):
        trainer.step(batches, lambda b: -response_logprobs(model, [rows[i] for i in b], [len(prompts[i]) for i in b]).sum(),
                     lambda b: sum(len(rows[i]) - len(prompts[i]) for i in b))


def ppo(args):
    from ppo import Ours, prompts_of
    with tempfile.TemporaryDirectory() as folder:
        side = Ours(args, prompts_of(args.model, args.n_rows), folder)
        for _ in range(args.iterations):
            side.iteration()


def dtype_of(args):
    from llama_rlhf.parallel import groups
    return groups.default_dtype(args.dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--part", default="", choices=["", "fine_tuning", "ppo"])
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--n_rows", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--max_batch_size", type=int, default=6)
    parser.add_argument("--inner_epochs", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-6)
    args = parser.parse_args()
    if args.part:
        from llama_rlhf.parallel import groups
        from llama_rlhf.runlog import peak_memory_gb
        groups.initialize()
        {"fine_tuning": fine_tuning, "ppo": ppo}[args.part](args)
        print(json.dumps({"peak_gb": peak_memory_gb()}))
        groups.shutdown()
        return
    peaks = {}
    for part in ("fine_tuning", "ppo"):
        done = subprocess.run([sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--part", part], stdout=subprocess.PIPE, text=True, check=True)
        peaks[part] = json.loads(done.stdout.splitlines()[-1])["peak_gb"]
    print(f"LoRA {args.lora_rank}, {args.dtype}, micro-batches of {args.max_batch_size}: fine-tuning one model {peaks['fine_tuning']:.2f} GB, "
          f"PPO with four roles {peaks['ppo']:.2f} GB, ratio {peaks['ppo'] / peaks['fine_tuning']:.2f}")


if __name__ == "__main__":
    main()
