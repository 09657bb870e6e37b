"""What a model, its training and its use take of memory on a rank of any layout, from its config alone: nothing is allocated.

No formula repeats the model's code. The code itself runs, forward and backward, on tensors without storage (torch's FakeTensorMode), as one
rank of any layout, and the sizes of its tensors are added up as they come and go. Two small numbers of layers are run; each figure is a
straight line in their number, and the full model lies on it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama_rlhf import losses
from llama_rlhf.config import ModelConfig
from llama_rlhf.generation import _PREFILL_TOKENS
from llama_rlhf.models import transformer
from llama_rlhf.models.transformer import CausalLM, Rows, Transformer, recompute_period
from llama_rlhf.parallel import groups
from llama_rlhf.parallel.gradients import BUCKET_BYTES, BUCKETS_TRAVELLING
from llama_rlhf.parallel.layers import Lora, bytes_held, walk
from llama_rlhf.sampling import Sampling, choose
from llama_rlhf.trainer import _BUCKET, Trainer, largest_share, response_logprobs, response_values

KINDS = ("weights", "weight copies", "optimizer", "gradients", "activations", "logits", "KV cache")
_PHASES = ("forward", "loss", "last block", "first block")      # of a training step, in order
_M = TypeVar("_M", bound=Transformer)


class _Live(TorchDispatchMode):
    """Inside, the bytes of tensors that come and go: `now`, and the largest sum in each phase. The model's own weights are not counted.

    kept: of them, what the last forward pass has left for backward.
    """

    def __init__(self, model: Transformer):
        super().__init__()
        self.now, self.kept, self.phase, self.peaks = 0, 0, "", Counter()
        self._seen = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.bincount.default:       # tokens per expert: a plan takes them to be equally many
            n, total = args[2], args[0].numel()
            with unset_fake_temporarily():
                return (torch.arange(n) + total) // n
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.at(self.phase)
        return result

    def _freed(self, key: int, n_bytes: int) -> None:
        self._seen.remove(key)
        self.now -= n_bytes

    def at(self, phase: str) -> None:
        self.phase = phase
        self.peaks[phase] = max(self.peaks[phase], self.now)


def _model(model_class: type[_M], config: ModelConfig, lora: Lora | None, dtype: torch.dtype, trainable: bool) -> _M:
    """As load_model makes it, without storage. Inside FakeTensorMode and groups.pretend."""
    model = model_class(config, lora=lora, dtype=dtype)
    for name, module, local, p, _ in list(walk(model)):
        trains = trainable and (lora is None or "lora_" in name or "value_head" in name)
        module._parameters[local] = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=groups.device()), requires_grad=trains)
    return model


@contextlib.contextmanager
def _sizes_only():
    """Inside, tensors have no storage, and what goes by blocks of rows goes through the first two only: no other takes more than the
    second, made while the first is still there."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for module in (losses, transformer):
            stack.callback(setattr, module, "_row_blocks", blocks := module._row_blocks)
            setattr(module, "_row_blocks", lambda *args, blocks=blocks: blocks(*args)[:2])
        yield


def _over_layers(config: ModelConfig, numbers, period: int = 1) -> Counter:
    """numbers(config) -> {name: bytes} for the full config, from two small numbers of layers, `period` apart."""
    first = (config.n_layers - 1) % period + 1 + period
    with _sizes_only():
        if config.n_layers <= first + period:
            return Counter(numbers(config))
        a, b = (numbers(replace(config, n_layers=n)) for n in (first, first + period))
    return Counter({name: a[name] + (config.n_layers - first) // period * (b[name] - a[name]) for name in a})


def _weights(model: Transformer) -> dict[str, int]:
    adapted = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name or "value_head" in name)
    return {"weights": sum(p.nbytes for p in model.parameters()), "adapters": adapted}


def passes(config: ModelConfig, rows: list[tuple[int, int]], *, model_class=CausalLM, lora: Lora | None = None, dtype: torch.dtype, trains: bool = True,
           recompute: str = "none", sequence_parallel: bool = False, precision: str = "master", zero: int = 0, accumulates: bool = False) -> Counter:
    """Bytes by kind of a model and of its training on micro-batches of `rows`, (length, prompt length) each; trains=False: of a pass without gradient.

    "peak": the largest sum of what comes and goes; its kinds are not all there at once. accumulates: a step has several micro-batches.
    """
    def numbers(config):
        model = _model(model_class, config, lora, dtype, trains)
        live = _Live(model)
        model.recompute(recompute)
        model.sequence_parallel(sequence_parallel)
        trainer = Trainer(model, lr=1.0, total_steps=1, precision=precision, zero=zero) if trains else None
        look: Callable = response_logprobs if issubclass(model_class, CausalLM) else response_values

        def leave(phase):       # the phase that begins when backward has come down to this output
            def hook(module, inputs, x):
                if live.phase == "forward" and x.requires_grad:
                    x.register_hook(lambda _: live.at(phase))
            return hook

        def at_head(module, inputs, hidden):
            live.kept = live.now - before
            live.at("loss")

        if trains:
            if config.n_layers > 1:
                model.layers[-2].register_forward_hook(leave("between"))    # its neighbours are the extremes
            model.layers[0].register_forward_hook(leave("first block"))
            model.register_forward_hook(leave("last block"))
        model.register_forward_hook(at_head)
        with live, torch.set_grad_enabled(trains):
            for _ in range(1 + accumulates):
                live.peaks.clear()
                before = live.now
                live.at("forward")
                result = look(model, [[0] * length for length, _ in rows], [prompt for _, prompt in rows]).sum()
                if trains:
                    result.backward()
                del result
        found = {**_weights(model), "logits": live.peaks["loss"] - before - live.kept, "activations": live.kept if trains else live.peaks["forward"],
                 **{phase: live.peaks[phase] for phase in _PHASES}}
        if trainer is not None:
            found |= {"optimizer": trainer.state_bytes, "gradients": 4 * sum(p.numel() for p in trainer.parameters)}
            largest = 4 * max(p.numel() for p in trainer.parameters)
            found["update"] = found["gradients"] + (BUCKETS_TRAVELLING * BUCKET_BYTES + largest) * (groups.dp_size() > 1) + (max(4 * _BUCKET, largest) + largest) * (precision == "kahan")
        return found

    found = _over_layers(config, numbers, recompute_period(recompute) or 1)
    if trains and zero and groups.dp_size() > 1:        # whole parameters are shared out: no sum over layers
        with _sizes_only():
            found["optimizer"] = largest_share(_model(model_class, config, lora, dtype, True), precision)
    found["peak"] = max(found[phase] for phase in (*_PHASES, "update"))
    return found


def generating(config: ModelConfig, prompt: int, longest: int, slots: int, *, lora: Lora | None = None, dtype: torch.dtype) -> Counter:
    """The same of sampling answers: `slots` rows at once, prompts of `prompt` tokens, `longest` with the answer."""
    def numbers(config):
        model = _model(CausalLM, config, lora, dtype, False).eval()
        live = _Live(model)
        packed = [prompt] * min(slots, max(1, _PREFILL_TOKENS // prompt))
        lengths = torch.zeros(slots, dtype=torch.long, device=groups.device())
        model.register_forward_hook(lambda *_: live.at("sampling"))
        # with experts their counts are real numbers among fake tensors, which inference mode does not allow
        with torch.no_grad(), torch.inference_mode(config.n_experts == 0), live:
            cache = model.new_cache(slots, longest)
            live.now = 0            # counted below, as far as it is written
            live.at("prefill")
            cache.begin_prefill(list(range(len(packed))), Rows.packed(packed))
            prompts = cache.n_bytes
            model(torch.zeros(sum(packed), dtype=torch.long, device=groups.device()), Rows.packed(packed), cache)
            live.at("decode")
            cache.begin_decode(lengths, longest - 1)
            hidden = model(lengths, Rows([1] * slots, lengths), cache)
            choose(hidden, model.head_weight, model.partition.held["vocab"], Sampling(1.0), (lengths, lengths, lengths), with_logprobs=True)
        return {**_weights(model), "weight copies": bytes_held(model, model.head_weight), "KV cache": cache.peak_bytes, "activations": live.peaks["prefill"],
                "logits": live.peaks["sampling"], "prefill": prompts + live.peaks["prefill"], "decode": cache.peak_bytes + max(live.peaks["decode"], live.peaks["sampling"])}

    found = _over_layers(config, numbers)
    found["peak"] = max(found["prefill"], found["decode"]) + found["weight copies"]
    return found
