"""Any opened checkpoint seen as native tensors: native names, interleaved rotary order, slices on request.

Foreign layouts end here. Nothing is guessed: a tensor that is missing, left over or of another shape is an error by name.
"""

from __future__ import annotations

import os
import re

import torch

from llama_rlhf.checkpoint.formats import Checkpoint, CheckpointError, read_json
from llama_rlhf.config import ModelConfig
from llama_rlhf.models import FAMILIES, config_from_gguf, config_from_hf, config_from_params, disagreements, preset
from llama_rlhf.models.family import Source, lookup
from llama_rlhf.parallel.layers import Piece

MANIFEST = "manifest.json"
FORMAT = "llama_rlhf/1"

# buffers that old exporters saved beside the weights; each is recomputed from the config
_IGNORED = re.compile(r"rope\.freqs|.*\.inner_attention\.rope\.freqs|.*rotary_emb\.inv_freq|.*\.attn\.masked_bias|.*logn_tensor"
                      r"|rope_freqs\.weight")


def half_to_interleaved(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of whole heads, from Hugging Face's rotary order (i pairs with i + d/2) to the native one (2i with 2i + 1)."""
    return x.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def interleaved_to_half(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of half_to_interleaved."""
    return x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def read_manifest(folder: str) -> dict | None:
    """The manifest of a folder this package wrote, checked for form and file sizes; None for a foreign folder."""
    path = os.path.join(folder, MANIFEST)
    if not os.path.exists(path):
        return None
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {manifest.get('format')!r}; this version reads {FORMAT!r}")
    if not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("config"), dict):
        raise CheckpointError(f"{path}: lacks 'files' or 'config'; it is damaged, use another checkpoint")
    for name, entry in manifest["files"].items():
        if not isinstance(name, str) or os.path.basename(name) != name or not isinstance(entry, dict):
            raise CheckpointError(f"{path}: illegal entry {name!r} in 'files'")
        file = os.path.join(folder, name)
        size = os.path.getsize(file) if os.path.exists(file) else None
        if size != entry.get("size"):
            raise CheckpointError(f"{file}: {'is missing' if size is None else f'{size} bytes'}, the manifest says "
                                  f"{entry.get('size')} bytes: truncated or replaced. Copy the checkpoint again, or use another.")
    return manifest


def load_config(checkpoint: Checkpoint, model_type: str = "") -> tuple[ModelConfig, list[str]]:
    """The model's config, from its manifest, config.json, params.json, GGUF header or, failing those, the preset.

    Returns it with notes for the user: where --model_type disagrees with the checkpoint (whose own numbers win).
    """
    named = preset(model_type) if model_type else None
    manifest = read_manifest(checkpoint.folder) if checkpoint.kind == "shards" else None
    if manifest:
        config = ModelConfig.from_dict(manifest["config"])
    elif checkpoint.kind == "gguf":
        config = config_from_gguf(checkpoint.config, checkpoint.infos["token_embd.weight"].shape[0], "output.weight" in checkpoint.infos)
    elif "model_type" in checkpoint.config:
        config = config_from_hf(checkpoint.config)
    elif checkpoint.config:
        config = config_from_params(checkpoint.config, _vocab_size(checkpoint))
    elif named:
        return named, []
    else:
        raise CheckpointError(f"{checkpoint.path}: no config.json or params.json beside the weights. "
                              "Put one there, or name the model with --model_type.")
    notes = []
    if named and (differing := disagreements(config, named)):
        notes.append(f"--model_type {model_type} differs from the checkpoint, whose own numbers are used: " + "; ".join(differing))
    return config, notes


def _vocab_size(checkpoint: Checkpoint) -> int:
    """Rows of the head (or embedding) in Meta's shards; params.json often says -1."""
    files = checkpoint.files
    if "output.weight" in files[0].infos:
        return sum(file.infos["output.weight"].shape[0] for file in files)
    if "tok_embeddings.weight" not in files[0].infos:
        raise CheckpointError(f"{files[0].path}: neither output.weight nor tok_embeddings.weight; not a language model's weights")
    rows, columns = files[0].infos["tok_embeddings.weight"].shape
    return rows * len(files) if columns == checkpoint.config["dim"] else rows


class NativeView:
    """A checkpoint's tensors under native names.

    wanted: native name -> Piece (full shape, cut dimension) of every tensor the model needs.
    optional: native names that may be absent (new adapters, a new value head).
    merge_lora: alpha / rank of adapters in the checkpoint to be added into their base weights, or None.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, wanted: dict[str, Piece], *, optional=frozenset(),
                 ignored=frozenset(), merge_lora: float | None = None):
        self.checkpoint, self.config, self.wanted, self.merge_lora = checkpoint, config, wanted, merge_lora
        self.infos = checkpoint.files[0].infos if checkpoint.kind == "shards" else checkpoint.infos
        family = FAMILIES[config.family]
        self._table = {} if checkpoint.kind == "shards" or "tok_embeddings.weight" in self.infos else \
            family.gguf if checkpoint.kind == "gguf" else family.hf
        self._prefix = ""
        if self._table and (embedding := self._table["tok_embeddings.weight"].name) not in self.infos:
            stripped = embedding.partition(".")[2]          # saved without the leading "model." or "transformer."
            if stripped in self.infos:
                self._prefix = embedding.partition(".")[0] + "."
        self.missing = {name for name in wanted if self._source(name).name not in self.infos}
        used = {self._source(name).name for name in wanted}
        if merge_lora is not None:
            used |= {name for name in self.infos if name.endswith((".lora_a", ".lora_b"))}
        if config.tie_embeddings:
            used.add(self._source("output.weight").name)    # some exporters save the tied head again
        left = sorted(name for name in self.infos.keys() - used if not _IGNORED.fullmatch(name) and name not in ignored)
        problems = [f"{what}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
                    for what, names in (("missing", sorted(self.missing - optional)), ("not understood", left)) if names]
        if problems:
            raise CheckpointError(f"{checkpoint.path}: the tensors do not fit a {config.family} model of {config.n_layers} layers. "
                                  + "; ".join(problems))
        for name in wanted.keys() - self.missing:
            self._check_shape(name)

    def _source(self, native: str) -> Source:
        source = lookup(self._table, native) if self._table else None
        source = source or Source(native)
        if self._prefix and source.name.startswith(self._prefix):
            return Source(source.name[len(self._prefix):], source.rope, source.part, source.parts)
        return source

    def _cut(self, native: str) -> int | None:
        """The dimension along which the shards of this checkpoint cut a tensor."""
        files, piece = self.checkpoint.files, self.wanted[native]
        if len(files) == 1 or piece.dim is None:
            return None
        if native == "tok_embeddings.weight" and files[0].infos[native].shape[0] == piece.shape[0]:
            return 1                        # LLaMA-1/2 and ours for them: cut on hidden
        return piece.dim

    def _check_shape(self, native: str) -> None:
        piece, source, checkpoint = self.wanted[native], self._source(native), self.checkpoint
        if checkpoint.kind != "shards":
            found = list(self.infos[source.name].shape)
            expected = [piece.shape[0] * source.parts, *piece.shape[1:]]
        else:
            if absent := [file.path for file in checkpoint.files if native not in file.infos]:
                raise CheckpointError(f"{absent[0]}: lacks {native}, which consolidated.00.pth has: the shards do not belong together")
            shapes = [list(file.infos[native].shape) for file in checkpoint.files]
            found, expected = shapes[0], list(piece.shape)
            if (cut := self._cut(native)) is not None:
                found = [*shapes[0][:cut], sum(shape[cut] for shape in shapes), *shapes[0][cut + 1:]]
        if found != expected:
            raise CheckpointError(
                f"{checkpoint.path}: {source.name} is {found} over {len(checkpoint.files)} file(s), the config asks for "
                f"{expected}. A shard is missing, the folder mixes two models, or the config beside it is another model's.")

    def dtype(self, native: str) -> torch.dtype:
        return self.infos[self._source(native).name].dtype

    def read(self, native: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows (or columns: the tensor's own cut dimension) start..stop of a native tensor; all of it when replicated."""
        piece = self.wanted[native]
        dim = piece.dim or 0
        stop = piece.shape[dim] if stop is None else stop
        x = self._read(native, dim, start, stop)
        if self.merge_lora is not None and native.endswith(".weight"):
            a, b = (f"{native.removesuffix('.weight')}.lora_{half}" for half in "ab")
            if a in self.infos:
                rows = (start, stop) if dim == 0 else (0, piece.shape[0])
                columns = (start, stop) if dim == 1 else (0, piece.shape[1])
                delta = self._read_lora(b, 0, *rows).float() @ self._read_lora(a, 1, *columns).float()
                x = (x.float() + self.merge_lora * delta).to(x.dtype)      # one rounding; never subtracted again
        return x

    def _read(self, native, dim, start, stop):
        if self.checkpoint.kind == "shards":
            return _read_shards(self.checkpoint.files, native, dim, start, stop, self._cut(native))
        source, piece = self._source(native), self.wanted[native]
        offset = source.part * piece.shape[0]
        x = self.checkpoint.read(source.name, dim, offset + start, offset + stop)
        return half_to_interleaved(x, self.config.head_dim) if source.rope else x

    def _read_lora(self, name, dim, start, stop):
        if self.checkpoint.kind != "shards":
            return self.checkpoint.read(name, dim, start, stop)
        files = self.checkpoint.files
        shapes = [file.infos[name].shape for file in files]
        base = self.wanted[name.rpartition(".")[0] + ".weight"]
        # A follows the input, B the output of its base: one of the two is cut as the base is, the other is replicated
        cut = base.dim if len(files) > 1 and base.dim == (1 if name.endswith("lora_a") else 0) else None
        return _read_shards(files, name, dim, start, min(stop, shapes[0][dim]) if cut != dim else stop, cut)


def _read_shards(files, name, dim, start, stop, cut):
    """start..stop along `dim` of a tensor cut along `cut` over the files (None: every file has all of it)."""
    if cut is None:
        return files[0].read(name, dim, start, stop)
    if cut != dim:
        return torch.cat([file.read(name, dim, start, stop) for file in files], cut)
    parts, offset = [], 0
    for file in files:
        size = file.infos[name].shape[cut]
        a, b = max(start, offset), min(stop, offset + size)
        if a < b:
            parts.append(file.read(name, cut, a - offset, b - offset))
        offset += size
    if not parts:                           # a range without rows still needs the other dimensions
        return files[0].read(name, cut, 0, 0)
    return parts[0] if len(parts) == 1 else torch.cat(parts, cut)
