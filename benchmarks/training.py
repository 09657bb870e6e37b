"""Training steps beside transformers, peft and TRL, and beside the limit; the same rows in every step, losses compared first.

    python benchmarks/training.py --model DIR --peer_python /path/to/venv/bin/python [--what full,lora,reward,loss] [--data train.jsonl]

DIR: a Hugging Face folder, e.g. made by checkpoint_split.py --format hf. The venv: see training_peer.py. A step takes --n_rows records of
--data (default: our own; the official GSM8K file has natural lengths) and makes one optimizer step, in micro-batches that each side likes
best (--micro_batch, --peer_micro_batch). The sides alternate; a ratio is the median over steps of the peer's seconds over ours. The first
step of each side counts for the loss only, and ends the run where the losses differ. bf16: our optimizer keeps fp32 masters, the peers' works on the bf16 weights.

  full    fine-tuning of all weights: transformers padded, TRL's SFTTrainer with rows sorted by length, and by its defaults
  lora    rank 16 on all linear layers: transformers + peft, SFTTrainer + peft
  reward  chosen and rejected answers: TRL's RewardTrainer
  loss    memory of the loss of 8192 tokens at a vocabulary of 152,064, forward and backward

The limit: matrix products of forward and backward over the rate of a 2048^3 product measured in the same run. Per token 2 FLOP for each
weight of a linear layer forward, 2 for the gradient of its input, 2 for its own where it is trained; the head at predicted tokens only.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from ppo import agree, linear_weights, matmul_rate

from llama_rlhf.checkpoint.shards import load_model
from llama_rlhf.data import Judged, sft_examples
from llama_rlhf.losses import token_logprobs
from llama_rlhf.models.transformer import CausalLM, ValueModel
from llama_rlhf.parallel import groups
from llama_rlhf.parallel.layers import Lora
from llama_rlhf.records import read_records
from llama_rlhf.reward import objective
from llama_rlhf.tokenizer import load_tokenizer
from llama_rlhf.trainer import Trainer, response_logprobs

HERE = os.path.dirname(os.path.abspath(__file__))


class Peak:
    """VmHWM since `start`."""

    def start(self):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return self

    @staticmethod
    def read(key="VmHWM"):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


class Ours:
    """One model of ours and its trainer; `step(rows)` as the scripts make it."""

    def __init__(self, what, options):
        self.model = load_model(options.model, ValueModel if what == "reward" else CausalLM, lora=Lora(16, 32.0) if what == "lora" else None,
                                dtype=groups.default_dtype(options.dtype))
        if what == "reward":        # the checkpoint has no such head: training_peer.py takes the same one
            with torch.no_grad():
                self.model.value_head.weight.copy_(torch.linspace(-0.1, 0.1, self.model.config.dim)[None])
                self.model.value_head.bias.zero_()
        self.trainer = Trainer(self.model, lr=1e-6, total_steps=10_000, schedule="constant")
        self.what, self.size = what, options.micro_batch

    def step(self, rows):
        if self.what == "reward":
            rows = [Judged([row["chosen"], row["rejected"]], row["prompt_len"], id=str(i), pairs=[(0, 1, None)]) for i, row in enumerate(rows)]
            loss_sum, count = lambda batch: objective(self.model, batch, loss="pairwise")[0], len
        else:
            def loss_sum(batch):
                return -response_logprobs(self.model, [row["tokens"] for row in batch], [row["prompt_len"] for row in batch]).sum()

            def count(batch):
                return sum(len(row["tokens"]) - row["prompt_len"] for row in batch)
        return self.trainer.step([rows[i:i + self.size] for i in range(0, len(rows), self.size)], loss_sum, count).loss


def serve(options):
    """Our side, in the peers' protocol: a step for each line on standard input."""
    groups.initialize(device="cpu")
    torch.set_num_threads(options.threads)
    with open(options.steps) as file:
        steps = json.load(file)
    ours = Ours(options.side, options)
    for rows in steps:
        if not sys.stdin.readline():
            sys.exit("standard input ended")
        peak, began = Peak().start(), time.perf_counter()
        loss = ours.step(rows)
        print(json.dumps({"seconds": time.perf_counter() - began, "loss": loss, "peak_bytes": peak.read()}), flush=True)
    groups.shutdown()


class Side:
    """A process that makes a step for each line we send it."""

    def __init__(self, command):
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True)

    def step(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{") and "seconds" in (record := json.loads(line)):
                return record
        self.errors.seek(0)
        raise SystemExit(f"{self.errors.read()[-2000:]}\na side ended, see above: " + " ".join(self.process.args))


def rows_of(options, n_steps):
    """n_steps lists of n_rows records, as ids: a shuffle of the data, or pairs of a solution and the next record's."""
    tokenizer = load_tokenizer(options.model)
    examples = sft_examples(read_records(options.data), tokenizer, max_seq_len=options.max_seq_len)
    random.Random(0).shuffle(examples)
    if len(examples) < n_steps * options.n_rows + 1:
        raise SystemExit(f"{options.data} has {len(examples)} records, {n_steps} steps of {options.n_rows} rows need {n_steps * options.n_rows + 1}")
    sft = [{"tokens": example.tokens, "prompt_len": example.prompt_len} for example in examples]
    pairs = [{"chosen": a["tokens"], "rejected": a["tokens"][:a["prompt_len"]] + b["tokens"][b["prompt_len"]:], "prompt_len": a["prompt_len"]}
             for a, b in zip(sft, sft[1:])]
    cut = lambda rows, n: [rows[i * n:(i + 1) * n] for i in range(n_steps)]  # noqa: E731
    return {"sft": cut(sft, options.n_rows), "reward": cut(pairs, options.n_rows // 2)}


def limit(weights, what, rows, rate):
    """Seconds that a step's matrix products need, and its tokens. weights: see linear_weights."""
    if what == "reward":
        lengths, asked = [len(row[side]) for row in rows for side in ("chosen", "rejected")], 2 * len(rows)
    else:
        lengths, asked = [len(row["tokens"]) for row in rows], sum(len(row["tokens"]) - row["prompt_len"] for row in rows)
    everywhere, where_asked, head = weights
    products = everywhere * sum(lengths) + (where_asked + head * (what != "reward")) * asked
    return (2 if what == "lora" else 3) * 2 * products / rate, sum(lengths)


def compare(what, options, folder, rows):
    steps = os.path.join(folder, f"{what}.json")
    with open(steps, "w") as file:
        json.dump(rows, file)
    common = ["--model", options.model, "--steps", steps, "--dtype", options.dtype, "--threads", str(options.threads)]
    ours = [sys.executable, os.path.join(HERE, "training.py"), *common, "--micro_batch", str(options.micro_batch), "--side"]
    sides = {"ours": Side([*ours, what])}
    if what == "lora":
        sides["ours, full"] = Side([*ours, "full"])
    if options.peer_python:
        peer = [options.peer_python, os.path.join(HERE, "training_peer.py"), *common, "--micro_batch", str(options.peer_micro_batch),
                "--attention", options.peer_attention or ("eager" if options.dtype == "bf16" else "sdpa"), *(["--lora_rank", "16"] if what == "lora" else [])]
        names = {"full": {"transformers": "transformers", "trl": "sft", "trl, defaults": "sft_defaults"}, "lora": {"peft": "transformers", "trl": "sft"}, "reward": {"trl": "reward"}}[what]
        sides |= {name: Side([*peer, "--side", side]) for name, side in names.items()}
    return sides


def close(sides):
    for side in sides.values():
        side.process.kill()
        side.process.wait()


def show(what, records, rows, options):
    middle = lambda name, key: statistics.median(r[key] for r in records[name][1:])  # noqa: E731
    print(f"\n{what}, {options.dtype}: losses of the first step " + ", ".join(f"{name} {r[0]['loss']:.5f}" for name, r in records.items()))
    weights = linear_weights(load_model(options.model, dtype=groups.default_dtype(options.dtype)))
    least, tokens = zip(*(limit(weights, what, step, r["rate"]) for step, r in zip(rows[1:], records["ours"][1:])))
    rates = {name: statistics.median(n / r["seconds"] for n, r in zip(tokens, r_[1:])) for name, r_ in records.items()}
    for name in records:
        line = f"  {name:13} {middle(name, 'seconds'):6.2f} s a step  {rates[name]:6.0f} tokens/s  peak memory {middle(name, 'peak_bytes') / 1e9:.2f} GB"
        if name == "ours":
            shares = [a / r["seconds"] for a, r in zip(least, records[name][1:])]
            line += f"  {statistics.median(shares):.0%} of the limit (steps {', '.join(f'{x:.0%}' for x in shares)}; {middle(name, 'rate') / 1e9:.0f} GFLOP/s)"
        elif name == "ours, full":
            parts = [a["seconds"] / b["seconds"] for a, b in zip(records["ours"][1:], records[name][1:])]
            line += f"  (all weights: a step with adapters takes {statistics.median(parts):.2f} of its time; steps {', '.join(f'{r:.2f}' for r in parts)})"
        else:
            ratios = [b["seconds"] / a["seconds"] for a, b in zip(records["ours"][1:], records[name][1:])]
            line += (f"  ours is {statistics.median(ratios):.2f} times as fast (steps {', '.join(f'{r:.2f}' for r in ratios)}), "
                     f"memory {middle('ours', 'peak_bytes') / middle(name, 'peak_bytes'):.2f} times")
        print(line, flush=True)


def loss_memory(options):
    """Bytes above hidden states and head, and above their gradients, that forward and backward of the loss take."""
    n, vocab, dim = 8192, 152_064, 1024
    hidden, head = (torch.randn(*shape, dtype=torch.bfloat16).mul_(0.02).requires_grad_() for shape in ((n, dim), (vocab, dim)))
    targets = torch.randint(vocab, (n,))
    hidden.grad, head.grad = torch.zeros_like(hidden), torch.zeros_like(head)
    for trained in (True, False):
        head.requires_grad_(trained)
        before = Peak().start().read("VmRSS")
        began = time.perf_counter()
        loss = -token_logprobs(hidden, head, targets).sum()
        middle = Peak.read()
        loss.backward()
        print(f"loss of {n} tokens at a vocabulary of {vocab}, head {'trained' if trained else 'frozen'}: forward {(middle - before) / 1e6:.0f} MB, with backward "
              f"{(Peak.read() - before) / 1e6:.0f} MB; all logits in fp32 would be {4 * n * vocab / 1e6:.0f} MB ({time.perf_counter() - began:.1f} s)", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--peer_python", default="", help="interpreter of a venv with TRL and peft; empty: only ours and the limit")
    parser.add_argument("--what", default="full,lora,reward,loss")
    parser.add_argument("--data", default=os.path.join(os.path.dirname(HERE), "dataset", "GSM8K", "train.json"))
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--n_rows", type=int, default=16)
    parser.add_argument("--max_seq_len", type=int, default=512)
    parser.add_argument("--micro_batch", type=int, default=16)
    parser.add_argument("--peer_micro_batch", type=int, default=4)
    parser.add_argument("--peer_attention", default="", choices=["", "sdpa", "eager"], help="default: eager in bf16, sdpa in fp32")
    parser.add_argument("--n_steps", type=int, default=3, help="counted ones")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    parser.add_argument("--steps", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.side:
        return serve(options)
    groups.initialize(device="cpu")
    torch.set_num_threads(options.threads)
    asked = options.what.split(",")
    if "loss" in asked:
        loss_memory(options)
    rows = rows_of(options, options.n_steps + 1)
    rate = lambda: matmul_rate(groups.default_dtype(options.dtype))  # noqa: E731
    for what in ("full", "lora", "reward"):
        if what not in asked:
            continue
        data = rows["reward" if what == "reward" else "sft"]
        with tempfile.TemporaryDirectory() as folder:
            sides = compare(what, options, folder, data)
            records = {name: [] for name in sides}
            for i in range(options.n_steps + 1):
                for name in list(sides) if i % 2 == 0 else list(sides)[::-1]:
                    before = rate() if name == "ours" else None
                    records[name].append(sides[name].step())
                    if before:      # the machine's speed comes and goes: the limit of a step is that of its moment
                        records[name][-1]["rate"] = (before + rate()) / 2
                if i == 0:      # the scores of a few pairs: rounding does not average out as over a thousand tokens
                    limit = 1e-3 if options.dtype == "fp32" else 5e-2 if what == "reward" else 2e-2
                    agree(f"{what}: losses of the first step", {name: r[0]["loss"] for name, r in records.items()}, limit)
            close(sides)
        show(what, records, data, options)
    groups.shutdown()


if __name__ == "__main__":
    main()
