# SPDX-License-Identifier: MIT
"""The tensor types: NumPy and C give the same bytes, and those bytes hold what the format promises."""

import re
from pathlib import Path

import numpy as np
import pytest

from gguf_splitq import errors, types
from gguf_splitq.runtime import native
from gguf_splitq.types import splitquant, windows

COLUMNS = 1024

# Relative squared error in dB on Gaussian weights that each format must stay under.
ERROR_CEILING = {
    "sq4": -22.2, "sq3": -16.1, "sq2": -10.0, "sq4x": -29.0, "sdr4": -21.3, "sq6w": -34.9, "sq5w": -29.3,
    "sq4w": -23.4, "sq3w": -17.5, "sq2w": -11.5,
}  # fmt: skip


def weights(kind: str) -> np.ndarray:
    rng = np.random.default_rng(7)
    normal = rng.normal(0, 1, (48, COLUMNS)).astype(np.float32)
    if kind == "gaussian":
        return normal * np.float32(0.02)
    if kind == "zero":
        return normal * 0
    if kind == "negative zero":
        return normal * np.float32(-0.0)
    if kind == "denormal":
        return normal * np.float32(1e-42)
    if kind == "near the least scale":
        return normal * np.float32(2.0) ** rng.integers(-30, -8, normal.shape).astype(np.float32)
    if kind == "many magnitudes":
        return normal * np.float32(2.0) ** rng.integers(-20, 8, normal.shape).astype(np.float32)
    if kind == "constant":
        return np.full_like(normal, 0.3)
    if kind == "single outlier":
        outlier = np.zeros_like(normal)
        outlier[np.arange(48), rng.integers(0, COLUMNS, 48)] = normal[:, 0]
        return outlier
    bits = rng.integers(0, 2**32, normal.shape, dtype=np.uint32).view(np.float32)
    return np.where(np.isfinite(bits), bits, 0).astype(np.float32)


KINDS = (
    "gaussian", "zero", "negative zero", "denormal", "near the least scale", "many magnitudes", "constant",
    "single outlier", "random bits",
)  # fmt: skip


def importances(kind: str | None) -> np.ndarray | None:
    if kind is None:
        return None
    values = np.random.default_rng(8).exponential(1, COLUMNS).astype(np.float32)
    if kind == "half zero":
        values[: COLUMNS // 2] = 0
    return values


@pytest.mark.parametrize("importance", [None, "exponential", "half zero"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tensor_type", types.CUSTOM, ids=lambda t: t.name)
def test_numpy_and_c_give_the_same_bytes(runtime_library, tensor_type, kind, importance):
    rows, columns = weights(kind), importances(importance)
    if tensor_type in windows.TYPES:  # NumPy searches for long
        rows = rows[:9]
    with np.errstate(all="ignore"):
        expected = tensor_type.encode_numpy(rows, columns)
    encoded = native.encode(runtime_library, tensor_type.gguf_id, rows, columns, tensor_type.row_bytes(COLUMNS))
    np.testing.assert_array_equal(encoded, expected)


@pytest.mark.parametrize("tensor_type", types.CUSTOM, ids=lambda t: t.name)
def test_numpy_and_c_decode_any_bytes_alike(runtime_library, tensor_type):
    blocks = np.random.default_rng(9).integers(0, 256, (2000, tensor_type.block_bytes), dtype=np.uint8)
    if tensor_type.name == "sq4x":  # random halves, but no NaN, whose bits C and NumPy need not keep
        blocks[:, 1:12:2] &= 0xBF
    expected = tensor_type.decode_numpy(blocks)
    decoded = native.decode(runtime_library, tensor_type.gguf_id, blocks, tensor_type.block_size)
    np.testing.assert_array_equal(decoded.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("tensor_type", types.CUSTOM, ids=lambda t: t.name)
def test_error_on_gaussian_weights(tensor_type):
    rows = weights("gaussian")
    error = rows - tensor_type.decode_numpy(tensor_type.encode_numpy(rows))
    assert 10 * np.log10((error**2).sum() / (rows**2).sum()) < ERROR_CEILING[tensor_type.name]


def test_importance_moves_the_error_to_columns_that_matter_less():
    rows = weights("gaussian")
    importance = np.where(np.arange(COLUMNS) % 2, np.float32(100), np.float32(1))
    sq2 = types.get("sq2")
    plain = (rows - sq2.decode_numpy(sq2.encode_numpy(rows))) ** 2
    weighted = (rows - sq2.decode_numpy(sq2.encode_numpy(rows, importance))) ** 2
    assert weighted[:, 1::2].sum() < plain[:, 1::2].sum()
    assert (weighted * importance).sum() < (plain * importance).sum()


def test_an_exhaustive_search_of_scales_gains_next_to_nothing():
    rows = weights("gaussian")[:, :256].reshape(-1, 32)
    sq4 = types.get("sq4")
    chosen = ((rows - sq4.decode_numpy(sq4.encode_numpy(rows))) ** 2).sum(1)
    levels = np.array(splitquant.codebooks()["sq4"].levels, np.float32)
    least = np.full(len(rows), np.inf)
    for scale in splitquant.SCALES:
        candidates = np.abs(rows[..., None] - scale * levels).min(-1)
        least = np.minimum(least, (candidates**2).sum(1))
    assert chosen.sum() < 1.001 * least.sum()


@pytest.mark.parametrize("tensor_type", [t for t in types.CUSTOM if t not in windows.TYPES], ids=lambda t: t.name)
def test_the_largest_weight_it_promises_survives(tensor_type):
    rows = np.full((2, 256), tensor_type.max_abs, np.float32)
    rows[1] *= -1
    np.testing.assert_allclose(tensor_type.decode_numpy(tensor_type.encode_numpy(rows)), rows, rtol=1e-3)


def test_scale_bytes_are_one_sign_four_exponent_three_mantissa_bits():
    scales = splitquant.SCALES.astype(np.float64)
    code = np.arange(128)
    exponent, mantissa = code // 8, code % 8
    expected = np.where(exponent == 0, mantissa / 8 * 2.0**-18, (1 + mantissa / 8) * 2.0 ** (exponent - 19.0))
    np.testing.assert_array_equal(scales[:128], expected)
    np.testing.assert_array_equal(scales[128:], -expected)


@pytest.mark.parametrize(
    ("name", "counts"), [("sq4", (3, 10, 3)), ("sq3", (2, 4, 2)), ("sq2", (1, 2, 1))], ids=["sq4", "sq3", "sq2"]
)
def test_levels_are_three_linear_ranges(name, counts):
    levels = np.array(splitquant.codebooks()[name].levels)
    assert len(levels) == sum(counts) and np.abs(levels).max() == 127 and (np.diff(levels) > 0).all()
    start = 0
    for count in counts:
        steps = np.diff(levels[start : start + count])
        assert steps.size == 0 or np.ptp(steps) <= 2  # equal up to the rounding to whole numbers
        start += count


@pytest.mark.parametrize("name", ["sq4", "sq3", "sq2"])
def test_the_documented_levels_are_the_ones_in_use(name):
    text = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
    row = re.search(rf"^\| `{name}` \|((?: [-\d ]+\|){{3}})$", text, re.M)
    assert tuple(map(int, re.findall(r"-?\d+", row[1]))) == splitquant.codebooks()[name].levels


@pytest.mark.parametrize("name", ["sq6w", "sq5w", "sq4w", "sq3w", "sq2w"])
def test_the_documented_tables_are_the_ones_in_use(name):
    text = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
    row = re.search(rf"^\| `{name}` \|((?: -?\d+){{64}}) \|$", text, re.M)
    assert list(map(int, row[1].split())) == windows.tables()[name].levels[:64].tolist()


def test_stored_bits():
    assert {t.name: t.bpw for t in types.CUSTOM} == {
        "sq4": 4.25, "sq3": 3.25, "sq2": 2.25, "sq4x": 6.375, "sdr4": 4.25, "sq6w": 6.25, "sq5w": 5.25, "sq4w": 4.25,
        "sq3w": 3.25, "sq2w": 2.25,
    }  # fmt: skip


def test_gguf_learns_the_types():
    import gguf

    types.register_with_gguf()
    types.register_with_gguf()
    member = gguf.GGMLQuantizationType(100)
    assert member == gguf.GGMLQuantizationType["SPLITQ_SQ4"] and gguf.GGML_QUANT_SIZES[member] == (32, 17)


def test_unknown_type_is_refused_with_the_names():
    names = (
        "sq4, sq3, sq2, sq4x, sdr4, sq6w, sq5w, sq4w, sq3w, sq2w, sq3wo, sq2wo, sq4wc, sq3wc, sq2wc, sq3c, sq2c, cq4"
    )
    with pytest.raises(errors.UsageError, match=f"'sq5' is not known.*{names}, cq3, cq2, f32"):
        types.get("sq5")


def test_a_type_only_c_can_encode_says_what_to_do(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(errors.EnvironmentFailed, match="iq4_xs needs the C library.*make runtime"):
        types.get("iq4_xs").encode(weights("gaussian"))


@pytest.mark.parametrize("name", [t.name for t in types.all_types() if t.max_abs and t not in types.CUSTOM])
@pytest.mark.parametrize("kind", ["one", "all", "random", "mixed"])
def test_stock_types_stay_finite_up_to_their_reach(runtime_library, name, kind):
    """Their scales and minima are halves: a larger weight makes one infinite, and with it a block."""
    stock, rng = types.get(name), np.random.default_rng(0)
    rows = {
        "one": np.eye(4, 256), "all": np.ones((4, 256)), "random": rng.uniform(-1, 1, (4, 256)),
        "mixed": rng.choice([-1, 1], (4, 256)),
    }[kind].astype(np.float32) * np.float32(stock.max_abs)  # fmt: skip
    for signed in (rows, -rows):
        assert np.isfinite(stock.decode(stock.encode(signed, np.ones(256, np.float32)))).all()
