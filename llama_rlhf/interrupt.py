"""SIGTERM, as torchrun and schedulers send it, asks a run to save and leave; all ranks leave at the same step."""

from __future__ import annotations

import signal

import torch
import torch.distributed as dist

from llama_rlhf.parallel import groups

EXIT_CODE = 128 + signal.SIGTERM     # not 0: what follows in a shell script must not take the model for finished


class Interrupt:
    """From its construction on, SIGTERM only sets a mark. `asked` is to be called by all ranks at the same places."""

    def __init__(self):
        self._marked = False
        signal.signal(signal.SIGTERM, self._mark)

    def _mark(self, *_):
        self._marked = True

    def asked(self) -> bool:
        """Collective: whether any rank has received the signal."""
        if groups.world_size() == 1:
            return self._marked
        mark = torch.tensor(int(self._marked), device=groups.device())
        dist.all_reduce(mark, dist.ReduceOp.MAX)
        return bool(mark)

    @staticmethod
    def leave(run_log, saved: bool = True) -> None:
        """Collective: end a run that has just been saved, or that has done nothing yet but evaluate."""
        run_log.write("SIGTERM: saved and left; the same command continues" if saved else "SIGTERM: left before the first step; the same command starts again")
        run_log.close()
        groups.shutdown()
        raise SystemExit(EXIT_CODE)
