"""Decode steps as CUDA graphs: the several hundred kernels of a step are launched as one."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from llama_rlhf.config import ModelConfig
from llama_rlhf.parallel import groups

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
        aside = _side_stream()              # libraries set themselves up on their first call with these shapes, which must not be recorded
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=aside):
            states = step()
        return graph.replay, states


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace for every stream that it has met."""
    return torch.cuda.Stream()


def records_steps(asked: str, config: ModelConfig) -> bool:
    """Whether decode steps are recorded. asked: auto (on CUDA, where one rank holds the model: of several it has not been seen yet), always or never.

    ValueError for another word, and for always where they cannot be.
    """
    if asked not in ("auto", "always", "never"):
        raise ValueError(f"--cuda_graphs {asked!r}: use auto, always or never")
    if asked == "auto":
        return groups.device().type == "cuda" and not config.n_experts and groups.tp_size() == 1
    if asked == "always" and groups.device().type != "cuda":
        raise ValueError("--cuda_graphs always is for CUDA. Leave it out.")
    if asked == "always" and config.n_experts:
        raise ValueError("--cuda_graphs always: a model with experts divides its tokens among them on the host, which cannot be recorded. Leave it out.")
    return asked == "always"
