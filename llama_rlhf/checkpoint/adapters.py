"""LoRA adapters between our checkpoints and PEFT folders (adapter_config.json, adapter_model.safetensors).

PEFT adds B(Ax) * alpha / r to a linear layer of transformers' model; we do the same to the native one. A reads the input and is
the same matrix in both; the rows of B follow the output, so those of q and k change their rotary order like the weight's.
A PEFT module that transformers fuses from several native ones (BLOOM's q, k, v in one) gives each of them the same A and its rows of
B. The other way each native adapter keeps its own A, so the fused module gets one of three times the rank: A stacked, B in blocks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch

from llama_rlhf.checkpoint.convert import half_to_interleaved
from llama_rlhf.checkpoint.formats import CheckpointError, open_file, read_json
from llama_rlhf.config import ModelConfig
from llama_rlhf.models import FAMILIES
from llama_rlhf.models.family import Source, lookup
from llama_rlhf.parallel.layers import Lora, Piece

PREFIX = "base_model.model."        # of every module, in PEFT's files
# entries of adapter_config.json that do not change what the adapter computes, beside those that are read below
_HARMLESS = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
             "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "layers_to_transform", "layers_pattern",
             "megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"}
# initialisations that change the base weights too: the adapter alone does not describe the model
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class PeftAdapter:
    """A PEFT LoRA folder, read under native names.

    check(wanted) compares it with the model; read(native) gives an adapter tensor, None for a module it does not target.
    Raises CheckpointError that names every option which would be lost.
    """

    def __init__(self, folder: str, config: ModelConfig):
        self.folder, self.config = folder, config
        path = os.path.join(folder, "adapter_config.json")
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such file; --adapter expects a PEFT folder with adapter_config.json and adapter_model.safetensors")
        options = read_json(path)
        if options.get("peft_type") != "LORA":
            raise CheckpointError(f"{path}: peft_type {options.get('peft_type')!r}; only LORA can be read")
        refused = sorted(f"{key}={value!r}" for key, value in options.items()
                         if value and key not in _HARMLESS and key != "init_lora_weights" and (key, value) != ("bias", "none"))
        init = options.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_CHANGE_BASE):
            refused.append(f"init_lora_weights={init!r}")
        if refused:
            raise CheckpointError(f"{path}: not supported: {', '.join(refused)[:300]}. Merge the adapter with peft's merge_and_unload() "
                                  "and split the result.")
        rank, alpha = options.get("r"), options.get("lora_alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
            raise CheckpointError(f"{path}: r={rank!r} and lora_alpha={alpha!r} are not a rank and a scale")
        # rank-stabilised LoRA divides by sqrt(r) instead of r (Kalajdzievski 2023, arXiv:2312.03732)
        self.lora = Lora(rank, alpha * math.sqrt(rank) if options.get("use_rslora") else alpha)
        names = [name for name in ("adapter_model.safetensors", "adapter_model.bin") if os.path.isfile(os.path.join(folder, name))]
        if not names:
            raise FileNotFoundError(f"{folder}: holds no adapter_model.safetensors")
        self._file = open_file(os.path.join(folder, names[0]))
        self._file.check()
        self._sources: dict[str, Source] = {}       # native adapter tensor -> where it lies

    def check(self, wanted: dict[str, Piece]) -> None:
        """Match every tensor of the file with a module of the model, by name and shape."""
        # a first-generation Qwen may have been fine-tuned as itself or re-saved as Qwen2
        tables = [FAMILIES[name].hf for name in (self.config.family, "qwen2") if name == self.config.family or self.config.family == "qwen"]
        infos, left = self._file.infos, set(self._file.infos)
        for native in (name for name in wanted if name.endswith((".lora_a", ".lora_b"))):
            module, _, half = native.rpartition(".")
            for table in tables:
                source = lookup(table, f"{module}.weight")
                if source is None or source.stacked or source.transposed:
                    continue
                key = f"{PREFIX}{source.name.removesuffix('.weight')}.lora_{half[-1].upper()}.weight"
                if key in infos:
                    break
            else:
                continue
            rows = source.parts if half == "lora_b" else 1
            expected = (wanted[native].shape[0] * rows, *wanted[native].shape[1:])
            if infos[key].shape != expected:
                raise CheckpointError(f"{self._file.path}: {key} is {list(infos[key].shape)}, the model asks for {list(expected)}. "
                                      "The adapter belongs to another model.")
            self._sources[native] = Source(key, source.rope, source.part, source.parts, by_head=source.by_head)
            left.discard(key)
        halves = {name.rpartition(".")[0] for name in self._sources}
        if alone := sorted(module for module in halves if {f"{module}.lora_a", f"{module}.lora_b"} - self._sources.keys()):
            raise CheckpointError(f"{self._file.path}: only one of lora_A and lora_B for {alone[0]}")
        if left or not self._sources:
            raise CheckpointError(f"{self._file.path}: no place in a {self.config.family} model of ours for {len(left)} tensors, e.g. "
                                  f"{', '.join(sorted(left)[:3])}. Adapters go on the linear layers of attention and feed-forward only.")

    def read(self, native: str) -> torch.Tensor | None:
        """fp32, native row order."""
        source = self._sources.get(native)
        if source is None:
            return None
        x, d = self._file.read(source.name).float(), self.config.head_dim
        if native.endswith(".lora_a"):
            return x
        if source.parts > 1:
            x = x.unflatten(0, (-1, source.parts, d))[:, source.part].flatten(0, 1) if source.by_head else x.chunk(source.parts)[source.part]
        return half_to_interleaved(x, d) if source.rope else x


def peft_tensors(rewrite, table: dict[str, Source]) -> dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]]:
    """PEFT's name -> (shape, a function that reads the tensor) for every adapter of a checkpoint of ours."""
    from llama_rlhf.checkpoint.export import foreign_tensors, place_in, to_foreign
    rank, d = rewrite.lora.rank, rewrite.config.head_dim
    tensors: dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]] = {}
    adapted = [name.removesuffix("lora_a") + "weight" for name in rewrite.pieces if name.endswith(".lora_a")]
    for name, natives in foreign_tensors(adapted, table).items():
        a, b = ([native.removesuffix("weight") + half for native in natives] for half in ("lora_a", "lora_b"))

        def read_a(a=a):
            return torch.cat([rewrite.read(native) for native in a])

        def read_b(b=b, sources=[place_in(table, native) for native in natives]):
            blocks = [rewrite.read(native) for native in b]
            return to_foreign([torch.nn.functional.pad(x, (i * rank, (len(b) - 1 - i) * rank)) for i, x in enumerate(blocks)], sources, d)

        prefix, pieces = PREFIX + name.removesuffix(".weight"), rewrite.pieces
        tensors[f"{prefix}.lora_A.weight"] = (rank * len(a), pieces[a[0]].shape[1]), read_a
        tensors[f"{prefix}.lora_B.weight"] = (sum(pieces[native].shape[0] for native in b), rank * len(b)), read_b
    return tensors


def peft_config(lora: Lora, tensors) -> dict:
    """adapter_config.json. target_modules lists the last part of every adapted module's name."""
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    fused = {name.split(".")[-3]: shape[0] // lora.rank for name, (shape, _) in tensors.items() if name.endswith("lora_A.weight") and shape[0] > lora.rank}
    return {**({"rank_pattern": {module: n * lora.rank for module, n in fused.items()},
                "alpha_pattern": {module: n * alpha for module, n in fused.items()}} if fused else {}),
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True, "r": lora.rank,
            "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
            "init_lora_weights": True, "target_modules": sorted({name.split(".")[-3] for name in tensors})}
