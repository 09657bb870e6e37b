"""What a run leaves behind: run.json (arguments, environment), metrics.jsonl (one line per interval), and a progress line."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import resource
import sys
import time

import torch

from llama_rlhf import __version__, cli
from llama_rlhf.parallel import groups


class RunLog:
    """Rank 0 writes; the other ranks call the same methods, which do nothing there.

    log_dir: made if needed. An older metrics.jsonl in it is appended to, each line naming its run by the start time.
    """

    def __init__(self, log_dir: str, *, total: int, unit: str = "step"):
        self.log_dir, self.total, self.unit = log_dir, total, unit
        self.started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._bar = self._metrics = None
        if not groups.is_main():
            return
        from tqdm import tqdm
        with self._named():
            os.makedirs(log_dir, exist_ok=True)
            with open(os.path.join(log_dir, "run.json"), "w") as file:
                json.dump({"script": os.path.basename(sys.argv[0]), "arguments": cli.resolved, "started": self.started,
                           "environment": environment()}, file, indent=1)
            self._metrics = open(os.path.join(log_dir, "metrics.jsonl"), "a")
        # a terminal gets a moving line, a file one line in ten seconds at most
        self._bar = tqdm(total=total, unit=unit, mininterval=0.3 if sys.stderr.isatty() else 10.0, dynamic_ncols=True)

    @contextlib.contextmanager
    def _named(self):
        """Failures to write say where."""
        try:
            yield
        except OSError as error:
            raise type(error)(error.errno, f"cannot write the log in {self.log_dir}: {error.strerror}. Complete saves are untouched") from error

    def advance(self, n: int = 1, **shown) -> None:
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(n)

    def record(self, kind: str, **values) -> None:
        """One line of metrics.jsonl. Numbers that are not finite are written as null: json has no NaN."""
        if self._metrics is not None:
            clean = {key: None if isinstance(v, float) and v - v != 0 else v for key, v in values.items()}
            with self._named():
                self._metrics.write(json.dumps({"kind": kind, "time": round(time.time(), 3), "run": self.started, **clean}) + "\n")
                self._metrics.flush()

    def write(self, text: str) -> None:
        """Print above the progress line."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._metrics.close()


class Clock:
    """Seconds by phase:  `with clock("generate"): ...`  adds to clock.seconds["generate"]."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str):
        started = self._now()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + self._now() - started

    @staticmethod
    def _now() -> float:
        if groups.device().type == "cuda":
            torch.cuda.synchronize()        # kernels run behind python's back
        return time.perf_counter()


class Average:
    """Token-weighted mean loss, and real tokens per second, since it was made."""

    def __init__(self, loss_sum: float = 0.0, n_loss_tokens: int = 0):
        self.loss_sum, self.n_loss_tokens, self.n_tokens, self.seconds = loss_sum, n_loss_tokens, 0, 0.0

    def state(self) -> dict:
        """For a later `Average(**state)`: the loss, not the times."""
        return {"loss_sum": self.loss_sum, "n_loss_tokens": self.n_loss_tokens}

    def add(self, result, n_tokens, seconds):
        self.n_tokens, self.seconds = self.n_tokens + n_tokens, self.seconds + seconds
        if not result.skipped:
            self.loss_sum += result.loss * result.n_tokens
            self.n_loss_tokens += result.n_tokens

    @property
    def loss(self):
        return self.loss_sum / self.n_loss_tokens if self.n_loss_tokens else float("nan")

    @property
    def perplexity(self):
        return 2.718281828459045 ** min(self.loss, 700.0)

    @property
    def tokens_per_second(self):
        return self.n_tokens / self.seconds if self.seconds else 0.0


def environment() -> dict:
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"llama_rlhf": __version__, "torch": torch.__version__, "python": platform.python_version(), "machine": platform.platform(),
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "cuda": cuda, "processes": groups.world_size(),
            "tensor_parallel": groups.tp_size(), "data_parallel": groups.dp_size()}


def peak_memory_gb() -> float:
    """Peak of this process: device memory on CUDA, resident memory on a CPU. GB = 1e9 bytes."""
    if groups.device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class PeakMemory:
    """The most memory this process holds at once after `start`, beyond what it held when this object was made (interpreter, libraries, data).

    Make it before the models are loaded, start it when they are: reading files in passing is then not counted. Bytes of device memory on
    CUDA, resident memory on a CPU.
    """

    def __init__(self):
        self._base = 0 if groups.device().type == "cuda" else self._resident("VmRSS")

    def start(self) -> None:
        if groups.device().type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            groups.release_freed_memory()
            with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
                file.write("5")         # the kernel's mark of the peak falls to what is held now

    @property
    def n_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if groups.device().type == "cuda" else self._resident("VmHWM") - self._base

    @staticmethod
    def _resident(key: str) -> int:
        try:
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
        except (OSError, StopIteration):        # not Linux: the peak so far stands for both
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
