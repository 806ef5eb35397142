# SPDX-License-Identifier: MIT
"""The tensor types: this project's own (one module per family) and llama.cpp's stock ones."""

from __future__ import annotations

import functools

from ..errors import UsageError
from . import claq, columns, sdr, splitquant, sq4x, sqc, windows, windowsc, windowso
from .base import TensorType

__all__ = ["TensorType", "all_types", "by_id", "columns_by_id", "get", "register_with_gguf"]

CUSTOM: list[TensorType] = [*splitquant.TYPES, *sq4x.TYPES, *sdr.TYPES, *windows.TYPES]
"""This project's block formats."""
COLUMNS: list[columns.ColumnType] = [*windowso.TYPES, *windowsc.TYPES, *sqc.TYPES, *claq.TYPES]
"""Its types with a side tensor, which code whole matrices."""


@functools.cache
def all_types() -> list[TensorType]:
    """Every type, this project's first."""
    from .stock import stock_types

    return [*CUSTOM, *COLUMNS, *stock_types()]


def get(name: str) -> TensorType:
    """The type of that name, in any case; UsageError lists the names when there is none."""
    if found := columns.by_name(COLUMNS, name.lower()):
        return found
    for tensor_type in all_types():
        if tensor_type.name == name.lower():
            return tensor_type
    known = ", ".join(t.name for t in all_types())
    raise UsageError(f"type '{name}' is not known: choose one of {known}")


@functools.cache
def by_id(gguf_id: int) -> TensorType:
    """The type with that on-disk `ggml_type`; KeyError when this project does not handle it."""
    return {t.gguf_id: t for t in all_types()}[gguf_id]


@functools.cache
def columns_by_id(gguf_id: int) -> columns.ColumnType | None:
    """The type with a side tensor and that on-disk `ggml_type`; None when it is another one."""
    return next((t for t in COLUMNS if t.gguf_id == gguf_id), None)


def register_with_gguf() -> None:
    """Teach the `gguf` package this project's type ids and block sizes; calling it again does nothing.

    Touches private parts of the enum (gguf has no public way), hence the `gguf<0.20` pin.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for tensor_type in (*CUSTOM, *COLUMNS):
        if tensor_type.gguf_id in GGMLQuantizationType._value2member_map_:
            continue
        member = int.__new__(GGMLQuantizationType, tensor_type.gguf_id)
        member._name_ = f"SPLITQ_{tensor_type.name.upper()}"
        member._value_ = tensor_type.gguf_id
        GGMLQuantizationType._member_map_[member._name_] = member
        GGMLQuantizationType._value2member_map_[tensor_type.gguf_id] = member
        GGML_QUANT_SIZES[member] = (tensor_type.block_size, tensor_type.block_bytes)
