"""Process groups, device, threads, seeds: the one place that knows how many processes there are and what they run on.

FairScale arranges the ranks as [data, tensor]: the ranks of one tensor-parallel group are adjacent (on one node, so that
their all-reduces stay on the fastest links); data-parallel replicas are strided. Started without torchrun, the world is one
process. CPU uses gloo, CUDA uses nccl; nothing outside this package asks which.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import io
import os
import sys
import time

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fairscale_groups
from torch.distributed.rendezvous import rendezvous

from llama_rlhf.parallel import machine
from llama_rlhf.parallel.shared_memory import SharedMemoryGroup, host_identity
from llama_rlhf.parallel.watch import Watch

_state: dict = {}


def initialize(model_parallel_size: int = -1, *, timeout_seconds: float = 600.0, device: str = "auto") -> None:
    """Start the process groups. Call once, first.

    model_parallel_size: tensor-parallel ranks of one replica; -1 takes all ranks. The rest is data parallel.
    timeout_seconds: how long a collective may wait before the run ends with an error. Reaches every sub-group.
    device: "auto" (CUDA when there is one), "cpu" or "cuda".
    Raises ValueError when the world does not divide or CUDA is asked for and absent.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = next((int(os.environ[name]) for name in ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK") if name in os.environ), 0)
    local_world = _local_world()
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {device}: use auto, cpu or cuda")
    if not 0 < timeout_seconds <= 1e8:
        raise ValueError(f"--timeout_seconds {timeout_seconds:g}: must be positive, such as 600, and at most three years, 1e8")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device. Use --device cpu, or install a CUDA build of torch.")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if use_cuda and "LOCAL_WORLD_SIZE" in os.environ and local_world > torch.cuda.device_count():     # of other launchers each process may see its own only
        raise ValueError(f"{local_world} processes on this node but {torch.cuda.device_count()} CUDA devices: "
                         f"run with --nproc_per_node {torch.cuda.device_count()}, or with --device cpu")
    if use_cuda:
        _state["device"] = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(_state["device"])
    else:
        _state["device"] = torch.device("cpu")
        # torch's matrix library keeps what it prepared for 1024 shapes, half a MB each, twice; packed tokens make new shapes at every step, and a step has
        # about a hundred. Read once, by the first product: whoever imported us may have made it already
        for variable, n in (("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128"), ("LRU_CACHE_CAPACITY", "64")):
            os.environ.setdefault(variable, n)
        # torchrun sets OMP_NUM_THREADS=1 when it is unset, which wastes every core but one per process
        asked = os.environ.get("OMP_NUM_THREADS", "")
        if asked == "1" and "TORCHELASTIC_RUN_ID" not in os.environ:
            torch.set_num_threads(1)
        elif asked in ("", "1"):
            torch.set_num_threads(max(1, machine.cores() // local_world))
    size = world if model_parallel_size == -1 else model_parallel_size
    if size < 1 or world % size:
        raise ValueError(f"--model_parallel_size {model_parallel_size} does not divide the {world} processes that were "
                         f"started. Use a divisor of {world}, or -1 for all.")
    timeout = datetime.timedelta(seconds=timeout_seconds)
    backend = "nccl" if use_cuda else "gloo"
    if not dist.is_initialized():
        if "WORLD_SIZE" in os.environ:
            # torchrun --max-restarts keeps the store of the processes that died, whose addresses the new ones would wait for
            store, rank, _ = next(rendezvous("env://", timeout=timeout))
            store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    # FairScale's released version takes no timeout, so its sub-groups would wait the library's default (10 or 30 minutes)
    new_group = dist.new_group
    dist.new_group = lambda *args, **kwargs: new_group(*args, **{"timeout": timeout, **kwargs})
    try:
        with contextlib.redirect_stdout(io.StringIO()):     # it prints three lines on rank 0
            fairscale_groups.initialize_model_parallel(size)
    finally:
        dist.new_group = new_group
    _state["tp"] = fairscale_groups.get_model_parallel_group()
    _state["dp"] = fairscale_groups.get_data_parallel_group()
    _state["places"] = (dist.get_world_size(_state["tp"]), dist.get_rank(_state["tp"]), dist.get_world_size(_state["dp"]), dist.get_rank(_state["dp"]))
    _state["shared_memory"] = None
    # torch seeds each process by chance. Nothing here draws from its generators, but a user's reward function may, on every rank alike
    torch.manual_seed(0)
    if world > 1:
        from llama_rlhf.parallel.regions import traffic     # it imports this module
        store = dist.PrefixStore("watch", dist.distributed_c10d._get_default_store())
        _state["watch"] = Watch(store, dist.get_rank(), world, timeout_seconds, lambda: traffic["all_reduce"] + traffic["all_gather"])
        _state["watch"].start()
    if not use_cuda and size > 1:
        places = gather_objects(host_identity())
        if len(set(places)) == 1 and places[0][-1] == "x86_64":         # several hosts: gloo
            try:
                _state["shared_memory"] = SharedMemoryGroup(_state["tp"], timeout_seconds)
            except MemoryError as error:
                log(f"note: {error}; tensor-parallel sums go through gloo, slower. In a container: --shm-size=1g")
            if not all(gather_objects(_state["shared_memory"] is not None)):
                _state["shared_memory"] = None


def _local_world() -> int:
    """Processes of this run on this host, as the launcher tells: torchrun, mpirun or srun ("4(x2)": on each of two)."""
    told = next((os.environ[name] for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE") if name in os.environ), "1")
    return int(told.partition("(")[0].partition(",")[0])


def keep_freed_memory(up_to: int = 256 << 20) -> None:
    """Let a CPU process reuse freed blocks of up to so many bytes instead of returning them: activations of megabytes come and go at every
    operation, and fetching fresh pages for each costs several times the arithmetic (RMSNorm of 900x576: 2.0 ms against 0.18 here).

    The smallest bound that was asked for holds. Free memory between blocks of many sizes adds up: call `release_freed_memory` now and then.
    glibc only; elsewhere nothing happens.
    """
    if _state["device"].type == "cpu":
        _state["kept"] = up_to = min(up_to, _state.get("kept", up_to))
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-3, up_to) or mallopt(-3, min(up_to, 32 << 20))     # M_MMAP_THRESHOLD; before glibc 2.35 at most 32 MiB
            mallopt(-1, (1 << 31) - 1)          # M_TRIM_THRESHOLD


def release_freed_memory(*, always: bool = False) -> None:
    """Give freed pages back to the system (see keep_freed_memory), if it has less left than this process holds, or always.

    A training step that must fetch all its pages anew takes much longer.
    """
    if _state["device"].type == "cpu" and (always or free_memory() < _resident_memory()):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _resident_memory() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def free_memory() -> int:
    """Bytes that this process may still take, its neighbours on this machine taking as much."""
    if device().type == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()     # what torch keeps for itself is free
    return machine.available_memory() // _local_world()


def shutdown() -> None:
    """Leave the groups; a later `initialize` may start others."""
    if "watch" in _state:
        _state["watch"].stop()
    if dist.is_initialized():
        # gloo's thread may still be about to drop the last tensor that it summed, for which it needs Python's lock; the groups' end would
        # hold the lock and wait for the thread, for ever
        if dist.get_world_size() > 1:
            time.sleep(0.05)
        fairscale_groups.destroy_model_parallel()
        dist.destroy_process_group()
    _state.clear()


def started() -> bool:
    """Whether `initialize` has been called: somebody else may have started torch's own groups."""
    return "places" in _state


def device() -> torch.device:
    return _state["device"]


def tp_group():
    return _state["tp"]


def dp_group():
    return _state["dp"]


def shared_memory() -> SharedMemoryGroup | None:
    """The fast path of tensor-parallel collectives, when this group's ranks are processes of one x86-64 host without CUDA."""
    return _state["shared_memory"]


def tp_size() -> int:
    return _state["places"][0]


def tp_rank() -> int:
    return _state["places"][1]


def dp_size() -> int:
    return _state["places"][2]


def dp_rank() -> int:
    return _state["places"][3]


class _Nobody:
    """In place of peers: tensor-parallel collectives give back what they are given."""

    all_reduce_ = staticmethod(lambda tensor, op="sum": tensor)
    all_gather = staticmethod(lambda tensor: torch.stack([tensor] * tp_size()))


@contextlib.contextmanager
def pretend(tp: int, rank: int = 0, dp: int = 1, device: torch.device | str | None = None):
    """Inside, this process takes itself for tensor-parallel rank `rank` of tp, on the first of dp replicas; nobody else need be there
    and `initialize` need not have been called. For plans (plan.py), which compute with sizes only."""
    before = dict(_state)
    _state.update(places=(tp, rank, dp, 0), shared_memory=_Nobody(), device=torch.device(device or before.get("device") or "cpu"))
    try:
        yield
    finally:
        _state.clear()
        _state.update(before)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def log(*words, **kwargs) -> None:
    """Print on rank 0. Errors are raised, on every rank, never logged."""
    if is_main():
        print(*words, **kwargs)
        sys.stdout.flush()


def broadcast_object(value):
    """Rank 0's picklable value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value) -> list:
    """Every rank's picklable value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    box = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


@contextlib.contextmanager
def together(doing: str):
    """A step that may fail on some ranks only (reading files, checking data): if one fails, all raise, none waits.

    Every rank must enter it; no collective inside. The error raised elsewhere names the rank it came from.
    """
    error = None
    try:
        yield
    except Exception as caught:             # noqa: BLE001  re-raised below, on every rank
        error = caught
    failures = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for failed_rank, message in enumerate(failures):
        if message is not None:
            raise ValueError(f"rank {failed_rank} failed while {doing}: {message}")


def default_dtype(name: str) -> torch.dtype:
    """The dtype for --dtype auto|fp32|bf16|fp16. auto: bf16 where the hardware multiplies it, else fp32."""
    table = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name in table:
        if name == "fp16" and device().type == "cpu":
            raise ValueError("--dtype fp16 on a CPU is hundreds of times slower than bf16 or fp32: use one of those")
        return table[name]
    if name != "auto":
        raise ValueError(f"--dtype {name!r}: use auto, fp32, bf16 or fp16")
    if device().type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    multiplies = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if multiplies else torch.float32
