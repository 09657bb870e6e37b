"""Write a checkpoint file tensor by tensor, so that splitting a large model never holds it in memory.

    with PthWriter("consolidated.00.pth") as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)
        print(writer.close())        # {"size": 2471645608, "sha256": "..."}

PthWriter's result is what torch.save of a dictionary name -> tensor writes: a zip of uncompressed records, one per
tensor, and a pickle of names, shapes and strides. torch.save itself needs the whole dictionary in memory, and stores
all of a storage for a tensor that views a part of it; here exactly the tensor's elements are stored.

SafetensorsWriter does the same for .safetensors. There the table of contents stands first, so names, shapes and dtypes
are given when it is opened, in the order in which the tensors will follow.
"""

import hashlib
import io
import json
import math
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .formats import SAFETENSORS_DTYPES, CheckpointError, TensorInfo

CHUNK_BYTES = 1 << 20
FLUSH_BYTES = 128 << 20
ALIGNMENT = 64  # of every record in the file, so that a mapped tensor is as well aligned as an allocated one
ALIGNMENT_SAFETENSORS = 8  # of its header, by the format
ROOT = "archive"

STORAGES = {
    torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage, torch.bfloat16: torch.BFloat16Storage,
    torch.float64: torch.DoubleStorage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage, torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}  # fmt: skip
_SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
# newer types have no storage class of their own
UNTYPED = {torch.float8_e4m3fn, torch.float8_e5m2}


class _Writer:
    """What both kinds share: one file, hashed while it is written, deleted if anything goes wrong."""

    def __init__(self, path):
        self.path = str(path)
        self._result: dict | None = None
        self._file: Any = None
        with self._errors():
            self._file = _HashingFile(self.path)

    def close(self) -> dict:
        """Finish the file, fsync it and return {"size": bytes, "sha256": hex}. Calling it again returns the same."""
        if self._result is None:
            with self._errors():
                self._finish()
                self._result = self._file.finish()
        return self._result

    def discard(self):
        """Close and delete the unfinished file. Does nothing after close()."""
        if self._result is None and self._file is not None:
            self._result = {}
            self._file.discard()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.close()
        else:
            self.discard()

    def _finish(self):
        """Write what follows the tensors."""

    @contextmanager
    def _errors(self):
        """Any failure leaves no partial file; those of the system become CheckpointError."""
        try:
            yield
        except BaseException as error:
            self.discard()
            if isinstance(error, OSError):
                raise CheckpointError(f"{self.path}: cannot be written: {error.strerror or error}") from error
            raise


class PthWriter(_Writer):
    """Streaming writer of one .pth file. After an error inside `with`, the partial file is deleted."""

    def __init__(self, path):
        self._entries: dict[str, _Entry] = {}
        super().__init__(path)
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)

    def write(self, name, tensor):
        """Append a tensor. Its bytes are in the file (or the system's cache) and hashed when this returns."""
        if self._result is not None:
            raise CheckpointError(f"{self.path}: already closed, cannot write {name}")
        if not isinstance(name, str) or name in self._entries:
            raise CheckpointError(f"{self.path}: {name!r} was written before, or is not a text")
        tensor = tensor.detach()
        if tensor.layout != torch.strided or tensor.dtype not in STORAGES.keys() | UNTYPED:
            raise CheckpointError(f"{self.path}: cannot store {name}: {tensor.layout}, {tensor.dtype}")
        key = str(len(self._entries))
        self._entries[name] = _Entry(_Storage(key, tensor.dtype, tensor.numel()), tuple(tensor.shape))
        with self._errors():
            self._record(f"data/{key}", tensor)

    def discard(self):
        if self._result is None and self._file is not None:
            self._zip.fp = None  # or it would write its table of contents when collected
        super().discard()

    def _finish(self):
        self._record("data.pkl", _bytes(_pickled(self._entries)))
        self._record("byteorder", _bytes(sys.byteorder.encode()))
        self._record("version", _bytes(b"3\n"))
        self._zip.close()

    def _record(self, name, tensor):
        """One aligned zip member, the tensor's bytes."""
        info = zipfile.ZipInfo(f"{ROOT}/{name}")  # its date is fixed: equal tensors give equal files
        info.file_size = tensor.numel() * tensor.element_size()  # tells zipfile in time whether the member needs 64-bit sizes
        is_large = info.file_size * 1.05 > zipfile.ZIP64_LIMIT
        # a member's data follow its 30-byte header, its name, its extra fields and those zipfile adds for large files
        data_at = self._file.tell() + 30 + len(info.filename) + (20 if is_large else 0)
        padding = -(data_at + 4) % ALIGNMENT
        info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)  # the field id torch uses for this
        with self._zip.open(info, "w", force_zip64=is_large) as member:
            for chunk in _chunks(tensor):
                member.write(chunk)
        info.extra = b""  # no padding needed in the table of contents
        self._file.drain()  # the caller may change the tensor after write()


class SafetensorsWriter(_Writer):
    """Streaming writer of one .safetensors file. After an error inside `with`, the partial file is deleted.

    infos: name -> TensorInfo of every tensor, in the order of the calls of write(). List larger element types first:
    then every tensor is aligned to its elements, as the format's own writer has it.
    """

    def __init__(self, path, infos: dict[str, TensorInfo]):
        header: dict = {"__metadata__": {"format": "pt"}}  # transformers insists on this entry
        at = 0
        for name, info in infos.items():
            if info.dtype not in _SAFETENSORS_NAMES or name == "__metadata__":
                raise CheckpointError(f"{path}: cannot store {name} ({info.dtype})")
            if at % info.dtype.itemsize:
                raise CheckpointError(f"{path}: {name} would not be aligned; list larger element types first")
            size = math.prod(info.shape) * info.dtype.itemsize
            header[name] = {"dtype": _SAFETENSORS_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [at, at + size]}
            at += size
        self._coming = list(reversed(infos.items()))
        super().__init__(path)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % ALIGNMENT_SAFETENSORS)
        with self._errors():
            self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name, tensor):
        """Append the next tensor. Its bytes are in the file (or the system's cache) and hashed when this returns."""
        if self._result is not None:
            raise CheckpointError(f"{self.path}: already closed, cannot write {name}")
        expected = self._coming.pop() if self._coming else ("no further tensor", None)
        if (name, TensorInfo(tuple(tensor.shape), tensor.dtype)) != expected:
            raise CheckpointError(f"{self.path}: got {name} {list(tensor.shape)} {tensor.dtype}, the header says {expected}")
        with self._errors():
            for chunk in _chunks(tensor.detach()):
                self._file.write(chunk)
            self._file.drain()  # the caller may change the tensor after write()

    def _finish(self):
        if self._coming:
            raise CheckpointError(f"{self.path}: {len(self._coming)} tensors of the header were not written, the first is "
                                  f"{self._coming[-1][0]}")  # fmt: skip


def _chunks(tensor):
    """The bytes of a tensor in row order, as arrays of uint8 of about CHUNK_BYTES: views where it is contiguous."""
    n_bytes = tensor.numel() * tensor.element_size()
    if n_bytes == 0:
        return
    if tensor.is_contiguous():
        flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)  # of a single element the stride may be any
        for start in range(0, n_bytes, CHUNK_BYTES):
            yield flat[start : start + CHUNK_BYTES].cpu().numpy()
    else:  # columns of a matrix, say: a few rows at a time stay in the processor's cache, a copy of all would not
        n_rows = max(1, CHUNK_BYTES * tensor.shape[0] // n_bytes)
        for start in range(0, tensor.shape[0], n_rows):
            yield from _chunks(tensor[start : start + n_rows].contiguous())


class _HashingFile:
    """A write-only file that computes its own sha256 in a second thread (hashlib and file writes release the GIL).

    It deliberately cannot seek: zipfile then puts CRC and sizes behind the data and never rewrites a byte.
    """

    def __init__(self, path):
        self._path = path
        self._file = open(path, "wb")
        self._hash = hashlib.sha256()
        self._size = self._sent = 0
        self._pool = ThreadPoolExecutor(1)
        self._pending = None

    def write(self, data):
        data = memoryview(data)
        self.drain()
        if data.nbytes < 1 << 16:
            self._hash.update(data)
        else:
            self._pending = self._pool.submit(self._hash.update, data)
        self._file.write(data)
        self._size += data.nbytes
        if self._size - self._sent >= FLUSH_BYTES and hasattr(os, "posix_fadvise"):
            # Linux then starts writing these pages to the disk at once, instead of all of them under the final fsync
            os.posix_fadvise(self._file.fileno(), self._sent, self._size - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = self._size
        return data.nbytes

    def tell(self):
        return self._size

    def flush(self):
        self._file.flush()

    def drain(self):
        """Wait until all bytes written so far are hashed."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def finish(self):
        self.drain()
        self._pool.shutdown()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"size": self._size, "sha256": self._hash.hexdigest()}

    def discard(self):
        self._pool.shutdown()
        try:
            self._file.close()
        except OSError:
            pass  # a full disk fails again on the last flush
        if os.path.isfile(self._path):  # never a device
            os.remove(self._path)


# ---- data.pkl ------------------------------------------------------------------------------------------------------


@dataclass
class _Storage:
    key: str
    dtype: torch.dtype
    n_elements: int


@dataclass
class _Entry:
    """Pickles as the call that rebuilds the tensor from its record."""

    storage: _Storage
    shape: tuple

    def __reduce__(self):
        strides, step = [], 1
        for size in reversed(self.shape):
            strides.insert(0, step)
            step *= max(size, 1)
        arguments = (self.storage, 0, self.shape, tuple(strides), False, OrderedDict())
        if self.storage.dtype in UNTYPED:
            return torch._utils._rebuild_tensor_v3, (*arguments, self.storage.dtype)
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value):
        if not isinstance(value, _Storage):
            return None
        if value.dtype in UNTYPED:
            return "storage", torch.UntypedStorage, value.key, "cpu", value.n_elements * value.dtype.itemsize
        return "storage", STORAGES[value.dtype], value.key, "cpu", value.n_elements


def _pickled(entries):
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(entries)  # 2 is what torch.save writes and its safe unpickler reads
    return stream.getvalue()


def _bytes(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
