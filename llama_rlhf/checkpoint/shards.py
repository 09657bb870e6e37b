"""From any checkpoint to a model on these ranks, and back to consolidated.NN.pth: at any tensor-parallel size, from any shard count."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass

import torch
from torch import nn

from llama_rlhf import __version__
from llama_rlhf.checkpoint import store
from llama_rlhf.checkpoint.convert import NativeView, load_config, read_manifest
from llama_rlhf.checkpoint.formats import Checkpoint, CheckpointError, open_checkpoint
from llama_rlhf.checkpoint.writer import PthWriter
from llama_rlhf.config import ModelConfig
from llama_rlhf.models.llama import write_params
from llama_rlhf.models.transformer import CausalLM, Transformer, ValueModel
from llama_rlhf.parallel import groups
from llama_rlhf.parallel.layers import Lora, Piece, piece_of, walk
from llama_rlhf.parallel.partition import Partition

# what stands beside the weights and travels with them
COMPANIONS = ("tokenizer.model", "tokenizer.model.v1", "tokenizer.model.v3", "tokenizer.json", "tokenizer_config.json",
              "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "qwen.tiktoken",
              "tokenizer.bytes.json", "chat_template.jinja", "generation_config.json")
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
    lora = None
    if ranks:
        if len(ranks) > 1 or not (manifest or {}).get("lora"):
            raise CheckpointError(f"{checkpoint.path}: adapters of ranks {sorted(ranks)} without their alpha in a manifest.json")
        lora = Lora(ranks.pop(), manifest["lora"]["alpha"])
    return Contents(config, notes, lora, "value_head.weight" in infos, manifest)


def load_model(path: str, model_class: type[Transformer] = CausalLM, *, lora: Lora | None = None, dtype=torch.float32,
               model_type: str = "", seed: int = 0, verify: bool = True) -> Transformer:
    """Collective. A CausalLM or ValueModel with this rank's weights, on this rank's device.

    lora: train adapters of this rank and alpha; continues those in the checkpoint, or starts new ones (B = 0, seeded).
          None: no adapters; those in the checkpoint are added into the weights (fp32 sum, one rounding).
    Gradients are asked for by all parameters, or by the adapters and the value head only when lora is given.
    Raises CheckpointError (a ValueError) or FileNotFoundError on every rank.
    """
    path = store.resolve(path)
    with groups.together(f"opening {path}"):
        checkpoint = open_checkpoint(path)
        contents = inspect(checkpoint, model_type)
    for note in contents.notes:
        groups.log("note:", note)
    if verify and contents.manifest:
        store.verify(checkpoint.folder)
    with groups.together(f"loading {path}"):
        if model_class is CausalLM and contents.has_value_head:
            raise CheckpointError(f"{path} is a reward or value model: it has a value head and cannot generate text. "
                                  "Give the checkpoint of a policy.")
        if lora and contents.lora and lora != contents.lora:
            raise CheckpointError(f"{path} holds adapters of rank {contents.lora.rank}, alpha {contents.lora.alpha}; asked for rank "
                                  f"{lora.rank}, alpha {lora.alpha}. Use those, or --lora_rank -1 to merge them and train all weights.")
        model = model_class(contents.config, lora=lora, dtype=dtype)
        wanted = native_tensors(model)
        adapters = {name for name in wanted if name.endswith((".lora_a", ".lora_b"))}
        head = {"value_head.weight", "value_head.bias"} & wanted.keys()
        ignored = frozenset() if model_class is CausalLM else frozenset({"output.weight", "lm_head.weight"})
        view = NativeView(checkpoint, contents.config, wanted, optional=adapters | head, ignored=ignored,
                          merge_lora=contents.lora.scale if contents.lora and not lora else None)
        if view.missing & adapters and adapters - view.missing:
            raise CheckpointError(f"{path}: some adapters are missing ({sorted(view.missing & adapters)[0]}, ...)")
        _fill(model, view, seed)
        checkpoint.close()
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(lora is None or "lora_" in parameter_name or "value_head" in parameter_name)
    new = sorted({name.rpartition(".")[2] if name in adapters else name for name in view.missing})
    if new:
        groups.log(f"new, not in {path}: {', '.join(new)}")
    return model


def _fill(model: Transformer, view: NativeView, seed: int) -> None:
    """Replace every meta parameter by this rank's values."""
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
        module._parameters[local] = nn.Parameter(full)


def _initial(native: str, piece: Piece, seed: int) -> torch.Tensor:
    """A new tensor's part for this rank, cut from one draw of the full tensor: the same model at every number of ranks."""
    if native.endswith((".lora_b", ".bias")):
        full = torch.zeros(piece.shape)
    else:
        generator = torch.Generator().manual_seed(seed << 32 | zlib.crc32(native.encode()))
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


def _write_companions(temporary: str, config: ModelConfig, source: str) -> dict:
    """params.json and what belongs to the tokenizer. source: folder, or GGUF file, the model came from."""
    entries = {"params.json": store.write_json(os.path.join(temporary, "params.json"), write_params(config))}
    if source.endswith(".gguf"):
        from llama_rlhf.checkpoint.gguf_tokenizer import write_tokenizer_files
        return entries | {os.path.basename(path): store.seal(path) for path in write_tokenizer_files(source, temporary)}
    for folder in (source, os.path.dirname(os.path.abspath(source))):      # Meta keeps tokenizer.model one folder up
        found = [name for name in COMPANIONS if os.path.isfile(os.path.join(folder, name))]
        if any("tokenizer" in name or "tiktoken" in name for name in found):
            return entries | {name: store.copy_file(os.path.join(folder, name), os.path.join(temporary, name)) for name in found}
    return entries


def save_model(model: Transformer, folder: str, *, companions: str, **more) -> None:
    """Collective. Publish this model as one consolidated.NN.pth per tensor-parallel rank; replicas write once.

    companions: the folder whose tokenizer files go along.  more: further manifest fields (step, epoch, ...).
    """
    config, wanted = model.config, native_tensors(model)
    writes = groups.dp_rank() == 0
    entries = [(native, piece, parameter.detach()) for _, _, _, parameter, pieces in walk(model) for native, piece in pieces]
    n_bytes = sum(piece_of(p, piece, owned=True).nbytes for _, piece, p in entries) if writes else 0

    def write(temporary: str) -> dict:
        result = _write_companions(temporary, config, companions) if groups.is_main() else {}
        if not writes:
            return result
        name = f"consolidated.{groups.tp_rank():02d}.pth"
        with PthWriter(os.path.join(temporary, name)) as writer:
            for native, piece, parameter in entries:
                x = embedding if native == "tok_embeddings.weight" and embedding is not None else \
                    piece_of(parameter, piece, owned=True)
                writer.write(native, x.cpu())
            return result | {name: writer.close()}

    embedding = None
    if config.embedding_cut == "hidden" and groups.tp_size() > 1:
        embedding = _recut_embedding(model)
    store.publish(folder, write, _manifest(config, wanted, model.lora, groups.tp_size(), isinstance(model, ValueModel), more),
                  n_bytes=n_bytes)


def _recut_embedding(model: Transformer) -> torch.Tensor:
    """Collective: this rank's columns of the whole embedding [V, dim/n], from the vocabulary rows each rank holds."""
    start, stop = model.partition.held["hidden"][groups.tp_rank()]
    weight, parts = model.tok_embeddings.weight.detach(), []
    for rank, (first, last) in enumerate(model.partition.held["vocab"]):
        rows = weight if rank == groups.tp_rank() else weight.new_empty(last - first, weight.shape[1])
        torch.distributed.broadcast(rows, torch.distributed.get_global_rank(groups.tp_group(), rank), group=groups.tp_group())
        parts.append(rows[:, start:stop].clone())
    return torch.cat(parts)


def split_checkpoint(source: str, folder: str, n: int, *, dtype: torch.dtype | None = None, model_type: str = "",
                     merge_lora: bool = False) -> ModelConfig:
    """Rewrite any checkpoint as n shards, one tensor in memory at a time; n=1 merges. dtype None keeps each tensor's own.

    Adapters and a value head go along (merge_lora adds adapters into their base). Raises CheckpointError, FileNotFoundError,
    ValueError when no cut for n exists; `folder` then does not exist.
    """
    source = store.resolve(source)
    with open_checkpoint(source) as checkpoint:
        contents = inspect(checkpoint, model_type)
        config, lora = contents.config, None if merge_lora else contents.lora
        for note in contents.notes:
            groups.log("note:", note)
        plan = Partition(config, n)
        store.verify(checkpoint.folder)
        model = (ValueModel if contents.has_value_head else CausalLM)(config, lora=lora, dtype=torch.float32)
        wanted = native_tensors(model)
        view = NativeView(checkpoint, config, wanted,
                          merge_lora=contents.lora.scale if contents.lora and merge_lora else None)
        target = lambda name: view.dtype(name) if dtype is None or "lora_" in name or "value_head" in name else dtype  # noqa: E731

        def write(temporary: str) -> dict:
            entries = _write_companions(temporary, config, checkpoint.path if checkpoint.kind == "gguf" else checkpoint.folder)
            names = [f"consolidated.{r:02d}.pth" for r in range(n)]
            writers = []
            try:
                writers += [PthWriter(os.path.join(temporary, name)) for name in names]
                for native, piece in wanted.items():
                    cut = cut_for_file(native, piece, config) if n > 1 else None
                    if cut is None:
                        x = view.read(native).to(target(native))
                        for writer in writers:
                            writer.write(native, x)
                    elif cut == piece.dim:
                        for writer, (start, stop) in zip(writers, plan.owned[piece.kind]):
                            writer.write(native, view.read(native, start, stop).to(target(native)))
                    else:
                        x = view.read(native).to(target(native))
                        for writer, (start, stop) in zip(writers, plan.held["hidden"]):
                            writer.write(native, x[:, start:stop])
                return entries | {name: writer.close() for name, writer in zip(names, writers)}
            except BaseException:
                for writer in writers:
                    writer.discard()
                raise

        n_bytes = sum(torch.Size(piece.shape).numel() * target(name).itemsize * (1 if piece.dim is not None else n)
                      for name, piece in wanted.items())
        store.publish(folder, write, _manifest(config, wanted, lora, n, contents.has_value_head, {}), n_bytes=n_bytes)
        return config
