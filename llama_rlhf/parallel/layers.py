"""Column- and row-parallel linear layers and the vocabulary-parallel embedding, with LoRA inside.

Fused in memory, separate on disk: one rank's q, k and v rows (gate and up rows) stand in one matrix, so a block enters the
parallel region twice and leaves it twice: two all-reduces forward, two backward. Each module's `layout` says, for every
parameter, which native (on-disk) tensors it holds and where; loading, saving, gradient sums and norms read nothing else.

All layers are built on the meta device and hold only this rank's part: no full weight is ever allocated.
"""

from __future__ import annotations

import contextlib
import math
import platform
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llama_rlhf.parallel import groups
from llama_rlhf.parallel.partition import Partition, Range
from llama_rlhf.parallel.regions import all_gather_tokens, all_reduce_, copy_to_tp, reduce_from_tp, reduce_scatter_tokens, scatter_from_tp


@dataclass(frozen=True)
class Piece:
    """One native tensor inside a parameter of this rank.

    name: native name relative to the module's parent ("wq.weight").
    rows: where it lies in dimension 0 of the parameter. (Experts stand one below the other, each a few pieces.)
    shape: of the full tensor.  dim: the dimension that is cut, None when every rank holds all of it.
    held, owned: this rank's range of `dim` in memory, and the part of it that this rank saves and counts.
    kind: the unit of the cut (see Partition), None when replicated.
    partial: replicated, but each rank's gradient is only its own part: sum it over ranks before use.
    shared: cut, but some of its rows live on several ranks (kv heads): their gradients must be summed over the holders.
    """

    name: str
    rows: Range
    shape: tuple[int, ...]
    dim: int | None = None
    held: Range = (0, 0)
    owned: Range = (0, 0)
    kind: str | None = None
    partial: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): y += alpha/rank * B(Ax). B starts at zero."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def lora_of(rank: int, alpha: float) -> Lora | None:
    """What --lora_rank and --lora_alpha ask for; None: all weights are trained."""
    if rank == 0 or rank < -1:
        raise ValueError(f"--lora_rank {rank}: use -1 to train all weights, or a rank such as 16")
    if rank > 0 and not 0 < alpha < math.inf:
        raise ValueError(f"--lora_alpha {alpha:g} must be more than 0: adapters are scaled by lora_alpha / lora_rank")
    return Lora(rank, alpha) if rank > 0 else None


def replicated(name: str, shape: tuple[int, ...], rows: Range | None = None, partial: bool = False) -> Piece:
    return Piece(name, rows or (0, shape[0]), tuple(shape), partial=partial)


_grouped_mm: Any = getattr(F, "grouped_mm", None)       # older torch has none
_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias. x: [T, in]; weight: [out, in], or what `held` made of it (no gradient then)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "") if weight.is_mkldnn else F.linear(x, weight, bias)


def _by_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and x.numel() > 0 and _is_packed(weight)


def product_back(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dy W, the gradient of x in x W^T. dy: [T, out], contiguous.

    In fp32 on a CPU by oneDNN: torch's usual product (MKL) is slower (benchmarks/kernels.py), but rounds less, so it is kept forward.
    """
    return torch.ops.mkldnn._linear_pointwise(dy, weight.t(), None, "none", [], "") if _by_onednn(dy, weight) else dy @ weight


class _Linear(torch.autograd.Function):
    """F.linear with `product_back`."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy, needs = dy.contiguous(), ctx.needs_input_grad
        return product_back(dy, weight) if needs[0] else None, dy.t() @ x if needs[1] else None, dy.sum(0) if needs[2] else None


class _AdaptedLinear(torch.autograd.Function):
    """y = x W^T + bias + x A^T B^T for a frozen W: the adapter is added inside the products (no [T, out] temporaries), and its
    two factors are applied in the dtype of x. Several projections side by side: A stacked [n r, in], B block-diagonal [out, n r].
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b):
        y, u = F.linear(x, weight, bias), F.linear(x, a)
        y.addmm_(u, b.t())
        ctx.save_for_backward(x, weight, a, b, u)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b, u = ctx.saved_tensors
        dy = dy.contiguous()
        du = dy @ b
        dx = product_back(dy, weight).addmm_(du, a) if ctx.needs_input_grad[0] else None
        return dx, None, None, du.t() @ x, (u.t() @ dy).t()


class _SplitLinear(torch.autograd.Function):
    """_AdaptedLinear, or a plain linear layer, of an x that is divided among the ranks by tokens: [ceil(n / tp), in] -> [n, out].

    Only this rank's rows are kept; backward gathers the others again, where weights or factors need them.
    """

    @staticmethod
    def forward(ctx, x, n, weight, bias, a, b):
        ctx.save_for_backward(x, weight, a, b)
        ctx.n = n
        whole = all_gather_tokens(x, n)
        y = F.linear(whole, weight, bias)
        return y if a is None else y.addmm_(F.linear(whole, a), b.t())

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b = ctx.saved_tensors
        dy, needs = dy.contiguous(), ctx.needs_input_grad
        du = None if a is None else dy @ b
        dx = None
        if needs[0]:
            dx = product_back(dy, weight)
            dx = reduce_scatter_tokens(dx if du is None else dx.addmm_(du, a))
        d_weight = d_a = d_b = None
        if needs[2] or du is not None:
            whole = all_gather_tokens(x, ctx.n)
            d_weight = dy.t() @ whole if needs[2] else None
            if du is not None:
                d_a, d_b = du.t() @ whole, dy.t() @ F.linear(whole, a)
        return dx, None, d_weight, dy.sum(0) if needs[3] else None, d_a, d_b


class ParallelLinear(nn.Module):
    """What the two kinds of linear layer below have in common. held: the copy of the weight that generation multiplies by."""

    layout: dict[str, tuple[Piece, ...]]
    weight: nn.Parameter
    bias: nn.Parameter | None
    lora: Lora | None
    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None
    sizes: list[int]            # how the rows of B divide among the projections
    held: torch.Tensor | None


def _factors(module: ParallelLinear, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a module as _AdaptedLinear takes them."""
    assert module.lora is not None and module.lora_a is not None and module.lora_b is not None
    b = (module.lora_b * module.lora.scale).to(dtype)
    return module.lora_a.to(dtype), torch.block_diag(*b.split(module.sizes)) if len(module.sizes) > 1 else b


def _multiply(module: ParallelLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [T, in] -> [T, out]: this rank's part of a linear layer, its adapter included."""
    if module.held is not None:
        return product(x, module.held, bias)
    if module.lora_a is not None:
        return _AdaptedLinear.apply(x, module.weight, bias, *_factors(module, x.dtype))
    return _Linear.apply(x, module.weight, bias) if _by_onednn(x, module.weight) else F.linear(x, module.weight, bias)


def _is_packed(weight: torch.Tensor) -> bool:
    return _ONEDNN and not weight.is_cuda and weight.numel() > 0


def held(weight: torch.Tensor, n_rows: int) -> torch.Tensor:
    """A frozen weight as `product` multiplies it fastest by n_rows rows: on a CPU a copy in oneDNN's own layout.

    For generation only: fp32 sums come out with twice the rounding error of torch's usual ones (still 1e-6 of the terms summed).
    """
    if not _is_packed(weight):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), n_rows)


def _copied(model: nn.Module) -> list[ParallelLinear]:
    """The linear layers of the blocks that get a copy; the head is the caller's, who multiplies by it."""
    return [module for module in model.get_submodule("layers").modules()
            if isinstance(module, ParallelLinear) and (module.lora_a is not None or _is_packed(module.weight))]


def bytes_held(model: nn.Module, head: torch.Tensor) -> int:
    """Of the copies that `weights_held` and `held(head)` make."""
    return sum(module.weight.nbytes for module in _copied(model)) + (head.nbytes if _is_packed(head) else 0)


@contextlib.contextmanager
def weights_held(model: nn.Module, n_rows: int):
    """Inside, no weight changes (generation): every linear layer multiplies by a copy prepared once, its adapter merged into it.

    n_rows: of the usual product. Where memory is short nothing is copied.
    """
    copied = _copied(model)
    short = float(sum(module.weight.nbytes for module in copied) > groups.free_memory() / 2)
    if groups.tp_size() > 1:        # all or none: a merged adapter rounds otherwise
        short = float(all_reduce_(torch.tensor([short], device=groups.device()), "max"))
    if short:
        copied = []
    for module in copied:
        weight: torch.Tensor = module.weight
        if module.lora_a is not None:
            a, b = _factors(module, torch.float32)
            weight = torch.addmm(weight.detach().float(), b, a).to(weight.dtype)
        module.held = held(weight, n_rows)
    try:
        yield
    finally:
        for module in copied:
            module.held = None


class ColumnParallelLinear(ParallelLinear):
    """[.., in] replicated -> [.., sum of this rank's rows]. Several projections of the same input, cut on the output.

    parts: (native name, kind of cut, full output size) for each projection; biases and adapters are cut alike.
    """

    def __init__(self, in_features: int, parts: list[tuple[str, str, int]], partition: Partition, *, bias: bool = False,
                 lora: Lora | None = None, dtype: torch.dtype):
        super().__init__()
        r = groups.tp_rank()
        self.layout = {}
        self.sizes = [partition.held[kind][r][1] - partition.held[kind][r][0] for _, kind, _ in parts]
        offsets = [sum(self.sizes[:i]) for i in range(len(parts) + 1)]

        def pieces(suffix: str, tail: tuple[int, ...]) -> tuple[Piece, ...]:
            return tuple(Piece(f"{name}.{suffix}", (offsets[i], offsets[i + 1]), (full, *tail), 0,
                               partition.held[kind][r], partition.owned[kind][r], kind,
                               shared=kind == "kv" and partition.kv_shared)
                         for i, (name, kind, full) in enumerate(parts))

        out = offsets[-1]
        self.weight = nn.Parameter(torch.empty(out, in_features, dtype=dtype, device="meta"))
        self.layout["weight"] = pieces("weight", (in_features,))
        self.bias = self.lora_a = self.lora_b = self.held = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out, dtype=dtype, device="meta"))
            self.layout["bias"] = pieces("bias", ())
        self.lora = lora
        if lora:
            # the A matrices of all parts are stacked: one matrix product reads x once for all of them.
            # A is replicated, but only this rank's rows of B send gradient into it: partial
            self.lora_a = nn.Parameter(torch.empty(lora.rank * len(parts), in_features, dtype=torch.float32, device="meta"))
            self.lora_b = nn.Parameter(torch.empty(out, lora.rank, dtype=torch.float32, device="meta"))
            self.layout["lora_a"] = tuple(
                replicated(f"{name}.lora_a", (lora.rank, in_features), (i * lora.rank, (i + 1) * lora.rank), partial=True)
                for i, (name, _, _) in enumerate(parts))
            self.layout["lora_b"] = pieces("lora_b", (lora.rank,))

    def forward(self, x: torch.Tensor, n_tokens: int | None = None) -> torch.Tensor:
        """n_tokens: x holds this rank's rows of so many (see regions); the result has all."""
        if n_tokens is None:
            return _multiply(self, copy_to_tp(x), self.bias)
        return _SplitLinear.apply(x, n_tokens, self.weight, self.bias, *((None, None) if self.lora_a is None else _factors(self, x.dtype)))


class RowParallelLinear(ParallelLinear):
    """[.., this rank's part of the input] -> [.., out] replicated: cut on the input, one all-reduce, adapter included.

    The bias is replicated and added once, after the reduce: its gradient is complete on every rank.
    """

    def __init__(self, name: str, kind: str, out_features: int, partition: Partition, *, bias: bool = False,
                 lora: Lora | None = None, dtype: torch.dtype):
        super().__init__()
        r = groups.tp_rank()
        held, owned, full = partition.held[kind][r], partition.owned[kind][r], partition.full[kind]
        in_local = held[1] - held[0]
        self.weight = nn.Parameter(torch.empty(out_features, in_local, dtype=dtype, device="meta"))
        self.layout = {"weight": (Piece(f"{name}.weight", (0, out_features), (out_features, full), 1, held, owned, kind),)}
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device="meta"))
            self.layout["bias"] = (replicated(f"{name}.bias", (out_features,)),)
        self.lora, self.lora_a, self.lora_b, self.held, self.sizes = lora, None, None, None, [out_features]
        if lora:
            # B is replicated and sees only this rank's Ax: its gradient is partial. Base and adapter share the one reduce
            self.lora_a = nn.Parameter(torch.empty(lora.rank, in_local, dtype=torch.float32, device="meta"))
            self.lora_b = nn.Parameter(torch.empty(out_features, lora.rank, dtype=torch.float32, device="meta"))
            self.layout["lora_a"] = (Piece(f"{name}.lora_a", (0, lora.rank), (lora.rank, full), 1, held, owned, kind),)
            self.layout["lora_b"] = (replicated(f"{name}.lora_b", (out_features, lora.rank), partial=True),)

    def forward(self, x: torch.Tensor, n_tokens: int | None = None) -> torch.Tensor:
        """n_tokens: the result shall have this rank's rows only, of so many."""
        y = _multiply(self, x, None)
        y = reduce_from_tp(y) if n_tokens is None else scatter_from_tp(y)
        return y if self.bias is None else y + self.bias


class ParallelExperts(nn.Module):
    """The SwiGLU experts of one layer: every rank holds its slice of every expert's width, so all ranks do equal work.

    w13: [experts, 2 * slice, dim], each expert's gate rows followed by its up rows.  w2: [experts, dim, slice]. Both are kept
    with the first two dimensions joined, so that an expert's native tensors are plain ranges of rows.
    Frozen while adapters are trained: adapters stand on attention and on dense feed-forwards only.
    """

    def __init__(self, n_experts: int, dim: int, ffn_dim: int, partition: Partition, *, dtype: torch.dtype):
        super().__init__()
        held = partition.held["ffn"][groups.tp_rank()]
        self.n_experts, self.dim, self.width = n_experts, dim, held[1] - held[0]
        self.w13 = nn.Parameter(torch.empty(n_experts * 2 * self.width, dim, dtype=dtype, device="meta"))
        self.w2 = nn.Parameter(torch.empty(n_experts * dim, self.width, dtype=dtype, device="meta"))

        def piece(name: str, first: int, rows: int, shape: tuple[int, int], cut: int) -> Piece:
            return Piece(name, (first, first + rows), shape, cut, held, held, "ffn")

        self.layout = {
            "w13": tuple(piece(f"experts.{e}.{w}.weight", (2 * e + i) * self.width, self.width, (ffn_dim, dim), 0)
                         for e in range(n_experts) for i, w in enumerate(("w1", "w3"))),
            "w2": tuple(piece(f"experts.{e}.w2.weight", e * dim, dim, (dim, ffn_dim), 1) for e in range(n_experts))}

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x: [T, dim]; chosen, weights: [T, k] experts of each token and their shares -> [T, dim] sum of their outputs, one reduce."""
        # each rank's experts give a part of the output, so the shares (and x) get a part of their gradient here: sum it
        x, weights = copy_to_tp(x), copy_to_tp(weights)
        n_tokens, k = chosen.shape
        experts, order = chosen.flatten().sort(stable=True)                 # tokens side by side, expert after expert
        out = self._grouped(x[order // k], experts)[order.argsort()].unflatten(0, (n_tokens, k))
        return reduce_from_tp((out * weights[..., None]).sum(1).to(x.dtype))    # summed in the dtype of the shares

    def _grouped(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """x: [N, dim]; experts: [N] that of each row, ascending."""
        w13 = self.w13.view(self.n_experts, 2 * self.width, self.dim)
        w2 = self.w2.view(self.n_experts, self.dim, self.width)
        if _has_grouped_mm(x, self.width):
            # counting them by bincount would wait for the device
            ends = torch.searchsorted(experts, torch.arange(self.n_experts, device=x.device), right=True, out_int32=True)
            gate, up = _grouped_mm(x, w13.mT, offs=ends).chunk(2, -1)
            return _grouped_mm(F.silu(gate) * up, w2.mT, offs=ends)
        out, counts = [], torch.bincount(experts, minlength=self.n_experts)
        # unbind once: indexing inside the loop would make backward build one full-size gradient per expert
        for rows, expert13, expert2 in zip(x.split(counts.tolist()), w13.unbind(), w2.unbind()):
            if len(rows):
                gate, up = F.linear(rows, expert13).chunk(2, -1)
                out.append(F.linear(F.silu(gate) * up, expert2))
        return torch.cat(out)


def _has_grouped_mm(x: torch.Tensor, width: int) -> bool:
    """Whether one kernel can multiply all experts: bf16 on Hopper or later, rows of 16 bytes."""
    return x.is_cuda and x.dtype == torch.bfloat16 and x.shape[-1] % 8 == 0 and width % 8 == 0 and width > 0 \
        and _grouped_mm is not None and torch.cuda.get_device_capability(x.device) >= (9, 0)


class VocabParallelEmbedding(nn.Module):
    """ids [..] -> [.., dim] replicated. Each rank holds a range of vocabulary rows; foreign ids give zero before the sum."""

    def __init__(self, name: str, config_vocab: int, dim: int, partition: Partition, *, dtype: torch.dtype):
        super().__init__()
        r = groups.tp_rank()
        self.start, self.stop = partition.held["vocab"][r]
        self.weight = nn.Parameter(torch.empty(self.stop - self.start, dim, dtype=dtype, device="meta"))
        self.layout = {"weight": (Piece(f"{name}.weight", (0, self.stop - self.start), (config_vocab, dim), 0,
                                        (self.start, self.stop), (self.start, self.stop), "vocab"),)}

    def forward(self, ids: torch.Tensor, n_tokens: int | None = None) -> torch.Tensor:
        """n_tokens: the result shall have this rank's rows only, of so many."""
        if groups.tp_size() == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.start
        foreign = (local < 0) | (local >= self.stop - self.start)
        x = F.embedding(local.masked_fill(foreign, 0), self.weight)
        x = x.masked_fill(foreign[..., None], 0.0)
        return reduce_from_tp(x) if n_tokens is None else scatter_from_tp(x)


def walk(model: nn.Module):
    """(parameter name, module, local name, parameter, [(native name, Piece), ...]) for every parameter, in order."""
    for module_name, module in model.named_modules():
        parent = module_name.rpartition(".")[0]
        for local, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{module_name}.{local}" if module_name else local
            layout = getattr(module, "layout", {}).get(local)
            if layout is None:                  # norms and small heads: one native tensor of the same name, on every rank
                pieces = [(name, replicated(name, tuple(parameter.shape), partial=local in getattr(module, "partial", ())))]
            else:
                pieces = [(f"{parent}.{piece.name}" if parent else piece.name, piece) for piece in layout]
            yield name, module, local, parameter, pieces


def piece_of(tensor: torch.Tensor, piece: Piece, *, owned: bool = False) -> torch.Tensor:
    """The view of a parameter (or its gradient, moment, master copy) that holds `piece`; `owned`: only what this rank saves."""
    view = tensor[piece.rows[0]:piece.rows[1]]
    if owned and piece.dim is not None and piece.owned != piece.held:
        view = view.narrow(piece.dim, piece.owned[0] - piece.held[0], piece.owned[1] - piece.owned[0])
    return view
