"""What gradients need after backward, before the optimizer: sums of partial gradients, and the one true norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from llama_rlhf.parallel import groups
from llama_rlhf.parallel.layers import piece_of, walk
from llama_rlhf.parallel.regions import all_reduce_

_FLUSH_BYTES = 64 << 20      # partial gradients travel in buffers of about this size
BUCKET_BYTES = 32 << 20      # of gradients that replicas sum together, at least a parameter's
BUCKETS_TRAVELLING = 3       # at most, at a time


def sync_partial_gradients(model, grad_of=lambda parameter: parameter.grad) -> None:
    """Add up, over tensor-parallel ranks, the gradients that each rank knows only in part.

    These are the replicated halves of LoRA, per-head norms (every rank sees its own heads), and kv heads that live on
    several ranks because there are more ranks than kv heads or heads do not divide. Same order on all ranks, few collectives.
    grad_of: parameter -> its gradient tensor (fp32 accumulators live outside `.grad`); None entries are skipped.
    """
    _sum_pieces(model, grad_of, owned_only=False)


def copy_shared_from_owners(model, value_of) -> None:
    """Give every holder of a shared kv head the owner's values, bit for bit.

    The holders apply equal updates to equal values, but the rounding of a vectorised optimizer depends on where in memory a
    row lies, and the copies would drift apart by a unit in the last place per step.
    """
    if model.partition.kv_shared:
        _sum_pieces(model, value_of, owned_only=True)


def _sum_pieces(model, tensor_of, owned_only: bool) -> None:
    if groups.tp_size() == 1:
        return
    pending: list[tuple[torch.Tensor, torch.Tensor]] = []       # (view of the tensor, its place in the sum)
    buffers: list[torch.Tensor] = []

    def flush():
        if buffers:
            flat = torch.cat([buffer.flatten() for buffer in buffers])
            all_reduce_(flat)
            _copy_out(flat, buffers)
            for view, place in pending:
                view.copy_(place)
        pending.clear()
        buffers.clear()

    for _, _, _, parameter, pieces in walk(model):
        if not parameter.requires_grad or (tensor := tensor_of(parameter)) is None:
            continue
        for _, piece in pieces:
            view = piece_of(tensor, piece)
            if piece.shared:
                buffer = torch.zeros(piece.shape, dtype=torch.float32, device=tensor.device)
                place = buffer[piece.held[0]:piece.held[1]]
                start, stop = piece.owned if owned_only else piece.held
                buffer[start:stop] = view[start - piece.held[0]:stop - piece.held[0]]
            elif piece.partial and not owned_only:
                place = buffer = view.float()
            else:
                continue
            pending.append((view, place))
            buffers.append(buffer)
            if sum(b.numel() * 4 for b in buffers) > _FLUSH_BYTES:
                flush()
    flush()


def gradient_norm(model, grad_of=lambda parameter: parameter.grad) -> torch.Tensor:
    """Global L2 norm (fp32 scalar, the same bits on all ranks): sharded parts summed over ranks, replicated ones once."""
    total = torch.zeros((), dtype=torch.float32, device=groups.device())
    views = []
    for _, _, _, parameter, pieces in walk(model):
        if not parameter.requires_grad or (grad := grad_of(parameter)) is None:
            continue
        if all(piece.dim is not None and piece.held == piece.owned for _, piece in pieces):
            views.append(grad)
        else:
            views += [piece_of(grad, piece, owned=True) for _, piece in pieces
                      if piece.dim is not None or groups.tp_rank() == 0]
    if views := [view for view in views if view.numel()]:
        total = torch.stack(torch._foreach_norm(views, dtype=torch.float32)).square().sum()
    return all_reduce_(total).sqrt()


class ReplicaSum:
    """Sums gradients over data-parallel replicas, in place, in buckets, while backward still runs: see `ready`.

    (The loss is already divided by the global count.) Buckets leave in one order, the same on every rank, whatever its backward does:
    the last parameters first, as backward finds them.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], grad_of):
        self._grad_of, self._buckets, filled = grad_of, [[]], 0
        for p in reversed(parameters):
            if self._buckets[-1] and filled + p.numel() * 4 > BUCKET_BYTES:
                self._buckets.append([])
                filled = 0
            self._buckets[-1].append(p)
            filled += p.numel() * 4
        self._bucket_of = {p: i for i, bucket in enumerate(self._buckets) for p in bucket}
        self.begin()

    def begin(self) -> None:
        self._missing, self._next = [len(bucket) for bucket in self._buckets], 0
        self._travelling: list[tuple[list[torch.Tensor], torch.Tensor, dist.Work]] = []

    def ready(self, parameter: torch.nn.Parameter) -> None:
        """This rank adds no more to this gradient in this step."""
        self._missing[self._bucket_of[parameter]] -= 1
        while self._next < len(self._buckets) and not self._missing[self._next]:
            self._send()

    def finish(self) -> None:
        """Send what is left, and wait for all. Every parameter has a gradient now."""
        while self._next < len(self._buckets):
            self._send()
        while self._travelling:
            self._receive()
        self.begin()

    def _send(self) -> None:
        if len(self._travelling) == BUCKETS_TRAVELLING:
            self._receive()
        grads = [self._grad_of(p) for p in self._buckets[self._next]]
        flat = torch.cat([g.flatten() for g in grads])
        self._travelling.append((grads, flat, dist.all_reduce(flat, group=groups.dp_group(), async_op=True)))
        self._next += 1

    def _receive(self) -> None:
        grads, flat, work = self._travelling.pop(0)
        work.wait()
        _copy_out(flat, grads)


def copy_from_replicas(tensors: Sequence[torch.Tensor], owners: list[int]) -> None:
    """Give every data-parallel replica the values that each tensor has on the replica that owns it, bit for bit, in buffers."""
    for owner in range(groups.dp_size() if groups.dp_size() > 1 else 0):
        source = dist.get_global_rank(groups.dp_group(), owner)
        _in_buffers([t for t, o in zip(tensors, owners) if o == owner], lambda flat: dist.broadcast(flat, source, group=groups.dp_group()))


def _in_buffers(tensors: list[torch.Tensor], collective) -> None:
    """Run an in-place collective on the tensors, side by side in buffers of about _FLUSH_BYTES (4 bytes per number)."""
    batch: list[torch.Tensor] = []
    for i, tensor in enumerate(tensors):
        batch.append(tensor)
        if i + 1 == len(tensors) or sum(t.numel() for t in batch) * 4 > _FLUSH_BYTES:
            flat = torch.cat([t.flatten() for t in batch])
            collective(flat)
            _copy_out(flat, batch)
            batch.clear()


def _copy_out(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """What lies side by side in `flat`, back into the tensors it was made of."""
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(part.view_as(tensor))
