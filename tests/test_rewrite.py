# SPDX-License-Identifier: MIT
"""What a conversion's loop does in C where the library is built, and in NumPy elsewhere, is the same."""

import numpy as np
import pytest

from gguf_splitq import rewrite, types
from gguf_splitq.runtime import native

FLOATS = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}


def stored(name: str) -> np.ndarray:
    """uint8 rows of 96 weights of many magnitudes, subnormal ones and both zeros among them."""
    rng = np.random.default_rng(3)
    values = rng.normal(0, 1, (5, 96)).astype(np.float32) * np.float32(2.0) ** rng.integers(-25, 15, (5, 96))
    values[0, :2] = 0.0, -0.0
    if name == "bf16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype(FLOATS[name]).view(np.uint8)


@pytest.mark.parametrize("name", FLOATS)
def test_widening_is_exact(runtime_library, monkeypatch, name):
    raw, type_id = stored(name), types.get(name).gguf_id
    rows, largest = native.widen(runtime_library, type_id, raw)
    monkeypatch.setattr(native, "library", lambda: None)
    expected, expected_largest = rewrite.widen(raw, type_id)
    assert rows.tobytes() == expected.tobytes() and largest == expected_largest == np.abs(expected).max()


@pytest.mark.parametrize("bits", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", FLOATS)
def test_widening_tells_of_values_that_are_not_finite(runtime_library, monkeypatch, name, bits):
    raw, type_id = stored(name), types.get(name).gguf_id
    value = np.array([float(bits)], np.float32)
    as_stored = (value.view(np.uint32) >> 16).astype(np.uint16) if name == "bf16" else value.astype(FLOATS[name])
    raw.view(FLOATS[name])[3, 7] = as_stored[0]
    for library in (runtime_library, None):
        monkeypatch.setattr(native, "library", lambda library=library: library)
        rows, largest = rewrite.widen(raw, type_id)
        assert not np.isfinite(largest) and np.argwhere(~np.isfinite(rows)).tolist() == [[3, 7]]


@pytest.mark.parametrize("name", ["sq4", "sq3", "sq2", "sq4x", "sdr4", "q8_0", "q4_k"])
def test_errors_are_numpys(runtime_library, name):
    target = types.get(name)
    rows = np.random.default_rng(4).normal(0, 0.02, (3, 1280)).astype(np.float32)
    rows[1] = 0
    data = target.encode(rows)
    sums = native.errors(runtime_library, target.gguf_id, data, rows)
    expected = rewrite.errors(target.decode(data), rows)
    assert sums == pytest.approx(expected, rel=1e-12) and sums[2] == expected[2] > 0


def test_q8_0_is_numpys_whatever_the_importance(runtime_library):
    target, rng = types.get("q8_0"), np.random.default_rng(5)
    rows = rng.normal(0, 1, (16, 1024)).astype(np.float32) * np.float32(2.0) ** rng.integers(-100, 30, (16, 1))
    rows = np.concatenate([rows, rng.integers(-254, 255, (16, 1024)) / 2]).astype(np.float32)  # halves to round
    assert target.encode(rows, np.ones(1024, np.float32)).tobytes() == target.encode_numpy(rows).tobytes()
