"""Any opened checkpoint seen as native tensors: native names, interleaved rotary order, slices on request.

Foreign layouts end here. Nothing is guessed: a tensor that is missing, left over or of another shape is an error by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace

import torch

from llama_rlhf.checkpoint.formats import Checkpoint, CheckpointError, read_json
from llama_rlhf.config import ModelConfig
from llama_rlhf.models import (
    FAMILIES, config_from_gguf, config_from_hf, config_from_params, disagreements, llama3_scaling, preset,
)
from llama_rlhf.models.family import Source, lookup
from llama_rlhf.models.transformer import rotary_frequencies
from llama_rlhf.parallel.layers import Piece

MANIFEST = "manifest.json"
FORMAT = "llama_rlhf/1"
NAMED_TEMPLATES = "additional_chat_templates"       # the only folder in a checkpoint, as transformers 5 has it

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
    if not intact(manifest):
        raise CheckpointError(f"{path} is corrupt: it does not have the SHA-256 that it states. Copy the checkpoint again, or use another.")
    if not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("config"), dict):
        raise CheckpointError(f"{path}: lacks 'files' or 'config'; it is damaged, use another checkpoint")
    for name, entry in manifest["files"].items():
        if not isinstance(name, str) or os.path.basename(name) != name.removeprefix(f"{NAMED_TEMPLATES}/") or not isinstance(entry, dict):
            raise CheckpointError(f"{path}: illegal entry {name!r} in 'files'")
        file = os.path.join(folder, name)
        size = os.path.getsize(file) if os.path.exists(file) else None
        if size != entry.get("size"):
            raise CheckpointError(f"{file}: {'is missing' if size is None else f'{size} bytes'}, the manifest says "
                                  f"{entry.get('size')} bytes: truncated or replaced. Copy the checkpoint again, or use another.")
    return manifest


def seal(manifest: dict) -> str:
    """The SHA-256 of everything in a manifest but its entry "sha256", which states it."""
    rest = json.loads(json.dumps({key: value for key, value in manifest.items() if key != "sha256"}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def intact(manifest: dict) -> bool:
    """Whether a manifest is as it was written; those of earlier versions do not say."""
    return "sha256" not in manifest or manifest["sha256"] == seal(manifest)


def load_config(checkpoint: Checkpoint, model_type: str = "") -> tuple[ModelConfig, list[str]]:
    """The model's config, from its manifest, config.json, params.json, GGUF header or, failing those, the preset.

    Returns it with notes for the user: where --model_type disagrees with the checkpoint (whose own numbers win).
    """
    named = preset(model_type) if model_type else None
    where = checkpoint.config_file or checkpoint.path
    try:
        return _load_config(checkpoint, model_type, named)
    except (CheckpointError, FileNotFoundError):
        raise
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except Exception as error:      # a number where a list belongs, ...
        raise CheckpointError(f"{where}: not the config of a model ({type(error).__name__}: {str(error)[:200]})") from error


def _load_config(checkpoint, model_type, named):
    manifest, notes = read_manifest(checkpoint.folder) if checkpoint.kind == "shards" else None, []
    if manifest:
        config = ModelConfig.from_dict(manifest["config"])
    elif checkpoint.kind == "gguf":
        infos = checkpoint.infos
        config = config_from_gguf(checkpoint.config, infos["token_embd.weight"].shape[0], "output.weight" in infos)
        if "rope_freqs.weight" in infos:
            config = _scaled_as(config, checkpoint.read("rope_freqs.weight"), checkpoint.path)
    elif "model_type" in checkpoint.config:
        config = config_from_hf(checkpoint.config)
        if config.tie_embeddings and _has_head_of_its_own(checkpoint, config.family):
            config = replace(config, tie_embeddings=False)
            notes.append("the config ties head and embedding, but the file holds two different ones: both are used")
    elif checkpoint.config:
        config = config_from_params(checkpoint.config, _vocab_size(checkpoint))
        if config.family == "llama" and config.rope_scaling:        # from 3.1 on; params.json does not say
            config = replace(config, tie_embeddings=_holds_one_matrix(checkpoint))
    elif named:
        return named, []
    elif os.path.exists(os.path.join(checkpoint.folder, "adapter_config.json")):
        raise CheckpointError(f"{checkpoint.path} is a PEFT adapter. Put it on its base model: checkpoint_split.py --ckpt_file BASE --adapter {checkpoint.folder}")
    else:
        raise CheckpointError(f"{checkpoint.path}: no config.json or params.json beside the weights. "
                              "Put one there, or name the model with --model_type.")
    if config.family not in FAMILIES:
        raise CheckpointError(f"{checkpoint.path}: its manifest names the family {config.family!r:.80}; known: {', '.join(FAMILIES)}")
    held = sum(math.prod(info.shape) for file in checkpoint.files for info in file.infos.values())
    if config.n_parameters > 2 * held:      # twice: a value model is saved without a head. Said before a model of a billion layers is laid out
        raise CheckpointError(f"{checkpoint.path}: the config asks for {config.n_parameters} parameters, the files hold {held}. "
                              "A file is missing, or the config is another model's.")
    if named and (differing := disagreements(config, named)):
        notes.append(f"--model_type {model_type} differs from the checkpoint, whose own numbers are used: " + "; ".join(differing))
    return config, notes


def _has_head_of_its_own(checkpoint: Checkpoint, family: str) -> bool:
    """Whether head and embedding both stand in the file and differ. (Some exporters save the tied head again.)"""
    names = [name if name in checkpoint.infos else name.partition(".")[2] for name in (FAMILIES[family].hf[n].name for n in ("tok_embeddings.weight", "output.weight"))]
    if any(name not in checkpoint.infos for name in names):
        return False
    rows, n = [checkpoint.infos[name].shape for name in names], 4096
    return rows[0] != rows[1] or not all(torch.equal(*(checkpoint.read(name, 0, start, min(start + n, rows[0][0])) for name in names)) for start in range(0, rows[0][0], n))


def _scaled_as(config: ModelConfig, factors: torch.Tensor, path: str) -> ModelConfig:
    """The config with the rotary scaling whose factors a GGUF file lists. Its header does not name the kind: take LLaMA-3's
    numbers, and insist that they give these factors."""
    scaled = replace(config, rope_scaling=llama3_scaling(round(factors.max().item(), 3)))
    expected = rotary_frequencies(config) / rotary_frequencies(scaled)
    if expected.shape != factors.shape or not torch.allclose(expected, factors.float(), rtol=1e-3):
        raise CheckpointError(f"{path}: rope_freqs.weight is not LLaMA-3's rotary scaling; no other is supported in GGUF files")
    return scaled


def _holds_one_matrix(checkpoint: Checkpoint) -> bool:
    """Whether head and embedding are one, as in LLaMA-3.2's 1B and 3B: no output.weight, or one that is the same bytes of the file."""
    infos = checkpoint.files[0].infos
    if len(checkpoint.files) > 1 or "output.weight" not in infos:
        return "output.weight" not in infos
    head, embedding = (checkpoint.files[0].read(name, 0, 0, 1) for name in ("output.weight", "tok_embeddings.weight"))
    return head.data_ptr() == embedding.data_ptr()


def _vocab_size(checkpoint: Checkpoint) -> int:
    """Rows of the head (or embedding) in Meta's shards; params.json often says -1."""
    files = checkpoint.files
    if checkpoint.kind != "shards":
        for name in ("output.weight", "tok_embeddings.weight"):
            if name in checkpoint.infos:
                return checkpoint.infos[name].shape[0]
    if "output.weight" in files[0].infos:
        return sum(file.infos["output.weight"].shape[0] for file in files)
    if "tok_embeddings.weight" not in files[0].infos:
        raise CheckpointError(f"{files[0].path}: neither output.weight nor tok_embeddings.weight; not a language model's weights")
    rows, columns = files[0].infos["tok_embeddings.weight"].shape
    return rows * len(files) if columns == checkpoint.config["dim"] else rows


class NativeView:
    """A checkpoint's tensors under native names.

    wanted: native name -> Piece (full shape, cut dimension) of every tensor the model needs.
    optional: native names that may be absent (new adapters, a new value head).  ignored: foreign names that may be left over.
    merge_lora: alpha / rank of adapters, among `wanted`, to be added into their base weights, or None.
    absent: gives the whole of a tensor that the checkpoint lacks, when such a one is read.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, wanted: dict[str, Piece], *, optional=frozenset(),
                 ignored=frozenset(), merge_lora: float | None = None, absent: Callable[[str], torch.Tensor] | None = None):
        self.checkpoint, self.config, self.wanted, self.merge_lora, self._absent = checkpoint, config, wanted, merge_lora, absent
        self.infos = checkpoint.files[0].infos if checkpoint.kind == "shards" else checkpoint.infos
        self._choose_layout()
        self.missing = {name for name in wanted if self._source(name).name not in self.infos}
        used = {self._source(name).name for name in wanted}
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

    def _choose_layout(self) -> None:
        """The family's layout, of those its files come in, that has the most of the wanted names."""
        family = FAMILIES[self.config.family]
        layouts = ({},) if self.checkpoint.kind == "shards" else (family.gguf,) if self.checkpoint.kind == "gguf" else \
            (family.hf, *family.other_layouts, {})
        best = -1
        for table in layouts:
            prefix = ""
            if table and "tok_embeddings.weight" in table and (name := table["tok_embeddings.weight"].name) not in self.infos \
                    and name.partition(".")[2] in self.infos:
                prefix = name.partition(".")[0] + "."       # saved without the leading "model." or "transformer."
            sources = {}
            for native in (*self.wanted, "output.weight"):
                source = (lookup(table, native) if table else None) or Source(native)
                sources[native] = replace(source, name=source.name.removeprefix(prefix))
            found = sum(sources[native].name in self.infos for native in self.wanted)
            if found > best:
                best, self._sources = found, sources
        embedding, head = self._source("tok_embeddings.weight"), self._source("output.weight")
        if self.config.tie_embeddings and self.checkpoint.kind != "shards" and embedding.name not in self.infos and head.name in self.infos:
            self._sources["tok_embeddings.weight"] = head       # of shared tensors safetensors' save_model keeps the first name: lm_head

    def _source(self, native: str) -> Source:
        return self._sources[native]

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
            rows, *columns = reversed(piece.shape) if source.transposed else piece.shape
            expected = [rows * source.parts, *columns]
            if source.stacked:
                expected = [self.config.n_experts, *expected] if len(found) == 3 else [self.config.n_experts * expected[0], *columns]
        else:
            if absent := [file.path for file in checkpoint.files if native not in file.infos]:
                raise CheckpointError(f"{absent[0]}: lacks {native}, which consolidated.00.pth has: the shards do not belong together")
            shapes = [list(file.infos[native].shape) for file in checkpoint.files]
            found, expected, cut = shapes[0], list(piece.shape), self._cut(native)
            for file, shape in zip(checkpoint.files, shapes):
                if len(checkpoint.files) > 1 and [n for i, n in enumerate(shape) if i != cut] != [n for i, n in enumerate(shapes[0]) if i != cut]:
                    raise CheckpointError(f"{file.path}: {native} is {shape}, in consolidated.00.pth {shapes[0]}: the shards do not belong together")
            if cut is not None:
                found = [*shapes[0][:cut], sum(shape[cut] for shape in shapes), *shapes[0][cut + 1:]]
        if found != expected:
            raise CheckpointError(
                f"{checkpoint.path}: {source.name} is {found} over {len(checkpoint.files)} file(s), the config asks for "
                f"{expected}. A shard is missing, the folder mixes two models, or the config beside it is another model's.")

    def stored_name(self, native: str) -> str:
        """The tensor of the checkpoint that it comes from, or is a part of."""
        return self._source(native).name

    def dtype(self, native: str) -> torch.dtype:
        return self.infos[self._source(native).name].dtype

    def read(self, native: str, start: int = 0, stop: int | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows (or columns: the tensor's own cut dimension) start..stop of a native tensor; all of it when replicated.

        dtype: None keeps the stored one. A weight with its adapter is their sum in fp32, rounded once.
        """
        piece = self.wanted[native]
        dim = piece.dim or 0
        stop = piece.shape[dim] if stop is None else stop
        x = self._read(native, dim, start, stop)
        dtype = dtype or x.dtype
        a, b = (f"{native.removesuffix('.weight')}.lora_{half}" for half in "ab")
        if self.merge_lora is not None and native.endswith(".weight") and a in self.wanted:
            rows = (start, stop) if dim == 0 else (0, piece.shape[0])
            columns = (start, stop) if dim == 1 else (0, piece.shape[1])
            delta = self._read(b, 0, *rows).float() @ self._read(a, 1, *columns).float()
            x = delta.mul_(self.merge_lora).add_(x)
        return x.to(dtype)

    def _read(self, native, dim, start, stop):
        if native in self.missing:
            assert self._absent is not None
            return self._absent(native).narrow(dim, start, stop - start)
        if self.checkpoint.kind == "shards":
            return _read_shards(self.checkpoint.files, native, dim, start, stop, self._cut(native))
        x = self._read_block(self._source(native), self.wanted[native].shape, dim, start, stop)
        return half_to_interleaved(x, self.config.head_dim) if self._source(native).rope else x

    def _read_block(self, source: Source, shape: tuple[int, ...], dim: int, start: int, stop: int) -> torch.Tensor:
        """start..stop along `dim` of a native tensor of this full shape, wherever `source` says it stands."""
        read, name = self.checkpoint.read, source.name
        if source.transposed:
            turned = replace(source, transposed=False)
            return self._read_block(turned, shape[::-1], 1 - dim, start, stop).t()
        if source.by_head:                  # rows in whole heads: take all parts of these heads, keep one
            rows = read(name, 0, source.parts * start, source.parts * stop)
            return rows.unflatten(0, (-1, source.parts, self.config.head_dim))[:, source.part].flatten(0, 1)
        first = source.part * shape[0]
        if source.stacked and len(self.infos[name].shape) == 3:
            block = read(name, 0, source.expert, source.expert + 1)[0, first:first + shape[0]]
            return block.narrow(dim, start, stop - start)
        first += source.expert * source.parts * shape[0]
        if dim == 0:
            return read(name, 0, first + start, first + stop)
        if source.parts == 1 and not source.stacked:
            return read(name, dim, start, stop)
        return read(name, 0, first, first + shape[0]).narrow(dim, start, stop - start)


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
