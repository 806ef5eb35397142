# SPDX-License-Identifier: MIT
"""The C encoders and decoders of the built runtime (libggml-base), called through ctypes.

ctypes releases the GIL during a call, so threads encode in parallel. Nothing here is needed for a
correct result: every type of this project has a NumPy twin that gives the same bytes.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import numpy as np

_CONVERT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml/include/ggml.h."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    ]


class _Sweep(ctypes.Structure):
    """`splitq_sweep` of ggml-windows-solve.h."""

    _fields_ = [
        ("bits", ctypes.c_int32),
        ("n_scales", ctypes.c_int32),
        ("closed", ctypes.c_int32),
        ("n_rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("levels", "aims", "base", "scales", "push", "costs", "states")),
        ("edges", ctypes.c_void_p),
        ("choice", ctypes.c_void_p),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The patched build's libggml-base, or None when the runtime has not been built."""
    from . import building

    path = building.library()
    if path is None:
        return None
    lib = ctypes.CDLL(str(path))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
    lib.splitq_widen.restype = ctypes.c_float
    lib.splitq_widen.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    lib.splitq_errors.restype = None
    lib.splitq_errors.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    lib.splitq_quantize_open.restype = lib.splitq_dequantize_open.restype = None
    lib.splitq_quantize_open.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
        ctypes.c_int, ctypes.c_int,
    ]  # fmt: skip
    lib.splitq_dequantize_open.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int,
    ]  # fmt: skip
    lib.splitq_windows_sweep.restype = None
    lib.splitq_windows_sweep.argtypes = [ctypes.POINTER(_Sweep)]
    return lib


def encode(
    lib: ctypes.CDLL, gguf_id: int, rows: np.ndarray, importance: np.ndarray | None, row_bytes: int
) -> np.ndarray:
    """`ggml_quantize_chunk` over float32 rows [n_rows, n_cols]; returns uint8 [n_rows, row_bytes]."""
    rows = np.ascontiguousarray(rows, np.float32)
    out = np.empty((rows.shape[0], row_bytes), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    assert weights is None or weights.shape == rows.shape[1:]
    lib.ggml_quantize_chunk(
        gguf_id, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None if weights is None else weights.ctypes.data
    )
    return out


def decode(lib: ctypes.CDLL, gguf_id: int, data: np.ndarray, n_cols: int) -> np.ndarray:
    """The type's `to_float` over uint8 [n_rows, row_bytes]; returns float32 [n_rows, n_cols]."""
    data = np.ascontiguousarray(data)
    out = np.empty((data.shape[0], n_cols), np.float32)
    _CONVERT(lib.ggml_get_type_traits(gguf_id).contents.to_float)(data.ctypes.data, out.ctypes.data, out.size)
    return out


def encode_open(
    lib: ctypes.CDLL,
    gguf_id: int,
    rows: np.ndarray,
    importance: np.ndarray | None,
    row_bytes: int,
    base: int,
    step: int,
) -> np.ndarray:
    """`encode` for rows of a type with open chains and these block scales."""
    rows = np.ascontiguousarray(rows, np.float32)
    out = np.empty((rows.shape[0], row_bytes), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    assert weights is None or weights.shape == rows.shape[1:]
    at = None if weights is None else weights.ctypes.data
    lib.splitq_quantize_open(gguf_id, rows.ctypes.data, out.ctypes.data, *rows.shape, at, base, step)
    return out


def decode_open(lib: ctypes.CDLL, gguf_id: int, data: np.ndarray, n_cols: int, base: int, step: int) -> np.ndarray:
    """`decode` for such rows."""
    data = np.ascontiguousarray(data)
    out = np.empty((data.shape[0], n_cols), np.float32)
    lib.splitq_dequantize_open(gguf_id, data.ctypes.data, out.ctypes.data, out.size, base, step)
    return out


def widen(lib: ctypes.CDLL, gguf_id: int, raw: np.ndarray) -> tuple[np.ndarray, float]:
    """F32, F16 or BF16 as stored, uint8 [n_rows, row_bytes] -> float32 [n_rows, n_cols], and the largest magnitude.

    The latter is infinite when a value is Inf or NaN; the values are then not to be used.
    """
    raw = np.ascontiguousarray(raw)
    out = np.empty((raw.shape[0], raw.shape[1] // lib.ggml_get_type_traits(gguf_id).contents.type_size), np.float32)
    return out, lib.splitq_widen(gguf_id, raw.ctypes.data, out.ctypes.data, out.size)


def errors(lib: ctypes.CDLL, gguf_id: int, data: np.ndarray, rows: np.ndarray) -> tuple[float, float, float]:
    """What a quantized type's `data` loses of float32 `rows`: sums of squared weights and errors, the largest error."""
    data, rows = np.ascontiguousarray(data), np.ascontiguousarray(rows)
    sums = (ctypes.c_double * 3)()
    lib.splitq_errors(gguf_id, data.ctypes.data, rows.ctypes.data, rows.size, sums)
    return tuple(sums)


def sweep(
    lib: ctypes.CDLL, bits: int, closed: int, given: Sequence[np.ndarray], states: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """A block of window codes as `Sweep` of coding/windows.py has it: edges and choice.

    given: levels, aims, base, scales, push and costs, float32; states: uint8. All are contiguous.
    """
    levels, aims, base, scales, push, costs = given
    edges, choice = np.empty(aims.shape, np.uint8), np.empty(aims.shape[1], np.int64)
    lib.splitq_windows_sweep(
        _Sweep(
            bits, len(scales), closed, aims.shape[1], *(array.ctypes.data for array in (levels, aims, base, scales)),
            push.ctypes.data if push.any() else None,  # without takes a fraction of the time
            costs.ctypes.data, None if states is None else states.ctypes.data, edges.ctypes.data, choice.ctypes.data,
        )
    )  # fmt: skip
    return edges, choice
