"""All-reduce and all-gather between processes of one machine through shared memory, for tensor parallelism on a CPU.

gloo answers a small all-reduce on one host in a fraction of a millisecond to two milliseconds, most of it waking threads; a
decode step needs two per layer. Here each rank writes its operand into a mapped file, raises a counter, waits for the others'
counters and adds up, in rank order: the same bits on every rank, accumulated in fp32.

Two buffers alternate: a rank that writes round s+2 has seen every counter at s+1, so everybody is done reading round s.
Counter and data are plain stores, in order on x86-64 only; elsewhere gloo is used (see `groups.initialize`).
"""

from __future__ import annotations

import mmap
import os
import platform
import tempfile
import time

import numpy
import torch
import torch.distributed as dist

_SLOT_BYTES = 8 << 20           # of each rank in each of the two buffers; larger tensors go in rounds
_COUNTER_STRIDE = 8             # int64s: one cache line per counter


def host_identity() -> tuple:
    """Equal on two processes exactly when they can map the same memory."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return (platform.node(), boot, os.stat("/dev/shm").st_dev, os.readlink("/proc/self/ns/pid"), platform.machine())
    except OSError:
        return (platform.node(), os.getpid(), 0, platform.machine())


def _has_ended(pid: int) -> bool:
    """Whether a process of this host is gone, or only waits to be collected by its parent."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True


class SharedMemoryGroup:
    """The ranks of one tensor-parallel group, all on this host. Collective to make; made once per group.

    Raises MemoryError on all of them when /dev/shm is too small (16 MiB per rank).
    """

    def __init__(self, group, timeout_seconds: float):
        self.rank, self.size, self.timeout_seconds = dist.get_rank(group), dist.get_world_size(group), timeout_seconds
        n_bytes = self.size * _COUNTER_STRIDE * 8 + 2 * self.size * _SLOT_BYTES
        first = dist.get_global_rank(group, 0)
        box: list = [None]
        if self.rank == 0:
            descriptor, path = tempfile.mkstemp(prefix="llama_rlhf-", dir="/dev/shm")
            try:
                os.posix_fallocate(descriptor, 0, n_bytes)      # a full /dev/shm says so now, not by a bus error later
                box = [path]
            except OSError:
                os.close(descriptor)
                os.unlink(path)
        dist.broadcast_object_list(box, src=first, group=group)
        if box[0] is None:
            raise MemoryError(f"/dev/shm has no room for {n_bytes >> 20} MiB")
        if self.rank != 0:
            descriptor = os.open(box[0], os.O_RDWR)
        self._map = mmap.mmap(descriptor, n_bytes)
        os.close(descriptor)
        self._pids: list = [None] * self.size
        dist.all_gather_object(self._pids, os.getpid(), group=group)
        if self.rank == 0:
            os.unlink(box[0])           # mapped by all: the name is no longer needed, and nothing is left behind by a crash
        n_counters = self.size * _COUNTER_STRIDE
        self._counters = numpy.frombuffer(self._map, dtype=numpy.int64, count=n_counters)[::_COUNTER_STRIDE]
        self._data = torch.frombuffer(self._map, dtype=torch.uint8, offset=n_counters * 8).view(2, self.size, _SLOT_BYTES)
        self._others = [r for r in range(self.size) if r != self.rank]
        self._round = 0

    def _exchange(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Publish a 1-D tensor of at most a slot; returns every rank's, in rank order, valid until the next but one exchange."""
        n_bytes = flat.numel() * flat.element_size()
        self._round += 1
        slots = self._data[self._round % 2]
        parts = [slots[r, :n_bytes].view(flat.dtype) for r in range(self.size)]
        parts[self.rank].copy_(flat)
        self._counters[self.rank] = self._round
        counters, goal, deadline, look = self._counters, self._round, None, 0.0
        for r in self._others:
            spins = 0
            while counters[r] < goal:
                spins += 1
                if spins > 200:             # about 20 us: a peer is late, let it have the core
                    os.sched_yield()
                if spins % 2000 == 0:
                    now = time.monotonic()
                    deadline, look = deadline or now + self.timeout_seconds, look or now + 1.0
                    if now > look:
                        look = now + 1.0
                        if _has_ended(self._pids[r]) and counters[r] < goal:
                            raise RuntimeError(f"tensor-parallel rank {r} (process {self._pids[r]}) has ended before exchange {goal}; see its output. "
                                               f"This is rank {self.rank}.")
                    if now > deadline:
                        raise RuntimeError(f"tensor-parallel rank {r} did not arrive at exchange {goal} within {self.timeout_seconds:.0f} s "
                                           f"(it is at {int(counters[r])}, this is rank {self.rank}). It is stuck or dead; see its output.")
                    time.sleep(0.0005)
        return parts

    def all_reduce_(self, tensor: torch.Tensor, op: str) -> torch.Tensor:
        flat = tensor.view(-1) if tensor.is_contiguous() else tensor.contiguous().view(-1)
        step = _SLOT_BYTES // tensor.element_size()
        for start in range(0, flat.numel(), step):
            out = flat[start:start + step]
            parts = self._exchange(out)
            if self.size == 2:              # one addition rounds once, in any dtype
                (torch.maximum if op == "max" else torch.add)(parts[0], parts[1], out=out)
            elif op == "max":
                torch.amax(torch.stack(parts), 0, out=out)
            else:
                total = parts[0].to(torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.dtype, copy=True)
                for part in parts[1:]:
                    total += part
                out.copy_(total)
        if not tensor.is_contiguous():
            tensor.copy_(flat.view_as(tensor))
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[...] -> [size, ...]"""
        flat = tensor.contiguous().view(-1)
        step = _SLOT_BYTES // tensor.element_size()
        rounds = [torch.stack(self._exchange(flat[start:start + step])) for start in range(0, flat.numel(), step)]
        return torch.cat(rounds, 1).view(self.size, *tensor.shape) if rounds else tensor.new_empty(self.size, *tensor.shape)
