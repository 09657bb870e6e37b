"""The decoder, told once: embedding -> blocks (attention, feed-forward) -> norm -> hidden states. Heads are added below it.

Tokens of all rows travel as one packed axis T without padding; only attention and rotary positions know the rows
(`Rows`). A row is one sequence. Native (Meta's) weight names and interleaved rotary order, in memory and on disk.
Families differ by switches of ModelConfig, never by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from llama_rlhf.config import ModelConfig
from llama_rlhf.models.attention import Rows, Take, packed_attention
from llama_rlhf.models.kv_cache import KVCache
from llama_rlhf.models.moe import MixtureOfExperts
from llama_rlhf.parallel import groups
from llama_rlhf.parallel.layers import ColumnParallelLinear, Lora, RowParallelLinear, VocabParallelEmbedding
from llama_rlhf.parallel.partition import Partition
from llama_rlhf.parallel.regions import gather_same


@dataclass
class Places:
    """What one forward pass knows about positions; attention applies what is there.

    turn: rotary table.  query_scale: [T, 1, 1] log-n factors.
    slopes: [H] ALiBi slopes of this rank's heads; bias: [H, longest row, longest row] what they add to the scores, causality
    included (None while decoding: the cache knows the keys).
    split: all tokens of the pass, where the ranks hold parts of them outside attention and feed-forward; None: everybody holds all.
    """

    turn: torch.Tensor | None = None
    query_scale: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    split: int | None = None


# numbers that a CPU normalises, or turns, at a time: their fp32 copies fit its cache
_NORM_CELLS, _ROTARY_CELLS = 600_000, 200_000
_KEPT_BYTES = 12 << 20      # the largest freed blocks that a CPU keeps where memory counts most; the holes between larger ones cannot all be used again


def _row_blocks(x: torch.Tensor, cells: int) -> list[slice]:
    """Rows of x in blocks of about so many numbers."""
    rows = max(1, cells * len(x) // max(1, x.numel()))
    return [slice(start, start + rows) for start in range(0, len(x), rows)]


def _normalised(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x / rms(x) * weight, x [..., d], and 1 / rms(x): both in fp32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsub(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_(), eps, alpha=-1 / x.shape[-1]).rsqrt_()      # eps + mean of squares
    return (wide * scale if wide is x else wide.mul_(scale)).mul_(weight), scale


class _RMSNorm(torch.autograd.Function):
    """`_normalised`, by blocks of rows that fit a CPU's cache: torch's composite form walks over fp32 copies of x a dozen times.

    With n = x / rms(x): dx = (g w - n mean(g w n)) / rms(x), dw = sum of g n over rows. LayerNorm's kernel, told that the mean is 0, gives that
    less mean(g w) / rms(x). Its own dw is summed in the dtype of x: not good enough in bf16.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        y, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.promote_types(x.dtype, torch.float32))
        for at in _row_blocks(x, _NORM_CELLS):
            y[at], scale[at] = _normalised(x[at], weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        d, trains, bf16 = x.shape[-1], ctx.needs_input_grad[1], x.dtype == torch.bfloat16
        g, rows, scale = grad.reshape(-1, d), x.reshape(-1, d), scale.view(-1, 1)
        if not bf16:            # fp16 has not bf16's range
            g, rows, weight = (t.to(scale.dtype) for t in (g, rows, weight))
        dx, dw, _ = torch.ops.aten.native_layer_norm_backward(g, rows, [d], torch.zeros_like(scale), scale, weight.to(scale.dtype), None, [True, trains and not bf16, False])
        dx.add_((g @ weight[:, None]) * (scale / d).to(g.dtype))
        if bf16 and trains:
            dw = (scale.t().to(g.dtype) @ (g * rows)).view(d)
        return dx.view(x.shape).to(x.dtype), dw.to(x.dtype) if trains else None, None


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean of squares in fp32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, partial: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"))
        self.eps = eps
        self.partial: tuple[str, ...] = ("weight",) if partial else ()    # used on this rank's heads only: its gradient is a part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        if torch.is_grad_enabled() or x.numel() > _NORM_CELLS:
            return _RMSNorm.apply(x, self.weight, self.eps)
        return _normalised(x, self.weight, self.eps)[0].to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / deviation * weight + bias (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"))
        self.bias = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"))
        self.eps = eps
        self.partial: tuple[str, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}


def rotary_frequencies(config: ModelConfig, device=None) -> torch.Tensor:
    """[head_dim/2] fp32 angles per position, with the config's scaling (Su et al. 2021, arXiv:2104.09864)."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequency = config.rope_theta ** -exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    # llama3: long wavelengths are stretched, short ones kept, those between blended
    wavelength = 2 * math.pi / frequency
    original, low, high = (scaling[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequency / scaling["factor"] + blend * frequency


def rotary_table(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """positions [T] -> [T, 1, head_dim/2] complex64: the turn of each interleaved pair. fp32 whatever the model's dtype, as Meta's code.

    frequencies: [head_dim/2], or [T, head_dim/2] when rows differ.
    """
    angle = positions.to(torch.float32)[:, None] * frequencies
    return torch.polar(torch.ones_like(angle), angle)[:, None]


def apply_rotary(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (0,1), (2,3), ... of each head, in fp32. x: [T, H, D]; turn: see rotary_table."""
    return _Rotary.apply(x, turn) if torch.is_grad_enabled() else _turned_by_blocks(x, turn)


def _turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2)


def _turned_by_blocks(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """`_turned` in the dtype of x. On a CPU by blocks of rows whose fp32 copies fit its cache."""
    if x.is_cuda or x.numel() <= _ROTARY_CELLS:
        return _turned(x, turn).to(x.dtype)
    y = torch.empty_like(x)
    for at in _row_blocks(x, _ROTARY_CELLS):
        y[at] = _turned(x[at], turn[at])
    return y


def _turned_by_reals(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """The same, as torch.compile makes one kernel of it: it does not take complex numbers. turn: [T, 1, head_dim/2, 2]"""
    pairs, (cos, sin) = x.float().unflatten(-1, (-1, 2)), turn[..., None, :].unbind(-1)
    sign = torch.arange(-1, 2, 2, device=x.device)
    return (pairs * cos + pairs.flip(-1) * (sin * sign)).flatten(-2).to(x.dtype)


class _Rotary(torch.autograd.Function):
    """`apply_rotary`, whose backward turns back."""

    @staticmethod
    def forward(ctx, x, turn):
        ctx.save_for_backward(turn)
        return _turned_by_blocks(x, turn)

    @staticmethod
    def backward(ctx, grad):
        turn, = ctx.saved_tensors
        return _turned_by_blocks(grad, turn.conj()), None


def ntk_stretch(length: int, trained: int) -> float:
    """First-generation Qwen's dynamic NTK factor of the rotary base for a row of `length` tokens: 1 up to the trained length."""
    return max(2.0 ** math.ceil(math.log2(length / trained) + 1) - 1, 1.0)


def stretched_frequencies(frequencies: torch.Tensor, stretch: torch.Tensor) -> torch.Tensor:
    """The frequencies of rotary bases theta * stretch^(d / (d - 2)): [d/2], [T] -> [T, d/2]."""
    d = 2 * len(frequencies)
    exponent = torch.arange(0, d, 2, dtype=torch.float32, device=frequencies.device) / (d - 2)
    return frequencies * stretch[:, None] ** -exponent


def alibi_slopes(n_heads: int, device=None) -> torch.Tensor:
    """[n_heads] slopes of ALiBi (Press et al. 2022, arXiv:2108.12409): powers of 2^(-8/n); heads beyond a power of two take
    the odd powers of the next finer sequence."""
    whole = 1 << (n_heads.bit_length() - 1)
    exponents = [8 * (i + 1) / whole for i in range(whole)] + [4 * (2 * i + 1) / whole for i in range(n_heads - whole)]
    return torch.tensor([2.0 ** -e for e in exponents], dtype=torch.float32, device=device)


def alibi_bias(slopes: torch.Tensor, n: int, dtype: torch.dtype) -> torch.Tensor:
    """[H, n, n]: slope * key position where the key is not later than the query, -inf elsewhere.

    No query position: softmax ignores a constant per query. fp32 product, then dtype, as BLOOM was trained.
    """
    key = torch.arange(n, device=slopes.device)
    return torch.where(key <= key[:, None], (slopes[:, None, None] * key).to(dtype), -torch.inf)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, partition: Partition, lora: Lora | None, dtype: torch.dtype, layer: int):
        super().__init__()
        d, rank = config.head_dim, groups.tp_rank()
        self.wqkv = ColumnParallelLinear(
            config.dim, [("wq", "q", config.n_heads * d), ("wk", "kv", config.n_kv_heads * d), ("wv", "kv", config.n_kv_heads * d)],
            partition, bias=config.qkv_bias, lora=lora, dtype=dtype)
        self.wo = RowParallelLinear("wo", "q", config.dim, partition, bias=config.linear_bias, lora=lora, dtype=dtype)
        self.q_norm = RMSNorm(d, config.norm_eps, dtype, partial=True) if config.qk_norm else None
        self.k_norm = RMSNorm(d, config.norm_eps, dtype, partial=True) if config.qk_norm else None
        self.head_dim, self.window = d, config.sliding_window if layer >= config.window_first_layer else None
        self.n_heads = partition.heads[rank][1] - partition.heads[rank][0]
        self.n_kv_heads = partition.kv_heads[rank][1] - partition.kv_heads[rank][0]
        mapping = partition.kv_of_query(rank)
        uniform = not self.n_heads or self.n_heads % self.n_kv_heads == 0 and \
            mapping == [h // (self.n_heads // self.n_kv_heads) for h in range(self.n_heads)]
        self.kv_of_query = None if uniform else mapping
        self._kv_of_query: torch.Tensor | None = None
        self.n_cache_heads = self.n_kv_heads if uniform else self.n_heads
        self.compiled_turn: Callable | None = None

    def forward(self, x: torch.Tensor, rows: Rows, places: Places, cache: KVCache | None, layer: int, at: torch.Tensor | None = None) -> torch.Tensor:
        """x: [T, dim] -> [T, dim], or of the tokens `at` only. With a cache: `rows` either starts at position 0 (prefill) or is one token each (decode)."""
        qkv = self.wqkv(x, places.split).unflatten(-1, (self.n_heads + 2 * self.n_kv_heads, self.head_dim))   # [T, H + 2 Hkv, D]
        if places.turn is None:
            q, k, v = qkv.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], 1)
        elif self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], 1)
            q, k = self._turn(self.q_norm(q), places.turn), self._turn(self.k_norm(k), places.turn)
        else:
            qk, v = qkv.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], 1)
            q, k = self._turn(qk, places.turn).split([self.n_heads, self.n_kv_heads], 1)
        if places.query_scale is not None:
            q = q * places.query_scale
        if not self.n_heads:                # more ranks than heads: nothing to attend to, but backward must still come through here
            return self.wo(_chosen((q + k + v).flatten(1), at), places.split)
        mapping = self._mapping(x.device)
        if cache is None:
            out = packed_attention(q, k, v, rows, mapping, self.window, places.bias)
        else:
            if mapping is not None:         # uneven heads: the cache keeps one kv head per query head, copied once, here
                k, v, mapping = k[:, mapping], v[:, mapping], None
            if cache.decoding:
                out = cache.attend(layer, q, k, v, self.window, places.slopes)
            else:
                out = cache.prefill(layer, q, k, v, rows, self.window, places.bias)
        return self.wo(_chosen(out.flatten(1), at), places.split)

    def _turn(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        if self.compiled_turn is not None and torch.is_grad_enabled():
            return self.compiled_turn(x, torch.view_as_real(turn))
        return apply_rotary(x, turn)

    def _mapping(self, device: torch.device) -> torch.Tensor | None:
        if self.kv_of_query is not None and (self._kv_of_query is None or self._kv_of_query.device != device):
            with torch.inference_mode(False):       # training uses it too
                self._kv_of_query = torch.tensor(self.kv_of_query, device=device)
        return self._kv_of_query


def _chosen(x: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
    return x if at is None else Take.apply(x, at)


def _gated(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x = [gate, up]: [T, 2 f] -> [T, f]"""
    gate, up = x.chunk(2, -1)
    return F.silu(gate).mul_(up)


class _Gated(torch.autograd.Function):
    """`_gated`, of which only x is kept for backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _gated(x)

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        dx = torch.empty_like(x)
        (gate, up), (d_gate, d_up) = x.chunk(2, -1), dx.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        return dx


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, partition: Partition, lora: Lora | None, dtype: torch.dtype):
        super().__init__()
        self.w13 = ColumnParallelLinear(config.dim, [("w1", "ffn", config.ffn_dim), ("w3", "ffn", config.ffn_dim)],
                                        partition, bias=config.linear_bias, lora=lora, dtype=dtype)
        self.w2 = RowParallelLinear("w2", "ffn", config.dim, partition, bias=config.linear_bias, lora=lora, dtype=dtype)
        self.compiled_gate: Callable | None = None

    def forward(self, x: torch.Tensor, n_tokens: int | None = None) -> torch.Tensor:
        gated = (self.compiled_gate or _Gated.apply) if torch.is_grad_enabled() else _gated
        return self.w2(gated(self.w13(x, n_tokens)), n_tokens)


class GeluMLP(nn.Module):
    """w2(gelu(w1 x)), the tanh form of gelu."""

    def __init__(self, config: ModelConfig, partition: Partition, lora: Lora | None, dtype: torch.dtype):
        super().__init__()
        self.w1 = ColumnParallelLinear(config.dim, [("w1", "ffn", config.ffn_dim)], partition, bias=config.linear_bias,
                                       lora=lora, dtype=dtype)
        self.w2 = RowParallelLinear("w2", "ffn", config.dim, partition, bias=config.linear_bias, lora=lora, dtype=dtype)

    def forward(self, x: torch.Tensor, n_tokens: int | None = None) -> torch.Tensor:
        return self.w2(F.gelu(self.w1(x, n_tokens), approximate="tanh"), n_tokens)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, partition: Partition, lora: Lora | None, dtype: torch.dtype, layer: int):
        super().__init__()
        norm = NORMS[config.norm]
        self.attention_norm = norm(config.dim, config.norm_eps, dtype)
        self.attention = Attention(config, partition, lora, dtype, layer)
        self.ffn_norm = norm(config.dim, config.norm_eps, dtype)
        self.feed_forward: nn.Module = MixtureOfExperts(config, partition, dtype) if config.n_experts else \
            {"swiglu": SwiGLU, "gelu": GeluMLP}[config.mlp](config, partition, lora, dtype)
        self.recompute_mlp = False

    def forward(self, x, rows, places, cache, layer, at=None):
        """at: the tokens that something is asked of behind this block: all see each other, but only these go on."""
        x = _chosen(x, at) + self.attention(self.attention_norm(x), rows, places, cache, layer, at)
        if not torch.is_grad_enabled():
            return x + self._mlp(x, places.split)
        return x + (_recomputed(self._mlp, x, places.split) if self.recompute_mlp else self._mlp(x, places.split))

    def _mlp(self, x, n_tokens):
        return self.feed_forward(self.ffn_norm(x), n_tokens)


class _Recomputed(torch.autograd.Function):
    """function(x, *args), of which backward keeps x alone and computes the rest again.

    Its graph is that of one node. torch's checkpoint keeps the nodes of everything inside; on a CPU these small lasting blocks came to lie between
    the large passing ones, whose holes malloc then could not use for the next: as much again as the plan.
    """

    @staticmethod
    def forward(ctx, anchor, function, x, *args):
        ctx.save_for_backward(x)
        ctx.function, ctx.args = function, args
        return function(x, *args)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[2])
        with torch.enable_grad():
            y = ctx.function(x, *ctx.args)
        if y.requires_grad:
            torch.autograd.backward(y, grad)
        return None, None, x.grad, *(None for _ in ctx.args)


def _recomputed(function, x, *args):
    return _Recomputed.apply(x.new_empty(0).requires_grad_(), function, x, *args)      # what is trained is inside, not among the arguments


def recompute_period(what: str) -> int:
    """Of the blocks that backward computes again: all, 1; "k", every k-th; none, or mlp (every block's feed-forward instead), 0."""
    if what not in ("none", "all", "mlp") and not (what.isdecimal() and int(what)):
        raise ValueError(f"--activation_checkpointing {what!r}: use none, all, mlp, or a number k for every k-th block")
    return int(what) if what.isdecimal() else int(what == "all")


class Transformer(nn.Module):
    """Token ids [T] -> hidden states [T, dim] after the final norm. Built empty (meta); see checkpoint.shards.load_model."""

    def __init__(self, config: ModelConfig, *, lora: Lora | None = None, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.lora, self.dtype = config, lora, dtype
        self.partition = Partition(config, groups.tp_size())
        self.tok_embeddings = VocabParallelEmbedding("tok_embeddings", config.vocab_size, config.dim, self.partition, dtype=dtype)
        self.tok_norm = NORMS[config.norm](config.dim, config.norm_eps, dtype) if config.embedding_norm else None
        self.layers = nn.ModuleList(Block(config, self.partition, lora, dtype, i) for i in range(config.n_layers))
        self.norm = NORMS[config.norm](config.dim, config.norm_eps, dtype)
        self.recompute_every = 0            # blocks 0, k, 2k, ... are; see `recompute`
        self.splits_tokens = False          # see `sequence_parallel`
        self._constants: torch.Tensor | None = None     # rotary frequencies or ALiBi slopes; never cast with the model: precision

    def forward(self, tokens: torch.Tensor, rows: Rows, cache: KVCache | None = None, at: torch.Tensor | None = None) -> torch.Tensor:
        """tokens: [T] ids of all rows, packed; rows: where each begins; cache: see kv_cache.KVCache.
        at: [N] the places on the packed axis, without repetitions, whose states are asked for; default: all. The last block leaves the others out.

        Training, scoring and generating are the same function, `train()` and `eval()` change nothing: also of models that
        re-scale positions beyond their training length.
        """
        if cache is None:       # neighbours of similar length attend together
            rows, order = rows.by_length()
            if order is not None:
                tokens, back = tokens[order], order.argsort()
                at = back if at is None else back[at]
        places = self._places(rows, cache)
        places.split = len(tokens) if self.splits_tokens and cache is None else None
        x = self.tok_embeddings(tokens, places.split)
        if self.tok_norm is not None:
            x = self.tok_norm(x)
        for i, block in enumerate(self.layers):
            # where tokens are divided among ranks all of them go on to the end
            goes_on = at if i + 1 == len(self.layers) and places.split is None else None
            if self.recompute_every and i % self.recompute_every == 0 and torch.is_grad_enabled():
                x = _recomputed(block, x, rows, places, None, i, goes_on)
            else:
                x = block(x, rows, places, cache, i, goes_on)
        x = self.norm(x)
        return x if places.split is None else _chosen(gather_same(x, places.split), at)

    def recompute(self, what: str) -> None:
        """What backward computes again instead of keeping it: see `recompute_period`."""
        self.recompute_every = recompute_period(what)
        for block in self.blocks:
            block.recompute_mlp = what == "mlp"
        if self.recomputes:
            groups.keep_freed_memory(up_to=_KEPT_BYTES)

    @property
    def recomputes(self) -> bool:
        return self.recompute_every > 0 or self.blocks[0].recompute_mlp

    def compile_elementwise(self, backend: str = "inductor") -> None:
        """Training passes go through torch.compile where a GPU would launch several kernels for what one can do: rotary positions and gates. One program
        serves all blocks and lengths. (Whole blocks: of our LoRA, torch 2.11 made wrong gradients without a word, and collectives cannot be traced.)"""
        turn, gate = (torch.compile(function, dynamic=True, backend=backend) for function in (_turned_by_reals, _gated))
        for block in self.blocks:
            block.attention.compiled_turn = turn
            if isinstance(block.feed_forward, SwiGLU):
                block.feed_forward.compiled_gate = gate

    def sequence_parallel(self, on: bool = True) -> None:
        """Outside attention and feed-forward each tensor-parallel rank holds its part of the tokens only: norms, residuals, and what backward
        keeps of them (see parallel.regions). Generation stays as it is. Call before a Trainer is made: more gradients are sums over ranks."""
        self.splits_tokens = on and groups.tp_size() > 1
        for module in self.modules() if self.splits_tokens else ():
            if isinstance(module, (RMSNorm, LayerNorm)):
                module.partial = tuple(module._parameters)
            elif isinstance(module, RowParallelLinear) and module.bias is not None:
                module.layout["bias"] = tuple(replace(piece, partial=True) for piece in module.layout["bias"])

    def _places(self, rows: Rows, cache: KVCache | None) -> Places:
        config, device = self.config, rows.positions.device
        if self._constants is None or self._constants.device != device:
            self._constants = rotary_frequencies(config, device) if config.positions == "rotary" else \
                alibi_slopes(config.n_heads, device)[slice(*self.partition.heads[groups.tp_rank()])]
        if config.positions == "alibi":
            decoding = cache is not None and cache.decoding
            return Places(slopes=self._constants,
                          bias=None if decoding else alibi_bias(self._constants, rows.behind + max(rows.lengths), self.dtype))
        frequencies, query_scale = self._constants, None
        if config.ntk_beyond is not None:
            frequencies = self._stretched(frequencies, rows, cache, config.ntk_beyond)
        if config.logn_beyond is not None:
            factor = (rows.positions + 1).float().log() / math.log(config.logn_beyond)
            query_scale = factor.clamp(min=1)[:, None, None].to(self.dtype)
        return Places(rotary_table(rows.positions, frequencies), query_scale=query_scale)

    @staticmethod
    def _stretched(frequencies: torch.Tensor, rows: Rows, cache: KVCache | None, trained: int) -> torch.Tensor:
        """Dynamic NTK: each row's stretch is chosen from the length of its prompt, and kept while it grows.

        A row that comes whole, prompt and response, gets the stretch it was generated with: its log-probabilities are the sampler's.
        """
        if cache is not None and cache.decoding:
            assert cache.stretch is not None
            return stretched_frequencies(frequencies, cache.stretch[:len(rows.lengths)])
        device = rows.positions.device
        stretch = torch.tensor([ntk_stretch(n, trained) for n in rows.prompts or rows.lengths], device=device)
        if cache is not None:
            if cache.stretch is None:
                cache.stretch = torch.ones(cache.n_slots, device=device)
            cache.stretch[cache.slots] = stretch
        return stretched_frequencies(frequencies, stretch.repeat_interleave(torch.tensor(rows.lengths, device=device), output_size=sum(rows.lengths)))

    def new_cache(self, n_slots: int, max_len: int) -> KVCache:
        """An empty key/value cache for n_slots rows of up to max_len tokens, in the model's dtype."""
        return KVCache(self.config.n_layers, n_slots, self.n_cache_heads, max_len, self.config.head_dim, dtype=self.dtype,
                       device=groups.device())

    def cache_bytes(self, n_slots: int, max_len: int) -> int:
        """Of a full `new_cache`."""
        return 2 * self.config.n_layers * n_slots * self.n_cache_heads * max_len * self.config.head_dim * self.dtype.itemsize

    @property
    def blocks(self) -> list[Block]:
        """`layers`, as what they are."""
        return [block for block in self.layers if isinstance(block, Block)]

    @property
    def n_cache_heads(self) -> int:
        return self.blocks[0].attention.n_cache_heads

    @property
    def vocab_start(self) -> int:
        return self.tok_embeddings.start


class CausalLM(Transformer):
    """The decoder with its language-model head: this rank's rows of the vocabulary (the embedding itself when tied)."""

    def __init__(self, config: ModelConfig, *, lora: Lora | None = None, dtype: torch.dtype = torch.float32):
        super().__init__(config, lora=lora, dtype=dtype)
        self.output = None if config.tie_embeddings else ColumnParallelLinear(
            config.dim, [("output", "vocab", config.vocab_size)], self.partition, dtype=dtype)

    @property
    def head_weight(self) -> torch.Tensor:
        """[this rank's vocabulary rows, dim]"""
        return self.tok_embeddings.weight if self.output is None else self.output.weight


class ValueModel(Transformer):
    """The decoder with a scalar head, in fp32: reward model, critic, verifier. Replicated, its gradient is complete."""

    def __init__(self, config: ModelConfig, *, lora: Lora | None = None, dtype: torch.dtype = torch.float32):
        super().__init__(config, lora=lora, dtype=dtype)
        self.value_head = ScalarHead(config.dim)
        self.score: dict | None = None      # of a trained reward model: see reward.py

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [.., dim] -> [..] fp32"""
        return self.value_head(hidden)


class ScalarHead(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, dim, dtype=torch.float32, device="meta"))
        self.bias = nn.Parameter(torch.empty(1, dtype=torch.float32, device="meta"))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden.float(), self.weight, self.bias)[..., 0]
