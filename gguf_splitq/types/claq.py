"""cq4, cq3, cq2: CLAQ, a codebook for every column, with wide columns and outliers.

A column is an input feature: its weights over all rows share a codebook. So a matrix is two tensors: the codes, and a
side tensor `X.codebook` beside `X.weight`. Stored column i is input feature order[i].

Codes, block of 32 stored columns of one row: 4-byte words, of which field i of byte k belongs to column 4 i + k:

    cq4  16 bytes  | 4 words of 4-bit codes, 8 columns each |
    cq3  12 bytes  | 2 words: low 2 bits of the codes, 16 columns each | 1 word: high bits |
    cq2   8 bytes  | 2 words of 2-bit codes |

Side tensor, I8 [size] or [experts, size], little-endian; each section begins at a multiple of 32 bytes, zeros between:

    header   u32 x 8    0x51414c43 ("CLAQ"), rows, columns, wide, outliers, 0, 0, 0
    order    u16 [columns]     a permutation; absent when wide = 0
    row      f16 [rows]
    scale    f16 [columns]
    levels   i8 [32 wide, 16], then i8 [the other columns, 2^bits], rising in a column
    extra    u8 [panels of 16 rows, wide, words, 16, 4]: what the codes of the first `wide` blocks have above the type's
             bits, laid out as in a block (2 words for cq2, 1 for cq3); missing rows are 0
    start    u32 [rows + 1]    outliers of row r are start[r] .. start[r + 1] - 1, only if there are, as
             what follows
    column   u16 [outliers]    stored column, rising in a row
    value    f16 [outliers]    added to the weight

    weight[r, order[i]] = row[r] * scale[i] * level[i, code[r, i]] (+ value)

Source: CLAQ, arXiv 2405.17233 (a codebook per column, adaptive precision, reserved outliers); integer levels, the scale
of a row and the bytes are this project's.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import InputError
from .base import TensorType

MAGIC = 0x51414C43
SIDE_TYPE = 24  # GGML_TYPE_I8
MOST_COLUMNS = 1 << 16  # what u16 can number
LEAST_ROWS = 128  # below, codebooks cost more than half of what the codes do
PANEL = 16  # rows side by side in `extra`
WIDE_BITS = 4
WIDE_SHARE = 0.75  # of what cq2.x and cq3.x have beyond cq2 and cq3; outliers take the rest
_ALIGNMENT = 32


@dataclass(frozen=True)
class Claq(TensorType):
    """A type of the family. target: stored bits per weight of cq2.x and cq3.x.

    What the target buys for a tensor: wide, leading blocks of 32 stored columns with 4-bit codes; outliers, in all.
    metric: which columns are wide, and hold more outliers: those of most "outlier"s, or of most error, "hessian".
    """

    code_bits: int = 4
    target: float | None = None
    wide: int = 0
    outliers: int = 0
    metric: str = "hessian"

    def bits(self, n_cols: int) -> np.ndarray:
        """int [n_cols]: bits of the codes of each stored column."""
        return np.where(np.arange(n_cols) < 32 * self.wide, WIDE_BITS, self.code_bits)

    def side_bytes(self, n_rows: int, n_cols: int) -> int:
        """Bytes of one matrix's side tensor."""
        sections = self._sections(n_rows, n_cols)
        return sum(_padded(math.prod(shape) * np.dtype(kind).itemsize) for kind, shape in sections)

    def matrix_bytes(self, n_rows: int, n_cols: int) -> int:
        """Bytes of one matrix, codes and side tensor."""
        return n_rows * self.row_bytes(n_cols) + self.side_bytes(n_rows, n_cols)

    def within(self, n_rows: int, n_cols: int, room: int) -> Claq:
        """The type with the wide blocks and outliers that `room` bytes for a matrix can hold."""
        least = self.matrix_bytes(n_rows, n_cols)
        kind = self._largest("wide", n_cols // 32, n_rows, n_cols, least + int(WIDE_SHARE * (room - least)))
        return kind._largest("outliers", n_rows * n_cols // 8, n_rows, n_cols, room)

    def _largest(self, name: str, most: int, n_rows: int, n_cols: int, room: int) -> Claq:
        def size(count: int) -> int:
            return replace(self, **{name: count}).matrix_bytes(n_rows, n_cols)

        return replace(self, **{name: max(bisect.bisect_right(range(most + 1), room, key=size) - 1, 0)})

    def _sections(self, n_rows: int, n_cols: int) -> list[tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of each section; those that are absent have no elements."""
        wide, panels, held = 32 * self.wide, -(-n_rows // PANEL), self.outliers > 0
        return [
            ("<u4", (8,)),
            ("<u2", (n_cols if wide else 0,)),
            ("<f2", (n_rows,)),
            ("<f2", (n_cols,)),
            ("i1", (16 * wide + (n_cols - wide << self.code_bits),)),
            ("u1", (panels, self.wide, WIDE_BITS - self.code_bits, PANEL, 4)),
            ("<u4", (n_rows + 1 if held else 0,)),
            ("<u2", (self.outliers,)),
            ("<f2", (self.outliers,)),
        ]

    def pack_codes(self, codes: np.ndarray) -> np.ndarray:
        """uint8 codes [n_rows, n_cols], of which the low bits count -> uint8 [n_rows, row_bytes]."""
        if self.code_bits != 3:
            return _pack(codes & (1 << self.code_bits) - 1, self.code_bits).reshape(len(codes), -1)
        low, high = _pack(codes & 3, 2), _pack(codes >> 2 & 1, 1)
        return np.concatenate([low, high], -1).reshape(len(codes), -1)

    def unpack_codes(self, data: np.ndarray) -> np.ndarray:
        """uint8 [n_rows, row_bytes] -> uint8 codes [n_rows, n_cols] without what is in `extra`."""
        blocks = data.reshape(len(data), -1, self.block_bytes)
        if self.code_bits != 3:
            return _unpack(blocks, self.code_bits)
        return _unpack(blocks[..., :8], 2) | _unpack(blocks[..., 8:], 1) << 2

    def pack(self, codes: np.ndarray, side: Side) -> tuple[np.ndarray, np.ndarray]:
        """Codes uint8 [n_rows, n_cols] in stored order -> (uint8 [n_rows, row_bytes], uint8 [side_bytes])."""
        n_rows, n_cols = codes.shape
        wide, panels, words = 32 * self.wide, -(-n_rows // PANEL), WIDE_BITS - self.code_bits
        upper = np.zeros((panels * PANEL, self.wide, 4 * words), np.uint8)
        if wide:
            upper[:n_rows] = _pack(codes[:, :wide] >> self.code_bits, words)
        upper = upper.reshape(panels, PANEL, self.wide, words, 4).transpose(0, 2, 3, 1, 4)
        levels = [side.levels[:wide].ravel(), side.levels[wide:, : 1 << self.code_bits].ravel()]
        held = self.outliers > 0
        parts = [
            [MAGIC, n_rows, n_cols, self.wide, self.outliers, 0, 0, 0],
            side.order if wide else [],
            side.row,
            side.scale,
            np.concatenate(levels),
            upper,
            side.start if held else [],
            side.column,
            side.value,
        ]
        out = bytearray()
        for part, (kind, shape) in zip(parts, self._sections(n_rows, n_cols), strict=True):
            part = np.asarray(part, kind)
            assert part.shape == shape, f"{part.shape} where {shape} is due"
            out += part.tobytes().ljust(_padded(part.nbytes), b"\0")
        return self.pack_codes(codes), np.frombuffer(bytes(out), np.uint8)

    def read_side(self, data: np.ndarray, n_rows: int, n_cols: int, name: str) -> Side:
        """uint8 [size] of one matrix, checked; InputError names the side tensor and what is wrong."""

        def require(sound: bool, cause: str) -> None:
            if not sound:
                raise InputError(f"tensor {name!r}: {cause}: the file is damaged, get or make it again")

        require(len(data) >= 32, f"{len(data)} bytes are no codebook")
        magic, rows, columns, wide, outliers = map(int, data[:20].view("<u4"))
        shaped = (magic, rows, columns) == (MAGIC, n_rows, n_cols) and not data[20:32].any()
        require(shaped, f"its header is not that of a matrix of {n_rows} x {n_cols}")
        fits = wide * 32 <= n_cols and (self.code_bits < WIDE_BITS or not wide) and outliers <= n_rows * n_cols
        require(fits, f"{wide} wide blocks and {outliers} outliers do not fit into the matrix")
        kind = replace(self, wide=wide, outliers=outliers)
        size = kind.side_bytes(n_rows, n_cols)
        require(len(data) >= size, f"it has {len(data)} bytes where {size} are needed")
        found, at = [], 0
        for dtype, shape in kind._sections(n_rows, n_cols):
            count = math.prod(shape) * np.dtype(dtype).itemsize
            found.append(data[at : at + count].view(dtype).reshape(shape))
            at += _padded(count)
        _, order, row, scale, packed, extra, start, column, value = found
        order = order if wide else np.arange(n_cols, dtype=np.uint16)
        require(np.array_equal(np.sort(order), np.arange(n_cols)), "its column order is not a permutation")
        finite = all(np.isfinite(part).all() for part in (row, scale, value))
        require(finite, "a scale or an outlier is not finite")
        if outliers:
            rising = start[0] == 0 and start[-1] == outliers and (np.diff(start.astype(np.int64)) >= 0).all()
            require(rising, "the starts of its outliers do not rise to their number")
            require(column.max() < n_cols, "an outlier lies in a column that is not there")
        levels = np.zeros((n_cols, 16), np.int8)
        levels[: 32 * wide] = packed[: 512 * wide].reshape(-1, 16)
        levels[32 * wide :, : 1 << self.code_bits] = packed[512 * wide :].reshape(n_cols - 32 * wide, -1)
        upper = extra.transpose(0, 3, 1, 2, 4).reshape(len(extra) * PANEL, wide, extra.shape[2] * 4)[:n_rows]
        return Side(order, row, scale, levels, start, column, value, upper)

    def decode_rows(self, data: np.ndarray, side: Side, first: int) -> np.ndarray:
        """Packed rows uint8 [n, row_bytes], the first of which is row `first` -> float32 [n, n_cols]."""
        codes, rows, wide = self.unpack_codes(data), slice(first, first + len(data)), side.upper.shape[1]
        if wide:
            codes[:, : 32 * wide] |= _unpack(side.upper[rows], WIDE_BITS - self.code_bits) << self.code_bits
        table = side.scale.astype(np.float32)[:, None] * side.levels
        stored = table[np.arange(len(table)), codes] * side.row[rows].astype(np.float32)[:, None]
        if len(side.start):
            begin, end = int(side.start[first]), int(side.start[first + len(data)])
            row = np.repeat(np.arange(len(data)), np.diff(side.start[first : first + len(data) + 1].astype(np.int64)))
            np.add.at(stored, (row, side.column[begin:end]), side.value[begin:end].astype(np.float32))
        out = np.empty_like(stored)
        out[:, side.order] = stored
        return out

    def decode(self, data: np.ndarray) -> np.ndarray:
        raise NotImplementedError("rows of this type need their side tensor: use decode_rows")


@dataclass(frozen=True)
class Side:
    """What a side tensor holds. Arrays are in stored order of columns.

    order: int [n_cols], the input feature of each stored column. row: float16 [n_rows]; scale: float16 [n_cols];
    levels: int8 [n_cols, 16], of which a column uses its first 2^bits. start, column, value: the outliers, rows one
    after the other, empty when there are none. upper: uint8 [n_rows, wide, bytes], of the wide codes, when read.
    """

    order: np.ndarray
    row: np.ndarray
    scale: np.ndarray
    levels: np.ndarray
    start: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    column: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint16))
    value: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float16))
    upper: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0), np.uint8))


def side_name(weight_name: str) -> str:
    """The side tensor of a weight: X.weight -> X.codebook."""
    return weight_name.removesuffix("weight") + "codebook"


def owners(tensors: Iterable) -> dict[str, Any]:
    """Name of a side tensor -> the `gguf_file.Tensor` it belongs to, for all of a file."""
    return {side_name(tensor.name): tensor for tensor in tensors if tensor.type_id in IDS}


def unfit(name: str, shape: tuple[int, ...]) -> str | None:
    """Why a tensor cannot have a cq type, in words that fit many; None when it can."""
    *stack, n_rows, n_cols = shape
    if n_cols % 32:
        return f"a row of {n_cols} is not a multiple of 32"
    if n_rows < LEAST_ROWS:
        return f"{n_rows} rows are too few to share codebooks"
    if n_cols > MOST_COLUMNS:
        return f"rows of {n_cols} are longer than {MOST_COLUMNS}"
    return "only experts are stacked for codebooks" if stack and "_exps." not in name else None


def by_name(name: str) -> Claq | None:
    """cq4, cq3, cq2 and cq2.1 to cq3.9; None for any other name."""
    match = re.fullmatch(r"cq([23])\.([1-9])", name)
    for kind in TYPES:
        if kind.name == name:
            return kind
        if match and kind.name == f"cq{match[1]}":
            return replace(kind, name=name, target=float(name[2:]))
    return None


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., n_cols] below 2^bits -> uint8 [..., n_blocks, 4 bits]."""
    fields = values.reshape(*values.shape[:-1], values.shape[-1] // 32, bits, 8 // bits, 4)
    shifts = bits * np.arange(8 // bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(fields << shifts, -2).reshape(*fields.shape[:-3], 4 * bits)


def _unpack(data: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., n_blocks, 4 bits] -> uint8 [..., n_cols]."""
    words = data.reshape(*data.shape[:-1], bits, 1, 4)
    shifts = bits * np.arange(8 // bits, dtype=np.uint8)[:, None]
    fields = words >> shifts & (1 << bits) - 1
    return fields.reshape(*data.shape[:-2], 32 * data.shape[-2])


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


_METHOD = "CLAQ, a codebook per column"
TYPES = [
    Claq("cq4", 105, 105, 32, 16, _METHOD, "models with outlier channels", code_bits=4),
    Claq("cq3", 106, 106, 32, 12, _METHOD, "the same in 3 bits; cq3.1 to cq3.9 are larger", code_bits=3),
    Claq("cq2", 107, 107, 32, 8, _METHOD, "the same in 2 bits; cq2.1 to cq2.9 are larger", code_bits=2),
]
IDS = tuple(kind.gguf_id for kind in TYPES)
