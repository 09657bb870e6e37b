"""Open any checkpoint file or folder lazily: tensor name -> shape, dtype and a reader of slices.

This module knows containers only (safetensors, torch zip files, GGUF, index files, folders), nothing about models.

    with open_checkpoint("/models/Llama-3.2-1B") as checkpoint:
        checkpoint.infos["model.norm.weight"]            # TensorInfo(shape=(2048,), dtype=torch.bfloat16)
        checkpoint.read("lm_head.weight", 0, 0, 1000)    # rows 0..999, the only bytes read

Files may come from strangers. Nothing in them is ever run: pickles are loaded with weights_only=True and no
fallback, safetensors by the official reader, and an index may only name files of its own folder. Whatever is wrong
with a file comes out as CheckpointError, whose text names the file, what is wrong and what to do about it.
"""

import difflib
import functools
import json
import math
import mmap
import os
import pickletools
import re
import struct
import zipfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from llama_rlhf import untrusted

# Tables of contents. Real ones: a few hundred bytes per tensor, and in GGUF a vocabulary of up to 262,000 tokens
MAX_HEADER_BYTES = 16 << 20  # safetensors
MAX_PICKLE_BYTES, PICKLE_BYTES_PER_RECORD = 1 << 19, 1 << 10  # data.pkl: so much, and so much more for each record
MAX_PICKLED_TUPLE = 2000  # objects in a tuple, counted wherever they are reached: a tuple may be a key, which is hashed
MAX_GGUF_HEADER_BYTES, MAX_GGUF_ITEMS, MAX_GGUF_ENTRIES = 64 << 20, 1 << 22, 1 << 16
MAX_NAME = 500  # characters of a tensor's name
TENSOR_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".gguf")
TRAINER_FILES = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)")


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the text names the file, the fault and the remedy."""


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: torch.dtype


_reading = functools.partial(untrusted.reading, error_class=CheckpointError)
read_json = functools.partial(untrusted.read_json, error_class=CheckpointError)


# ---- one file ------------------------------------------------------------------------------------------------------


class TensorFile:
    """One open file. Use open_file(); subclasses fill `infos` and implement `_slice`."""

    def __init__(self, path):
        self.path = str(path)
        self.infos: dict[str, TensorInfo] = {}
        self.skipped: list[str] = []  # entries that are not tensors, e.g. "epoch (int)"

    def read(self, name, dim=0, start=0, stop=None) -> torch.Tensor:
        """Elements start..stop-1 along `dim` (default: everything), contiguous, on the CPU.

        The result may be a view of the mapped file. Writing to it never changes the file, but clone() it before
        torch.save, which would otherwise save everything that shares its storage.
        """
        info = self._info(name)
        if not info.shape and (dim, start, stop) == (0, 0, None):
            dim = size = None
        elif not 0 <= dim < len(info.shape):
            raise CheckpointError(f"{self.path}: {name} has shape {list(info.shape)}: there is no dimension {dim}")
        else:
            size = info.shape[dim]
            stop = size if stop is None else stop
            if not 0 <= start <= stop <= size:
                raise CheckpointError(
                    f"{self.path}: {name} has {size} elements along dimension {dim}: cannot read {start}..{stop}"
                )
        if size is not None and (start, stop) == (0, size):
            dim = None
        with _reading(self.path, f"cannot read {name}"):
            return self._slice(name, dim, start, stop).contiguous()

    def check(self, part=0, parts=1):
        """Compare the data with the file's own checksums, where its kind has some (.pth, .pt, .bin); reads all of it.

        part, parts: only every parts-th record from `part` on, so that several processes share the work.
        """

    def close(self):
        """Drop the file. Tensors already read stay valid."""
        self.infos = {}
        self._drop()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _info(self, name):
        if name in self.infos:
            return self.infos[name]
        if not self.infos:
            raise CheckpointError(f"{self.path}: this file was closed: open it again to read {name!r}")
        close = difflib.get_close_matches(str(name), self.infos, 3)
        hint = f"; similar names: {', '.join(close)}" if close else ""
        raise CheckpointError(f"{self.path}: no tensor named {name!r} among its {len(self.infos)} tensors{hint}")

    def _slice(self, name, dim, start, stop):  # dim None: the whole tensor
        raise NotImplementedError

    def _drop(self):
        raise NotImplementedError


def open_file(path) -> TensorFile:
    """Open one .safetensors, .pth/.pt/.bin or .gguf file. Reads its table of contents, no tensor data."""
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file (looked for a checkpoint file: {', '.join(TENSOR_SUFFIXES)})")
    suffix = os.path.splitext(path)[1]
    if not os.path.isfile(path) or suffix not in READERS:
        raise CheckpointError(f"{path}: not a checkpoint file; expected one of {', '.join(TENSOR_SUFFIXES)}")
    with _reading(path):
        size = os.path.getsize(path)
        with open(path, "rb") as stream:
            head = stream.read(400)
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty; download or save it again")
    untrusted.refuse_stand_in(path, head, CheckpointError)
    with _reading(path):
        file = READERS[suffix](path)
    for name in file.infos:  # names are shown in messages: no control sequences for the terminal, no novels
        if len(name) > MAX_NAME or not name.isprintable():
            raise CheckpointError(f"{path}: {name[:50]!r} is not a name for a tensor; this is no file of model weights")
    if not file.infos:
        skipped = f" (it holds: {', '.join(file.skipped[:5])})" if file.skipped else ""
        raise CheckpointError(f"{path}: holds no tensors{skipped}; give a checkpoint of model weights")
    return file


class _SafetensorsFile(TensorFile):
    def __init__(self, path):
        super().__init__(path)
        from safetensors import safe_open

        with _reading(path, "not a valid safetensors file, or cut short; download it again"):
            with open(path, "rb") as stream:
                header_bytes = int.from_bytes(stream.read(8), "little")
                if header_bytes > MAX_HEADER_BYTES:
                    raise CheckpointError(f"{path}: a header of {header_bytes} bytes, more than {MAX_HEADER_BYTES}: damaged, "
                                          "or not a file of model weights; download it again")  # fmt: skip
                header = stream.read(header_bytes)
            self._file: Any = safe_open(path, framework="pt", device="cpu")
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}
            json.loads(header, object_pairs_hook=self._without_duplicates)  # the reader takes the last of equal keys
        for name, piece in slices.items():
            dtype = SAFETENSORS_DTYPES.get(piece.get_dtype())
            if dtype is None:
                raise CheckpointError(f"{path}: {name} has dtype {piece.get_dtype()}, which cannot be read")
            self.infos[name] = TensorInfo(tuple(piece.get_shape()), dtype)

    def _without_duplicates(self, pairs):
        if len(result := dict(pairs)) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{self.path}: its header has {twice[:MAX_NAME]!r} twice; download it again")
        return result

    def _slice(self, name, dim, start, stop):
        if dim is None:
            return self._file.get_tensor(name)
        return self._file.get_slice(name)[(slice(None),) * dim + (slice(start, stop),)]

    def _drop(self):
        self._file = None


SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class _TorchFile(TensorFile):
    """A zip file written by torch.save (torch >= 1.6) or by PthWriter, mapped into memory."""

    def __init__(self, path):
        super().__init__(path)
        if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 6):
            raise CheckpointError(f"{path}: torch {torch.__version__} can be made to run code by this kind of file "
                                  "(CVE-2025-32434); use torch >= 2.6 or convert the file to safetensors")  # fmt: skip
        check_torch_zip(path)
        try:
            with _reading(path, "damaged: torch cannot load it; download or save it again"):
                loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except CheckpointError as error:
            # torch's unpickler refuses everything but plain data, and names the function or class it refused
            refused = re.search(r"GLOBAL ([\w.]+)", str(error.__cause__))
            if refused is None:
                raise
            raise CheckpointError(
                f"{path}: not plain tensors: loading it would have to call {refused[1]}, so it was refused and "
                "nothing was run; save only the state dict, or use safetensors"
            ) from error.__cause__
        self._tensors = {}
        for name, value in self._state_dict(loaded).items():
            if not isinstance(value, torch.Tensor):
                self.skipped.append(f"{name} ({type(value).__name__})")
                continue
            if not isinstance(name, str):
                raise CheckpointError(f"{path}: a tensor is filed under {name!r}, which is not a name")
            if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
                raise CheckpointError(f"{path}: {name} is not an ordinary dense tensor ({value.layout}, {value.dtype})")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                # strides of 0 let a few bytes pose as terabytes
                raise CheckpointError(f"{path}: {name} claims more elements ({value.numel()}) than the file stores")
            self._tensors[name] = value.detach()
            self.infos[name] = TensorInfo(tuple(value.shape), value.dtype)

    def _state_dict(self, loaded):
        """The dictionary of tensors: the file itself, or its entry "model" or "state_dict"."""
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{self.path}: holds a {type(loaded).__name__}, not a dictionary of tensors")
        nested = [key for key in ("model", "state_dict") if isinstance(loaded.get(key), dict)]
        if not nested:
            return loaded
        tensors = [key for key, value in loaded.items() if isinstance(value, torch.Tensor)]
        if tensors or len(nested) > 1:
            raise CheckpointError(f"{self.path}: several candidates for the model: {nested + tensors[:3]}; "
                                  "save only the state dict")  # fmt: skip
        self.skipped += [f"{key} ({type(value).__name__})" for key, value in loaded.items() if key != nested[0]]
        return loaded[nested[0]]

    def check(self, part=0, parts=1):
        with zipfile.ZipFile(self.path) as archive:
            for member in archive.infolist()[part::parts]:
                _check_crc(self.path, archive, member)

    def _slice(self, name, dim, start, stop):
        tensor = self._tensors[name]
        return tensor if dim is None else tensor.narrow(dim, start, stop - start)

    def _drop(self):
        self._tensors = {}


def check_torch_zip(path, whole=False):
    """Refuse a file that is not exactly what torch.save writes, before torch's own reader sees it.

    torch.load accepts compressed members (a small file that expands to gigabytes) and picks one of several archive
    roots (what a scanner saw need not be what is loaded); its message for a truncated file says nothing.

    whole: compare every record with its checksum, and let data.pkl hold more than names and shapes, as that of a rollout.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        head = stream.read(8)
    if not head.startswith(b"PK\x03\x04"):
        raise CheckpointError(
            f"{path}: not a torch zip file. If it is a legacy file (torch < 1.6), load it where you trust it and "
            "torch.save it again; otherwise download it again"
        )
    with _reading(path, f"cut short or damaged ({size} bytes); download or copy it again"), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    names = [member.filename for member in members]
    roots = {name.split("/", 1)[0] for name in names}
    pickles = [member for member in members if member.filename.endswith(".pkl")]
    if len(roots) != 1 or len(set(names)) != len(names) or archive.comment:
        raise CheckpointError(f"{path}: unexpected archive layout {sorted(names)[:4]}; torch.save writes one folder")
    if [member.filename for member in pickles] != [f"{roots.pop()}/data.pkl"]:
        raise CheckpointError(f"{path}: not a saved state dict (a TorchScript archive?): {sorted(names)[:4]}")
    if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members):
        raise CheckpointError(f"{path}: compressed members are refused; torch.save never compresses")
    if sum(m.file_size for m in members) > size or any(m.header_offset + m.file_size > size for m in members):
        raise CheckpointError(f"{path}: its members claim more bytes than the file has ({size}); download it again")
    if min(m.header_offset for m in members) != 0:
        raise CheckpointError(f"{path}: unexpected bytes before the archive; torch.save writes none")
    largest = MAX_PICKLE_BYTES + PICKLE_BYTES_PER_RECORD * len(members)
    if pickles[0].file_size > largest and not whole:
        raise CheckpointError(f"{path}: data.pkl has {pickles[0].file_size} bytes, more than {largest}, too many for names and shapes")
    with zipfile.ZipFile(path) as archive:
        for member in members:  # the tables; the tensors' records are for `check`, which reads all of the file
            if whole or "/data/" not in member.filename:
                _check_crc(path, archive, member)
        with _reading(path, "data.pkl is damaged; download or save it again"):
            check_pickle(path, archive.read(pickles[0]))


def _check_crc(path, archive, member):
    if member.CRC == 0:  # torch writes that when it is told not to compute checksums
        member.CRC = None  # zipfile: do not compare
    with _reading(path, f"damaged in {member.filename}; download or copy it again"), archive.open(member) as stream:
        while stream.read(1 << 20):
            pass


# of the functions torch's unpickler would call, those that make ordinary tensors
REBUILDS = {f"torch._utils _rebuild_{what}" for what in ("tensor_v2", "tensor_v3", "parameter", "parameter_with_state")}


def check_pickle(path, data):
    """Refuse what torch's safe unpickler accepts but no state dict holds, before it runs.

    It would call functions that make quantised, sparse and other special tensors from numbers it does not check. And a
    tuple of a tuple of a tuple, each referred to twice, is a hundred bytes that as a dictionary's key take years to hash.
    """
    mark, memo = object(), {}
    stack: list = []  # of each object on the unpickler's stack: how many it holds
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL" and "rebuild" in argument and argument not in REBUILDS:
            raise CheckpointError(f"{path}: not plain tensors: loading it would have to call {argument.replace(' ', '.')}, so it was "
                                  "refused and nothing was run; save only ordinary dense tensors, or use safetensors")  # fmt: skip
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
            continue
        before, held = opcode.stack_before, memo.get(argument, 1) if opcode.name in ("BINGET", "LONG_BINGET") else 1
        if pickletools.markobject in before:
            while (top := stack.pop()) is not mark:
                held += top
            before = before[: before.index(pickletools.markobject)]
        for _ in before:
            held += stack.pop()
        if opcode.name.startswith("TUPLE") and held > MAX_PICKLED_TUPLE:
            raise CheckpointError(f"{path}: its data.pkl nests more than {MAX_PICKLED_TUPLE} objects in a tuple, which no file of weights needs")
        stack += [mark if kind is pickletools.markobject else held for kind in opcode.stack_after]


# ---- GGUF ----------------------------------------------------------------------------------------------------------

# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
GGUF_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
GGUF_STRING, GGUF_ARRAY = 8, 9
GGUF_DTYPES = {  # types stored as they are; all others are quantised
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
DEQUANTISE_BYTES = 16 << 20  # fp32 bytes produced per step: bounds the temporaries of gguf.dequantize


@dataclass
class GgufHeader:
    metadata: dict
    tensors: dict  # name -> (shape in torch order, ggml type number, offset in the file)
    data: mmap.mmap


def read_gguf_header(path) -> GgufHeader:
    """Metadata and tensor table of a GGUF file (versions 2 and 3). Needs no package, reads no tensor data."""
    with _reading(path, "not a valid GGUF file, or cut short; download it again"):
        with open(path, "rb") as stream:
            # private: tensors that view it are writable, the file never changes
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return _GgufParser(path, data).parse()


class _GgufParser:
    """Reads little-endian values one after another; every length is checked against what is left of the file."""

    def __init__(self, path, data):
        self.path, self.data, self.at, self.end, self.items = path, data, 0, len(data), 0

    def parse(self):
        if self.data[:4] != b"GGUF":
            raise CheckpointError(f"{self.path}: not a GGUF file (it starts with {self.data[:4]!r})")
        self.at = 4
        version = self.scalar("<I")
        self.end = min(len(self.data), MAX_GGUF_HEADER_BYTES)
        if version not in (2, 3):
            raise CheckpointError(f"{self.path}: GGUF version {version}; versions 2 and 3 (little-endian) can be read")
        n_tensors, n_fields = self.scalar("<Q"), self.scalar("<Q")
        if max(n_tensors, n_fields) > MAX_GGUF_ENTRIES:
            raise CheckpointError(f"{self.path}: damaged: {n_tensors} tensors and {n_fields} fields; download it again")
        metadata, tensors = {}, {}
        for _ in range(n_fields):
            key = self.string()
            if key in metadata:
                raise CheckpointError(f"{self.path}: metadata key {key!r} appears twice")
            metadata[key] = self.value(self.scalar("<I"))
        for _ in range(n_tensors):
            name = self.string()
            if name in tensors:
                raise CheckpointError(f"{self.path}: tensor {name!r} appears twice")
            n_dims = self.scalar("<I")
            if n_dims > 4:
                raise CheckpointError(f"{self.path}: damaged: {name!r} has {n_dims} dimensions, the format ends at 4; download it again")
            dims = [self.scalar("<Q") for _ in range(n_dims)]
            tensors[name] = (tuple(reversed(dims)), self.scalar("<I"), self.scalar("<Q"))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment not in {1 << n for n in range(3, 21)}:
            raise CheckpointError(f"{self.path}: damaged: an alignment of {alignment!r} bytes; download it again")
        start = -(-self.at // alignment) * alignment
        tensors = {name: (shape, kind, start + offset) for name, (shape, kind, offset) in tensors.items()}
        return GgufHeader(metadata, tensors, self.data)

    def need(self, n_bytes):
        if n_bytes > self.end - self.at:
            raise CheckpointError(f"{self.path}: cut short or damaged: {n_bytes} bytes expected at {self.at}, the "
                                  f"{'file' if self.end == len(self.data) else 'header'} has {self.end}; download it again")  # fmt: skip

    def scalar(self, form):
        self.need(struct.calcsize(form))
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self):
        size = self.scalar("<Q")
        self.need(size)
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8")

    def value(self, kind):
        if kind == GGUF_STRING:
            return self.string()
        if kind != GGUF_ARRAY:
            return self.scalar(self.form(kind))
        kind, count = self.scalar("<I"), self.scalar("<Q")
        self.items += count
        if self.items > MAX_GGUF_ITEMS:
            raise CheckpointError(f"{self.path}: damaged: arrays of {self.items} values or more; download it again")
        if kind in (GGUF_STRING, GGUF_ARRAY):
            return [self.value(kind) for _ in range(count)]
        form = self.form(kind)
        self.need(count * struct.calcsize(form))
        values = list(struct.unpack_from(f"<{count}{form[1]}", self.data, self.at))
        self.at += count * struct.calcsize(form)
        return values

    def form(self, kind):
        if kind not in GGUF_SCALARS:
            raise CheckpointError(f"{self.path}: unknown metadata type {kind} at byte {self.at}")
        return GGUF_SCALARS[kind]


class _GgufFile(TensorFile):
    """Quantised tensors come out as fp32, all others in their stored type. `metadata` holds the file's keys."""

    def __init__(self, path):
        super().__init__(path)
        try:
            import gguf
        except ImportError as error:
            raise CheckpointError(f"{path}: reading GGUF files needs the package gguf; pip install gguf") from error
        header = read_gguf_header(path)
        self.metadata = header.metadata
        self._data: Any = header.data
        n_pieces = self.metadata.get("split.count", 1)
        if n_pieces not in (0, 1):
            raise CheckpointError(f"{path}: one of {n_pieces} pieces; merge them first (llama-gguf-split --merge)")
        self._stored, places = {}, []  # name -> (ggml type, elements per block, bytes per block, offset)
        for name, (shape, number, offset) in header.tensors.items():
            with _reading(path, f"{name} has a tensor type that the installed gguf package does not know"):
                kind = gguf.GGMLQuantizationType(number)
                block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            if not shape or shape[-1] % block:
                raise CheckpointError(f"{path}: {name} has shape {list(shape)}, no whole blocks of {block} ({kind.name})")
            end = offset + math.prod(shape) // block * block_bytes
            if end > len(self._data):
                raise CheckpointError(f"{path}: cut short: {name} ends at byte {end}, the file has {len(self._data)}; "
                                      "download it again")  # fmt: skip
            self._stored[name] = (kind, block, block_bytes, offset)
            self.infos[name] = TensorInfo(shape, GGUF_DTYPES.get(kind.name, torch.float32))
            places.append((offset, end, name))
        places.sort()
        for (_, end, name), (offset, _, other) in zip(places, places[1:]):
            if offset < end:
                raise CheckpointError(f"{path}: damaged: {name} and {other} overlap; download it again")

    def _slice(self, name, dim, start, stop):
        shape, dtype = self.infos[name].shape, self.infos[name].dtype
        kind, block, block_bytes, offset = self._stored[name]
        if math.prod(shape) == 0:
            tensor = torch.empty(shape, dtype=dtype)
            return tensor if dim is None else tensor.narrow(dim, start, stop - start)
        if kind.name in GGUF_DTYPES:
            flat = torch.frombuffer(self._data, dtype=dtype, count=math.prod(shape), offset=offset)
            return flat.view(shape) if dim is None else flat.view(shape).narrow(dim, start, stop - start)

        n_blocks = shape[-1] // block
        raw = np.frombuffer(self._data, np.uint8, math.prod(shape) // block * block_bytes, offset)
        raw = raw.reshape(*shape[:-1], n_blocks, block_bytes)
        if dim is None:
            return _dequantise(raw, kind, block)
        if dim < len(shape) - 1:
            return _dequantise(raw[(slice(None),) * dim + (slice(start, stop),)], kind, block)
        # along the last dimension only whole blocks can be dequantised: take those that touch the cut, then trim
        first = start // block
        whole = _dequantise(raw[..., first : -(-stop // block), :], kind, block)
        return whole.narrow(dim, start - first * block, stop - start)

    def _drop(self):
        self._data = None
        self._stored = {}


def _dequantise(raw, kind, block):
    """raw: [..., n_blocks, bytes per block] -> fp32 [..., n_blocks * block]."""
    from gguf import dequantize

    shape = (*raw.shape[:-2], raw.shape[-2] * block)
    out = torch.empty(math.prod(shape[:-1]), shape[-1])
    if out.numel() == 0:
        return out.view(shape)
    rows = raw.reshape(len(out), -1)
    step = max(1, DEQUANTISE_BYTES // (4 * shape[-1]))
    for i in range(0, len(out), step):
        out[i : i + step] = torch.from_numpy(dequantize(rows[i : i + step], kind))
    return out.view(shape)


READERS = {
    ".safetensors": _SafetensorsFile, ".pth": _TorchFile, ".pt": _TorchFile, ".bin": _TorchFile, ".gguf": _GgufFile,
}  # fmt: skip


# ---- folders -------------------------------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """All files of one model.

    kind "full": every name is complete in exactly one file. "gguf": the same, one GGUF file. "shards": tensor
    parallel shards consolidated.NN.pth, files[rank] holds rank's part of every name; use .files, not read().
    """

    path: str
    folder: str  # where the json and tokenizer files live
    kind: str
    files: list[TensorFile]
    config: dict = field(repr=False)  # config.json or params.json; the metadata of a GGUF file; {} if there is none
    config_file: str | None
    generation_config: dict = field(repr=False)
    infos: dict[str, TensorInfo] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        self._file_of = {}
        for file in self.files if self.kind != "shards" else ():
            for name in file.infos:
                if name in self._file_of:
                    raise CheckpointError(f"{file.path}: {name} is also in {self._file_of[name].path}; these files "
                                          "do not belong together, remove the stale ones")  # fmt: skip
                self._file_of[name] = file
            self.infos.update(file.infos)

    @property
    def bytes_total(self) -> int:
        return sum(os.path.getsize(file.path) for file in self.files)

    def read(self, name, dim=0, start=0, stop=None) -> torch.Tensor:
        """See TensorFile.read."""
        if self.kind == "shards":
            raise CheckpointError(f"{self.path}: holds tensor parallel shards; read {name} from .files[rank]")
        if name not in self._file_of:
            close = difflib.get_close_matches(str(name), self._file_of, 3)
            hint = f"; similar names: {', '.join(close)}" if close else ""
            raise CheckpointError(f"{self.path}: no tensor named {name!r} among its {len(self.infos)} tensors{hint}")
        return self._file_of[name].read(name, dim, start, stop)

    def close(self):
        for file in self.files:
            file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def not_there(path: str) -> str:
    """What to say of a checkpoint's path that leads nowhere: it may be the name of a model on the hub."""
    hub = re.fullmatch(r"[\w.-]+/([\w.-]+)", path) if not os.path.exists(os.path.dirname(path) or ".") else None
    return (f"{path or 'an empty path'}: no such file or folder (looked for a checkpoint" + (f"; relative paths are taken from {os.getcwd()})" if path and not os.path.isabs(path) else ")")
            + (f". If it is a model of the Hugging Face hub, fetch it first: hf download {path} --local-dir {hub[1]}" if hub else ""))


def open_checkpoint(path) -> Checkpoint:
    """Open a checkpoint given as a folder, a *.index.json or a single file.

    In a folder the first of these counts: consolidated.NN.pth; model.safetensors.index.json; model.safetensors or
    the only *.safetensors; consolidated.NN.pt; pytorch_model.bin.index.json; pytorch_model.bin or the only
    .bin/.pth/.pt; the only .gguf.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(not_there(path))
    if os.path.isdir(path):
        with _reading(path):
            names = sorted(os.listdir(path))
        return _open_folder(path, names)
    folder, name = os.path.split(os.path.abspath(path))
    if name.endswith(".index.json"):
        return _checkpoint(path, folder, "full", _open_index(path))
    with _reading(folder):
        siblings = sorted(os.listdir(folder))
    pieces = _pieces_like(name, siblings)
    if len(pieces) > 1:
        raise CheckpointError(
            f"{path}: one of {len(pieces)} files of a checkpoint ({pieces[0]} .. {pieces[-1]}); give the folder "
            f"{folder} to open all of it, or move the file elsewhere to open it alone"
        )
    kind = "shards" if re.fullmatch(r"consolidated\.\d+\.pth", name) else "full"
    if kind == "shards":
        _numbered(folder, pieces)
    return _checkpoint(path, folder, kind, [open_file(path)])


def _open_folder(folder, names):
    def files(pattern):
        return [name for name in names if re.fullmatch(pattern, name)]

    def opened(kind, chosen):
        return _checkpoint(folder, folder, kind, [open_file(os.path.join(folder, name)) for name in chosen])

    if shards := files(r"consolidated\.\d+\.pth"):
        return opened("shards", _numbered(folder, shards))
    if "model.safetensors.index.json" in names:
        return _checkpoint(folder, folder, "full", _open_index(os.path.join(folder, "model.safetensors.index.json")))
    if candidates := files(r".*\.safetensors"):
        return opened("full", _the_only(folder, candidates, "model.safetensors"))
    if union := files(r"consolidated\.\d+\.pt"):  # Mixtral's hub files: each holds other tensors, all of them whole
        return opened("full", _numbered(folder, union))
    if "pytorch_model.bin.index.json" in names:
        return _checkpoint(folder, folder, "full", _open_index(os.path.join(folder, "pytorch_model.bin.index.json")))
    if candidates := [name for name in files(r".*\.(bin|pth|pt)") if not TRAINER_FILES.fullmatch(name)]:
        return opened("full", _the_only(folder, candidates, "pytorch_model.bin"))
    if candidates := files(r".*\.gguf"):
        return opened("gguf", _the_only(folder, candidates, None))
    raise CheckpointError(
        f"{folder}: no checkpoint in this folder: found neither consolidated.NN.pth, *.safetensors, .bin/.pth/.pt nor "
        f".gguf among {len(names)} entries ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
    )


def _checkpoint(path, folder, kind, files):
    generation_config = optional_json(folder, "generation_config.json")
    if isinstance(files[0], _GgufFile):
        return Checkpoint(path, folder, "gguf", files, files[0].metadata, None, generation_config)
    # consolidated files are described by the params.json beside them, all others by config.json
    native = os.path.basename(files[0].path).startswith("consolidated.")
    choice = ("params.json", "config.json") if native else ("config.json", "params.json")
    config_file = next((p for n in choice if os.path.exists(p := os.path.join(folder, n))), None)
    config = read_json(config_file) if config_file else {}
    return Checkpoint(path, folder, kind, files, config, config_file, generation_config)


def _numbered(folder, names):
    """consolidated.NN.* in numeric order; the numbers must be 0..n-1."""
    numbers = [int(name.split(".")[1]) for name in names]
    if len(set(numbers)) != len(numbers):
        raise CheckpointError(f"{folder}: two files with the same number among {', '.join(sorted(names))}")
    missing = sorted(set(range(max(numbers) + 1)) - set(numbers))
    if missing:
        suffix = names[0].rsplit(".", 1)[1]
        listed = ", ".join(f"consolidated.{n:02d}.{suffix}" for n in missing[:10])
        raise CheckpointError(f"{folder}: holds {len(numbers)} shards up to number {max(numbers)}, but {listed} "
                              f"{'is' if len(missing) == 1 else 'are'} missing; copy the whole checkpoint")  # fmt: skip
    return [name for _, name in sorted(zip(numbers, names))]


def _pieces_like(name, siblings):
    """The files of one checkpoint with `name`, judged by numbering: consolidated.NN.x, x-00001-of-00003.y."""
    for pattern in (r"(consolidated\.)\d+(\.pth|\.pt|\.safetensors)", r"(.+-)\d{5}(-of-\d{5}\.\w+)"):
        if match := re.fullmatch(pattern, name):
            like = re.escape(match[1]) + r"\d+" + re.escape(match[2])
            return [sibling for sibling in siblings if re.fullmatch(like, sibling)]
    return [name]


def _the_only(folder, candidates, preferred):
    if preferred in candidates:
        return [preferred]
    if len(candidates) > 1:
        listed = ", ".join(candidates[:8]) + (", ..." if len(candidates) > 8 else "")
        why = "their index json is missing" if any("-of-" in name for name in candidates) else "give one of them"
        raise CheckpointError(f"{folder}: {len(candidates)} candidates for the checkpoint, {why}: {listed}")
    return candidates


# ---- json and index files ------------------------------------------------------------------------------------------


def optional_json(folder, name):
    """The json object in a file of a folder; {} without the file."""
    path = os.path.join(folder, name)
    return read_json(path) if os.path.exists(path) else {}


def _open_index(index_file):
    """The files an index names, each checked to hold the names the index promises."""
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index_file}: no "weight_map" of tensor names to file names')
    folder = os.path.dirname(os.path.abspath(index_file))
    names_in = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str):
            raise CheckpointError(f"{index_file}: {name} is mapped to {file_name!r}, expected a file name")
        names_in.setdefault(file_name, []).append(name)
    paths = {file_name: _inside(index_file, folder, file_name) for file_name in names_in}
    missing = [file_name for file_name, path in paths.items() if not os.path.exists(path)]
    if missing:
        raise CheckpointError(f"{index_file}: {len(missing)} of the {len(paths)} files it names do not exist: "
                              f"{', '.join(missing[:5])}; complete the download")  # fmt: skip
    files = []
    for file_name, path in sorted(paths.items()):
        file = open_file(path)
        absent = [name for name in names_in[file_name] if name not in file.infos]
        if absent:
            raise CheckpointError(f"{path}: lacks {len(absent)} tensors which {os.path.basename(index_file)} places "
                                  f"there, e.g. {absent[0]}; index and files are of different checkpoints")  # fmt: skip
        files.append(file)
    return files


def _inside(index_file, folder, name):
    """The path of a file named by an index. It must be a plain name, and a link must not lead out of the folder.

    Hugging Face's cache is the exception: snapshots/<revision>/* are links to models--x--y/blobs, which may in turn
    be links to blobs/ of the cache.
    """
    if not name or name.startswith(".") or ".." in name or any(c in name for c in "/\\:\0"):
        raise CheckpointError(f"{index_file}: illegal file name {name!r}; an index may only name files beside it")
    path = os.path.join(folder, name)
    real, allowed = os.path.realpath(path), [os.path.realpath(folder)]
    cache = re.match(r"(.*)/(models--[^/]+)/snapshots/", allowed[0].replace(os.sep, "/") + "/")
    if cache:
        allowed += [f"{cache[1]}/{cache[2]}/blobs", f"{cache[1]}/blobs"]
    if not any(real.startswith(os.path.join(root, "")) for root in allowed):
        raise CheckpointError(f"{index_file}: {name} is a link to {real}, outside its folder; copy the file instead")
    return path
