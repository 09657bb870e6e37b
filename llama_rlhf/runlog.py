"""What a run leaves behind: run.json (arguments, environment), metrics.jsonl (one line per interval), a progress line, and what report.py makes of them."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import os
import platform
import resource
import sys
import time

import torch

from llama_rlhf import __version__, cli
from llama_rlhf.parallel import groups


TRACKERS = ("none", "tensorboard", "wandb")


def check_tracker(name: str) -> None:
    """ValueError where --tracker cannot be served: before the models are loaded."""
    if name not in TRACKERS:
        raise ValueError(f"--tracker {name!r}: use {', '.join(TRACKERS[:-1])} or {TRACKERS[-1]}")
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ValueError(f"--tracker {name}: the package is not installed. Run `pip install {name}`, or leave the flag out: metrics.jsonl is written always.")


def open_tracker(name: str, log_dir: str):
    """(log(numbers, step), close()) of a tracker."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(log_dir)

        def log(numbers, step):
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)

        return log, writer.close
    import wandb
    run = wandb.init(project=os.environ.get("WANDB_PROJECT", "llama_rlhf"), dir=log_dir, config=cli.resolved, mode=os.environ.get("WANDB_MODE", "offline"))
    return run.log, run.finish


def numbers_of(values: dict, prefix: str) -> dict[str, float]:
    """{"prefix/name": number}, nested dicts spelled out, everything else left out."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= numbers_of(value, f"{prefix}/{key}")
        elif isinstance(value, (int, float)):
            found[f"{prefix}/{key}"] = value
    return found


class _Lines:
    """A file in the place of a terminal: what is drawn over the line before becomes a line of its own."""

    def __init__(self, file):
        self._file = file

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            self._file.write(text + "\n")

    def __getattr__(self, name):
        return getattr(self._file, name)


def progress_line(total: int, unit: str):
    """A terminal gets a moving line, a file one line in ten seconds at most."""
    from tqdm import tqdm
    moves = sys.stderr.isatty()
    return tqdm(total=total, unit=unit, file=sys.stderr if moves else _Lines(sys.stderr), mininterval=0.3 if moves else 10.0, dynamic_ncols=moves)


def _drop_torn_line(path: str) -> None:
    """What a run that was cut off in the middle of a line left of it: the next would be written on."""
    with open(path, "rb+") as file:
        lines = file.read()
        file.truncate(lines.rfind(b"\n") + 1)


class RunLog:
    """Rank 0 writes; the other ranks call the same methods, which do nothing there.

    log_dir: made if needed. An older metrics.jsonl in it is appended to, each line naming its run by the start time.
    tracker: one of TRACKERS, which gets every number of `record` too.
    """

    def __init__(self, log_dir: str, *, total: int, unit: str = "step", tracker: str = "none"):
        self.log_dir, self.total, self.unit = log_dir, total, unit
        self.started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._bar = self._metrics = self._tracker = None
        if not groups.is_main():
            return
        with self._named():
            os.makedirs(log_dir, exist_ok=True)
            with open(os.path.join(log_dir, "run.json"), "w") as file:
                json.dump({"script": os.path.basename(sys.argv[0]), "arguments": cli.resolved, "given": cli.given, "started": self.started,
                           "environment": environment()}, file, indent=1)
            self._metrics = open(os.path.join(log_dir, "metrics.jsonl"), "a")
            _drop_torn_line(self._metrics.name)
        self._tracker = None if tracker == "none" else open_tracker(tracker, log_dir)
        self._bar = progress_line(total, unit)

    @contextlib.contextmanager
    def _named(self):
        """Failures to write say where."""
        try:
            yield
        except OSError as error:
            raise type(error)(error.errno, f"cannot write the log in {self.log_dir}: {error.strerror}. Complete saves are untouched") from error

    def advance(self, **shown) -> None:
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(1)

    def resumed(self, step: int) -> None:
        """The run continues after this step: what was recorded beyond it is void, and the time it took is no measure for the rest."""
        self.record("resumed", step=step)
        if self._bar is not None:
            self._bar.initial = self._bar.n = self._bar.last_print_n = step
            self._bar.unpause()

    def record(self, kind: str, **values) -> None:
        """One line of metrics.jsonl. Numbers that are not finite are written as null: json has no NaN."""
        if self._metrics is not None:
            clean = {key: None if isinstance(v, float) and v - v != 0 else v for key, v in values.items()}
            with self._named():
                self._metrics.write(json.dumps({"kind": kind, "time": round(time.time(), 3), "run": self.started, **clean}) + "\n")
                self._metrics.flush()
        if self._tracker is not None and "step" in values:
            self._tracker[0](numbers_of({key: value for key, value in values.items() if key != "step"}, kind), values["step"])

    def find(self, kind: str, step: int) -> dict | None:
        """Collective: the record of this kind and step that metrics.jsonl holds of this run; None where it has none, or is damaged."""
        from llama_rlhf.report import records_of
        found = None
        with contextlib.suppress(ValueError):
            if groups.is_main():
                found = next((record for record in records_of(self.log_dir) if record["kind"] == kind and record.get("step") == step), None)
        return groups.broadcast_object(found)

    def write(self, text: str) -> None:
        """Print above the progress line; where that goes to a file, on a line after it."""
        if self._bar is not None:
            if sys.stderr.isatty():
                self._bar.write(text, file=sys.stdout)
            else:
                print(text)
            sys.stdout.flush()

    def close(self, *, report: bool = False) -> None:
        """report: of a finished run; see report.at_the_end."""
        if self._bar is None or self._metrics is None:
            return
        self._bar.close()
        self._metrics.close()
        if self._tracker is not None:
            self._tracker[1]()
        if report:
            from llama_rlhf.report import at_the_end
            at_the_end(self.log_dir)


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
    """The most memory this process holds at once between `start` and `stop`, or now, beyond what it held when this object was made (interpreter, libraries, data).

    Make it before the models are loaded, start it when they are, and stop it while more are: reading files in passing is then not counted. Bytes of device memory on
    CUDA; on a CPU of resident memory without mapped files, which are the code of libraries.
    trains: an optimizer will be made; what its first use imports (a second) is no part of the run's memory.
    """

    def __init__(self, *, trains: bool = True):
        if trains:
            torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
        self._before = 0
        self._base = 0 if groups.device().type == "cuda" else self._resident("RssAnon") + self._resident("RssShmem")

    def start(self) -> None:
        if groups.device().type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            groups.release_freed_memory(always=True)
            with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
                file.write("5")         # the kernel's mark of the peak falls to what is held now

    def stop(self) -> None:
        self._before = self.n_bytes

    @property
    def n_bytes(self) -> int:
        if groups.device().type == "cuda":
            return max(self._before, torch.cuda.max_memory_allocated())
        return max(self._before, self._resident("VmHWM") - self._resident("RssFile") - self._base)

    @staticmethod
    def _resident(key: str) -> int:
        """A line of Linux' /proc/self/status. Elsewhere 0, but for the peak."""
        with contextlib.suppress(OSError), open("/proc/self/status") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(key)), 0)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if key == "VmHWM" else 0
