# SPDX-License-Identifier: MIT
"""The container: tensors of this project's types in a header that every GGUF reader takes, and back.

Readers refuse a file for a type id that they do not know. In a container such a tensor is I8, as many columns as a row
has bytes; two keys name these tensors and their types, and a third numbers these rules. They stand behind the general.*
keys, and so within the first MiB, before the vocabulary. Nothing else differs, and the data not at all. docs/format.md
has the definition, and llama.cpp's loader (src/llama-model-loader.cpp in patches/) reads the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from .. import types
from ..errors import InputError, UnsupportedError
from .values import Value, typed

VERSION = 1
PREFIX = "gguf_splitq.container."
VERSION_KEY, TENSORS_KEY, TYPES_KEY = KEYS = (PREFIX + "version", PREFIX + "tensors", PREFIX + "types")
I8 = 24  # GGML_TYPE_I8
KINDS = {kind.gguf_id: kind for kind in (*types.CUSTOM, *types.COLUMNS)}

Info = tuple[str, tuple[int, ...], int]  # a tensor's name, NumPy shape and type id


def ours(infos: Iterable[Info]) -> list[Info]:
    """The tensors of this project's types."""
    return [info for info in infos if info[2] in KINDS]


def pack(kv: Mapping[str, Value], infos: Sequence[Info]) -> tuple[dict[str, Value], list[Info]]:
    """Metadata and tensors as a container has them; a file without our types stays as it is."""
    listed = ours(infos)
    if not listed:
        return dict(kv), list(infos)
    keys = {
        VERSION_KEY: Value.of(VERSION),
        TENSORS_KEY: Value.of([name for name, _, _ in listed]),
        TYPES_KEY: Value.of(np.array([type_id for _, _, type_id in listed])),
    }
    items = list(kv.items())
    behind = next((i for i, (key, _) in enumerate(items) if not key.startswith("general.")), len(items))
    return dict(items[:behind]) | keys | dict(items[behind:]), [_as_bytes(info) for info in infos]


def unpack(path: Path, kv: Mapping[str, Value], infos: Sequence[Info]) -> tuple[dict[str, Value], list[Info]]:
    """What `pack` was given, from what it gave; a file without the keys stays as it is. infos: of all its shards.

    A tensor may have its own type already, where a program wrote the types that it knew and kept the keys.
    Raises InputError by the tensor's name, UnsupportedError for rules of another version.
    """
    if not any(key in kv for key in KEYS):
        return dict(kv), list(infos)
    if (version := typed(path, kv, VERSION_KEY, int, 0)) != VERSION:
        raise UnsupportedError(f"{path}: its container is of version {version}: use a newer gguf-splitq")
    names, ids = typed(path, kv, TENSORS_KEY, list[str], []), typed(path, kv, TYPES_KEY, list[int], [])
    if len(names) != len(ids):
        what = f"its container names {len(names)} tensors and {len(ids)} types"
        raise InputError(f"{path}: {what}: the file is damaged, get or make it again")
    found, listed = {info[0]: info for info in infos}, {}
    for name, type_id in zip(names, ids, strict=True):
        if cause := "is listed twice" if name in listed else _unfit(found.get(name), type_id):
            raise InputError(f"{path}: tensor {name!r} of the container {cause}: the file is damaged, get it again")
        listed[name] = type_id
    kept = {key: value for key, value in kv.items() if key not in KEYS}
    return kept, [_as_type(info, listed[info[0]]) if info[0] in listed else info for info in infos]


def _unfit(info: Info | None, type_id: int) -> str | None:
    """Why a tensor as stored cannot be of that type; None when it can."""
    if type_id not in KINDS:
        return f"is said to be of type {type_id}, which is none of {min(KINDS)} to {max(KINDS)}"
    if info is None:
        return "is not there"
    _, shape, stored = info
    if stored == type_id:
        return None
    if stored != I8:
        return f"is stored as type {stored} where {I8} (I8) is due"
    row, kind = shape[-1] if shape else 1, KINDS[type_id]
    return f"has rows of {row} bytes, no blocks of {kind.name}'s {kind.block_bytes}" if row % kind.block_bytes else None


def _as_bytes(info: Info) -> Info:
    name, shape, type_id = info
    return (name, (*shape[:-1], KINDS[type_id].row_bytes(shape[-1])), I8) if type_id in KINDS else info


def _as_type(info: Info, type_id: int) -> Info:
    name, shape, stored = info
    kind = KINDS[type_id]
    return (name, (*shape[:-1], shape[-1] // kind.block_bytes * kind.block_size), type_id) if stored == I8 else info
