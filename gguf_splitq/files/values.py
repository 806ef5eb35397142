# SPDX-License-Identifier: MIT
"""Metadata of GGUF files: values as they are stored, and what a reader may ask of them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..errors import InputError

# GGUF value type ids -> struct format
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U32, STRING, ARRAY = 4, 8, 9
_NAMES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64")
_INTEGERS = (0, 1, 2, 3, 4, 5, 10, 11)
_DUE: dict[Any, str] = {  # what a reader may ask for, in words
    str: "a string", int: "a whole number", list[str]: "an array of strings", list[int]: "an array of whole numbers",
}  # fmt: skip

T = TypeVar("T")


@dataclass(frozen=True)
class Value:
    """A metadata value as stored: GGUF value type and little-endian bytes (an array's own type and count included)."""

    type: int
    raw: bytes

    @classmethod
    def of(cls, value: int | str | list[str] | np.ndarray) -> Value:
        """A u32 from an int, a string from a str, an array of strings or, from a NumPy array, of u32."""
        if isinstance(value, np.ndarray):
            return cls(ARRAY, struct.pack("<IQ", U32, value.size) + value.astype("<u4").tobytes())
        if isinstance(value, list):
            return cls(ARRAY, struct.pack("<IQ", STRING, len(value)) + b"".join(map(string, value)))
        if isinstance(value, int):
            return cls(U32, struct.pack("<I", value))
        return cls(STRING, string(value))

    @property
    def python(self) -> Any:
        """The value as Python's own type: int, float, bool, str or a list of these."""
        if self.type != ARRAY:
            return _unpack(self.type, self.raw, 0)[0]
        item_type, count = self._items
        if item_type != STRING:
            return list(struct.unpack_from(f"<{count}{SCALARS[item_type]}", self.raw, 12))
        items, at = [], 12
        for _ in range(count):
            item, at = _unpack(item_type, self.raw, at)
            items.append(item)
        return items

    @property
    def kind(self) -> str:
        """The type in words, for messages."""
        if self.type != ARRAY:
            return f"of type {_NAMES[self.type]}"
        item_type, count = self._items
        return f"an array of {count} of type {_NAMES[item_type]}"

    def serves(self, kind: Any) -> bool:
        """Whether `python` is a `kind`, one of `_DUE`; an empty array is a list of anything."""
        allowed = (STRING,) if kind in (str, list[str]) else _INTEGERS
        if kind in (str, int):
            return self.type in allowed
        return self.type == ARRAY and (self._items[1] == 0 or self._items[0] in allowed)

    @property
    def _items(self) -> tuple[int, int]:
        """An array's value type and count."""
        return struct.unpack_from("<IQ", self.raw)


def typed(path: Path, kv: Mapping[str, Value], key: str, kind: type[T], default: T) -> T:
    """A metadata value as `kind` (str, int, list[str] or list[int]), `default` where there is none.

    All that acts on a file's metadata asks here. Raises InputError when the value is of another kind.
    """
    if key not in kv:
        return default
    if not kv[key].serves(kind):
        cause = f"metadata {key!r} is {kv[key].kind} where {_DUE[kind]} is due"
        raise InputError(f"{path}: {cause}: the file is damaged, get or make it again")
    return kv[key].python


def string(text: str | bytes) -> bytes:
    """A string as stored, its length before it."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _unpack(kind: int, raw: bytes, at: int) -> tuple[int | float | bool | str, int]:
    """(value, position after it) of a scalar or string at `at`."""
    if kind == STRING:
        (length,) = struct.unpack_from("<Q", raw, at)
        end = at + 8 + length
        return raw[at + 8 : end].decode(errors="replace"), end
    return struct.unpack_from("<" + SCALARS[kind], raw, at)[0], at + struct.calcsize(SCALARS[kind])
