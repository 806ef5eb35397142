# SPDX-License-Identifier: MIT
"""Rewriting a GGUF file tensor by tensor: rows are read, encoded and measured in threads, and written in order.

A tensor is cut into chunks of whole rows, always at the same places, so that neither the bytes nor the statistics
depend on the number of threads. At most `window` chunks are in memory at a time, whatever the size of a tensor. Inside
a chunk, everything is done on pieces that stay in a core's cache. Types with a side tensor share what is in it among
all rows of a matrix: they are coded here a matrix at a time, before their chunks.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from . import plan, types
from .errors import InputError, UsageError
from .files import gguf_file
from .files.gguf_file import Gguf, Tensor, Value
from .runtime import native
from .types import columns

CHUNK = 1 << 18  # weights read, encoded and written as one
PIECE = 1 << 16  # weights converted and measured at once: 256 KiB as float32
BASE_RAM = 256 << 20  # bytes: the interpreter, its libraries and the metadata
CODER_RAM = 384 << 20  # bytes: PyTorch


class Rows(Protocol):
    """Rows that are encoded already: an array, or a part of a file that is read when it is sliced."""

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


@dataclass
class Stats:
    """The error of one tensor: sums over all its weights in float64, the largest error, worker seconds."""

    weights: int = 0
    signal: float = 0.0
    error: float = 0.0
    largest: float = 0.0
    seconds: float = 0.0

    def add(self, other: Stats) -> None:
        """Take in what was measured of other rows of the tensor."""
        self.weights += other.weights
        self.signal += other.signal
        self.error += other.error
        self.largest = max(self.largest, other.largest)
        self.seconds += other.seconds

    @property
    def rmse(self) -> float:
        """Root mean square of the errors."""
        return math.sqrt(self.error / self.weights)

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise; None when there is no error (or no signal) to relate, or no number for it."""
        ratio = self.signal / self.error if self.error and self.signal else 0.0
        return 10 * math.log10(ratio) if 0 < ratio < math.inf else None


@dataclass(frozen=True)
class Job:
    """One chunk to encode."""

    entry: plan.Entry
    first: int
    count: int
    importance: np.ndarray | None  # float32 [n_cols]
    solved: np.ndarray | None = None  # uint8 [count, row_bytes]: encoded already
    side: columns.Side | None = None  # of the matrix, where `target` has side tensors
    source_side: columns.Side | None = None  # the same of what is read


@dataclass(frozen=True)
class Chunk:
    """One encoded chunk; `data` is None when a weight was as large as `too_large`, beyond the type's reach."""

    data: np.ndarray | None
    stats: Stats
    too_large: float = 0.0


def rewrite(
    source: Gguf,
    entries: Sequence[plan.Entry],
    kv: Mapping[str, Value],
    outfile: Path,
    importance: Mapping[str, np.ndarray] | None = None,
    threads: int = 1,
    max_ram: int | None = None,
    solved: Mapping[str, Rows] | None = None,
    done: Callable[[plan.Entry, Stats], None] = lambda entry, stats: None,
    check: Callable[[Path], None] = lambda written: None,
    contained: bool = False,
) -> tuple[list[plan.Entry], list[Stats]]:
    """Write `outfile` with every tensor in the type its entry names; returns the entries as they came out and errors.

    importance: tensor name -> float32 [experts * n_cols], missing names allowed. solved: tensor name -> uint8
    [n_rows, row_bytes], tensors encoded already, and [matrices, size], their side tensors. done: called after each
    tensor. check: called with the written file before it gets its name; raises to have it dropped. contained: write
    a container.
    A tensor with a weight beyond its type's reach is encoded again in a wider one (`plan.widen`).
    Raises InputError for NaN or Inf (naming the place) and EnvironmentFailed when the disk fails.
    """
    importance, solved = importance or {}, solved or {}
    final, measured = [], []
    sides: dict[str, np.ndarray] = {}

    def jobs() -> Iterator[Job]:
        for entry in entries:
            weights, rows = importance.get(entry.name), solved.get(entry.name)
            if entry.columns:
                if rows is None:
                    rows, sides[entry.name] = _code(source, entry, entry.columns, weights)
                else:
                    sides[entry.name] = solved[columns.side_name(entry.name)][:]
            yield from _jobs(source, entry, weights, rows, sides.get(entry.name))

    pool = ThreadPoolExecutor(threads, "encode")
    try:
        window = window_size(entries, threads, max_ram)
        begin = len(header(kv, entries, contained))
        with gguf_file.atomic(outfile, begin + data_size(entries), check) as out:
            out.seek(begin)
            stream = _in_order(pool, source, jobs(), window)
            for entry in entries:
                start = out.tell()
                stats, too_large = _write(out, entry, stream)
                if too_large:
                    entry = plan.widen(entry, too_large)
                    out.seek(start)
                    again = _jobs(source, entry, importance.get(entry.name))
                    stats, _ = _write(out, entry, _in_order(pool, source, again, window))
                _pad(out)
                if entry.name in sides:
                    out.write(sides.pop(entry.name).data)
                    _pad(out)
                final.append(entry)
                measured.append(stats)
                done(entry, stats)
            out.truncate()
            head = header(kv, final, contained)
            if len(head) < begin:
                _move(out, begin, len(head))
            out.seek(0)
            out.write(head)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return final, measured


def header(kv: Mapping[str, Value], entries: Sequence[plan.Entry], contained: bool) -> bytes:
    """What is before the tensor data. A container's is the shorter the fewer of its tensors have our types."""
    return gguf_file.header(kv, [tensor for e in entries for tensor in e.stored], contained)


def data_size(entries: Sequence[plan.Entry]) -> int:
    """Bytes of the tensor data."""
    stored = [tensor for e in entries for tensor in e.stored]
    return sum(gguf_file.padded(gguf_file.n_bytes(shape, type_id)) for _, shape, type_id in stored)


def peak_ram(entries: Sequence[plan.Entry], threads: int, window: int) -> int:
    """An upper estimate in bytes of what `rewrite` keeps in memory."""
    chunks = window * max((_chunk_ram(e) for e in entries), default=0) + threads * 8 * 4 * PIECE
    return BASE_RAM + chunks + max((_code_ram(e) for e in entries), default=0)


def window_size(entries: Sequence[plan.Entry], threads: int, max_ram: int | None) -> int:
    """How many chunks may be in memory: enough to keep every thread busy, or what `max_ram` bytes allow.

    Raises UsageError when not even one chunk fits.
    """
    window = 2 * threads + 2
    if max_ram is None:
        return window
    while window > 1 and peak_ram(entries, threads, window) > max_ram:
        window -= 1
    if (least := peak_ram(entries, threads, window)) > max_ram:
        raise UsageError(f"--max-ram {gguf_file.mib(max_ram)} is too small: this model needs {gguf_file.mib(least)}")
    return window


def to_float32(raw: np.ndarray, type_id: int) -> np.ndarray:
    """Rows as stored, uint8 [n_rows, row_bytes] -> float32 [n_rows, n_cols]; may be a view of `raw`."""
    name = gguf_file.type_name(type_id)
    if name == "f32":
        return raw.view(np.float32)
    if name == "bf16":
        return np.left_shift(raw.view(np.uint16), 16, dtype=np.uint32).view(np.float32)
    if name == "f16":
        # Exponent and mantissa moved to float32's places, then rescaled by the difference of the biases: exact for
        # every finite value, and eight times as fast as NumPy's astype. Inf and NaN come out at 2^16 or more.
        bits = np.left_shift(raw.view(np.int16), 16, dtype=np.int32)
        bits >>= 3
        bits &= np.int32(-0x70002000)  # 0x8fffe000: the sign's two copies go
        values = bits.view(np.float32)
        values *= np.float32(2.0**112)
        return values if values.max() < 65536 and values.min() > -65536 else raw.view(np.float16).astype(np.float32)
    try:
        return types.by_id(type_id).decode(raw)
    except KeyError:  # a type that is read but not written here, such as MXFP4
        from gguf import GGMLQuantizationType, quants

        return quants.dequantize(np.ascontiguousarray(raw), GGMLQuantizationType(type_id))


def widen(raw: np.ndarray, type_id: int) -> tuple[np.ndarray, float]:
    """`to_float32`, and the largest magnitude, which is not finite when one of the values is not."""
    lib = native.library()
    if lib is None or gguf_file.type_name(type_id) not in plan.FLOATS:
        return (rows := to_float32(raw, type_id)), float(max(rows.max(), -rows.min()))
    rows, largest = native.widen(lib, type_id, raw)
    return (rows if math.isfinite(largest) else to_float32(raw, type_id)), largest


def errors(decoded: np.ndarray, rows: np.ndarray) -> tuple[float, float, float]:
    """Sums of squared weights and errors in float64, the largest error; overwrites `decoded`."""
    decoded -= rows
    largest = max(float(decoded.max()), -float(decoded.min()))
    with np.errstate(over="ignore"):  # weights beyond 1e19 have no square; their error is infinite then
        error = float(np.square(decoded, out=decoded).sum(dtype=np.float64))
        return float(np.square(rows, out=decoded).sum(dtype=np.float64)), error, largest


def each_matrix(file: Gguf, tensor: Tensor, step: int | None = None) -> Iterator[np.ndarray]:
    """float32 [rows, columns] of a tensor's matrix, or of one expert after the other; of `step` rows when given."""
    step = step or tensor.shape[-2]
    for first in range(0, tensor.n_rows, step):
        yield read_float32(file, tensor, first, min(step, tensor.n_rows - first))


def read_float32(file: Gguf, tensor: Tensor, first: int, count: int) -> np.ndarray:
    """float32 [count, columns]: rows of a tensor."""
    return widen(file.read_rows(tensor, first, count), tensor.type_id)[0]


def encode(source: Gguf, job: Job) -> Chunk:
    """Read, encode and measure one chunk. Threads run this."""
    tensor, target, kind = job.entry.tensor, job.entry.target, job.entry.columns
    raw = source.read_rows(tensor, job.first, job.count)
    started = time.perf_counter()  # reading may have waited for the converter process
    stats = Stats(weights=job.count * tensor.n_cols)
    if target is None:
        return Chunk(raw, stats)
    limit = math.inf if target.max_abs is None else target.max_abs
    copied = job.entry.copied and job.solved is None
    out = raw if copied else np.empty((job.count, target.row_bytes(tensor.n_cols)), np.uint8)
    step, too_large = max(1, PIECE // tensor.n_cols), 0.0
    for at in range(0, job.count, step):
        rows, largest = _floats(raw[at : at + step], tensor, job.source_side, job.first + at)
        if not math.isfinite(largest):
            raise _not_finite(tensor, rows, job.first + at)
        if largest > limit:
            too_large = max(too_large, largest)
        if copied or too_large:  # what wider type will do, all the pieces tell
            continue
        solved = job.solved
        out[at : at + step] = target.encode(rows, job.importance) if solved is None else solved[at : at + step]
        if kind is None or job.side is None:
            sums = _measure(target, out[at : at + step], rows)
        else:
            sums = errors(kind.decode_rows(out[at : at + step], job.side, (job.first + at) % tensor.shape[-2]), rows)
        stats.add(Stats(0, *sums))
    stats.seconds = time.perf_counter() - started
    return Chunk(None if too_large else out, stats, too_large)


def side_of(source: Gguf, tensor: Tensor, row: int) -> columns.Side | None:
    """The side tensor of the matrix that this row lies in; InputError when it is not there or damaged."""
    kind = types.columns_by_id(tensor.type_id)
    if kind is None:
        return None
    name = columns.side_name(tensor.name)
    found = next((t for t in source.tensors if t.name == name), None)
    *stack, n_rows, n_cols = tensor.shape if len(tensor.shape) > 1 else (0, 1, 1)  # never of one dimension
    if found is None or found.type_id != columns.SIDE_TYPE or found.shape[:-1] != tuple(stack):
        cause = f"its {name!r} is missing, or of a wrong type or shape"
        raise InputError(f"{tensor.file.name}: tensor {tensor.name!r}: {cause}: the file is damaged, get it again")
    return kind.read_side(source.read_rows(found, row // n_rows, 1)[0], n_rows, n_cols, name)


def _floats(raw: np.ndarray, tensor: Tensor, side: columns.Side | None, first: int) -> tuple[np.ndarray, float]:
    """`widen` of rows from row `first` of the tensor on."""
    kind = types.columns_by_id(tensor.type_id)
    if kind is None or side is None:
        return widen(raw, tensor.type_id)
    rows = kind.decode_rows(raw, side, first % tensor.shape[-2])
    return rows, float(max(rows.max(), -rows.min()))


def _code(
    source: Gguf, entry: plan.Entry, kind: columns.ColumnType, importance: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """A tensor of a type with side tensors, coded without a Hessian: uint8 [n_rows, row_bytes] and [matrices, size]."""
    import torch

    from .coding import families

    tensor, packed, sides = entry.tensor, [], []
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(entry.source_name, torch.float32)
    by_matrix = None if importance is None else torch.from_numpy(importance.reshape(-1, tensor.n_cols))
    for number, first in enumerate(range(0, tensor.n_rows, tensor.shape[-2])):
        raw = source.read_rows(tensor, first, tensor.shape[-2])
        for at in range(0, len(raw), step := max(1, PIECE // tensor.n_cols)):
            rows, largest = widen(raw[at : at + step], tensor.type_id)
            if not math.isfinite(largest):
                raise _not_finite(tensor, rows, first + at)
        weights = None if by_matrix is None else by_matrix[number]
        if entry.source_name not in plan.FLOATS:
            raw = to_float32(raw, tensor.type_id).view(np.uint8)
        found = families.code(torch.from_numpy(raw).view(dtype), kind, entry.layout, weights)
        packed.append(found[0])
        sides.append(found[1])
    return np.concatenate(packed), np.stack(sides)


def _move(out: BinaryIO, start: int, to: int) -> None:
    """Move all that an open file holds from `start` on down to `to`: tensors that were widened are not listed."""
    end = out.seek(0, os.SEEK_END)
    for at in range(start, end, gguf_file.PIECE):
        out.seek(at)
        data = out.read(gguf_file.PIECE)
        out.seek(at - start + to)
        out.write(data)
    out.truncate(end - start + to)


def _pad(out: BinaryIO) -> None:
    out.write(b"\0" * (gguf_file.padded(out.tell()) - out.tell()))


def _measure(target: types.TensorType, data: np.ndarray, rows: np.ndarray) -> tuple[float, float, float]:
    """`errors` of encoded rows."""
    lib = native.library()
    if lib is None or target.name in plan.FLOATS:
        return errors(target.decode(data), rows)
    return native.errors(lib, target.gguf_id, data, rows)


def _write(out: BinaryIO, entry: plan.Entry, stream: Iterator[Chunk]) -> tuple[Stats, float]:
    """Take a tensor's chunks from the stream and write them; (statistics, the largest weight beyond reach or 0)."""
    total, too_large = Stats(), 0.0
    for _ in _ranges(entry.tensor):
        chunk = next(stream)
        total.add(chunk.stats)
        too_large = max(too_large, chunk.too_large)
        if chunk.data is not None and not too_large:
            out.write(chunk.data.data)
    return total, too_large


def _in_order(pool: ThreadPoolExecutor, source: Gguf, jobs: Iterator[Job], window: int) -> Iterator[Chunk]:
    """Results in the order of the jobs, with at most `window` of them under way or waiting."""
    waiting: deque[Future[Chunk]] = deque()
    for job in jobs:
        waiting.append(pool.submit(encode, source, job))
        if len(waiting) >= window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _jobs(
    source: Gguf,
    entry: plan.Entry,
    importance: np.ndarray | None,
    solved: Rows | None = None,
    sides: np.ndarray | None = None,
) -> Iterator[Job]:
    per_matrix = entry.tensor.shape[-2] if len(entry.tensor.shape) > 1 else 1
    by_matrix = None if importance is None else importance.reshape(-1, entry.tensor.n_cols)
    side = source_side = None
    for first, count in _ranges(entry.tensor):
        weights = None if by_matrix is None else by_matrix[first // per_matrix]
        if first % per_matrix == 0:
            source_side = side_of(source, entry.tensor, first)
            if entry.columns and sides is not None:
                data = sides[first // per_matrix]
                side = entry.columns.read_side(data, per_matrix, entry.tensor.n_cols, columns.side_name(entry.name))
        rows = None if solved is None else solved[first : first + count]
        yield Job(entry, first, count, weights, rows, side, source_side)


def _ranges(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """(first row, rows) of each chunk; none crosses from one expert's matrix into the next."""
    per_matrix = tensor.shape[-2] if len(tensor.shape) > 1 else 1
    step = max(1, CHUNK // tensor.n_cols)
    for matrix in range(0, tensor.n_rows, per_matrix):
        for first in range(matrix, matrix + per_matrix, step):
            yield first, min(step, matrix + per_matrix - first)


def _chunk_ram(entry: plan.Entry) -> int:
    """Bytes of one chunk in memory, stored and encoded."""
    rows = min(entry.tensor.n_rows, max(1, CHUNK // entry.tensor.n_cols))
    return rows * (entry.tensor.row_bytes + entry.n_bytes // entry.tensor.n_rows)


def _code_ram(entry: plan.Entry) -> int:
    """Bytes that coding a tensor with a side tensor takes: a matrix, its codes while they are packed, the result."""
    if not entry.columns:
        return 0
    return CODER_RAM + entry.tensor.shape[-2] * (entry.tensor.row_bytes + 3 * entry.tensor.n_cols) + 2 * entry.n_bytes


def _not_finite(tensor: Tensor, rows: np.ndarray, first: int) -> InputError:
    row, column = np.argwhere(~np.isfinite(rows))[0]
    value = "NaN" if np.isnan(rows[row, column]) else "Inf"
    return InputError(
        f"{tensor.file.name}: tensor {tensor.name!r} holds {value} at row {first + row}, column {column}: "
        "the checkpoint is damaged, get it again"
    )
