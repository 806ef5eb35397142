# SPDX-License-Identifier: MIT
"""Importance matrices of llama.cpp, in both of its file formats.

Values are those that llama-quantize would use, to the last bit: common_imatrix_load in common/imatrix-loader.cpp and
load_imatrix in tools/quantize/quantize.cpp at the pin.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import InputError
from . import gguf_file
from .gguf_file import Tensor, Value

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass
class Imatrix:
    """Mean squared activations. entries: tensor name -> float32 [experts * n_cols]."""

    path: Path
    entries: dict[str, np.ndarray]
    datasets: list[str] = field(default_factory=list)
    chunks: int = 0

    def for_tensors(self, tensors: Sequence[Tensor]) -> dict[str, np.ndarray]:
        """The entries that fit these tensors; InputError for one of another size (an embedding's is left out)."""
        found = {}
        for tensor in tensors:
            entry = self.entries.get(tensor.name)
            matrices = tensor.shape[0] if len(tensor.shape) == 3 else 1
            if entry is None:
                continue
            if entry.size == tensor.n_cols * matrices:
                found[tensor.name] = entry
            elif tensor.name not in ("token_embd.weight", "per_layer_token_embd.weight"):
                due = tensor.n_cols * matrices
                raise InputError(
                    f"{self.path}: the entry of {tensor.name!r} has {entry.size} values where {due} are due: "
                    "make the importance matrix with this model"
                )
        return found

    def metadata(self) -> dict[str, Value]:
        """The keys by which llama-quantize records an importance matrix; the file's name without its folder."""
        kv = {"quantize.imatrix.file": Value.of(self.path.name)}
        if self.datasets:
            kv["quantize.imatrix.dataset"] = Value.of(self.datasets[0])
        kv["quantize.imatrix.entries_count"] = Value.of(len(self.entries))
        if self.chunks > 0:
            kv["quantize.imatrix.chunks_count"] = Value.of(self.chunks)
        return kv


def load(path: str | Path) -> Imatrix:
    """Read an importance matrix; InputError for a file that is truncated, hostile, or holds NaN, Inf or negatives."""
    path = Path(path)
    gguf_file.require_file(path)
    try:
        with open(path, "rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        matrix = _load_gguf(path) if is_gguf else _load_legacy(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    if not matrix.entries:
        raise _damaged(path, "it has no entries")
    for name, values in matrix.entries.items():
        if not (np.isfinite(values).all() and values.min() >= 0):
            raise _damaged(path, f"the entry of {name!r} holds NaN, Inf or a negative value")
    return matrix


def _load_gguf(path: Path) -> Imatrix:
    with gguf_file.read(path) as file:
        missing = [k for k in ("datasets", "chunk_count", "chunk_size") if f"imatrix.{k}" not in file.kv]
        if missing:
            raise _damaged(path, f"the key 'imatrix.{missing[0]}' is missing")
        by_name = {t.name: t for t in file.tensors}
        entries = {}
        for tensor in file.tensors:
            name, counts = tensor.name.removesuffix(_SUMS), by_name.get(tensor.name.removesuffix(_SUMS) + _COUNTS)
            if not tensor.name.endswith(_SUMS):
                if tensor.name.endswith(_COUNTS) and tensor.name.removesuffix(_COUNTS) + _SUMS not in by_name:
                    raise _damaged(path, f"{tensor.name!r} has no sums")
                continue
            if counts is None or tensor.n_weights % counts.n_weights:
                raise _damaged(path, f"the counts of {name!r} are missing or do not fit the sums")
            if any(gguf_file.type_name(t.type_id) != "f32" for t in (tensor, counts)):
                raise _damaged(path, f"the entry of {name!r} is not F32")
            sums, calls = (file.read_rows(t, 0, t.n_rows).view(np.float32).ravel() for t in (tensor, counts))
            if not np.isfinite(calls).all():
                raise _damaged(path, f"the counts of {name!r} hold NaN or Inf")
            calls = np.floor(calls.astype(np.float64) + 0.5).astype(np.float32)  # lround, for counts above 0
            per_expert = sums.reshape(len(calls), -1)
            with np.errstate(all="ignore"):  # what comes of it is checked by the caller
                entries[name] = np.where(calls[:, None] > 0, per_expert / calls[:, None], np.float32(1)).ravel()
        datasets, chunks = file.get("imatrix.datasets", list[str], []), file.get("imatrix.chunk_count", int, 0)
        if chunks >= 1 << 32:
            raise _damaged(path, f"{chunks} chunks are more than can be")
        return Imatrix(path, entries, datasets, chunks)


def _load_legacy(path: Path) -> Imatrix:
    """int32 count, then per entry: int32 length, name, int32 calls, int32 values, float32 values; chunks, dataset."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:

        def take(count: int, what: str) -> bytes:
            if not 0 <= count <= size - file.tell():
                raise _damaged(path, f"the file ends inside {what}")
            return file.read(count)

        def number(what: str) -> int:
            return struct.unpack("<i", take(4, what))[0]

        entries = {}
        for i in range(number("the number of entries")):
            what = f"entry {i + 1}"
            name = take(number(what), what).split(b"\0")[0].decode(errors="replace")
            calls, count = number(what), number(what)
            if count < 1:
                raise _damaged(path, f"{what} has {count} values")
            values = np.frombuffer(take(4 * count, what), "<f4").astype(np.float32)
            entries[name] = values / np.float32(calls) if calls > 0 else values
        if file.tell() == size:
            return Imatrix(path, entries)
        chunks = number("the number of chunks")
        dataset = take(number("the data set's name"), "the data set's name") if file.tell() < size else b""
        return Imatrix(path, entries, [dataset.decode(errors="replace")] if dataset else [], chunks)


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: {what}: the importance matrix is damaged, make it again with llama-imatrix")
