# SPDX-License-Identifier: MIT
"""llama.cpp's own types, for embeddings, outputs, fallbacks and comparisons.

Encoding runs in the built runtime's C library; the types that the `gguf` package can encode work without it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import EnvironmentFailed
from .base import TensorType

# NumPy does these as fast as C.
_FLOATS = {"f32", "f16", "bf16"}

HALF = 65504.0  # the largest float16

# name, general.file_type (include/llama.h, `enum llama_ftype`; the S or M mix stands for a K type)
_FILE_TYPES = {
    "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9,
    "q2_k": 21, "q3_k": 11, "q4_k": 14, "q5_k": 16, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30,
    "iq3_s": 26, "iq3_xxs": 23, "iq2_s": 28, "iq2_xs": 20, "iq2_xxs": 19, "iq1_s": 24, "iq1_m": 31,
}  # fmt: skip


@dataclass(frozen=True)
class StockType(TensorType):
    """A type that unpatched llama.cpp knows; its NumPy code is the `gguf` package's."""

    def encode(self, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        if self.name in _FLOATS:
            return self.encode_numpy(rows)
        return super().encode(rows, importance if self.uses_importance else None)

    @property
    def uses_importance(self) -> bool:
        return self.name not in (*_FLOATS, "q8_0")

    def needs_library(self, weighted: bool) -> bool:
        if weighted and self.uses_importance:
            return True
        try:
            self.encode_numpy(np.zeros((1, self.block_size), np.float32))
        except EnvironmentFailed:
            return True
        return False

    def encode_numpy(self, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        from gguf import GGMLQuantizationType, quants

        try:
            if importance is not None:
                raise NotImplementedError
            out = quants.quantize(np.ascontiguousarray(rows, np.float32), GGMLQuantizationType(self.gguf_id))
        except NotImplementedError:
            raise missing_library(self.name, importance is not None) from None
        return out.view(np.uint8)

    def decode(self, data: np.ndarray) -> np.ndarray:
        return self.decode_numpy(data) if self.name in _FLOATS else super().decode(data)

    def decode_numpy(self, data: np.ndarray) -> np.ndarray:
        from gguf import GGMLQuantizationType, quants

        if self.name in ("f32", "f16"):
            return np.ascontiguousarray(data).view(np.float32 if self.name == "f32" else np.float16).astype(np.float32)
        return quants.dequantize(np.ascontiguousarray(data), GGMLQuantizationType(self.gguf_id))


def missing_library(name: str, weighted: bool) -> EnvironmentFailed:
    """What to raise for a type that only the C library encodes."""
    how = " with importance data" if weighted else ""
    return EnvironmentFailed(
        f"encoding to {name}{how} needs the C library of the patched llama.cpp, which is not built: "
        "run `make runtime` or `gguf-splitq runtime build` first"
    )


def stock_types() -> list[StockType]:
    """Every stock type, with block sizes taken from the `gguf` package."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    types = []
    for name, file_type in _FILE_TYPES.items():
        gguf_type = GGMLQuantizationType[name.upper()]
        block_size, block_bytes = GGML_QUANT_SIZES[gguf_type]
        # Scales and minima are halves, and a minimum may be chosen beyond the smallest weight.
        max_abs = {"f32": None, "bf16": None, "f16": HALF, "q8_0": 127 * HALF}.get(name, HALF / 2)
        types.append(
            StockType(name, int(gguf_type), file_type, block_size, block_bytes, "llama.cpp", "stock type", max_abs)
        )
    return types
