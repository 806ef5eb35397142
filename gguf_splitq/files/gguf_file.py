# SPDX-License-Identifier: MIT
"""GGUF files: a strict reader of headers, bounded reads of tensor rows, and an atomic writer.

The header is parsed here, not by `gguf.GGUFReader`, because that class trusts what it reads: a 49-byte file can make
it loop over 2^62 entries. Every length is checked against the bytes that are left before it is used, and the layout
rules are those of llama.cpp's own loader (ggml/src/gguf.cpp): tensors lie one after another, each start padded to the
alignment, nothing overlaps and nothing is left out. Metadata values are kept as stored bytes, so that copying them
changes nothing. Tensor data is read by `pread`, never mapped, which keeps the resident memory bounded.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import re
import secrets
import stat
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from .. import types
from ..errors import EnvironmentFailed, InputError, UnsupportedError
from . import container
from .values import ARRAY, SCALARS, STRING, U32, Value, string, typed

ALIGNMENT = 32  # of every file written here: llama-quantize's COPY breaks files with any other value
MAX_HEADER = 1 << 28  # bytes; the largest vocabularies need about 2^24
MAX_ENTRIES = 1 << 20  # tensors, or keys; the largest models have about 2^12
MAX_NAME = 64  # GGML_MAX_NAME, the closing zero byte included
MAX_DIMS = 4  # GGML_MAX_DIMS
PIECE = 1 << 22  # bytes read at once of a tensor that is copied

_SHARD = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Bytes of a file of another kind."""

    file: Path
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies. shape is NumPy's order (columns last), offset counts from the start of the file.

    parts: where its bytes are instead, one part after another, if the file has a hole in its place.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    n_bytes: int
    file: Path
    parts: tuple[Part, ...] = ()

    @property
    def n_cols(self) -> int:
        """Weights of a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def n_rows(self) -> int:
        """Rows, those of all experts together."""
        return self.n_weights // self.n_cols

    @property
    def n_weights(self) -> int:
        """All its weights."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Stored bytes of a row."""
        return self.n_bytes // self.n_rows


@dataclass
class Gguf:
    """A checked GGUF file, or a set of shards seen as one."""

    path: Path
    kv: dict[str, Value]
    tensors: list[Tensor]
    files: list[Path]
    size: int  # bytes of all files
    growing: Callable[[], bool] = lambda: False  # whether more of the data may yet be written
    contained: bool = False  # whether tensors of this project's types were stored as bytes

    def __post_init__(self) -> None:
        self._open = {}
        parts = [part.file for tensor in self.tensors for part in tensor.parts]
        try:
            for path in dict.fromkeys([*self.files, *parts]):
                self._open[path] = open(path, "rb", buffering=0)
        except OSError as error:
            self.close()
            raise EnvironmentFailed(
                f"{path}: cannot be opened beside {len(self._open)} other shards ({error.strerror}): "
                "allow more open files (ulimit -n) or merge them"
            ) from error

    def get(self, key: str, kind: type[T], default: T) -> T:
        """`typed` of this file's metadata."""
        return typed(self.path, self.kv, key, kind, default)

    @property
    def infos(self) -> list[container.Info]:
        """(name, NumPy shape, type id) of the tensors."""
        return [(t.name, t.shape, t.type_id) for t in self.tensors]

    def read_rows(self, tensor: Tensor, first: int, count: int) -> np.ndarray:
        """Rows [first, first + count) of a tensor as stored: uint8 [count, row_bytes]. Threads may call this at once.

        Waits for what a growing file does not hold yet. Raises InputError when the file has become shorter since its
        header was read.
        """
        size = tensor.row_bytes
        return self._read(tensor, first * size, count * size).reshape(count, size)

    def pieces(self, tensor: Tensor) -> Iterator[memoryview]:
        """All bytes of a tensor in order, in pieces of bounded size whatever its rows are; raises as `read_rows`."""
        for at in range(0, tensor.n_bytes, PIECE):
            yield self._read(tensor, at, min(PIECE, tensor.n_bytes - at)).data

    def _read(self, tensor: Tensor, at: int, size: int) -> np.ndarray:
        """uint8 [size]: the bytes of a tensor from its byte `at` on."""
        data = np.empty(size, np.uint8)
        view = data.data.cast("B")
        for part in tensor.parts or (Part(tensor.file, tensor.offset, tensor.n_bytes),):
            count = max(0, min(part.n_bytes - at, len(view)))
            self._fill(view[:count], part.file, part.offset + at, tensor)
            view, at = view[count:], max(0, at - part.n_bytes)
        return data

    def _fill(self, view: memoryview, path: Path, offset: int, tensor: Tensor) -> None:
        """Bytes of a file, from `offset` on, into `view`."""
        try:
            while len(view):
                growing = path == tensor.file and self.growing()  # asked first: what is written meanwhile is read below
                n = os.preadv(self._open[path].fileno(), [view], offset)
                if n == 0 and growing:
                    time.sleep(0.02)
                elif n == 0:
                    raise InputError(f"{path}: the file ends inside tensor {tensor.name!r}: copy it again")
                view, offset = view[n:], offset + n
        except OSError as error:
            cause = f"tensor {tensor.name!r} cannot be read ({error.strerror})"
            raise InputError(f"{path}: {cause}: check the disk") from error

    def close(self) -> None:
        """Give the open files back."""
        for file in self._open.values():
            file.close()

    def __enter__(self) -> Gguf:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@functools.cache
def sizes() -> dict[int, tuple[str, int, int]]:
    """ggml type id -> (name, weights per block, bytes per block), of every type that can be read or written."""
    from gguf import GGML_QUANT_SIZES

    types.register_with_gguf()
    ours = {t.gguf_id: t.name for t in types.all_types()}
    return {int(t): (ours.get(int(t), t.name.lower()), *GGML_QUANT_SIZES[t]) for t in GGML_QUANT_SIZES}


def type_name(type_id: int) -> str:
    """ggml's name of a type id, its number where nobody here knows it."""
    return sizes()[type_id][0]


def require_file(path: str | Path) -> None:
    """InputError unless `path` is a file with a beginning and an end: reading a pipe would wait, a device never end."""
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            return
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({cause}): check the path") from error
    raise InputError(f"{path}: cannot be read (not a regular file): check the path")


def read(path: str | Path, data: bool = True) -> Gguf:
    """Read and check the header of a GGUF file; a file named *-00001-of-000NN.gguf brings its other shards along.

    data: False for a file that is still being written, whose tensor data need not be there yet.
    Raises InputError for damage of any kind, UnsupportedError for big-endian files and unknown tensor types.
    """
    path = Path(path)
    shards = _shards(path)
    parts = [_read_one(shard, data) for shard in shards]
    kv = {k: v for k, v in parts[0][0].items() if not k.startswith("split.")}
    tensors = [t for _, part in parts for t in part]
    names = set()
    for tensor in tensors:
        if tensor.name in names:
            raise InputError(f"{path}: tensor {tensor.name!r} is there twice: the file is damaged, get it again")
        names.add(tensor.name)
    for number, (shard, (found, _)) in enumerate(zip(shards, parts, strict=True)):
        _check_split(shard, found, number, len(shards), len(tensors))
    contained = any(key in kv for key in container.KEYS)
    kv, infos = container.unpack(path, kv, [(t.name, t.shape, t.type_id) for t in tensors])
    tensors = [replace(t, shape=shape, type_id=type_id) for t, (_, shape, type_id) in zip(tensors, infos, strict=True)]
    size = sum(p.stat().st_size for p in shards)
    return Gguf(path, kv, tensors, shards, size, contained=contained)


def header(kv: Mapping[str, Value], tensors: Sequence[container.Info], contained: bool = False) -> bytes:
    """Everything before the tensor data, padded; tensors are (name, NumPy shape, type id) in file order.

    contained: as a container (`container.pack`). Otherwise the length does not depend on the type ids.
    """
    if contained:
        kv, tensors = container.pack(kv, tensors)
    out = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(kv)))
    for key, value in kv.items():
        out += string(key) + struct.pack("<I", value.type) + value.raw
    offset = 0
    for name, shape, type_id in tensors:
        out += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), type_id, offset)
        offset += padded(n_bytes(shape, type_id))
    return bytes(out.ljust(padded(len(out)), b"\0"))


def stream(file: Gguf, contained: bool) -> tuple[int, Iterator[bytes | memoryview]]:
    """(bytes, pieces) of one file with all that `file` holds, as a container or with the types' own ids.

    The data stay where they are, so one form becomes the other and back byte for byte. Shards become one file; an
    alignment that is none of ours goes.
    """
    kv = dict(file.kv)
    if typed(file.path, kv, "general.alignment", int, ALIGNMENT) != ALIGNMENT:
        del kv["general.alignment"]
    head = header(kv, file.infos, contained)

    def pieces() -> Iterator[bytes | memoryview]:
        yield head
        for tensor in file.tensors:
            yield from file.pieces(tensor)
            yield bytes(padded(tensor.n_bytes) - tensor.n_bytes)

    return len(head) + sum(padded(t.n_bytes) for t in file.tensors), pieces()


def n_bytes(shape: tuple[int, ...], type_id: int) -> int:
    """Stored bytes of a tensor, padding left out; rows must divide into the type's blocks."""
    _, block, block_bytes = sizes()[type_id]
    return math.prod(shape) // block * block_bytes


def padded(size: int, alignment: int = ALIGNMENT) -> int:
    """`size` up to the next multiple of the alignment."""
    return -(-size // alignment) * alignment


@contextlib.contextmanager
def atomic(path: Path, needed: int, check: Callable[[Path], None] = lambda temp: None) -> Iterator[BinaryIO]:
    """A file that appears under `path` only when the block ends well, was synced, and reads back as a sound GGUF.

    needed: bytes the file will take, for the check of free space and the message when the disk fills. check: raises
    what else speaks against the file, which has a temporary name then.
    Raises EnvironmentFailed when the folder cannot be written to or is too small. Nothing is left behind on any
    exception, KeyboardInterrupt included.
    """
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        require_space(path.parent, needed)
        with open(temp, "x+b", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _check_written(temp, path)
        check(temp)
        os.replace(temp, path)
    except OSError as error:
        raise disk_error(error, path, needed) from error
    finally:
        temp.unlink(missing_ok=True)


def require_space(folder: Path, needed: int) -> None:
    """EnvironmentFailed unless `folder` has `needed` bytes free."""
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if free < needed:
        raise EnvironmentFailed(
            f"{folder}: {mib(needed)} are needed and {mib(free)} are free: make room or choose another --outfile"
        )


def disk_error(error: OSError, path: Path, needed: int) -> EnvironmentFailed:
    """The one sentence for a write that failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return EnvironmentFailed(
            f"{path}: the disk filled up while {mib(needed)} were being written: make room or choose another --outfile"
        )
    return EnvironmentFailed(f"{path}: cannot be written ({error.strerror or error}): check the folder and its rights")


def mib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**20:,.1f} MiB"


def _check_written(temp: Path, path: Path) -> None:
    """EnvironmentFailed unless the file reads back as a GGUF whose tensors fill it to the last byte."""
    with contextlib.suppress(InputError), read(temp) as file:
        tensors = file.tensors
        if not tensors or tensors[-1].offset + padded(tensors[-1].n_bytes) == temp.stat().st_size:
            return
    raise EnvironmentFailed(f"{path}: the file does not read back as it was written: check the disk")


def _shards(path: Path) -> list[Path]:
    """The files of a set by their names, all of which are there."""
    match = _SHARD.fullmatch(path.name)
    if not match or int(match[3]) < 2:
        return [path]
    stem, number, count = match.groups()
    if number != "00001":
        raise InputError(f"{path}: this is shard {number} of {count}: give the first, {stem}-00001-of-{count}.gguf")
    shards = [path.with_name(f"{stem}-{i:05d}-of-{count}.gguf") for i in range(1, int(count) + 1)]
    for i, shard in enumerate(shards):
        if not os.path.exists(shard):
            raise InputError(f"{shard}: shard {i + 1} of {len(shards)} is missing: put all of them in one folder")
    return shards


def _check_split(path: Path, kv: Mapping[str, Value], number: int, count: int, n_tensors: int) -> None:
    """InputError unless what a shard says of its set is what was found, where it says anything."""
    said = typed(path, kv, "split.count", int, 0)
    if count == 1 and said > 1:
        raise InputError(
            f"{path}: the file is one of {said} shards: give the first, named NAME-00001-of-NNNNN.gguf, "
            "with the others beside it"
        )
    for key, due in (("count", count), ("no", number), ("tensors.count", n_tensors)):
        found = typed(path, kv, f"split.{key}", int, due)
        if found != due and not (key == "count" and found == 0):
            raise InputError(
                f"{path}: 'split.{key}' is {found} where {due} is due for shard {number + 1} of {count}: "
                "these are not shards of one file, get them again"
            )


def _read_one(path: Path, data: bool) -> tuple[dict[str, Value], list[Tensor]]:
    """(metadata, tensors) of one file."""
    require_file(path)
    try:
        with open(path, "rb") as file:
            return _Header(path, file).parse(data)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: a name in the header is not UTF-8: the file is damaged, get it again") from error


class _Header:
    """One pass over a header; `left` is what may still be read, and nothing is read beyond it."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.left = min(self.size, MAX_HEADER)

    def fail(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what}: the file is damaged or not a GGUF file, get it again")

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise self.fail(f"the header ends inside {what} ({count} bytes wanted, {self.left} left)")
        self.left -= count
        data = self.file.read(count)
        if len(data) < count:
            raise self.fail(f"the file became shorter inside {what} while it was read")
        return data

    def number(self, fmt: str, what: str) -> int:
        return struct.unpack("<" + fmt, self.take(struct.calcsize("<" + fmt), what))[0]

    def string(self, what: str) -> bytes:
        return self.take(self.number("Q", what), what)

    def parse(self, data: bool) -> tuple[dict[str, Value], list[Tensor]]:
        if self.take(4, "the magic number") != b"GGUF":
            raise self.fail("the first four bytes are not 'GGUF'")
        version = self.number("I", "the version")
        if version in (2 << 24, 3 << 24):
            raise UnsupportedError(f"{self.path}: big-endian GGUF files are not handled: convert it to little-endian")
        if version not in (2, 3):
            raise UnsupportedError(f"{self.path}: GGUF version {version} is not handled: make the file anew")
        n_tensors, n_kv = self.number("Q", "the tensor count"), self.number("Q", "the metadata count")
        if 24 * n_tensors + 13 * n_kv > self.left or max(n_tensors, n_kv) > MAX_ENTRIES:
            raise self.fail(f"{n_tensors} tensors and {n_kv} metadata entries do not fit into {self.left} bytes")
        kv = {}
        for _ in range(n_kv):
            key = self.string("a metadata key").decode()
            if not key.isprintable() or key in kv:
                raise self.fail(f"metadata key {key!r} is there twice or not printable")
            kv[key] = self.value(key)
        alignment = typed(self.path, kv, "general.alignment", int, ALIGNMENT)
        if kv.get("general.alignment", Value.of(0)).type != U32 or alignment.bit_count() != 1 or alignment > 1 << 20:
            raise self.fail("general.alignment is not a power of two in a u32")
        infos = [self.tensor_info() for _ in range(n_tensors)]
        return kv, self.place(infos, alignment, data)

    def value(self, key: str) -> Value:
        what = f"metadata {key!r}"
        kind = self.number("I", what)
        if kind in SCALARS:
            return Value(kind, self.take(struct.calcsize(SCALARS[kind]), what))
        if kind == STRING:
            return Value(kind, string(self.string(what)))
        if kind != ARRAY:
            raise self.fail(f"{what} has the unknown type {kind}")
        head = self.take(12, what)
        item, count = struct.unpack("<IQ", head)
        if item in SCALARS:
            return Value(kind, head + self.take(count * struct.calcsize(SCALARS[item]), what))
        if item != STRING:
            raise self.fail(f"{what} is an array of the unknown type {item}")
        if count * 8 > self.left:
            raise self.fail(f"{what} claims {count} strings in {self.left} bytes")
        items = bytearray(head)  # not a list of objects, each of which takes ten times what an empty string does
        for _ in range(count):
            items += string(self.string(what))
        return Value(kind, bytes(items))

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, NumPy shape, type id, offset from the start of the data)."""
        stored = self.string("a tensor name")
        if not 0 < len(stored) < MAX_NAME:
            raise self.fail(f"a tensor name has {len(stored)} bytes where 1 to {MAX_NAME - 1} are allowed")
        name = stored.decode()
        if not name.isprintable():  # names are shown, and a terminal obeys what it is shown
            raise self.fail(f"tensor name {name!r} is not printable")
        what = f"tensor {name!r}"
        n_dims = self.number("I", what)
        if n_dims > MAX_DIMS:
            raise self.fail(f"{what} has {n_dims} dimensions where {MAX_DIMS} are allowed")
        shape = tuple(self.number("Q", what) for _ in range(n_dims))[::-1]
        type_id, offset = self.number("I", what), self.number("Q", what)
        if math.prod(shape) not in range(1, 1 << 63):
            raise self.fail(f"{what} has the impossible shape {list(shape)}")
        if type_id not in sizes():
            raise UnsupportedError(f"{self.path}: {what} has type {type_id}, which is unknown here: use a newer one")
        if (shape[-1] if shape else 1) % sizes()[type_id][1]:
            raise self.fail(
                f"{what} has rows of {shape[-1] if shape else 1} that do not divide into blocks of {type_name(type_id)}"
            )
        return name, shape, type_id, offset

    def place(self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int, data: bool) -> list[Tensor]:
        """Absolute offsets, each checked to be where the one before it ends."""
        start = padded(self.file.tell(), alignment)
        expected, tensors = 0, []
        for name, shape, type_id, offset in infos:
            if offset != expected:
                raise self.fail(
                    f"tensor {name!r} starts at {offset} where {expected} is due (overlap or bad alignment)"
                )
            size = n_bytes(shape, type_id)
            if data and start + offset + size > self.size:
                missing = start + offset + size - self.size
                raise self.fail(f"tensor {name!r} reaches {missing} bytes past the end of the file (truncated)")
            tensors.append(Tensor(name, shape, type_id, start + offset, size, self.path))
            expected += padded(size, alignment)
        return tensors
