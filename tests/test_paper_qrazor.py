# SPDX-License-Identifier: MIT
"""The published razoring that `make paper-qrazor` simulates: codes, shifts, rounding, and its error by group size."""

import numpy as np
import pytest

from experiments.paper_qrazor import razored


def test_a_group_keeps_sign_and_three_bits_below_its_leading_one():
    base = np.array([[127, 8, 24, 40, -127, 4, -20, 0] + 7 * [1] + [3]], np.float32)  # 127: the scale is 1
    assert razored(base, 8)[0, :8].tolist() == [112, 0, 32, 32, -128, 0, -16, 0]  # shift 4: 127 would be 8, is cut
    assert razored(base, 8)[0, 8:].tolist() == base[0, 8:].tolist()  # three bits need no shift


def test_rows_have_scales_of_their_own_and_zeros_stay():
    rows = np.vstack([np.zeros(32), np.full(32, 1e-3), np.full(32, -5)]).astype(np.float32)
    np.testing.assert_allclose(razored(rows, 16), rows * np.array([[1], [112 / 127], [128 / 127]]), rtol=1e-6)


@pytest.mark.parametrize(("group", "error"), [(8, -20.1), (16, -19.1), (32, -18.6)])
def test_error_on_gaussian_weights(group, error):
    rows = np.random.default_rng(1).normal(0, 0.02, (200, 512)).astype(np.float32)
    assert 10 * np.log10(((rows - razored(rows, group)) ** 2).sum() / (rows**2).sum()) == pytest.approx(error, abs=0.2)
