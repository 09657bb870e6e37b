"""To a Hugging Face folder that transformers loads, or a PEFT adapter folder: the family tables run backwards, one tensor in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import torch

from llama_rlhf.checkpoint import store
from llama_rlhf.checkpoint.convert import interleaved_to_half
from llama_rlhf.checkpoint.formats import CheckpointError, TensorInfo, optional_json
from llama_rlhf.checkpoint.gguf_tokenizer import write_fast_tokenizer
from llama_rlhf.checkpoint.shards import COMPANIONS, Rewrite, check_new_folder, copy_companions
from llama_rlhf.checkpoint.writer import SafetensorsWriter
from llama_rlhf.config import ModelConfig
from llama_rlhf.models import FAMILIES
from llama_rlhf.models.family import Source, lookup
from llama_rlhf.parallel import groups

Progress = Callable[[int, int], None] | None
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def for_transformers(config: ModelConfig) -> ModelConfig:
    """The config to export as. transformers has no first-generation Qwen; up to its training length it is a Qwen2."""
    if config.family != "qwen":
        return config
    trained = config.ntk_beyond or config.logn_beyond or config.max_seq_len
    groups.log(f"note: first-generation Qwen is written as qwen2, the same model up to the {trained} tokens it was trained for")
    return replace(config, family="qwen2", max_seq_len=trained, ntk_beyond=None, logn_beyond=None)


def place_in(table: dict[str, Source], native: str) -> Source:
    """Where a native tensor goes in this layout."""
    source = lookup(table, native)
    if source is None or source.stacked or source.transposed:
        raise CheckpointError(f"{native} has no place in the Hugging Face layout of this family")
    return source


def foreign_tensors(natives, table: dict[str, Source]) -> dict[str, list[str]]:
    """foreign name -> the native tensors it is made of, in the order of their parts."""
    found: dict[str, dict[int, str]] = {}
    for native in natives:
        source = place_in(table, native)
        found.setdefault(source.name, {})[source.part] = native
    for name, parts in found.items():
        wanted = place_in(table, parts[min(parts)]).parts
        if sorted(parts) != list(range(wanted)):
            raise CheckpointError(f"{name} is made of {wanted} parts, of which {sorted(parts)} exist")
    return {name: [parts[i] for i in sorted(parts)] for name, parts in found.items()}


def to_foreign(tensors: list[torch.Tensor], sources: list[Source], head_dim: int) -> torch.Tensor:
    """Put the parts of one foreign tensor together: rows back in half-split rotary order, blocks one after another or by head."""
    blocks = [interleaved_to_half(x, head_dim) if source.rope else x for x, source in zip(tensors, sources)]
    if len(blocks) == 1:
        return blocks[0]
    if sources[0].by_head:
        return torch.stack([x.unflatten(0, (-1, head_dim)) for x in blocks], 1).flatten(0, 2)
    return torch.cat(blocks)


def export_hf(source: str, folder: str, *, dtype: torch.dtype | None = None, model_type: str = "", merge_lora: bool = False,
              adapter: str = "", tokenizer: str = "", max_shard_bytes: int = 5_000_000_000, progress: Progress = None) -> ModelConfig:
    """Write config.json, tokenizer files and model.safetensors (or several and their index) for transformers' from_pretrained.

    dtype, merge_lora, adapter: see Rewrite. A model with adapters must be merged; one with a value head has no counterpart.
    Raises CheckpointError or FileNotFoundError; `folder` then does not exist.
    """
    check_new_folder(folder)
    with Rewrite(source, dtype=dtype, model_type=model_type, merge_lora=merge_lora, adapter=adapter) as rewrite:
        groups.log(f"read {source}: {rewrite}")
        _check_policy(rewrite, source)
        if rewrite.lora:
            raise CheckpointError(f"{source} holds adapters, which a Hugging Face folder cannot. Add --merge_lora, or write them "
                                  "alone with --format peft.")
        rewrite.check()
        config = for_transformers(rewrite.config)
        family = FAMILIES[config.family]
        table = family.hf
        members = foreign_tensors(rewrite.pieces, table)
        infos = {name: _info(rewrite, natives) for name, natives in members.items()}
        files = _group(infos, max_shard_bytes)
        n_bytes = sum(_nbytes(info) for info in infos.values())

        def write(temporary: str) -> None:
            copy_companions(tokenizer or rewrite.tokenizer_source, temporary)
            special = _special_ids(temporary, tokenizer or rewrite.tokenizer_source, config.vocab_size)
            store.write_json(os.path.join(temporary, "config.json"), {
                **family.write_hf(config), **special, "torch_dtype": _common_dtype(infos)})
            generation = optional_json(temporary, "generation_config.json")
            if generation | special != generation:
                store.write_json(os.path.join(temporary, "generation_config.json"), generation | special)
            try:
                if wrong := write_fast_tokenizer(temporary):
                    groups.log(f"note: tokenizer.json {'encodes otherwise than' if os.path.exists(os.path.join(temporary, 'tokenizer.json')) else 'cannot encode as'} "
                               f"the original: {', '.join(map(repr, wrong[:5]))} ({len(wrong)} in all)")
            except (ValueError, FileNotFoundError):     # the weights are of use without a tokenizer
                pass
            done = 0
            for file, names in files.items():
                with SafetensorsWriter(os.path.join(temporary, file), {name: infos[name] for name in names}) as writer:
                    for name in names:
                        natives = members[name]
                        x = to_foreign([rewrite.read(native) for native in natives], [place_in(table, native) for native in natives],
                                       config.head_dim)
                        writer.write(name, x.to(infos[name].dtype))
                        done += x.nbytes
                        if progress:
                            progress(done, n_bytes)
            if len(files) > 1:
                store.write_json(os.path.join(temporary, "model.safetensors.index.json"), {
                    "metadata": {"total_size": n_bytes}, "weight_map": {name: file for file, names in files.items() for name in names}})

        store.publish(folder, write, None, n_bytes=n_bytes)
        return config


def export_peft(source: str, folder: str, *, model_type: str = "", progress: Progress = None) -> ModelConfig:
    """Write the adapters of a checkpoint as a PEFT folder: adapter_config.json and adapter_model.safetensors, fp32.

    peft.PeftModel.from_pretrained(base, folder) puts them on the base model, which is not part of the folder.
    """
    from llama_rlhf.checkpoint.adapters import peft_config, peft_tensors
    check_new_folder(folder)
    with Rewrite(source, model_type=model_type) as rewrite:
        groups.log(f"read {source}: {rewrite}")
        _check_policy(rewrite, source)
        if not rewrite.lora:
            raise CheckpointError(f"{source} holds no adapters; --format peft writes nothing else. Use --format hf for the model.")
        rewrite.check()
        tensors = peft_tensors(rewrite, FAMILIES[for_transformers(rewrite.config).family].hf)
        infos = {name: TensorInfo(shape, torch.float32) for name, (shape, _) in tensors.items()}
        n_bytes = sum(_nbytes(info) for info in infos.values())

        def write(temporary: str) -> None:
            store.write_json(os.path.join(temporary, "adapter_config.json"), peft_config(rewrite.lora, tensors))
            done = 0
            with SafetensorsWriter(os.path.join(temporary, "adapter_model.safetensors"), infos) as writer:
                for name, (_, read) in tensors.items():
                    writer.write(name, read())
                    done += _nbytes(infos[name])
                    if progress:
                        progress(done, n_bytes)

        store.publish(folder, write, None, n_bytes=n_bytes)
        return rewrite.config


def companions_folder(tokenizer_file: str) -> str:
    """--tokenizer_file, a file or a folder -> the folder (or GGUF file) that tokenizer files are copied from; "" stays ""."""
    if tokenizer_file and not os.path.exists(tokenizer_file):
        raise FileNotFoundError(f"--tokenizer_file {tokenizer_file} does not exist")
    if not tokenizer_file or tokenizer_file.endswith(".gguf"):
        return tokenizer_file
    known = [name for name in COMPANIONS if "tokenizer" in name or "tiktoken" in name]
    folder, name = (tokenizer_file, None) if os.path.isdir(tokenizer_file) else os.path.split(os.path.abspath(tokenizer_file))
    if name not in known if name else not any(os.path.isfile(os.path.join(folder, name)) for name in known):
        raise ValueError(f"--tokenizer_file {tokenizer_file}: expected {', '.join(known)}, or a folder with one of them")
    return folder


def _check_policy(rewrite: Rewrite, source: str) -> None:
    if rewrite.contents.has_value_head:
        raise CheckpointError(f"{source} is a reward or value model. Neither transformers nor peft has its head; only --format native keeps it.")


def _info(rewrite: Rewrite, natives: list[str]) -> TensorInfo:
    shapes, dtype = [rewrite.pieces[native].shape for native in natives], rewrite.dtype(natives[0])
    for native in natives[1:]:
        dtype = torch.promote_types(dtype, rewrite.dtype(native))
    return TensorInfo((sum(shape[0] for shape in shapes), *shapes[0][1:]), dtype)


def _nbytes(info: TensorInfo) -> int:
    return torch.Size(info.shape).numel() * info.dtype.itemsize


def _common_dtype(infos: dict[str, TensorInfo]) -> str:
    """The dtype of most weights, in transformers' spelling."""
    sizes: dict[torch.dtype, int] = {}
    for info in infos.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + torch.Size(info.shape).numel()
    return _DTYPES.get(max(sizes, key=lambda dtype: sizes[dtype]), "float32")


def _group(infos: dict[str, TensorInfo], limit: int) -> dict[str, list[str]]:
    """file name -> tensors, in order, files at most `limit` bytes of tensors (a single larger tensor has its own)."""
    groups_, size = [[]], 0
    for name, info in infos.items():
        if groups_[-1] and size + _nbytes(info) > limit:
            groups_.append([])
            size = 0
        groups_[-1].append(name)
        size += _nbytes(info)
    # larger element types first: the writer keeps every tensor aligned
    ordered = [sorted(names, key=lambda name: -infos[name].dtype.itemsize) for names in groups_]
    if len(ordered) == 1:
        return {"model.safetensors": ordered[0]}
    return {f"model-{i:05d}-of-{len(ordered):05d}.safetensors": names for i, names in enumerate(ordered, 1)}


def _special_ids(folder: str, source: str, n_rows: int) -> dict:
    """bos, eos and pad ids: of generation_config.json in `folder`; those it lacks, of the source's config.json; else of the tokenizer.

    Of the eos a list is all there are; to a single one come the tokenizer's, the first of which ends the answers in training.
    """
    from llama_rlhf.tokenizer import load_tokenizer
    known, eos = [optional_json(folder, "generation_config.json"), optional_json(source, "config.json")], []
    try:
        tokenizer = load_tokenizer(folder)
        eos = list(tokenizer.eos_ids)
        pad = None if known[0] and tokenizer.pad_id in eos else tokenizer.pad_id       # transformers does not train the embedding of a pad token
        known.append({"bos_token_id": tokenizer.bos_id, "eos_token_id": eos, "pad_token_id": pad if pad is not None and pad < n_rows else None})
    except (ValueError, FileNotFoundError):     # the weights are of use without it
        pass
    found = {key: [ids[key] for ids in known if ids.get(key) not in (None, [], -1)] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    special = {key: values[0] for key, values in found.items() if values}
    if isinstance(single := special.get("eos_token_id"), int):
        special["eos_token_id"] = list(dict.fromkeys([*eos, single]))
    return {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in special.items()}
