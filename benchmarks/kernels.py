"""Why the program multiplies and attends as it does: its forms beside torch's usual ones, on this machine.

    python benchmarks/kernels.py [--threads 2]

Six tables, microseconds (best of several), of forms that are first seen to give the same: one step's linear layers of SmolLM2-135M by F.linear and by `layers.held` weights;
a linear layer of 2048 rows by torch's product and by oneDNN's, in fp32: forward, where we keep torch's, and the gradient of its input;
decode attention by the fused kernel and by batched products on a cache without gaps; causal attention forward + backward by
the fused kernel (a row at a time, in bf16 and in fp32) and as the model computes it; RMSNorm forward + backward by torch and as the model computes it;
the token that ends the nucleus (top-p) of each row of logits, by sorting them all and as `sampling` finds it.
"""

import argparse
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F

from llama_rlhf.models.attention import Rows, packed_attention
from llama_rlhf.models.transformer import _RMSNorm
from llama_rlhf.parallel import groups
from llama_rlhf.parallel.layers import held, product, product_back
from llama_rlhf.sampling import Sampling, _threshold

DIM, FFN, HEADS, KV_HEADS, D, LAYERS, VOCAB = 576, 1536, 9, 3, 64, 30, 49152


def best(call, n=12):
    for _ in range(2):
        call()
    times = []
    for _ in range(n):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6


def same(usual, *others):
    """SystemExit where a form gives something else, rounding apart: its time would be no comparison."""
    for other in others:
        if not (apart := float((other.float() - usual.float()).abs().max() / usual.float().abs().max())) < 0.03:
            raise SystemExit(f"two forms of one computation differ by {apart:.1%} of the largest value, {tuple(usual.shape)} {usual.dtype}: one of them is wrong")


def linears(dtype, batch):
    """One decode step: every linear layer and the head, each with weights of its own."""
    shapes = [((HEADS + 2 * KV_HEADS) * D, DIM), (DIM, DIM), (2 * FFN, DIM), (DIM, FFN)] * LAYERS + [(VOCAB, DIM)]
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    inputs = {n: torch.randn(batch, n, dtype=dtype) for n in (DIM, FFN)}
    packed = [held(w, batch) for w in weights]
    for shape, w, p in zip(shapes, weights, packed):
        same(F.linear(inputs[shape[1]], w), product(inputs[shape[1]], p))
    usual = best(lambda: [F.linear(inputs[w.shape[1]], w) for w in weights])
    return usual, best(lambda: [product(inputs[shape[1]], w) for shape, w in zip(shapes, packed)])


def training_products(rows, shape):
    """Of a linear layer in fp32: forward by torch and by oneDNN, the gradient of its input by torch and as the model computes it."""
    w, x, dy = torch.randn(shape), torch.randn(rows, shape[1]), torch.randn(rows, shape[0])
    by_onednn = torch.ops.mkldnn._linear_pointwise
    same(F.linear(x, w), by_onednn(x, w, None, "none", [], ""))
    same(dy @ w, product_back(dy, w))
    return best(lambda: F.linear(x, w)), best(lambda: by_onednn(x, w, None, "none", [], "")), best(lambda: dy @ w), best(lambda: product_back(dy, w))


def decode_attention(dtype, batch, span):
    caches = [torch.randn(batch * KV_HEADS, span, D, dtype=dtype) for _ in range(2 * LAYERS)]
    q, mask = torch.randn(batch, KV_HEADS, HEADS // KV_HEADS, D, dtype=dtype), torch.zeros(batch, 1, 1, span, dtype=dtype)
    wide = mask.expand(-1, KV_HEADS, -1, -1).flatten(0, 1)
    pairs = list(zip(caches[::2], caches[1::2]))
    shape = batch, KV_HEADS, span, D

    def fused(k, v):
        return F.scaled_dot_product_attention(q, k.view(shape), v.view(shape), attn_mask=mask)

    def products(k, v):
        return torch.bmm(torch.baddbmm(wide, q.flatten(0, 1), k.transpose(1, 2), alpha=D ** -0.5).softmax(-1), v)

    same(fused(*pairs[0]).flatten(0, 1), products(*pairs[0]))
    return best(lambda: [fused(k, v) for k, v in pairs]), best(lambda: [products(k, v) for k, v in pairs])


def training_attention(dtype, lengths):
    q, k, v = (torch.randn(sum(lengths), h, D, dtype=dtype, requires_grad=True) for h in (HEADS, KV_HEADS, KV_HEADS))
    grad, rows = torch.randn(sum(lengths), HEADS, D, dtype=dtype), Rows.packed(lengths)

    def fused(cast):
        out, start = [], 0
        for n in lengths:
            row = (x[None, start:start + n].transpose(1, 2).to(cast) for x in (q, k, v))
            out.append(F.scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
            start += n
        return torch.cat(out).to(dtype)

    forms = lambda: fused(dtype), lambda: fused(torch.float32), lambda: packed_attention(q, k, v, rows, None, None)  # noqa: E731
    usual, *others = ([form().detach(), *torch.autograd.grad(form(), (q, k, v), grad)] for form in forms)
    for results in zip(usual, *others):
        same(*results)
    return [best(lambda form=form: form().backward(grad)) for form in forms]


def nucleus(batch, top_p):
    z = torch.randn(batch, VOCAB) * 6
    z -= z.amax(-1, keepdim=True)
    p, ranges = z.exp(), [(0, VOCAB)]

    def by_sorting():
        ordered = z.sort(-1, descending=True).values
        mass = ordered.softmax(-1)
        return ordered.gather(1, (mass.cumsum(-1) - mass < top_p).sum(-1, keepdim=True) - 1)[:, 0]

    ours = lambda: _threshold(z, p, ranges, Sampling(1.0, top_p=top_p))  # noqa: E731
    same(by_sorting(), ours())
    return best(by_sorting), best(ours)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    groups.initialize(device="cpu")
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            for batch in (1, 16, 64):
                usual, ours = linears(dtype, batch)
                print(f"{name} linear layers of a step, {batch:2d} rows: F.linear {usual:7.0f}, held {ours:7.0f}: {usual / ours:.2f} times as fast", flush=True)
        for shape in (((HEADS + 2 * KV_HEADS) * D, DIM), (DIM, DIM), (2 * FFN, DIM), (DIM, FFN)):
            usual, onednn, back, ours = training_products(2048, shape)
            print(f"fp32 linear layer {shape[1]:4d} -> {shape[0]:4d}, 2048 rows: forward F.linear {usual:6.0f}, oneDNN {onednn:6.0f}: {usual / onednn:.2f}; "
                  f"gradient of the input torch {back:6.0f}, ours {ours:6.0f}: {back / ours:.2f}", flush=True)
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            for batch, span in ((1, 128), (1, 512), (1, 1024), (4, 128), (4, 512), (16, 128), (64, 128), (64, 320)):
                fused, ours = decode_attention(dtype, batch, span)
                print(f"{name} decode attention, {batch:2d} rows x {span}: fused {fused:7.0f}, products {ours:7.0f}: {fused / ours:.2f}", flush=True)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for lengths in ([64] * 16, [128] * 16, [180, 140, 234, 120, 110, 109], [512, 400]):
            fused, in_fp32, ours = training_attention(dtype, lengths)
            print(f"{name} attention forward and backward, {len(lengths)} rows of {min(lengths)} to {max(lengths)}: fused {fused:6.0f}, "
                  f"fused in fp32 {in_fp32:6.0f}, ours {ours:6.0f}: {min(fused, in_fp32) / ours:.2f}", flush=True)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        x, weight, grad = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2848, DIM), (DIM,), (2848, DIM)))
        same(F.rms_norm(x, (DIM,), weight, 1e-5).detach(), _RMSNorm.apply(x, weight, 1e-5).detach())
        usual = best(lambda: F.rms_norm(x, (DIM,), weight, 1e-5).backward(grad))
        ours = best(lambda: _RMSNorm.apply(x, weight, 1e-5).backward(grad))
        print(f"{name} RMSNorm forward and backward, 2848 rows: torch {usual:6.0f}, ours {ours:6.0f}: {usual / ours:.2f}", flush=True)
    with torch.inference_mode():
        for batch in (1, 16, 64):
            usual, ours = nucleus(batch, 0.9)
            print(f"nucleus of {batch:2d} rows of {VOCAB} logits: by sorting {usual:7.0f}, ours {ours:6.0f}: {usual / ours:.2f}", flush=True)
    groups.shutdown()


if __name__ == "__main__":
    main()
