"""Decode steps as CUDA graphs: the several hundred kernels of a step are launched as one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llama_rlhf.config import ModelConfig

_FEWEST_POSITIONS = 256


class DecodeGraphs:
    """decode(n, longest) as `forward` does it, by replaying a recording of it.

    forward(n, longest) -> [n, dim]: states of the tokens in slots 0..n-1, whose rows have at most `longest` positions in the cache. What else
    it reads must lie in tensors that stay where they are.
    There is a recording for each number of rows and of positions that is met, both rounded up. The surplus rows' states are left out, and what
    they write to their slots' next position is overwritten when a row enters there; the caller keeps that position inside the cache.
    """

    def __init__(self, forward: Callable[[int, int], torch.Tensor], n_slots: int, max_len: int):
        self._forward, self._n_slots, self._max_len = forward, n_slots, max_len
        self._record = Recorder()
        self._recorded: dict[tuple[int, int], tuple[Callable, torch.Tensor]] = {}

    def __call__(self, n: int, longest: int) -> torch.Tensor:
        rows = min(self._n_slots, 1 << (n - 1).bit_length() if n <= 16 else -(-n // 16) * 16)
        positions = min(self._max_len, max(_FEWEST_POSITIONS, 1 << longest.bit_length()))      # 0 .. longest
        if (rows, positions) not in self._recorded:
            self._recorded[rows, positions] = self._record(lambda: self._forward(rows, positions - 1))
        replay, states = self._recorded[rows, positions]
        replay()
        return states[:n]


class Recorder:
    """record(step) -> (replay, what step returns: the tensor that each replay fills anew). Recordings share their working memory."""

    def __init__(self):
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], torch.Tensor]) -> tuple[Callable, torch.Tensor]:
        aside = torch.cuda.Stream()         # libraries set themselves up on their first calls, which must not be recorded
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()
            step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            states = step()
        return graph.replay, states


def check_cuda_graphs(config: ModelConfig, device: torch.device) -> None:
    """ValueError where decode steps cannot be recorded."""
    if device.type != "cuda":
        raise ValueError("--cuda_graphs is for CUDA. Leave it out.")
    if config.n_experts:
        raise ValueError("--cuda_graphs: a model with experts divides its tokens among them on the host, which cannot be recorded. Leave it out.")
