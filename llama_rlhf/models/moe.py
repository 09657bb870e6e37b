"""Mixture of experts in place of a feed-forward (Shazeer et al. 2017, arXiv:1701.06538; Mixtral, arXiv:2401.04088).

A router scores the experts for every token; the token goes to the best few and receives the weighted sum of their outputs.
The router is replicated. It reads the hidden states as they are, and the weights it gives pass through the same
copy-forward, sum-backward operator as the experts' input: so its gradient is complete, and equal on every rank.
No token is dropped and there is no load-balancing loss: fine-tuning keeps the released routing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from llama_rlhf.config import ModelConfig
from llama_rlhf.parallel.layers import ParallelExperts
from llama_rlhf.parallel.partition import Partition
from llama_rlhf.parallel.regions import gather_same, split_tokens


class Router(nn.Module):
    """Hidden states [T, dim] -> the k best experts of each token [T, k] and their weights [T, k]."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.dim, dtype=dtype, device="meta"))
        self.k, self.normalise, self.keep_fp32 = config.n_active_experts, config.normalise_routing, config.fp32_routing

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = F.linear(x, self.weight).softmax(-1, dtype=torch.float32).topk(self.k)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights if self.keep_fp32 else weights.to(x.dtype)


class MixtureOfExperts(nn.Module):
    def __init__(self, config: ModelConfig, partition: Partition, dtype: torch.dtype):
        super().__init__()
        self.gate = Router(config, dtype)
        self.experts = ParallelExperts(config.n_experts, config.dim, config.ffn_dim, partition, dtype=dtype)

    def forward(self, x: torch.Tensor, n_tokens: int | None = None) -> torch.Tensor:
        """n_tokens: x and the result have this rank's rows only, of so many. Experts need all tokens side by side."""
        if n_tokens is not None:
            x = gather_same(x, n_tokens)
        y = self.experts(x, *self.gate(x))
        return y if n_tokens is None else split_tokens(y)
