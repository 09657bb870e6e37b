"""Generation on a CPU beside transformers' `generate`, and beside the floor; same weights, prompts and lengths, outputs compared first. (On a GPU: gpu.py.)

    python benchmarks/generation.py --model DIR [--what decode,job,samples,parallel,start] [--dtype bf16] [--n_questions 256]

DIR: a Hugging Face folder, e.g. made by checkpoint_split.py --format hf. The sides alternate (ours, theirs, theirs, ours); a ratio is
the median over such pairs.
  decode   tokens per second while decoding alone, at 1, 16 and 64 rows of 100 tokens, every row 64 new tokens. Floor: the model's own
           linear layers at that batch, by F.linear, nothing else, timed before and after.
  job      GSM8K questions with chat template, greedy, natural stopping: wall time for all, and the part of decode rows that was useful.
  samples  8 samples of each of 32 questions, temperature 1.
  parallel ours on two tensor-parallel ranks of one thread beside one process of two threads, decoding 16 rows; calls and bytes of the
           collectives per decode step, which must be what the architecture says.
  start    seconds from the start of solver_evaluate.py to its first token, beside a minimal script of transformers that gives one.
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
import transformers
from ppo import agree

from llama_rlhf.checkpoint.shards import load_model
from llama_rlhf.data import encode_prompt
from llama_rlhf.generation import Statistics, generate
from llama_rlhf.parallel import groups
from llama_rlhf.sampling import Sampling
from llama_rlhf.tasks import get_task
from llama_rlhf.tokenizer import load_tokenizer


def theirs(model, prompts, *, max_new_tokens, batch, eos=None, cache=None, **options):
    """Static batches of `batch` prompts, the longest first, left padding: their best order. Returns token lists in the given order."""
    order, results = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])), {}
    for start in range(0, len(order), batch):
        part = order[start:start + batch]
        longest = max(len(prompts[i]) for i in part)
        ids = torch.tensor([[0] * (longest - len(prompts[i])) + prompts[i] for i in part])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in part])
        model.generation_config.eos_token_id = list(eos) if eos else None      # None: no row ends early, and nothing is looked for
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=0, cache_implementation=cache,
                                 **({"do_sample": False} | options))
        n = options.get("num_return_sequences", 1)
        for place, i in enumerate(part):
            for row in out[place * n:(place + 1) * n, longest:].tolist():
                end = next((t + 1 for t, token in enumerate(row) if eos and token in eos), len(row))
                results.setdefault(i, []).append(row[:end])
    return [results[i] for i in range(len(prompts))]


def ours(model, prompts, *, max_new_tokens, batch, eos=(), statistics=None, **options):
    rows = generate(model, prompts, eos_ids=tuple(eos), max_new_tokens=max_new_tokens, max_batch_size=batch, statistics=statistics, **options)
    return [[sample.tokens for sample in row] for row in rows]


def timed(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def alternate(a, b, pairs):
    """Seconds of a and b, a b b a ...: ([(a, b), ...], last results)"""
    seconds = []
    for i in range(pairs):
        first, second = (a, b) if i % 2 == 0 else (b, a)
        x, last_x = timed(first)
        y, last_y = timed(second)
        seconds.append((x, y) if i % 2 == 0 else (y, x))
    return seconds, ((last_x, last_y) if (pairs - 1) % 2 == 0 else (last_y, last_x))


def show(name, seconds, extra=""):
    ratios = [b / a for a, b in seconds]
    print(f"{name}: ours {statistics.median(a for a, _ in seconds):.2f} s, transformers {statistics.median(b for _, b in seconds):.2f} s: "
          f"{statistics.median(ratios):.2f} times as fast (pairs {', '.join(f'{r:.2f}' for r in ratios)}){extra}", flush=True)


def floor(model, batch):
    """Seconds that the model's linear layers alone take for one step."""
    weights = [m.weight for m in model.modules() if hasattr(m, "held")] + [model.head_weight]
    inputs = {w.shape[1]: torch.randn(batch, w.shape[1], dtype=w.dtype) for w in weights}
    with torch.inference_mode():
        return statistics.median(timed(lambda: [F.linear(inputs[w.shape[1]], w) for w in weights])[0] for _ in range(15))


def decode(model, peer, args):
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 16, 64):
        prompts = torch.randint(100, 40000, (batch, 100), generator=generator).tolist()
        # the time of 8 tokens is taken off: prefill and preparations, on both sides
        both, shares = [[], []], []
        for side, call, model_ in ((0, ours, model), (1, theirs, peer)):
            call(model_, prompts, max_new_tokens=2, batch=batch)
        for i in range(args.pairs):
            for side in ((0, 1), (1, 0))[i % 2]:
                call, model_ = ((ours, model), (theirs, peer))[side]
                before = floor(model, batch) if side == 0 else None
                long, short = (timed(lambda n=n: call(model_, prompts, max_new_tokens=n, batch=batch))[0] for n in (72, 8))
                both[side].append((long - short) / 64)
                if before:          # the machine's speed comes and goes: the floor is that of the moment
                    shares.append((before + floor(model, batch)) / 2 / both[0][-1])
        rates = [batch / statistics.median(steps) for steps in both]
        print(f"decode {batch:2d} rows: ours {rates[0]:.1f} tok/s, transformers {rates[1]:.1f}: {statistics.median(b / a for a, b in zip(*both)):.2f} "
              f"times as fast; {statistics.median(shares):.0%} of the floor (pairs {', '.join(f'{share:.0%}' for share in shares)})", flush=True)


def one_layout(args):
    """Our decode rate on the ranks there are, and what a step costs in collectives: one line of json. See `parallel`."""
    from llama_rlhf.parallel.regions import traffic
    model = load_model(args.model, dtype=groups.default_dtype(args.dtype))
    prompts = torch.randint(100, 40000, (16, 100), generator=torch.Generator().manual_seed(0)).tolist()
    ours(model, prompts, max_new_tokens=2, batch=16)
    seconds, counts = {}, {}
    for n in (72, 8):
        traffic.clear()
        seconds[n] = min(timed(lambda n=n: ours(model, prompts, max_new_tokens=n, batch=16))[0] for _ in range(1 if n == 72 else 2))
        counts[n] = traffic.copy()
        counts[n].subtract({} if n == 72 else {key: value // 2 for key, value in traffic.items()})
    if groups.is_main():
        per_step = {key: (counts[72][key] - counts[8][key]) / 64 for key in counts[72]}
        config = model.config
        expected = {"all_reduce": 2 * config.n_layers + 1, "all_reduce_bytes": (2 * config.n_layers + 1) * 16 * config.dim * model.dtype.itemsize,
                    "all_gather": 1, "all_gather_bytes": 16 * 2 * 8} if groups.tp_size() > 1 else {}
        print(json.dumps({"rate": 16 * 64 / (seconds[72] - seconds[8]), "per_step": per_step, "expected": expected}), flush=True)


def parallel(args):
    own = [os.path.abspath(__file__), "--model", args.model, "--what", "one_layout", "--dtype", args.dtype]
    commands = {1: [sys.executable, *own, "--threads", "2"], 2: [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *own, "--threads", "1"]}
    found = {1: [], 2: []}
    for i in range(args.pairs):
        for n in ((1, 2), (2, 1))[i % 2]:
            out = subprocess.run(commands[n], capture_output=True, text=True, check=True).stdout
            found[n].append(json.loads(next(line for line in out.splitlines() if line.startswith("{"))))
    rates = {n: statistics.median(run["rate"] for run in runs) for n, runs in found.items()}
    ratio = statistics.median(b["rate"] / a["rate"] for a, b in zip(found[1], found[2]))
    last = found[2][-1]
    print(f"decode 16 rows: one process {rates[1]:.1f} tok/s, two ranks {rates[2]:.1f}: {ratio:.2f} of it; collectives per step of 16 tokens "
          + ", ".join(f"{key} {value:.0f}" for key, value in sorted(last["per_step"].items()))
          + (" as expected" if last["per_step"] == last["expected"] else f", EXPECTED {last['expected']}"), flush=True)


OUR_START = """
import os, runpy, sys
from llama_rlhf import generation
accept = generation._Batch._accept
def first(self, *arguments):
    print(accept(self, *arguments)[0], flush=True)
    os._exit(0)
generation._Batch._accept = first
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

THEIR_START = """
import os
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
ids = tokenizer("What is 2 + 3?", return_tensors="pt")
with torch.inference_mode():
    print(tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0, -1:]), flush=True)
os._exit(0)         # as our side: the interpreter's end is no part of the start
"""


def start(args):
    evaluate = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "solver_evaluate.py")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryDirectory() as folder:
        a = lambda: subprocess.run([sys.executable, "-c", OUR_START, evaluate, "--ckpt_dir", args.model, "--log_dir", folder, "--limit", "1", "--max_new_tokens", "1",  # noqa: E731
                                    "--dtype", args.dtype, "--write_report", "false"], check=True, capture_output=True, cwd=os.path.dirname(evaluate))
        b = lambda: subprocess.run([sys.executable, "-c", THEIR_START, args.model, {"bf16": "bfloat16", "fp32": "float32"}[args.dtype]],  # noqa: E731
                                   check=True, capture_output=True, env=environment)
        assert b"(0, 0, 0," in a().stdout       # files are in memory now
        b()
        seconds, _ = alternate(a, b, args.pairs)
    print(f"from nothing to the first token: solver_evaluate.py {statistics.median(x for x, _ in seconds):.2f} s, transformers "
          f"{statistics.median(y for _, y in seconds):.2f} s: {statistics.median(x / y for x, y in seconds):.2f} of it", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--what", default="decode,job,samples")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--label_file", default=os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "dataset/GSM8K/test.json"))
    parser.add_argument("--n_questions", type=int, default=256)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64, help="rows at once of job and samples")
    parser.add_argument("--own_batch", type=int, default=-1, help="of our side of job, where it is to be another")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--peer_attention", default="", choices=["", "eager", "sdpa"], help="default: what is faster here, eager while decoding in bf16, else sdpa")
    parser.add_argument("--cache", default=None, help="of the peer: None (dynamic) or static")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    groups.initialize(device="cpu")
    torch.set_num_threads(args.threads)
    asked = args.what.split(",")
    if asked == ["one_layout"]:
        one_layout(args)
        groups.shutdown()
        return
    for name, measure in (("parallel", parallel), ("start", start)):
        if name in asked:
            measure(args)
    if not {"decode", "job", "samples"} & set(asked):
        return
    model = load_model(args.model, dtype=groups.default_dtype(args.dtype))
    peer = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=model.dtype).eval()
    tokenizer = load_tokenizer(args.model)
    prompts = [encode_prompt(tokenizer, problem.prompt, use_chat_template=True) for problem in get_task("GSM8K").load(args.label_file)[:args.n_questions]]
    mine = ours(model, prompts[:8], max_new_tokens=16, batch=8, eos=tokenizer.eos_ids)
    same = sum(a == b for a, b in zip(mine, theirs(peer, prompts[:8], max_new_tokens=16, batch=8, eos=tokenizer.eos_ids)))
    print(f"outputs compared: {same} of 8 greedy answers of 16 tokens are the same ({args.dtype})", flush=True)
    agree("the same answers of 8", {"seen": same, "wanted": 8}, 0 if model.dtype == torch.float32 else 5)      # bf16 rounds: a text parts where two tokens are nearly alike
    if "decode" in asked:
        peer.set_attn_implementation(args.peer_attention or ("eager" if model.dtype == torch.bfloat16 else "sdpa"))
        decode(model, peer, args)
    peer.set_attn_implementation(args.peer_attention or "sdpa")
    if "job" in asked:
        facts = Statistics()
        options = dict(max_new_tokens=args.max_new_tokens, batch=args.batch, eos=tokenizer.eos_ids)
        own = options | {"batch": args.batch if args.own_batch == -1 else args.own_batch}
        seconds, (a, b) = alternate(lambda: ours(model, prompts, **own, statistics=facts), lambda: theirs(peer, prompts, **options, cache=args.cache), max(1, args.pairs // 2))
        same = sum(x == y for x, y in zip(a, b))
        tokens = [sum(len(row[0]) for row in side) for side in (a, b)]
        show(f"{len(prompts)} questions, {own['batch']} rows at once, theirs {args.batch}", seconds, f"; {same} texts the same, {tokens[0]} and {tokens[1]} tokens; "
             f"of the decode rows we computed {1 - (tokens[0] - len(prompts)) * len(seconds) / max(1, facts.decode_rows):.1%} gave no token of an answer, "
             f"{facts.decode_rows / max(1, facts.slot_steps):.1%} of slots x steps were filled")
    if "samples" in asked:
        few, options = prompts[:32], dict(max_new_tokens=128, batch=args.batch, eos=tokenizer.eos_ids)
        seconds, (a, b) = alternate(lambda: ours(model, few, **options, n_samples=8, sampling=Sampling(temperature=1.0)),
                                    lambda: theirs(peer, few, **(options | {"batch": args.batch // 8}), do_sample=True, temperature=1.0, top_k=0, num_return_sequences=8),
                                    max(1, args.pairs // 2))
        tokens = [sum(len(sample) for row in side for sample in row) for side in (a, b)]
        rates = [f"{n / statistics.median(s[i] for s in seconds):.0f}" for i, n in enumerate(tokens)]
        ratio = statistics.median((tokens[0] / x) / (tokens[1] / y) for x, y in seconds)
        print(f"8 samples of {len(few)} questions: ours {rates[0]} tok/s, transformers {rates[1]}: {ratio:.2f} times as fast ({tokens[0]} and {tokens[1]} tokens)", flush=True)
    groups.shutdown()


if __name__ == "__main__":
    main()
