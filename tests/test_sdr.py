# SPDX-License-Identifier: MIT
"""sdr4: its arithmetic is that of integers, and its steps, shifts and choices are the documented ones."""

import re
from pathlib import Path

import numpy as np
import pytest
from test_kernels import driver, multiply, random_blocks, run, scalar  # noqa: F401

from gguf_splitq import types
from gguf_splitq.types import sdr

SDR4 = types.get("sdr4")
ROWS = 200


def test_rows_of_a_cache_equal_numpy_byte_for_byte(driver):  # noqa: F811
    rng = np.random.default_rng(6)
    rows = (rng.normal(0, 1, (ROWS, 128)) * 2.0 ** rng.integers(-12, 2, (ROWS, 128))).astype(np.float32)
    rows[0], rows[1, 1:], rows[2], rows[3] = 0, 0, rows[2] * 1e-20, rows[3] * 1e9
    got = run(driver, "cache", SDR4.gguf_id, 128, ROWS, data=rows.tobytes())
    assert got == SDR4.encode_cache(rows).tobytes()


def test_a_cache_keeps_keys_and_values_as_large_as_they_are():
    """Nearest codes are too small on average, which attention adds up; along its blocks a cache's error is smaller."""
    rows = np.random.default_rng(7).normal(0, 1, (1000, 64)).astype(np.float32)
    along = [
        np.einsum("nj,nj->n", rows, rows - SDR4.decode_numpy(encoded)) / np.square(rows).sum(1)
        for encoded in (SDR4.encode_cache(rows), SDR4.encode_numpy(rows))
    ]
    assert np.square(along[0]).mean() < 0.6 * np.square(along[1]).mean()


def integers(blocks: np.ndarray) -> np.ndarray:
    """int64 [n, 32]: weights in units of their block's step."""
    return sdr.unpack(blocks).astype(np.int64) << np.repeat(sdr.shifts(blocks[:, 16]), sdr.GROUP, axis=1)


def test_weights_are_integers_times_the_step_of_their_block():
    blocks = random_blocks(SDR4, 5000, np.random.default_rng(1))
    exact = integers(blocks) * sdr.STEPS[blocks[:, 16], None].astype(np.float64)
    np.testing.assert_array_equal(SDR4.decode_numpy(blocks), exact)


@pytest.mark.parametrize("blocks", [1, 2, 7, 18], ids="{} blocks".format)
def test_the_dot_product_is_the_integer_product_exactly(driver, blocks):  # noqa: F811
    """With steps that are powers of two and activations of scale 1, no operation in float has anything to round."""
    rng = np.random.default_rng(blocks)
    x = random_blocks(SDR4, ROWS * blocks, rng)
    exponent = rng.integers(0, 4, len(x)) + 16  # sums of 18 blocks then fit the 24 bits of a float
    x[:, 16] = np.array([exponent * 4, 85 + exponent * 4, 170 + exponent * 2, 213 + exponent * 2])[
        rng.integers(0, 4, len(x)), np.arange(len(x))
    ]
    y = np.empty((len(x), 34), np.uint8)
    y[:, :2] = np.array([1.0], "<f2").view(np.uint8)
    y[:, 2:] = rng.integers(-127, 128, (len(y), 32)).astype(np.int8).view(np.uint8)
    output = run(driver, "dot", SDR4.gguf_id, 32 * blocks, ROWS, data=x.tobytes() + y.tobytes())

    unit = sdr.STEPS[x[:, 16]] * 2.0**11  # 1, 2, 4 or 8 for every block
    products = integers(x) * y[:, 2:].view(np.int8) * unit[:, None].astype(np.int64)
    np.testing.assert_array_equal(np.frombuffer(output, np.float32) * 2.0**11, products.reshape(ROWS, -1).sum(1))


def razored(activations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, n_cols] -> int64 [n, n_cols] and the float32 scale of each row, as QRazor's code does it."""
    largest = np.abs(activations).max(1)
    base = np.rint(np.abs(activations) * (np.float32(32767) / largest)[:, None]).astype(np.int64)
    base = base.reshape(len(largest), -1, 16)
    shift = np.maximum(np.frexp(np.bitwise_or.reduce(base, -1, keepdims=True).astype(np.float64))[1] - 3, 0)
    magnitude = np.rint(base / 2.0**shift).astype(np.int64)
    sign = np.sign(activations).astype(np.int64).reshape(base.shape)
    return (np.clip(sign * magnitude, -8, 7) << shift).reshape(activations.shape), largest / np.float32(32767)


def test_the_razored_product_is_the_integer_product_exactly(driver):  # noqa: F811
    """One block of weights of step 2**-15, so that the token's scale is all that there is to round."""
    rng = np.random.default_rng(5)
    x = random_blocks(SDR4, ROWS, rng)
    x[:, 16] = rng.choice([0, 170, 213], ROWS)
    y = (rng.normal(0, 1, (ROWS, 32)) * np.repeat(2.0 ** rng.integers(-9, 3, (ROWS, 2)), 16, axis=1)).astype(np.float32)
    y[:2, :16] = 0
    output = np.frombuffer(run(driver, "razor", SDR4.gguf_id, 32, ROWS, data=x.tobytes() + y.tobytes()), np.float32)
    activations, scale = razored(y)
    products = (integers(x) * activations).sum(1)
    np.testing.assert_array_equal(output, (products * 2.0**-15).astype(np.float32) * scale)


@pytest.mark.parametrize("blocks", [2, 7, 18], ids="{} blocks".format)
def test_razored_products_equal_scalar_bit_for_bit(driver, scalar, blocks):  # noqa: F811
    rng = np.random.default_rng(blocks)
    x = random_blocks(SDR4, ROWS * blocks, rng)
    y = (rng.standard_t(2, (ROWS, 32 * blocks))).astype(np.float32)
    y[0] = 0
    args, data = ("razor", SDR4.gguf_id, 32 * blocks, ROWS), x.tobytes() + y.tobytes()
    output = np.frombuffer(run(driver, *args, data=data), np.float32)
    np.testing.assert_array_equal(output, np.frombuffer(run(scalar, *args, data=data), np.float32))
    assert output[0] == 0 and np.isfinite(output).all()


@pytest.mark.parametrize("experts", [False, True], ids=["batches", "experts"])
def test_matrix_products_with_razored_activations(driver, experts):  # noqa: F811
    """Two matrices, three batches each; or four experts, of which each token has two."""
    rng = np.random.default_rng(6)
    matrices, rows, columns, tokens = (4, 21, 96, 5) if experts else (2, 21, 96, 5)
    x = random_blocks(SDR4, matrices * rows * columns // 32, rng)
    weights = SDR4.decode_numpy(x).reshape(matrices, rows, columns).astype(np.float64)
    y = rng.normal(0, 1, (tokens, 2, columns) if experts else (6, tokens, columns)).astype(np.float32)
    values, scale = razored(y.reshape(-1, columns))
    values = (values * scale[:, None].astype(np.float64)).reshape(y.shape)
    if experts:
        ids = np.array([[0, 3], [3, 1], [2, 0], [1, 2], [3, 2]], np.int32)
        got = multiply(driver, "razor_mul_id", SDR4, columns, rows, matrices, tokens, 2, 0,
                       data=x.tobytes() + y.tobytes() + ids.tobytes(), last=[0])  # fmt: skip
        exact = (weights[ids] @ values[..., None])[..., 0]
    else:
        got = multiply(driver, "razor_mul", SDR4, columns, rows, matrices, tokens, 3, 0, data=x.tobytes() + y.tobytes())
        exact = values @ weights.repeat(3, 0).swapaxes(1, 2)
    np.testing.assert_allclose(got.reshape(exact.shape), exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())


def test_the_documented_steps_are_the_ones_in_use():
    d = np.arange(256)
    fine = (1 + d % 4 / 4) * 2.0 ** (d // 4 - 15)
    coarse = (1 + (d - 170) % 2 / 2) * 2.0 ** ((d - 170) // 2 - 15.0)
    np.testing.assert_array_equal(sdr.STEPS[:85], fine[:85])
    np.testing.assert_array_equal(sdr.STEPS[85:170], -fine[:85])
    np.testing.assert_array_equal(sdr.STEPS[170:213], coarse[170:213])
    np.testing.assert_array_equal(sdr.STEPS[213:], sdr.STEPS[170:213])
    assert sdr.shifts(np.arange(256)).tolist() == [[0, 0]] * 170 + [[0, 1]] * 43 + [[1, 0]] * 43


def test_trying_all_steps_gains_next_to_nothing():
    rows = np.random.default_rng(2).normal(0, 0.02, (1, 8192)).astype(np.float32).reshape(-1, 32)
    chosen = ((rows - SDR4.decode_numpy(SDR4.encode_numpy(rows))) ** 2).sum(1)
    unit = np.repeat(sdr.group_steps(np.arange(256)), sdr.GROUP, axis=1)[:, None]
    codes = np.clip(np.rint(rows / unit), -8, 7)
    assert chosen.sum() < 1.002 * ((rows - codes * unit) ** 2).sum(2).min(0).sum()


@pytest.mark.parametrize("larger", [0, 1], ids=["first", "second"])
def test_the_group_of_the_larger_weights_is_the_shifted_one(larger):
    rows = np.random.default_rng(3).normal(0, 1, (200, 2, 16)).astype(np.float32)
    rows[:, larger] *= 3
    shifted = sdr.shifts(SDR4.encode_numpy(rows.reshape(200, 32))[:, 16])
    assert shifted[:, larger].mean() > 0.5 and not shifted[:, 1 - larger].any()


def test_rounding_is_to_nearest_even_and_cut():
    row = np.tile(np.arange(-8, 8, dtype=np.float32), 2)  # units of 1 give the least error, whatever the first four are
    row[:4] = [0.5, 1.5, -2.5, 7.5]
    assert SDR4.decode_numpy(SDR4.encode_numpy(row[None]))[0].tolist() == [0, 2, -2, 7, *row[4:]]


def test_zeros_are_stored_as_zero_bytes():
    assert not SDR4.encode_numpy(np.zeros((2, 64), np.float32)).any()


def test_no_byte_decodes_to_anything_but_a_number():
    blocks = np.zeros((256, 17), np.uint8)
    blocks[:, 16] = np.arange(256)
    blocks[:, :16] = 0x78
    weights = SDR4.decode_numpy(blocks)
    assert np.isfinite(weights).all() and np.abs(weights).max() == 8 * 2 * 64


def test_the_documented_range_is_the_range():
    text = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
    assert re.search(r"largest step is 64 and the largest weight 448", text) and sdr.MAX_ABS == 448
