# SPDX-License-Identifier: MIT
"""What a tensor type is: a block of `block_size` weights of one row stored in `block_bytes` bytes.

A type is an instance of a subclass; a subclass gives `encode_blocks` and `decode_blocks` in NumPy on
arrays of blocks, and this base class does rows, checks and the switch to the C library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..runtime import native

if TYPE_CHECKING:
    from .columns import ColumnType

# Weights per NumPy pass: the temporaries of one pass then stay inside a core's L2 cache.
_PIECE = 1 << 15


@dataclass(frozen=True)
class TensorType:
    """One storable type.

    name: the command-line word and ggml's type name. gguf_id: the on-disk `ggml_type`. file_type: the
    value of `general.file_type` for a file made of it. max_abs: the largest |weight| it can hold
    (None: no limit).
    """

    name: str
    gguf_id: int
    file_type: int
    block_size: int
    block_bytes: int
    method: str
    purpose: str
    max_abs: float | None = None

    @property
    def bpw(self) -> float:
        """Stored bits per weight, scales and tables included."""
        return 8 * self.block_bytes / self.block_size

    @property
    def uses_importance(self) -> bool:
        """Whether an importance matrix changes what is stored."""
        return True

    def needs_library(self, weighted: bool) -> bool:
        """Whether only the C library can encode, weighted: with importance data."""
        return False

    @property
    def columns(self) -> ColumnType | None:
        """The type itself when it has a side tensor: a plan then has a layout for it."""
        return None

    @property
    def stand_in(self) -> str | None:
        """The type that a tensor gets instead when this one does not fit; None where llama-quantize's table tells."""
        return None

    def unfit(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Why a tensor of this name and NumPy shape cannot have the type, in words that fit many; None when it can."""
        n_cols = shape[-1]
        return f"a row of {n_cols} is not a multiple of {self.block_size}" if n_cols % self.block_size else None

    def row_bytes(self, n_cols: int) -> int:
        """Stored bytes of a row of `n_cols` weights; `n_cols` must be a multiple of `block_size`."""
        assert n_cols % self.block_size == 0, f"a row of {n_cols} does not divide into blocks of {self.block_size}"
        return n_cols // self.block_size * self.block_bytes

    def encode(self, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """float32 [n_rows, n_cols] -> uint8 [n_rows, row_bytes].

        importance: float32 [n_cols], non-negative weights of the squared error of each column, or None.
        Rows are independent. Raises EnvironmentFailed where only the C library can encode and it is not built.
        """
        lib = native.library()
        if lib is not None:
            return native.encode(lib, self.gguf_id, rows, importance, self.row_bytes(rows.shape[1]))
        return self.encode_numpy(rows, importance)

    def decode(self, data: np.ndarray) -> np.ndarray:
        """uint8 [n_rows, row_bytes] -> float32 [n_rows, n_cols]."""
        lib = native.library()
        if lib is not None:
            return native.decode(lib, self.gguf_id, data, data.shape[1] // self.block_bytes * self.block_size)
        return self.decode_numpy(data)

    def encode_numpy(self, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """`encode` without the C library."""
        n_rows, n_cols = rows.shape
        out = np.empty((n_rows, self.row_bytes(n_cols)), np.uint8)
        step = max(1, _PIECE // n_cols)
        for start in range(0, n_rows, step):
            piece = np.ascontiguousarray(rows[start : start + step], np.float32)
            blocks = piece.reshape(-1, self.block_size)
            weights = None if importance is None else np.broadcast_to(importance, piece.shape).reshape(blocks.shape)
            out[start : start + step] = self.encode_blocks(blocks, weights).reshape(len(piece), -1)
        return out

    def decode_numpy(self, data: np.ndarray) -> np.ndarray:
        """`decode` without the C library."""
        blocks = np.ascontiguousarray(data).reshape(-1, self.block_bytes)
        return self.decode_blocks(blocks).reshape(data.shape[0], -1)

    def encode_blocks(self, blocks: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        """float32 [n_blocks, block_size] (finite) -> uint8 [n_blocks, block_bytes]; importance: same shape or None."""
        raise NotImplementedError

    def decode_blocks(self, data: np.ndarray) -> np.ndarray:
        """uint8 [n_blocks, block_bytes] -> float32 [n_blocks, block_size]."""
        raise NotImplementedError
