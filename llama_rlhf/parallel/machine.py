"""What this process may use of its machine: cores and memory, the bounds of containers and batch jobs (Linux control groups) included.

Those bounds are not in what the system says of the whole machine: a program that goes by that alone starts 64 threads for 2 cores' time, or is
killed where it believed that it had memory left.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_UNBOUNDED = 1 << 62


def cores(root: str = "/") -> int:
    """Cores whose time this process gets: those it may run on, or fewer where its control groups (docker --cpus) have less time; at least 1."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group, version in _groups("cpu", root):
        quota, period = _numbers(group, ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us"), 2)
        if 0 < quota < _UNBOUNDED and period > 0:
            n = min(n, math.ceil(quota / period))
    return max(1, n)


def available_memory(root: str = "/") -> int:
    """Bytes that may still be taken before something is swapped or killed; without bound where the system does not say."""
    left = _UNBOUNDED
    try:
        with open(os.path.join(root, "proc/meminfo")) as file:
            left = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    for group, version in _groups("memory", root):
        limit, used = _numbers(group, ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2)
        if 0 <= limit < _UNBOUNDED:
            left = min(left, max(0, limit - used + _cached(group, version)))
    return left


def _groups(controller: str, root: str) -> Iterator[tuple[Path, int]]:
    """The folders of this process's control groups and of those above them, with the interface's version (1 or 2)."""
    try:
        lines = (Path(root) / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:         # not Linux
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and controller not in controllers.split(","):
            continue
        top = Path(root) / "sys/fs/cgroup" / (controller if controllers else "")
        group = top / path.lstrip("/")      # in a container often a name of the host's, which is not there: then the top is its own
        while True:
            yield group, 1 if controllers else 2
            if group == top:
                break
            group = group.parent


def _numbers(group: Path, files: tuple[str, ...], n: int) -> list[int]:
    """The n numbers in these files, one after the other; all out of bounds where they cannot be read. "max": no bound."""
    try:
        words = [word for name in files for word in (group / name).read_text().split()]
        numbers = [_UNBOUNDED if word == "max" else int(word) for word in words]
    except (OSError, ValueError):
        numbers = []
    return numbers if len(numbers) == n else [_UNBOUNDED] * n


def _cached(group: Path, version: int) -> int:
    """Bytes of files that the group counts as used and the system drops when it needs them."""
    name = "inactive_file" if version == 2 else "total_inactive_file"
    try:
        return next(int(value) for key, value in (line.split() for line in (group / "memory.stat").read_text().splitlines()) if key == name)
    except (OSError, StopIteration, ValueError):
        return 0
