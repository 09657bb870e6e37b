"""Names a rank that is stuck while the others still wait for it, before they give up.

Every rank's watch posts, every few seconds, where in the program its main thread is. A rank that has stood in one collective for
half of --timeout_seconds reads what the others posted and prints it: who is somewhere else, and who posts nothing any more (stopped,
or dead on another host). No call in the program's hot paths: the place is read off the thread's stack.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_ROOT = os.path.dirname(_PACKAGE)


def place_of(thread_id: int) -> tuple[str, str]:
    """("solver_train.py:184 main > trainer.py:91 step > ...", name of the collective it waits in, or "")"""
    frame, ours, collective = sys._current_frames().get(thread_id), [], ""
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        spins = name == "_exchange" and path.startswith(_PACKAGE)       # a loop: who waits in it stands on another line at every look
        if "torch/distributed/distributed_c10d" in path or spins:
            collective = name if name != "wrapper" else collective      # the outermost of them: what the program called
        if path.startswith(_PACKAGE) and not spins or os.path.dirname(path) == _ROOT:
            ours.append(f"{os.path.basename(path)}:{frame.f_lineno} {name}")
        frame = frame.f_back
    return " > ".join(reversed([x for x in ours if not x.endswith((" run", " _call_through_fire", " <module>"))])), collective


class Watch(threading.Thread):
    """Posts this rank's place and reads the others' through `store`, a torch.distributed store. Prints to stderr."""

    def __init__(self, store, rank: int, world: int, timeout_seconds: float, progress=lambda: 0):
        """progress: a number that grows with this rank's collectives; two visits of one place are told apart by it."""
        super().__init__(daemon=True, name="watch")
        self.store, self.rank, self.world, self.timeout_seconds, self.progress = store, rank, world, timeout_seconds, progress
        self.period = min(5.0, max(0.5, timeout_seconds / 20))
        self._main, self._end = threading.main_thread().ident or 0, threading.Event()

    def run(self) -> None:
        last, since, told, posts = None, time.monotonic(), False, 0
        while not self._end.wait(self.period if posts else 0):
            place, collective = place_of(self._main)
            now = (place, collective, self.progress())
            if now != last:
                last, since, told = now, time.monotonic(), False
            posts, waited = posts + 1, time.monotonic() - since
            try:
                self.store.set(f"place/{self.rank}", json.dumps({"posts": posts, "place": place, "collective": collective, "n": now[2], "waits": waited > self.period,
                                                                 "process": os.getpid(), "host": platform.node()}))
                if collective and waited > self.timeout_seconds / 2 and not told:
                    told = True
                    self._tell(place, collective, waited)
            except Exception as error:      # noqa: BLE001  a run must not fail by its watch
                if not self._end.is_set():
                    print(f"[rank {self.rank}] waits in {collective or place}; the others' places cannot be read: {error}", file=sys.stderr, flush=True)
                return

    def stop(self) -> None:
        """Post no more; returns when the thread has let go of the store."""
        self._end.set()
        self.join(self.period + 1)

    def _read(self) -> dict[int, dict]:
        keys = {rank: f"place/{rank}" for rank in range(self.world)}
        return {rank: json.loads(self.store.get(key)) for rank, key in keys.items() if self.store.check([key])}

    def _tell(self, place: str, collective: str, waited: float) -> None:
        before = self._read()
        self._end.wait(2.5 * self.period)
        after = self._read()
        silent = {rank for rank in range(self.world) if after.get(rank, {}).get("posts") == before.get(rank, {}).get("posts")}
        waiting = [rank for rank, post in after.items() if rank not in silent and post["collective"] and post["waits"]]
        if place_of(self._main) != (place, collective) or waiting and self.rank != min(waiting):
            return                  # it went on, or another rank says it
        lines = [f"rank {self.rank} has waited {waited:.0f} s in {collective} ({place}); after {self.timeout_seconds:.0f} s (--timeout_seconds) the run ends. The others:"]
        for rank in range(self.world):
            post = after.get(rank)
            if rank == self.rank:
                continue
            if post is None:
                lines.append(f"  rank {rank} has not said anything since the start: STUCK or gone")
                continue
            where = f"in {post['collective']} ({post['place']})" if post["collective"] else f"at {post['place']}"
            verdict = "STUCK, stopped or gone: no sign of life; last seen " if rank in silent else "waits too, " if rank in waiting else "STUCK or slow, "
            lines.append(f"  rank {rank} (process {post['process']} on {post['host']}) {verdict}{where}, after {post['n']} tensor-parallel collectives (rank {self.rank}: "
                         f"{self.progress()})")
        print("\n".join(lines), file=sys.stderr, flush=True)
