"""From any checkpoint to a model on these ranks, and back to consolidated.NN.pth: at any tensor-parallel size, from any shard count."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from llama_rlhf import __version__
from llama_rlhf.checkpoint import store
from llama_rlhf.checkpoint.convert import NAMED_TEMPLATES, NativeView, load_config, read_manifest
from llama_rlhf.checkpoint.formats import Checkpoint, CheckpointError, open_checkpoint, open_file, read_json
from llama_rlhf.checkpoint.writer import PthWriter
from llama_rlhf.config import ModelConfig
from llama_rlhf.models import write_params
from llama_rlhf.models.transformer import CausalLM, Transformer, ValueModel
from llama_rlhf.parallel import groups
from llama_rlhf.parallel.layers import Lora, Piece, piece_of, replicated, walk
from llama_rlhf.parallel.partition import Partition

# what stands beside the weights and travels with them
COMPANIONS = ("tokenizer.model", "tokenizer.model.v1", "tokenizer.model.v3", "tokenizer.json", "tokenizer_config.json",
              "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "qwen.tiktoken",
              "tokenizer.bytes.json", "chat_template.jinja", "chat_template.json", "generation_config.json")
_LM_HEAD = frozenset({"output.weight", "lm_head.weight"})         # stands beside the value head where both were trained
_STORED = ("causal_lm", "value_model")


def native_tensors(model: nn.Module) -> dict[str, Piece]:
    """native name -> Piece of every tensor of a model (full shapes, whatever the number of ranks)."""
    return {name: piece for *_, pieces in walk(model) for name, piece in pieces}


@dataclass
class Contents:
    """What a checkpoint holds besides its weights' shapes."""

    config: ModelConfig
    notes: list[str]
    lora: Lora | None
    has_value_head: bool
    manifest: dict | None


def inspect(checkpoint: Checkpoint, model_type: str = "") -> Contents:
    config, notes = load_config(checkpoint, model_type)
    infos = checkpoint.files[0].infos if checkpoint.kind == "shards" else checkpoint.infos
    manifest = read_manifest(checkpoint.folder) if checkpoint.kind == "shards" else None
    ranks = {info.shape[0] for name, info in infos.items() if name.endswith(".lora_a")}
    lora, stored = None, (manifest or {}).get("lora")
    if ranks:
        if len(ranks) > 1 or not stored:
            raise CheckpointError(f"{checkpoint.path}: adapters of ranks {sorted(ranks)} without their alpha in a manifest.json")
        lora = Lora(ranks.pop(), stored["alpha"])
    return Contents(config, notes, lora, "value_head.weight" in infos, manifest)


def verify_contents(checkpoint: Checkpoint, contents: Contents) -> None:
    """Collective: compare a folder of ours with its SHA-256, anyone else's with the checksums its files have, if any."""
    if contents.manifest:
        return store.verify(checkpoint.folder)
    with groups.together(f"verifying {checkpoint.path}"):
        for file in checkpoint.files:
            file.check(groups.rank(), groups.world_size())


def look_inside(path: str) -> Contents:
    """Collective. What a checkpoint holds, its weights unread."""
    with groups.together(f"opening {path}"), open_checkpoint(store.resolve(path)) as checkpoint:
        return inspect(checkpoint)


def load_model(path: str, model_class: type[Transformer] = CausalLM, *, lora: Lora | Literal["stored"] | None = None, dtype=torch.float32,
               model_type: str = "", seed: int = 0, verify: bool = True, trainable: bool = True, need_head: bool = False,
               share: Sequence[Transformer] = ()) -> Any:
    """Collective. A model_class, CausalLM or ValueModel, with this rank's weights, on this rank's device.

    lora: train adapters of this rank and alpha; continues those in the checkpoint, or starts new ones (B = 0, seeded).
          None: no adapters; those in the checkpoint are added into the weights (fp32 sum, one rounding).
          "stored": adapters if the checkpoint holds some, beside the weights.
    trainable: gradients are asked for by all parameters, or by the adapters and the value head only when there are adapters;
          False: by none.
    need_head: a ValueModel's head must be in the checkpoint; otherwise a missing one is drawn.
    share: models already loaded. A frozen weight equal, bit for bit, to a frozen one of theirs is the same memory: one base
          serves several adapters.
    A ValueModel's `score` is what the checkpoint says of its scores (see reward.py), None when nothing.
    Raises CheckpointError (a ValueError) or FileNotFoundError on every rank.
    """
    path = store.resolve(path)
    with groups.together(f"opening {path}"):
        checkpoint = open_checkpoint(path)
        contents = inspect(checkpoint, model_type)
    for note in contents.notes:
        groups.log("note:", note)
    if verify:
        verify_contents(checkpoint, contents)
    with groups.together(f"loading {path}"):
        if model_class is CausalLM and contents.has_value_head:
            raise CheckpointError(f"{path} is a reward or value model: it has a value head and cannot generate text. "
                                  "Give the checkpoint of a policy.")
        if need_head and not contents.has_value_head:
            raise CheckpointError(f"{path} has no value head: it is not a reward model. Train one with verifier_train.py, "
                                  "or give the folder that it saved.")
        if isinstance(lora, str):       # "stored"
            lora = contents.lora
        if lora and contents.lora and lora != contents.lora:
            raise CheckpointError(f"{path} holds adapters of rank {contents.lora.rank}, alpha {contents.lora.alpha}; asked for rank "
                                  f"{lora.rank}, alpha {lora.alpha}. Use those, or --lora_rank -1 to merge them and train all weights.")
        model = model_class(contents.config, lora=lora, dtype=dtype)
        wanted = native_tensors(model)
        adapters = {name for name in wanted if name.endswith((".lora_a", ".lora_b"))}
        head = {"value_head.weight", "value_head.bias"} & wanted.keys()
        ignored = frozenset() if model_class is CausalLM else _LM_HEAD
        merged = contents.lora if not lora else None
        view = NativeView(checkpoint, contents.config, native_tensors(model_class(contents.config, lora=merged)) if merged else wanted,
                          optional=adapters | head, ignored=ignored, merge_lora=merged.scale if merged else None)
        if view.missing & adapters and adapters - view.missing:
            raise CheckpointError(f"{path}: some adapters are missing ({sorted(view.missing & adapters)[0]}, ...)")
        trains = {name for name, _ in model.named_parameters()
                  if trainable and (lora is None or "lora_" in name or "value_head" in name)}
        donors = [{name: p for name, p in other.named_parameters() if not p.requires_grad} for other in share]
        _fill(model, view, seed, trains, donors)
        checkpoint.close()
    if isinstance(model, ValueModel):
        model.score = (contents.manifest or {}).get("score")
    new = sorted({name.rpartition(".")[2] if name in adapters else name for name in view.missing})
    if new:
        groups.log(f"new, not in {path}: {', '.join(new)}")
    return model


def _fill(model: Transformer, view: NativeView, seed: int, trains: set[str], donors: list[dict[str, nn.Parameter]]) -> None:
    """Replace every meta parameter by this rank's values; frozen ones by a donor's parameter where that is equal."""
    for name, module, local, parameter, pieces in list(walk(model)):
        full = torch.empty(parameter.shape, dtype=parameter.dtype, device=groups.device())
        for native, piece in pieces:
            target = piece_of(full, piece)
            if native in view.missing:
                target.copy_(_initial(native, piece, seed))
            elif piece.dim is None:
                target.copy_(view.read(native))
            else:
                target.copy_(view.read(native, *piece.held))
        twins = [] if name in trains else [donor[name] for donor in donors if name in donor]
        twin = next((t for t in twins if t.shape == full.shape and t.dtype == full.dtype and torch.equal(t, full)), None)
        module._parameters[local] = nn.Parameter(full, requires_grad=name in trains) if twin is None else twin


def _initial(native: str, piece: Piece, seed: int) -> torch.Tensor:
    """A new tensor's part for this rank, cut from one draw of the full tensor: the same model at every number of ranks."""
    if native.endswith((".lora_b", ".bias")):
        full = torch.zeros(piece.shape)
    else:
        generator = torch.Generator().manual_seed(zlib.crc32(native.encode(), seed & 0xffffffff))      # torch takes 32 bits
        fan_in = piece.shape[-1]
        if native.endswith(".lora_a"):      # peft's choice: uniform within 1 / sqrt(fan in of the full, uncut layer)
            full = (torch.rand(piece.shape, generator=generator) * 2 - 1) / fan_in ** 0.5
        else:                               # value head: N(0, 1/(d+1)), as summarize-from-feedback (Huang et al. 2024, arXiv:2403.17031)
            full = torch.randn(piece.shape, generator=generator) / (fan_in + 1) ** 0.5
    return full if piece.dim is None else full.narrow(piece.dim, piece.held[0], piece.held[1] - piece.held[0])


def cut_for_file(native: str, piece: Piece, config: ModelConfig) -> int | None:
    """The dimension along which our files cut a tensor."""
    return 1 if native == "tok_embeddings.weight" and config.embedding_cut == "hidden" else piece.dim


def _manifest(config: ModelConfig, wanted: dict[str, Piece], lora: Lora | None, n: int, has_value_head: bool, more: dict) -> dict:
    return {"kind": _STORED[has_value_head], "written_by": f"llama_rlhf {__version__}", "n_shards": n,
            "config": config.to_dict(), "lora": lora and {"rank": lora.rank, "alpha": lora.alpha},
            "plan": {name: {"shape": piece.shape, "cut": cut_for_file(name, piece, config), "unit": piece.kind}
                     for name, piece in wanted.items()}, **more}


def copy_companions(source: str, target: str) -> dict:
    """Put what belongs to the tokenizer into the folder `target`; returns the files' manifest entries.

    source: folder, or GGUF file, the model came from.
    """
    from llama_rlhf.tokenizer import _gguf
    if (gguf := _gguf(Path(source))) is not None:
        from llama_rlhf.checkpoint.gguf_tokenizer import write_tokenizer_files
        return {os.path.basename(path): store.seal(path) for path in write_tokenizer_files(str(gguf), target)}
    for folder in (source, os.path.dirname(os.path.abspath(source))) if os.path.exists(source) else ():      # Meta keeps tokenizer.model one folder up
        found = [name for name in COMPANIONS if os.path.isfile(os.path.join(folder, name))]
        found += sorted(f"{NAMED_TEMPLATES}/{path.name}" for path in Path(folder, NAMED_TEMPLATES).glob("*.jinja") if path.is_file())
        if any("tokenizer" in name or "tiktoken" in name for name in found):
            if found[-1].startswith(NAMED_TEMPLATES):
                os.makedirs(os.path.join(target, NAMED_TEMPLATES), exist_ok=True)
            entries = {name: store.copy_file(os.path.join(folder, name), os.path.join(target, name)) for name in found}
            if "generation_config.json" not in found and (eos := _eos_of_config(folder)) is not None:
                entries["generation_config.json"] = store.write_json(os.path.join(target, "generation_config.json"), {"eos_token_id": eos})
            return entries
    return {}


def _eos_of_config(folder: str) -> int | list[int] | None:
    """What ends generation, if config.json, which stays behind, has a say in it."""
    from llama_rlhf.tokenizer import load_tokenizer
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path) or read_json(path).get("eos_token_id") is None:
        return None
    try:
        eos = list(load_tokenizer(folder).eos_ids)
    except (ValueError, FileNotFoundError):     # the weights are of use without a tokenizer
        return None
    return eos[0] if len(eos) == 1 else eos or None


def _write_companions(temporary: str, config: ModelConfig, source: str) -> dict:
    """params.json and the tokenizer's files."""
    params = store.write_json(os.path.join(temporary, "params.json"), write_params(config))
    return {"params.json": params, **copy_companions(source, temporary)}


def save_model(model: Transformer, folder: str, *, companions: str, trainer=None, **more) -> None:
    """Collective. Publish this model as one consolidated.NN.pth per tensor-parallel rank; replicas write once.

    companions: the folder whose tokenizer files go along.  more: further manifest fields (step, epoch, score, ...).
    trainer: its state goes along, one training.NN.pth per tensor-parallel rank (and replica, where they share it), for `load_training_state`:
    what has a parameter's shape under the parameter's native names, cut as the weights are; everything else as it is.
    """
    config, wanted, writes = model.config, native_tensors(model), groups.dp_rank() == 0
    entries, state = _what_is_saved(model, trainer)

    def write(temporary: str) -> dict:
        result = _write_companions(temporary, config, companions) if groups.is_main() else {}
        if len(result) == 1:
            groups.log(f"note: {companions} has no tokenizer's files, so {folder} is saved without. Copy them into it before it is used.")
        if writes:
            name = f"consolidated.{groups.tp_rank():02d}.pth"
            with PthWriter(os.path.join(temporary, name)) as writer:
                for native, x in entries:
                    writer.write(native, (embedding if native == "tok_embeddings.weight" and embedding is not None else x).cpu())
                result |= {name: writer.close()}
        if state:
            name = _training_file(trainer, groups.tp_rank())
            with PthWriter(os.path.join(temporary, name)) as writer:
                for key, x in state.items():
                    writer.write(key, x.cpu())
                result |= {name: writer.close()}
        return result

    embedding = None
    if config.embedding_cut == "hidden" and groups.tp_size() > 1:
        embedding = _recut_embedding(model)
    store.publish(folder, write, _manifest(config, wanted, model.lora, groups.tp_size(), isinstance(model, ValueModel), more),
                  n_bytes=_save_bytes(entries, state))
    if trainer is not None:
        trainer.last_save = folder


def _what_is_saved(model: Transformer, trainer) -> tuple[list[tuple[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """(native name, tensor) of the weights that this rank writes, and the trainer's state: replicas write once what they share."""
    writes = groups.dp_rank() == 0
    entries = [(native, piece_of(parameter.detach(), piece, owned=True)) for _, _, _, parameter, pieces in walk(model) for native, piece in pieces] if writes else []
    return entries, _native_state(model, trainer.state_tensors()) if trainer is not None and (writes or trainer.sharded) else {}


def _save_bytes(entries, state) -> int:
    return sum(x.nbytes for _, x in entries) + sum(x.nbytes for x in state.values())


def check_space(saves: dict[str, tuple[Transformer, Any]]) -> None:
    """Collective. CheckpointError where there is no room for a save of each: folder -> (model, trainer). Better before the first step than after an epoch."""
    sizes = groups.gather_objects([_save_bytes(*_what_is_saved(*save)) for save in saves.values()])
    with groups.together("checking the space to save in"):
        needed: Counter = Counter()
        for folder, *of_ranks in zip(saves, *sizes):
            needed[os.stat(folder).st_dev] += sum(of_ranks)
        for folder in saves:
            store.check_free_space(folder, needed[os.stat(folder).st_dev])


def _native_state(model: Transformer, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A trainer's "parameter.key" -> tensor as "native name.key" -> the part of it that this rank owns."""
    layout, result = {name: (parameter, pieces) for name, _, _, parameter, pieces in walk(model)}, {}
    for key, x in state.items():
        name, _, what = key.rpartition(".")
        if name in layout and layout[name][0].shape == x.shape:
            result |= {f"{native}.{what}": piece_of(x, piece, owned=True) for native, piece in layout[name][1]}
        else:
            result[key] = x
    return result


def _training_file(trainer, tp_rank: int) -> str:
    return f"training.{tp_rank:02d}{f'.{groups.dp_rank():02d}' if trainer.sharded else ''}.pth"


def load_training_state(trainer, folder: str) -> None:
    """Collective. Give a trainer the state that `save_model` stored with its model, at whatever number of tensor-parallel ranks.
    ValueError on every rank when it does not fit."""
    with groups.together(f"loading the optimizer state of {folder}"), contextlib.ExitStack() as opened:
        n_shards = (read_manifest(folder) or {}).get("n_shards", 1)
        paths = [os.path.join(folder, _training_file(trainer, rank)) for rank in range(n_shards)]
        if missing := [path for path in paths if not os.path.exists(path)]:
            raise CheckpointError(f"{missing[0]} is missing: {folder} holds no optimizer state to resume from. Start a new run from its weights.")
        files = [opened.enter_context(open_file(path)) for path in paths]
        files = [{key: file.read(key) for key in file.infos} for file in files]         # views of the mapped files
        same = n_shards == groups.tp_size()
        own = files[groups.tp_rank()] if same else files[0]

        def read(key: str, piece: Piece) -> torch.Tensor:
            if piece.dim is None or same and piece.held == piece.owned:
                return own[key]
            return torch.cat([file[key] for file in files], piece.dim).narrow(piece.dim, piece.held[0], piece.held[1] - piece.held[0])

        kinds, state, taken = {}, {}, set()
        for key in own:
            kinds.setdefault(key.rpartition(".")[0], []).append(key.rpartition(".")[2])
        for name, _, _, parameter, pieces in walk(trainer.model):
            for what in kinds.get(pieces[0][0], ()) if parameter.requires_grad else ():
                keys = [f"{native}.{what}" for native, _ in pieces]
                if own[keys[0]].dim() != parameter.dim() or not all(key in own for key in keys):
                    continue            # a number beside the moments, the step count
                state[f"{name}.{what}"] = full = torch.empty(parameter.shape, dtype=own[keys[0]].dtype)
                for key, (_, piece) in zip(keys, pieces):
                    piece_of(full, piece).copy_(read(key, piece))
                taken |= set(keys)
        trainer.load_state_tensors({**{key: x for key, x in own.items() if key not in taken}, **state})
        trainer.last_save = folder


def _recut_embedding(model: Transformer) -> torch.Tensor:
    """Collective: this rank's columns of the whole embedding [V, dim/n], from the vocabulary rows each rank holds."""
    start, stop = model.partition.held["hidden"][groups.tp_rank()]
    weight, parts = model.tok_embeddings.weight.detach(), []
    for rank, (first, last) in enumerate(model.partition.held["vocab"]):
        rows = weight if rank == groups.tp_rank() else weight.new_empty(last - first, weight.shape[1])
        torch.distributed.broadcast(rows, torch.distributed.get_global_rank(groups.tp_group(), rank), group=groups.tp_group())
        parts.append(rows[:, start:stop].clone())
    return torch.cat(parts)


class Rewrite:
    """A checkpoint opened to be written again: every tensor of the result, whole, under its native name, one at a time.

    dtype: of the weights; None keeps each tensor's own. Adapters and a value head stay fp32.
    merge_lora: add the adapters into their weights (fp32 sum, one rounding); otherwise they go along.
    adapter: a PEFT folder whose adapters are put on the checkpoint.
    pieces: native name -> Piece of every tensor of the result.  lora: rank and alpha of the adapters that go along.
    """

    def __init__(self, source: str, *, dtype: torch.dtype | None = None, model_type: str = "", merge_lora: bool = False,
                 adapter: str = ""):
        source = store.resolve(source)
        if os.path.exists(os.path.join(source, "adapter_config.json")):
            raise CheckpointError(f"{source} is a PEFT adapter. Give its base model as --ckpt_file and this folder as --adapter.")
        self.checkpoint = open_checkpoint(source)
        contents = self.contents = inspect(self.checkpoint, model_type)
        self.config, self._dtype, self._peft = contents.config, dtype, None
        lora = contents.lora
        if adapter:
            from llama_rlhf.checkpoint.adapters import PeftAdapter
            if lora:
                raise CheckpointError(f"{source} has adapters of its own. Add them into its weights first, with --merge_lora.")
            self._peft = PeftAdapter(adapter, self.config)
            lora = self._peft.lora
        elif merge_lora and not lora:
            raise CheckpointError(f"{source} holds no adapters to merge. Leave out --merge_lora, or name them with --adapter.")
        model = (ValueModel if contents.has_value_head else CausalLM)(self.config, lora=lora, dtype=torch.float32)
        wanted = native_tensors(model)
        adapters = frozenset(name for name in wanted if name.endswith((".lora_a", ".lora_b")))
        self._view = NativeView(self.checkpoint, self.config, wanted, optional=adapters if adapter else frozenset(),
                                ignored=_LM_HEAD if contents.has_value_head else frozenset(),
                                merge_lora=lora.scale if lora and merge_lora else None, absent=self._from_peft)
        if self._peft:
            self._peft.check(wanted)
        self.lora = None if merge_lora else lora
        self.pieces = {name: piece for name, piece in wanted.items() if not merge_lora or name not in adapters}
        self._adapters = adapters

    @property
    def carried(self) -> dict:
        """What the source's manifest says of a reward model's scores."""
        score = (self.contents.manifest or {}).get("score")
        return {"score": score} if score else {}

    @property
    def tokenizer_source(self) -> str:
        return self.checkpoint.path if self.checkpoint.kind == "gguf" else self.checkpoint.folder

    def dtype(self, native: str) -> torch.dtype:
        """Of a tensor of the result."""
        if native in self._adapters or "value_head" in native:
            return torch.float32 if native in self._view.missing else self._view.dtype(native)
        return self._dtype or self._view.dtype(native)

    def stored_name(self, native: str) -> str:
        """The tensor of the source that it comes from, or is a part of."""
        return self._view.stored_name(native)

    def nbytes(self, native: str) -> int:
        return torch.Size(self.pieces[native].shape).numel() * self.dtype(native).itemsize

    def read(self, native: str) -> torch.Tensor:
        """A whole tensor of the result; it may view the mapped file."""
        dtype = self.dtype(native)
        y = self._view.read(native, dtype=dtype)
        if dtype == torch.float16 and (self._view.merge_lora is not None or self._view.dtype(native) != dtype) and not y.isfinite().all():
            x = self._view.read(native, dtype=torch.float32)
            if x.isfinite().all():
                raise CheckpointError(f"{self.checkpoint.path}: {native} has values up to {x.abs().max():.3g}, and fp16 ends at 65504. "
                                      "Use bf16 or fp32.")
        return y

    def _from_peft(self, native: str) -> torch.Tensor:
        assert self._peft is not None
        x = self._peft.read(native)
        # modules that the PEFT adapter leaves alone get new adapters, which add nothing until they are trained
        return _initial(native, replicated(native, self._view.wanted[native].shape), 0) if x is None else x

    def __str__(self) -> str:
        c, files = self.config, self.checkpoint.files
        parts = [f"{c.family}, {c.n_layers} layers, {sum(torch.Size(p.shape).numel() for p in self.pieces.values()) / 1e6:.1f} M parameters",
                 f"{len(files)} x {os.path.splitext(files[0].path)[1]}, {self.checkpoint.bytes_total / 1e9:.2f} GB"]
        if lora := self._peft.lora if self._peft else self.contents.lora:
            parts.append(f"adapters of rank {lora.rank}, alpha {lora.alpha:g}{'' if self.lora else ' to be merged'}")
        return ", ".join(parts + ["value head"] * self.contents.has_value_head)

    def check(self) -> None:
        """Compare a checkpoint of ours with its checksums before a byte is written."""
        for note in self.contents.notes:
            groups.log("note:", note)
        verify_contents(self.checkpoint, self.contents)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.checkpoint.close()


def check_new_folder(folder: str) -> None:
    """Refuse a target that publishing would fail on, before hours of reading."""
    folder = os.path.realpath(folder)
    if os.path.ismount(folder):
        raise CheckpointError(f"{folder} is a mount point, whose place a finished folder cannot take. Choose a folder inside it.")
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise CheckpointError(f"{folder} is a file. Choose another folder, or remove it.")
    if os.path.isdir(folder) and os.listdir(folder):
        raise CheckpointError(f"{folder} exists and is not empty. Choose another folder, or remove this one.")
    parent = os.path.dirname(folder)
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot write in {parent}: it is {'not a folder' if not os.path.isdir(parent) else 'write-protected'}. "
                              "Choose another place.")


def split_checkpoint(source: str, folder: str, n: int, *, dtype: torch.dtype | None = None, model_type: str = "",
                     merge_lora: bool = False, adapter: str = "", tokenizer: str = "",
                     progress: Callable[[int, int], None] | None = None) -> ModelConfig:
    """Rewrite any checkpoint as n shards, one tensor in memory at a time; n=1 merges.

    dtype, merge_lora, adapter: see Rewrite.  tokenizer: folder to take its files from, when not beside the weights.
    progress: called with bytes done and bytes in all after every tensor.
    Raises CheckpointError, FileNotFoundError, ValueError when no cut for n exists; `folder` then does not exist.
    """
    check_new_folder(folder)
    with Rewrite(source, dtype=dtype, model_type=model_type, merge_lora=merge_lora, adapter=adapter) as rewrite:
        config, pieces = rewrite.config, rewrite.pieces
        plan = Partition(config, n)
        groups.log(f"read {source}: {rewrite}")
        rewrite.check()
        n_bytes = sum(rewrite.nbytes(name) * (1 if piece.dim is not None else n) for name, piece in pieces.items())

        def write(temporary: str) -> dict:
            entries = _write_companions(temporary, config, tokenizer or rewrite.tokenizer_source)
            names, done = [f"consolidated.{r:02d}.pth" for r in range(n)], 0
            writers = []
            try:
                writers += [PthWriter(os.path.join(temporary, name)) for name in names]
                # each shard computes its own checksums: two or more at a time use the processor's cores
                with ThreadPoolExecutor(min(n, os.cpu_count() or 1)) as pool:
                    for native, piece in pieces.items():
                        x, cut, parts = rewrite.read(native), cut_for_file(native, piece, config), None
                        if n > 1 and cut is not None:
                            ranges = plan.owned[piece.kind] if cut == piece.dim else plan.held["hidden"]
                            parts = [x.narrow(cut, start, stop - start) for start, stop in ranges]
                        parts = parts or [x] * n
                        list(pool.map(PthWriter.write, writers, [native] * n, parts))
                        done += sum(part.nbytes for part in parts)
                        if progress:
                            progress(done, n_bytes)
                    closed = list(pool.map(PthWriter.close, writers))
                return entries | dict(zip(names, closed))
            except BaseException:
                for writer in writers:
                    writer.discard()
                raise

        store.publish(folder, write, _manifest(config, pieces, rewrite.lora, n, rewrite.contents.has_value_head, rewrite.carried),
                      n_bytes=n_bytes)
        return config
