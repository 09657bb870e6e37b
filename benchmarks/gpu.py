"""One GPU: training and decoding at true sizes beside transformers and peft, and beside what the card itself does. Nothing is downloaded.

    python benchmarks/gpu.py [--what rates,full,lora,decode] [--train tinyllama-1.1b] [--large llama-2-7b]

The weights are random, made on the card by transformers and copied, so both sides compute the same; losses and log-probabilities are compared first. The
sides alternate (ours, theirs, theirs, ours); a ratio is the median over such pairs. Both keep their weights on the card; a side's peak memory is
what was allocated beyond what it found. bf16; our optimizer keeps fp32 masters, theirs works on the bf16 weights.

  rates   bf16 matrix product of 8192^3, TFLOP/s, and a copy of 4 GB, bytes read and written: the limits below are of these
  full    --train, all weights: steps of --n_rows rows of --length tokens in micro-batches of --micro_batch. Limit: the matrix products of the linear
          layers and of attention, forward and backward, at that rate
  lora    --large, rank 16 on all linear layers: steps of --lora_rows rows
  decode  --large: decoding alone after prompts of 100 tokens, 128 new tokens for every row, at --rows rows. Limit: weights and cached keys and values
          read once at the rate of the copy. With and without CUDA graphs; theirs with its dynamic cache, and with --static 1 its static one, compiled
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from ppo import agree
from training_peer import LINEARS, optimizer_step

from llama_rlhf.checkpoint.formats import Checkpoint, TensorFile, TensorInfo
from llama_rlhf.checkpoint.shards import NativeView, _fill, native_tensors
from llama_rlhf.generation import generate
from llama_rlhf.models import FAMILIES, preset
from llama_rlhf.models.transformer import CausalLM
from llama_rlhf.parallel import groups
from llama_rlhf.parallel.layers import Lora
from llama_rlhf.trainer import Trainer, response_logprobs


class InMemory(TensorFile):
    """A model of transformers, as a file of its tensors."""

    def __init__(self, tensors):
        super().__init__("memory")
        self.tensors = tensors
        self.infos = {name: TensorInfo(tuple(x.shape), x.dtype) for name, x in tensors.items()}

    def _slice(self, name, dim, start, stop):
        return self.tensors[name] if dim is None else self.tensors[name].narrow(dim, start, stop - start)

    def _drop(self):
        self.tensors = {}


def both(config, lora):
    """(ours, theirs) with the same random weights, on the device, bf16."""
    import transformers
    settings = transformers.AutoConfig.for_model(**FAMILIES[config.family].write_hf(config))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with groups.device():
        torch.manual_seed(0)
        peer = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa")
    torch.set_default_dtype(before)
    model = CausalLM(config, lora=lora, dtype=torch.bfloat16)
    wanted = native_tensors(model)
    checkpoint = Checkpoint("memory", "", "full", [InMemory({name: x.detach() for name, x in peer.state_dict().items()})], {}, None, {})
    view = NativeView(checkpoint, config, wanted, optional={name for name in wanted if "lora_" in name})
    _fill(model, view, 0, {name for name, _ in model.named_parameters() if not lora or "lora_" in name}, [])
    return model, peer


def synchronize():
    if groups.device().type == "cuda":
        torch.cuda.synchronize()


def timed(call):
    synchronize()
    start = time.perf_counter()
    result = call()
    synchronize()
    return time.perf_counter() - start, result


def alternate(sides, pairs):
    """name -> [seconds], of calls in turn: a b b a ..."""
    seconds = {name: [] for name in sides}
    for i in range(pairs):
        for name in list(sides) if i % 2 == 0 else list(sides)[::-1]:
            seconds[name].append(timed(sides[name])[0])
    return seconds


def allocated(peak=False):
    if groups.device().type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def rates(size):
    """FLOP/s of a bf16 matrix product, bytes/s of a copy: medians."""
    a, b = torch.randn(2, size, size, device=groups.device()).bfloat16()
    x = torch.empty(1 << (31 if size > 4096 else 24), dtype=torch.int16, device=groups.device())
    y = torch.empty_like(x)
    timed(lambda: a @ b), timed(lambda: y.copy_(x))
    product = statistics.median(timed(lambda: [a @ b for _ in range(10)])[0] / 10 for _ in range(3))
    copy = statistics.median(timed(lambda: [y.copy_(x) for _ in range(5)])[0] / 5 for _ in range(3))
    print(f"rates: product of {size}^3 {2 * size ** 3 / product / 1e12:.0f} TFLOP/s, copy {2 * x.nbytes / copy / 1e12:.2f} TB/s", flush=True)
    return 2 * size ** 3 / product, 2 * x.nbytes / copy


def train(what, config, options, flops):
    lora = Lora(16, 32.0) if what == "lora" else None
    n_rows = options.lora_rows if lora else options.n_rows
    generator = torch.Generator().manual_seed(0)
    lengths = [options.length] * n_rows if not options.mixed else \
        sorted(torch.randint(options.length // 8, options.length + 1, (n_rows,), generator=generator).tolist(), reverse=True)
    rows = [torch.randint(3, config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    parts = [rows[i:i + options.micro_batch] for i in range(0, n_rows, options.micro_batch)]
    empty = allocated()
    model, peer = both(config, lora)
    weights = allocated() - empty
    if options.compile:
        model.compile_elementwise()
    trainer = Trainer(model, lr=1e-5, total_steps=100, schedule="constant")

    def ours():
        return trainer.step(parts, lambda part: -response_logprobs(model, part, [1] * len(part)).sum(), lambda part: sum(len(row) - 1 for row in part)).loss

    peer.config.use_cache = False
    if lora:
        from peft import LoraConfig, get_peft_model
        peer = get_peft_model(peer, LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM"))
    peer.train()
    trained = [p for p in peer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    records = [{"tokens": row, "prompt_len": 1} for row in rows]

    def theirs():
        return optimizer_step(peer, trained, optimizer, records, options.peer_micro_batch or options.micro_batch, groups.device())

    sides, peaks, losses, first = {"ours": ours, "theirs": theirs}, {}, {}, {}
    for name, step in sides.items():
        if groups.device().type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = allocated()
        first[name], losses[name] = timed(step)
        peaks[name] = allocated(peak=True) - before + (trainer.state_bytes if name == "ours" else 0)
    agree(f"{what}: losses of the first step", losses, 0.05)
    seconds = alternate(sides, options.pairs)
    linear = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "lora_" not in name and not name.startswith("tok_emb"))
    # causal attention: two products of half n^2 each, forward; twice that backward
    products = sum((4 if lora else 6) * linear * n + 3 * 2 * n * n * config.n_heads * config.head_dim * config.n_layers for n in lengths)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"])]
    rate = {name: sum(lengths) / statistics.median(values) for name, values in seconds.items()}
    done = products / sum(lengths) * rate["ours"]
    settings = f"{options.micro_batch} rows in a micro-batch, theirs {options.peer_micro_batch or options.micro_batch}{', --compile' if options.compile else ''}"
    print(f"{what}, {linear / 1e9:.2f} G linear weights, {n_rows} rows, {sum(lengths)} tokens a step, {settings}: losses {losses['ours']:.5f}, {losses['theirs']:.5f}\n"
          f"  ours {rate['ours']:.0f} tokens/s, {done / 1e12:.0f} TFLOP/s, {done / flops:.1%} of the product's rate; transformers{' + peft' if lora else ''} "
          f"{rate['theirs']:.0f} tokens/s: ours is {statistics.median(ratios):.2f} times as fast (pairs {', '.join(f'{r:.2f}' for r in ratios)}; first steps "
          f"{first['ours']:.1f}, {first['theirs']:.1f} s)\n  memory above the weights ({weights / 2e9:.1f} GB): ours {peaks['ours'] / 1e9:.1f} GB, theirs {peaks['theirs'] / 1e9:.1f} GB", flush=True)
    if options.profile:
        profile(ours, f"{what}, ours", options.profile)


def profile(call, name, folder):
    with torch.profiler.profile() as found:
        call()
        synchronize()
    with open(os.path.join(folder, name.replace(", ", "_").replace(" ", "_") + ".txt"), "w") as file:
        file.write(found.key_averages().table(sort_by="self_device_time_total", row_limit=45, max_name_column_width=90))


def decode(config, options, bandwidth):
    model, peer = both(config, None)
    peer.eval()
    peer.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(0)
    weight_bytes = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("tok_emb"))

    def ours(prompts, n, graphs, with_logprobs=False):
        found = generate(model, prompts, eos_ids=(), max_new_tokens=n, max_batch_size=len(prompts), cuda_graphs=graphs, with_logprobs=with_logprobs)
        return [row[0] if with_logprobs else row[0].tokens for row in found]

    def theirs(prompts, n, cache):
        ids = torch.tensor(prompts, device=groups.device())
        with torch.inference_mode():
            return peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=0, cache_implementation=cache)[:, ids.shape[1]:].tolist()

    on_gpu = groups.device().type == "cuda"
    for batch in (int(n) for n in options.rows.split(",")):
        prompts = torch.randint(3, config.vocab_size, (batch, 100), generator=generator).tolist()
        calls = {"ours": lambda n: ours(prompts, n, "never"), "theirs": lambda n: theirs(prompts, n, None)}
        if on_gpu:
            calls = {"ours": lambda n: ours(prompts, n, "always"), "ours, no graphs": lambda n: ours(prompts, n, "never"), "theirs": calls["theirs"]}
        if options.static:
            calls["theirs, static"] = lambda n: theirs(prompts, n, "static")
        checked = ours(prompts, 16, "always" if on_gpu else "never", with_logprobs=True)
        with torch.inference_mode():
            logits = peer(torch.tensor([prompt + row.tokens for prompt, row in zip(prompts, checked)], device=groups.device())).logits[:, 99:-1].float()
            chosen = logits.log_softmax(-1).gather(2, torch.tensor([row.tokens for row in checked], device=groups.device())[..., None])[..., 0]
        apart = (chosen.cpu() - torch.tensor([row.logprobs for row in checked])).abs()
        agree("mean distance of the log-probabilities", {"ours": 0.0, "theirs": float(apart.mean())}, 0.1)
        first = {name: timed(lambda call=call: call(8))[0] for name, call in calls.items()}
        steps, shorts = {name: [] for name in calls}, {name: [] for name in calls}
        for i in range(options.pairs):
            for name in list(calls) if i % 2 == 0 else list(calls)[::-1]:
                short, long = (timed(lambda n=n, call=calls[name]: call(n))[0] for n in (8, 136))
                steps[name].append((long - short) / 128)
                shorts[name].append(short)
        least = (weight_bytes + model.cache_bytes(batch, 100 + 72)) / bandwidth
        print(f"decode {batch} rows, {weight_bytes / 1e9:.1f} GB of weights; limit {least * 1e3:.2f} ms a step; log-probabilities of our first 16 tokens differ from "
              f"transformers' by {apart.mean():.3f} on average, {apart.max():.3f} at most", flush=True)
        for name, values in steps.items():
            middle, ratios = statistics.median(values), [b / a for a, b in zip(steps["ours"], values)]
            print(f"  {name:16} {middle * 1e3:.2f} ms a step, {batch / middle:.0f} tok/s, {least / middle:.0%} of the limit"
                  + ("" if name == "ours" else f"; ours is {statistics.median(ratios):.2f} times as fast (pairs {', '.join(f'{r:.2f}' for r in ratios)})")
                  + f"; 8 tokens with prefill {statistics.median(shorts[name]):.2f} s, the first time {first[name]:.1f} s", flush=True)
        if options.profile:
            profile(lambda: ours(prompts, 16, "always"), f"decode {batch}, graphs", options.profile)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="rates,full,lora,decode")
    parser.add_argument("--train", default="tinyllama-1.1b")
    parser.add_argument("--large", default="llama-2-7b")
    parser.add_argument("--n_rows", type=int, default=16)
    parser.add_argument("--lora_rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--mixed", type=int, default=0, help="1: rows of length/8 to length tokens instead")
    parser.add_argument("--micro_batch", type=int, default=4)
    parser.add_argument("--peer_micro_batch", type=int, default=0, help="theirs, where it is to be another")
    parser.add_argument("--rows", default="1,16,64")
    parser.add_argument("--static", type=int, default=0)
    parser.add_argument("--compile", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=0, help="of the models, instead of all")
    parser.add_argument("--product", type=int, default=8192)
    parser.add_argument("--profile", default="", help="folder for tables of kernels")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    groups.initialize(device=options.device)
    sizes = {name: replace(preset(name), **({"n_layers": options.layers} if options.layers else {})) for name in (options.train, options.large)}
    flops, bandwidth = rates(options.product)
    asked = options.what.split(",")
    for what, name in (("full", options.train), ("lora", options.large)):
        if what in asked:
            train(what, sizes[name], options, flops)
    if "decode" in asked:
        decode(sizes[options.large], options, bandwidth)
    groups.shutdown()


if __name__ == "__main__":
    main()
