"""Seconds of a PPO iteration by phase: ours, TRL's PPOTrainer, and the limit; same model, prompts, lengths and epochs.

    python benchmarks/ppo.py --model DIR --peer_python /path/to/venv/bin/python      # a venv with trl==0.24.0, transformers==4.57.1

DIR: a Hugging Face folder, e.g. made by checkpoint_split.py --format hf. Both sides answer the same prompts (token ids) with
exactly --new_tokens tokens (the end token never ends a row), hold actor, reference, critic and reward model of the same
architecture (with --lora_rank adapters on actor and critic), and make --inner_epochs passes of updates, one optimizer step each.
TRL takes the generator's log-probabilities as the old ones; we compute them again, a forward pass more. Iterations alternate between the sides; the first of each is not counted.

The limit of a phase is the work that must be done over what this machine does just before and after the iteration: matrix products
of the forward and backward passes over the matmul rate; decoding over the time of the model's own linear layers at that batch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F

from llama_rlhf.advantages import ALGORITHMS, Settings, make_advantages
from llama_rlhf.checkpoint.shards import load_model, save_model
from llama_rlhf.data import encode_prompt
from llama_rlhf.losses import kl_estimate
from llama_rlhf.models.transformer import ValueModel
from llama_rlhf.parallel import groups
from llama_rlhf.parallel.layers import Lora
from llama_rlhf.ppo import UpdateSettings, update_actor, update_critic
from llama_rlhf.records import read_records
from llama_rlhf.roles import load_roles
from llama_rlhf.rollout import Prompt, Reward, RolloutSettings, collect
from llama_rlhf.runlog import Clock, peak_memory_gb
from llama_rlhf.tokenizer import load_tokenizer
from llama_rlhf.trainer import Trainer, response_logprobs


class Endless:
    """A tokenizer no id of which ends a row."""

    eos_ids = ()

    def __init__(self, tokenizer):
        self.decode = tokenizer.decode


class Ours:
    def __init__(self, args, prompts, folder):
        dtype, lora = groups.default_dtype(args.dtype), Lora(args.lora_rank, 32.0) if args.lora_rank > 0 else None
        reward_dir = os.path.join(folder, "reward")
        save_model(load_model(args.model, ValueModel, lora=lora, dtype=dtype, seed=7), reward_dir, companions=args.model,
                   score={"loss": "pairwise", "form": "linear", "offset": 0.0, "scale": 1.0})
        self.roles = load_roles(actor_dir=args.model, start_dir=args.model, critic_dir=reward_dir, critic_start_dir=reward_dir, reward_dir=reward_dir, reward_weight=1.0,
                                needs_reference=True, lora=lora, dtype=dtype)
        steps = 1000 * args.inner_epochs
        self.trainers = [Trainer(model, lr=args.lr, total_steps=steps, eps=1e-5) for model in (self.roles.actor, self.roles.critic)]
        self.tokenizer, self.prompts = Endless(load_tokenizer(args.model)), [Prompt(i, "", p) for i, p in enumerate(prompts)]
        self.drawing = RolloutSettings(max_new_tokens=args.new_tokens, bootstrap_truncated=True, batch_size=args.n_rows)
        self.updating = UpdateSettings(epochs=args.inner_epochs, minibatch_size=args.n_rows, max_batch_size=args.max_batch_size,
                                       max_new_tokens=args.new_tokens)
        self.done = 0

    def iteration(self):
        clock = Clock()
        rollout, _ = collect(self.roles, self.prompts, self.tokenizer, Reward(self.roles.reward), self.drawing, iteration=self.done, clock=clock)
        k1 = kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1")
        made = make_advantages("ppo", rollout.scores, k1, rollout.mask, settings=Settings(beta=0.05), values=rollout.values)
        actor_trainer, critic_trainer = self.trainers
        with clock("update"), self.roles.using(self.roles.critic, trainer=critic_trainer):
            update_critic(critic_trainer, rollout, made, self.updating, self.done)
        with clock("update"), self.roles.using(self.roles.actor, trainer=actor_trainer):
            update_actor(actor_trainer, rollout, made, ALGORITHMS["ppo"], self.updating, self.done)
        self.done += 1
        return {"seconds": sum(clock.seconds.values()), "generate": clock.seconds["generate"],
                "score": clock.seconds["score"] + clock.seconds["forward"], "update": clock.seconds["update"],
                "response_tokens": sum(rollout.response_lengths), "prompt_tokens": sum(rollout.prompt_lengths), "peak_rss_gb": peak_memory_gb()}


class Peer:
    """benchmarks/ppo_peer.py in its own interpreter, one iteration for each line on its standard input."""

    def __init__(self, args, prompts_file):
        self.process = subprocess.Popen(
            [args.peer_python, os.path.join(os.path.dirname(os.path.abspath(__file__)), "ppo_peer.py"), "--model", args.model, "--prompts", prompts_file,
             "--dtype", args.dtype, "--lora_rank", str(args.lora_rank), "--n_rows", str(args.n_rows), "--new_tokens", str(args.new_tokens),
             "--epochs", str(args.inner_epochs), "--iterations", str(args.iterations + 1), "--threads", str(args.threads), "--wait_for_stdin", "1", "--value_lora", "1",
             "--micro_batch", str(args.peer_micro_batch), "--attention", "eager" if args.dtype == "bf16" else "sdpa", "--dump", args.dump],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def iteration(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{") and "seconds" in (record := json.loads(line)):
                return record
        raise SystemExit("the peer ended; run benchmarks/ppo_peer.py with its interpreter to see why")


def agree(what, values, limit):
    """SystemExit unless the numbers of `values`, by side, lie within `limit` of each other."""
    if not all(abs(a - b) <= limit for a in values.values() for b in values.values()):
        raise SystemExit(f"{what}: {', '.join(f'{side} {value:.5g}' for side, value in values.items())}; more than {limit:g} apart. "
                         "The sides have not done the same work, so their times and memory are no comparison")


def compare(ours, dump_file, dtype):
    """The reference's log-probabilities of the peer's first responses, by both sides."""
    with open(dump_file) as file:
        dump = json.load(file)
    theirs = torch.tensor(dump["reference_logprobs"])
    prompts = [len(row) - theirs.shape[1] for row in dump["sequences"]]
    with torch.no_grad():
        mine = response_logprobs(ours.roles.reference, dump["sequences"], prompts).view_as(theirs)
    print(f"outputs compared: reference log-probabilities of {theirs.numel()} tokens differ by at most {(mine - theirs).abs().max():.1e}, "
          f"mean {(mine - theirs).abs().mean():.1e}", flush=True)
    agree("mean distance of the reference's log-probabilities", {"ours": 0.0, "trl": float((mine - theirs).abs().mean())}, {"fp32": 1e-3, "bf16": 0.1}[dtype])


class Limit:
    """Seconds that an iteration's matrix products need on this machine, as fast as it is at the moment."""

    def __init__(self, model, n_rows):
        self.model, self.n_rows, self.weights = model, n_rows, linear_weights(model)
        weights = [m.weight.detach() for m in model.layers.modules() if hasattr(m, "held")] + [model.head_weight.detach()]     # no copies: they would be our memory
        self.layers = [(torch.randn(n_rows, weight.shape[1], dtype=model.dtype), weight) for weight in weights]

    def speed(self):
        """FLOP/s of matrix products, and seconds of all linear layers of a decode step, timed alone, weights not in cache."""
        times = []
        for _ in range(7):
            start = time.perf_counter()
            for x, w in self.layers:
                F.linear(x, w)
            times.append(time.perf_counter() - start)
        return matmul_rate(self.model.dtype), statistics.median(times)

    def seconds(self, n_prompt, n_response, n_updates, lora, rate, decode_step):
        """{"generate", "score", "update"}. Per token a forward costs 2 FLOP per linear weight, a backward 4 (2 with adapters: no weight
        gradients). The head, and what the last block does behind its attention, are counted where something is asked of a token: of
        response tokens, of each row's last one for its reward."""
        everywhere, asked, head = self.weights
        forward = lambda tokens, states, heads: 2 * (everywhere * tokens + asked * states + head * heads)  # noqa: E731
        tokens = n_prompt + n_response
        # actor and reference look at response tokens with the head; critic and reward model have none
        policy, critic, reward = forward(tokens, n_response, n_response), forward(tokens, n_response, 0), forward(tokens, self.n_rows, 0)
        return {"generate": forward(n_prompt, self.n_rows, self.n_rows) / rate + decode_step * (n_response // self.n_rows),
                "score": (2 * policy + critic + reward) / rate, "update": n_updates * (2 if lora else 3) * (policy + critic) / rate}


def linear_weights(model):
    """How many weights of linear layers multiply every token, how many (the last block's, behind its attention) only those of which something
    is asked, and how many stand in the head."""
    sizes = {name: m.weight.numel() for name, m in model.layers.named_modules() if hasattr(m, "held")}
    asked = sum(n for name, n in sizes.items() if name.startswith(f"{len(model.layers) - 1}.") and not name.endswith("wqkv"))
    return sum(sizes.values()) - asked, asked, model.head_weight.numel()


def matmul_rate(dtype, n=2048, seconds=0.5):
    """FLOP/s of products of n x n matrices, over `seconds`."""
    a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    a @ b
    start, done = time.perf_counter(), 0
    while (took := time.perf_counter() - start) < seconds:
        a @ b
        done += 1
    return 2 * n ** 3 * done / took


def prompts_of(model, n):
    """Token ids of the first n training problems, in the model's chat format."""
    tokenizer = load_tokenizer(model)
    records = read_records(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "dataset", "GSM8K", "train.json"))
    return [encode_prompt(tokenizer, record["instruction"], use_chat_template=True) for record in records[:n]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--peer_python", default="", help="interpreter of a venv with TRL; empty: only ours and the limit")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--lora_rank", type=int, default=-1)
    parser.add_argument("--n_rows", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--inner_epochs", type=int, default=2)
    parser.add_argument("--max_batch_size", type=int, default=16)
    parser.add_argument("--peer_micro_batch", type=int, default=4, help="TRL's time is flat from 4 to 16, its memory is not")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--lr", type=float, default=1e-6)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    groups.initialize(device="cpu")
    torch.set_num_threads(args.threads)
    prompts = prompts_of(args.model, args.n_rows)
    with tempfile.TemporaryDirectory() as folder:
        prompts_file, args.dump = os.path.join(folder, "prompts.json"), os.path.join(folder, "dump.json")
        with open(prompts_file, "w") as file:
            json.dump(prompts, file)
        sides = {"ours": Ours(args, prompts, folder)}
        if args.peer_python:
            sides["trl"] = Peer(args, prompts_file)
        rows, limit = {name: [] for name in sides}, Limit(sides["ours"].roles.actor, args.n_rows)
        for i in range(args.iterations + 1):
            for name in list(sides) if i % 2 == 0 else list(sides)[::-1]:
                before = limit.speed() if name == "ours" else ()
                record = sides[name].iteration()
                if before:
                    record["speed"] = [(a + b) / 2 for a, b in zip(before, limit.speed())]
                print(f"{name:5} iteration {i}: " + "  ".join(f"{key} {value:.4g}" for key, value in record.items() if isinstance(value, (int, float))), flush=True)
                if i:
                    rows[name].append(record)
                elif name == "trl":
                    compare(sides["ours"], args.dump, args.dtype)
    first = rows["ours"][0]
    for key in ("prompt_tokens", "response_tokens"):
        agree(f"{key} of the last iteration", {name: records[-1][key] for name, records in rows.items()}, 0)
    for record in rows["ours"]:
        record["limit"] = limit.seconds(record["prompt_tokens"], record["response_tokens"], args.inner_epochs, args.lora_rank > 0, *record["speed"])
        record["limit"]["seconds"] = sum(record["limit"].values())
    speed = [statistics.median(record["speed"][i] for record in rows["ours"]) for i in (0, 1)]
    print(f"\n{args.dtype}, {'all weights' if args.lora_rank < 1 else f'LoRA {args.lora_rank}'}, {args.n_rows} prompts ({first['prompt_tokens']} tokens) x "
          f"{args.new_tokens} new tokens, {args.inner_epochs} epochs, {args.threads} threads; matmul {speed[0] / 1e9:.0f} GFLOP/s, "
          f"decode step {speed[1] * 1e3:.1f} ms; medians of {args.iterations}")
    print(f"{'':10}{'generate':>10}{'score':>10}{'update':>10}{'whole':>10}{'memory GB':>11}")
    keys = ("generate", "score", "update", "seconds")
    for name, records in rows.items():
        middle = lambda key: statistics.median(r[key] for r in records)  # noqa: E731, B023
        print(f"{name:10}" + "".join(f"{middle(key):10.2f}" for key in keys) + f"{middle('peak_rss_gb'):11.2f}")
    print(f"{'limit':10}" + "".join(f"{statistics.median(r['limit'][key] for r in rows['ours']):10.2f}" for key in keys))
    share = lambda key: f"{statistics.median(r['limit'][key] / r[key] for r in rows['ours']):.0%}"  # noqa: E731
    print("ours runs at " + ", ".join(f"{share(key)} of the limit in {key}" for key in keys[:3]) + f", {share('seconds')} of the whole")
    if "trl" in rows:
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(rows["ours"], rows["trl"])]
        print(f"TRL / ours: {statistics.median(ratios):.2f} (each pair: {', '.join(f'{r:.2f}' for r in ratios)})")
    groups.shutdown()


if __name__ == "__main__":
    main()
