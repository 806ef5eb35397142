# SPDX-License-Identifier: MIT
"""What the types with a side tensor share: those of claq.py, sqc.py, windowsc.py and windowso.py.

A column is an input feature. What belongs to it, and not to a row, is in a tensor of its own: X.columns beside
X.weight. Stored column i is input feature order[i]. The codes of the first `wide` blocks of 32 stored columns have
more bits than the type's; what they have more is in the side tensor, too.

Codes, block of 32 stored columns of one row: 4-byte words, of which field i of byte k belongs to column 4 i + k:

    4 bits  16 bytes  | 4 words of 4-bit codes, 8 columns each |
    3 bits  12 bytes  | 2 words: low 2 bits of the codes, 16 columns each | 1 word: high bits |
    2 bits   8 bytes  | 2 words of 2-bit codes |

Side tensor, I8 [size] or [experts, size], little-endian; each section begins at a multiple of 32 bytes, zeros between.
All types have these, and their own ones:

    header   u32 x 8    0x51414c43 ("CLAQ"), rows, columns, wide, outliers, base, step, 0; base, step: of windowso.py
    order    u16 [columns]     a permutation; absent when wide = 0
    scale    f16 [columns]
    extra    u8 [panels of 16 rows, wide, words, 16, 4]: what the codes of the first `wide` blocks have above the type's
             bits, laid out as in a block (a word for each bit); missing rows are 0
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import InputError
from .base import TensorType

MAGIC = 0x51414C43
SIDE_TYPE = 24  # GGML_TYPE_I8
IDS = frozenset({*range(105, 110), *range(113, 116), 118, 119})
MOST_COLUMNS = 1 << 16  # what u16 can number
# What llama.cpp does with a matrix instead of multiplying with it as it is stored, and parts of the names of those that
# are large enough: GET_ROWS in LLM_TENSOR_INFOS of src/llama-arch.cpp, TENSOR_ALLOW_RESHAPE in src/models at the pin,
# where no graph takes a view of any other such matrix, and no loader merges or splits one.
_OTHER_USES = {
    "llama.cpp looks rows up in it": (
        "compressor_ape", "nextn.embed_tokens", "markov_w1", "selector_predecessor", "selector_successor",
    ),
    "llama.cpp makes a stack of it": ("attn_output_a.weight",),
}  # fmt: skip
PANEL = 16  # rows side by side in `extra`
_ALIGNMENT = 32

Require = Callable[[bool, str], None]


@dataclass(frozen=True)
class Layout:
    """How a tensor of such a type is laid out; all its matrices alike.

    wide: leading blocks of 32 stored columns with codes of `wide_bits`. outliers: in a whole matrix. metric: which
    columns are wide, and hold more outliers: those of most "outlier"s, or of most error, "hessian".
    """

    wide: int = 0
    outliers: int = 0
    metric: str = "hessian"


PLAIN = Layout()


@dataclass(frozen=True)
class ColumnType(TensorType):
    """A type with a side tensor. target: stored bits per weight of cq2.x, sq2.x and so on, met by layouts.

    code_bits and wide_bits: of the codes of plain and wide columns. least_rows: with fewer, the side tensor takes more
    than half of what the codes do.
    """

    code_bits: int = 4
    wide_bits: int = 4
    target: float | None = None
    least_rows: int = 128

    @property
    def columns(self) -> ColumnType:
        return self

    @property
    def stand_in(self) -> str:
        return f"sq{self.code_bits}"

    def bits(self, n_cols: int, layout: Layout) -> np.ndarray:
        """int [n_cols]: bits of the codes of each stored column."""
        return np.where(np.arange(n_cols) < 32 * layout.wide, self.wide_bits, self.code_bits)

    def side_bytes(self, n_rows: int, n_cols: int, layout: Layout) -> int:
        """Bytes of one matrix's side tensor."""
        sections = self.sections(n_rows, n_cols, layout).values()
        return sum(_padded(math.prod(shape) * np.dtype(kind).itemsize) for kind, shape in sections)

    def matrix_bytes(self, n_rows: int, n_cols: int, layout: Layout) -> int:
        """Bytes of one matrix, codes and side tensor."""
        return n_rows * self.row_bytes(n_cols) + self.side_bytes(n_rows, n_cols, layout)

    def within(self, n_rows: int, n_cols: int, room: int, layout: Layout) -> Layout:
        """The layout with the wide blocks (and outliers) that `room` bytes for a matrix can hold."""
        return self.largest(lambda count: replace(layout, wide=count), n_cols // 32, n_rows, n_cols, room)

    def largest(self, layout: Callable[[int], Layout], most: int, n_rows: int, n_cols: int, room: int) -> Layout:
        """layout(n) with the largest n up to `most` of which `room` bytes can hold a matrix; n = 0 if of none."""

        def size(count: int) -> int:
            return self.matrix_bytes(n_rows, n_cols, layout(count))

        return layout(max(bisect.bisect_right(range(most + 1), room, key=size) - 1, 0))

    def unfit(self, name: str, shape: tuple[int, ...]) -> str | None:
        *stack, n_rows, n_cols = shape
        if cause := super().unfit(name, shape):
            return cause
        if n_rows < self.least_rows:
            return f"{n_rows} rows are too few to share a side tensor"
        if n_cols > MOST_COLUMNS:
            return f"rows of {n_cols} are longer than {MOST_COLUMNS}"
        for use, parts in _OTHER_USES.items():
            if any(part in name for part in parts):
                return use
        return "of stacks only experts can have side tensors" if stack and "_exps." not in name else None

    def sections(self, n_rows: int, n_cols: int, layout: Layout) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(dtype, shape) of each section by name, in the file's order; those that are absent have no elements."""
        raise NotImplementedError

    def section(self, name: str, n_rows: int, n_cols: int, layout: Layout) -> tuple[str, tuple[int, ...]]:
        """(dtype, shape) of a section that all types have."""
        extra = (-(-n_rows // PANEL), layout.wide, self.wide_bits - self.code_bits, PANEL, 4)
        return {
            "header": ("<u4", (8,)),
            "order": ("<u2", (n_cols if layout.wide else 0,)),
            "scale": ("<f2", (n_cols,)),
            "extra": ("u1", extra),
        }[name]

    def pack_codes(self, codes: np.ndarray, d: np.ndarray | None = None) -> np.ndarray:
        """uint8 codes [n_rows, n_cols], of which the low bits count -> uint8 [n_rows, row_bytes].

        d: uint8 [n_rows, n_cols / 32], the last byte of each block, for types that have one.
        """
        parts = [_pack(codes >> at & (1 << bits) - 1, bits) for at, bits in self._planes]
        parts += [] if d is None else [d[..., None]]
        return np.concatenate(parts, -1).reshape(len(codes), -1)

    def unpack_codes(self, data: np.ndarray) -> np.ndarray:
        """uint8 [n_rows, row_bytes] -> uint8 codes [n_rows, n_cols] without what is in `extra`."""
        blocks, start = data.reshape(len(data), -1, self.block_bytes), 0
        codes = np.zeros((len(data), 32 * blocks.shape[1]), np.uint8)
        for at, bits in self._planes:
            codes |= _unpack(blocks[..., start : start + 4 * bits], bits) << at
            start += 4 * bits
        return codes

    def codes_of(self, data: np.ndarray, side: Side, first: int) -> np.ndarray:
        """Packed rows uint8 [n, row_bytes], the first of which is row `first` -> whole uint8 codes [n, n_cols]."""
        codes, upper = self.unpack_codes(data), side.upper[first : first + len(data)]
        if side.wide:
            codes[:, : side.wide] |= _unpack(upper, self.wide_bits - self.code_bits) << self.code_bits
        return codes

    def pack(
        self, codes: np.ndarray, side: Side, layout: Layout, d: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes uint8 [n_rows, n_cols] in stored order -> (uint8 [n_rows, row_bytes], uint8 [side_bytes]).

        d: as `pack_codes` takes it.
        """
        return self.pack_codes(codes, d), self.pack_side(codes, side, layout)

    def pack_side(self, codes: np.ndarray, side: Side, layout: Layout) -> np.ndarray:
        """The side tensor, uint8 [side_bytes]. codes: [n_rows, n_cols], of which only wide columns are looked at."""
        n_rows, n_cols = codes.shape
        wide, panels, words = 32 * layout.wide, -(-n_rows // PANEL), self.wide_bits - self.code_bits
        upper = np.zeros((panels * PANEL, layout.wide, 4 * words), np.uint8)
        if wide:
            upper[:n_rows] = _pack(codes[:, :wide] >> self.code_bits, words)
        contents = self.contents(side, layout) | {
            "header": [MAGIC, n_rows, n_cols, layout.wide, layout.outliers, *side.grid, 0],
            "extra": upper.reshape(panels, PANEL, layout.wide, words, 4).transpose(0, 2, 3, 1, 4),
        }
        out = bytearray()
        for name, (kind, shape) in self.sections(n_rows, n_cols, layout).items():
            part = np.asarray(contents[name] if math.prod(shape) else np.empty(shape), kind)
            assert part.shape == shape, f"{part.shape} where {shape} is due"
            out += part.tobytes().ljust(_padded(part.nbytes), b"\0")
        return np.frombuffer(bytes(out), np.uint8)

    def contents(self, side: Side, layout: Layout) -> dict[str, np.ndarray]:
        """Sections by name, but for header and extra."""
        return dict(vars(side))

    def read_side(self, data: np.ndarray, n_rows: int, n_cols: int, name: str) -> Side:
        """uint8 [size] of one matrix, checked; InputError names the side tensor and what is wrong."""

        def require(sound: bool, cause: str) -> None:
            if not sound:
                raise InputError(f"tensor {name!r}: {cause}: the file is damaged, get or make it again")

        require(len(data) >= 32, f"{len(data)} bytes are no side tensor")
        magic, rows, columns, wide, outliers = map(int, data[:20].view("<u4"))
        base, step, rest = map(int, data[20:32].view("<u4"))
        shaped = (magic, rows, columns) == (MAGIC, n_rows, n_cols) and self.has_grid(base, step) and not rest
        require(shaped, f"its header is not that of a matrix of {n_rows} x {n_cols}")
        fits = wide * 32 <= n_cols and (self.code_bits < self.wide_bits or not wide) and outliers <= n_rows * n_cols
        require(fits, f"{wide} wide blocks and {outliers} outliers do not fit into the matrix")
        layout = Layout(wide, outliers)
        size = self.side_bytes(n_rows, n_cols, layout)
        require(len(data) >= size, f"it has {len(data)} bytes where {size} are needed")
        found, at = {}, 0
        for section, (dtype, shape) in self.sections(n_rows, n_cols, layout).items():
            count = math.prod(shape) * np.dtype(dtype).itemsize
            found[section] = data[at : at + count].view(dtype).reshape(shape)
            at += _padded(count)
        extra = found.pop("extra")
        found["upper"] = extra.transpose(0, 3, 1, 2, 4).reshape(len(extra) * PANEL, wide, extra.shape[2] * 4)[:n_rows]
        if not wide:
            found["order"] = np.arange(n_cols)
        require(np.array_equal(np.sort(found["order"]), np.arange(n_cols)), "its column order is not a permutation")
        del found["header"]
        return self.checked(found | {"grid": np.array([base, step], np.uint32)}, layout, require)

    def has_grid(self, base: int, step: int) -> bool:
        """Whether words 5 and 6 of a header can be these: 0, but for types that choose block scales for a matrix."""
        return base == step == 0

    def checked(self, found: Mapping[str, np.ndarray], layout: Layout, require: Require) -> Side:
        """The side tensor from its sections, whose contents are checked here but for the order."""
        require(np.isfinite(found["scale"]).all(), "a scale is not finite")
        return Side(**found)

    def decode_rows(self, data: np.ndarray, side: Side, first: int) -> np.ndarray:
        """Packed rows uint8 [n, row_bytes], the first of which is row `first` -> float32 [n, n_cols]."""
        raise NotImplementedError

    def decode(self, data: np.ndarray) -> np.ndarray:
        raise NotImplementedError("rows of this type need their side tensor: use decode_rows")

    @property
    def _planes(self) -> tuple[tuple[int, int], ...]:
        """(lowest bit, bits) of what is packed one after the other."""
        return ((0, 2), (2, 1)) if self.code_bits == 3 else ((0, self.code_bits),)


def _absent(*shape: int, dtype: type = np.uint8) -> Any:
    return field(default_factory=lambda: np.zeros(shape, dtype))


@dataclass(frozen=True)
class Side:
    """What a side tensor holds, in stored order of columns.

    order: int [n_cols], the input feature of each stored column. scale: float16 [n_cols]. upper: uint8 [n_rows, wide,
    bytes], of the wide codes, when read. grid: uint32 [2], base and step of windowso.py. Of CLAQ's types only: row:
    float16 [n_rows]; levels: int8 [n_cols, 16], of which a column uses its first 2^bits; start, column, value: the
    outliers, rows one after the other.
    """

    order: np.ndarray
    scale: np.ndarray
    row: np.ndarray = _absent(0, dtype=np.float16)
    levels: np.ndarray = _absent(0, 16, dtype=np.int8)
    start: np.ndarray = _absent(0, dtype=np.uint32)
    column: np.ndarray = _absent(0, dtype=np.uint16)
    value: np.ndarray = _absent(0, dtype=np.float16)
    upper: np.ndarray = _absent(0, 0, 0)
    grid: np.ndarray = _absent(2, dtype=np.uint32)

    @property
    def wide(self) -> int:
        """How many columns are wide, when read."""
        return 32 * self.upper.shape[1]


def side_name(weight_name: str) -> str:
    """The side tensor of a weight: X.weight -> X.columns."""
    return weight_name.removesuffix("weight") + "columns"


def owners(tensors: Iterable) -> dict[str, Any]:
    """Name of a side tensor -> the `gguf_file.Tensor` it belongs to, for all of a file."""
    return {side_name(tensor.name): tensor for tensor in tensors if tensor.type_id in IDS}


def by_name(kinds: Sequence[ColumnType], name: str) -> ColumnType | None:
    """One of these, or with a target: cq2.1 to cq3.9, sq2.1 to sq3.9; None for any other name."""
    match = re.fullmatch(r"([cs]q[23])\.([1-9])", name)
    for kind in kinds:
        if kind.name == name:
            return kind
        if match and kind.name.removesuffix("c") == match[1]:
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
