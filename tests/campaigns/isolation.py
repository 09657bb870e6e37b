"""Run functions in processes forked from this one, with a limit on time and memory, and say how each case ended.

The parent imports everything once and starts no threads; a fork then costs milliseconds, and whatever a case does to its
process (a signal, an endless loop, a terabyte) is seen from outside. A process takes a batch of cases; those after one that
ended it go to the next process.
"""

import itertools
import json
import os
import resource
import select
import signal
import time
from dataclasses import dataclass

MORE_BYTES = 1 << 30        # address space of a process, beyond what it starts with


@dataclass
class Ending:
    """kind and detail: what the function returned, or "signal", "hang", "traceback". seconds: of the processor's work."""

    kind: str
    detail: str
    seconds: float
    peak_mb: float


def held_mb():
    """What this process holds in memory now."""
    return _status("VmRSS:")


def _status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(key))


def work_seconds():
    mine, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return mine.ru_utime + mine.ru_stime + children.ru_utime + children.ru_stime


def _child(function, arguments, pipe):
    os.setpgid(0, 0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):        # libraries in Rust report a panic there
        os.dup2(nothing, stream)
    limit = (int(_status("VmSize:")) << 20) + MORE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for argument in arguments:
        start = work_seconds()
        try:
            kind, detail = function(argument)
        except BaseException as error:      # noqa: BLE001  that is the question
            kind, detail = "traceback", f"{type(error).__name__}: {error}"
        helpers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        os.write(pipe, json.dumps([kind, detail[:1000], work_seconds() - start, max(_status("VmHWM:"), helpers)]).encode() + b"\n")


def run_cases(function, arguments, *, seconds=180.0, workers=2, batch=1):
    """Yield (argument, Ending) of function(argument) -> (kind, detail) for each, in about the order given; hung after `seconds`."""
    source, retry, running = iter(arguments), [], {}
    while True:
        while len(running) < workers:
            cases = retry.pop() if retry else list(itertools.islice(source, batch))
            if not cases:
                break
            mine, theirs = os.pipe()
            if (pid := os.fork()) == 0:
                try:
                    os.close(mine)
                    _child(function, cases, theirs)
                finally:
                    os._exit(0)
            os.close(theirs)
            running[mine] = [pid, cases, time.monotonic(), b""]
        if not running:
            return
        ready, _, _ = select.select(list(running), [], [], 0.2)
        for pipe, state in list(running.items()):
            pid, cases, since, text = state
            late = time.monotonic() - since > seconds
            if pipe in ready:
                data = os.read(pipe, 1 << 20)
                *lines, state[3] = (text + data).split(b"\n")
                for line in lines:
                    yield cases.pop(0), Ending(*json.loads(line))
                    state[2] = time.monotonic()
                ended = not data
            elif late:
                ended = True
            else:
                continue
            if ended:
                try:
                    os.killpg(pid, signal.SIGKILL)      # also what it started
                except (ProcessLookupError, PermissionError):
                    pass
                _, status = os.waitpid(pid, 0)
                os.close(pipe)
                del running[pipe]
                if cases:
                    kind, detail = ("hang", f"stopped after {seconds:g} s") if pipe not in ready else ("signal", f"wait status {status}")
                    yield cases.pop(0), Ending(kind, detail, time.monotonic() - since, 0.0)
                if cases:
                    retry.append(cases)
