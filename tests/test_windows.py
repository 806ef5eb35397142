# SPDX-License-Identifier: MIT
"""The encoder of window codes, sq6w to sq2w: near the best codes there are, for all kinds of blocks.

That NumPy and C give the same bytes is shown in test_types.py and test_kernels.py.
"""

import numpy as np
import pytest

from gguf_splitq import types
from gguf_splitq.types import splitquant, windows

FAMILY = pytest.mark.parametrize("kind", windows.TYPES, ids=lambda t: t.name)


def blocks(kind: str, n: int = 64) -> np.ndarray:
    """float32 [n, 32]."""
    rng = np.random.default_rng(3)
    values = {
        "gaussian": rng.normal(0, 1, (n, 32)),
        "student t4": rng.standard_t(4, (n, 32)),
        "one outlier": rng.normal(0, 1, (n, 32)) * np.where(np.arange(32) == 5, 10, 1),
    }[kind]
    return (values * 0.02).astype(np.float32)


def errors(kind: windows.Window, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Squared errors [n] of blocks encoded and decoded, weighted by importance [32]."""
    rows = kind.decode_numpy(kind.encode_numpy(x, importance))
    return ((x - rows).astype(np.float64) ** 2 * (1 if importance is None else importance)).sum(1)


def decibels(ratio: float) -> float:
    return 10 * np.log10(ratio)


def least_errors(kind: windows.Window, x: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Least squared errors [n] over 10 scales from the root mean square's, both signs, and all closed paths."""
    n_states, rms = kind.n_states, np.sqrt((importance * x.astype(np.float64) ** 2).sum(1) / importance.sum())
    nearest = np.searchsorted(splitquant.SCALES[:128], rms / windows.tables()[kind.name].rms)
    least = np.full(len(x), np.inf)
    for step in np.arange(-4, 6):
        for mirror in (0, 128):
            scale = splitquant.SCALES[np.clip(nearest + step, 1, 127) + mirror].astype(np.float64)
            metric = (x[..., None] - scale[:, None, None] * kind.edges) ** 2 * importance[:, None]
            total = np.zeros(len(x))
            for chain in kind.chain:
                cost = np.broadcast_to(np.where(np.eye(n_states), 0, np.inf), (len(x), n_states, n_states))
                for column in chain[::-1]:  # [n, begun in, now in]
                    ways = np.repeat(cost, 1 << kind.code_bits, axis=2) + metric[:, None, column]
                    cost = ways.reshape(len(x), n_states, -1, n_states).min(2)
                total += np.einsum("bii->bi", cost).min(1)
            least = np.minimum(least, total)
    return least


@FAMILY
def test_hardly_anything_is_lost_against_all_closed_paths_at_all_scales(kind):
    x = blocks("gaussian", 1024)
    assert decibels(errors(kind, x).sum() / least_errors(kind, x, np.ones(32)).sum()) < 0.05


@pytest.mark.parametrize(("decades", "limit"), [(2, 0.1), (4, 0.4)])
@FAMILY
def test_nor_much_where_columns_differ_in_importance(kind, decades, limit):
    x = blocks("gaussian", 256)
    weight = 10 ** np.random.default_rng(4).uniform(0, decades, 32).astype(np.float32)
    limit += 0.2 * (kind.code_bits > 4)  # a scale further off would be better
    assert decibels(errors(kind, x, weight).sum() / least_errors(kind, x, weight).sum()) < limit


@pytest.mark.parametrize(("content", "gain"), [("gaussian", 1), ("student t4", 1.8), ("one outlier", 2.5)])
@pytest.mark.parametrize("name", ["sq4w", "sq3w", "sq2w"])
def test_errors_are_well_below_those_of_the_sq_type_of_as_many_bits(name, content, gain):
    x = blocks(content, 512)
    assert decibels(errors(types.get(name[:-1]), x).sum() / errors(types.get(name), x).sum()) > gain


@pytest.mark.parametrize("content", ["gaussian", "student t4", "one outlier"])
@pytest.mark.parametrize("bits", [5, 6])
def test_a_bit_more_has_less_than_a_third_of_the_error(bits, content):
    x = blocks(content, 512)
    less, more = (errors(types.get(f"sq{b}w"), x).sum() for b in (bits - 1, bits))
    assert less > 3 * more


@FAMILY
def test_a_mirrored_block_has_the_mirrored_scale(kind):
    x = blocks("gaussian")
    expected = kind.encode_numpy(x)
    expected[:, -1] ^= 128
    np.testing.assert_array_equal(kind.encode_numpy(-x), expected)


@FAMILY
def test_twice_the_weights_have_twice_the_scale(kind):
    x = blocks("gaussian")
    expected = kind.encode_numpy(x)
    expected[:, -1] += 8  # an octave
    np.testing.assert_array_equal(kind.encode_numpy(2 * x), expected)


@FAMILY
def test_blocks_of_nothing_are_zero_bytes(kind):
    x = np.zeros((4, 32), np.float32)
    x[1] = -0.0
    x[2, 3] = 1e-42
    x[3] = 2.0**-21  # a sixtieth of what the least scale makes of a usual level
    assert not kind.encode_numpy(x)[:3].any()
    assert errors(kind, x)[3] <= (x[3].astype(np.float64) ** 2).sum()


@FAMILY
def test_blocks_are_as_good_until_the_scales_end(kind):
    x = blocks("gaussian", 256)
    relative = errors(kind, x) / (x**2).sum(1)
    for largest in (2.0**-10, 0.1, kind.max_abs):
        scaled = x / np.abs(x).max(1, keepdims=True) * np.float32(largest)
        assert decibels((errors(kind, scaled) / (scaled**2).sum(1)).sum() / relative.sum()) < 0.1
    beyond = kind.decode_numpy(kind.encode_numpy(x * np.float32(1e6)))
    assert 14 < np.abs(beyond).max() < 15  # the largest level at the largest scale


@FAMILY
def test_importance_counts_by_its_ratios_and_not_at_all_where_it_is_zero(kind):
    x, weight = blocks("gaussian").reshape(2, -1), np.random.default_rng(5).exponential(1, 1024).astype(np.float32)
    weight[:512] = 0
    encoded = kind.encode_numpy(x, weight)
    np.testing.assert_array_equal(encoded, kind.encode_numpy(x, weight * np.float32(2.0**-100)))
    half = encoded.shape[1] // 2
    np.testing.assert_array_equal(encoded[:, :half], kind.encode_numpy(x)[:, :half])
    assert (encoded[:, half:] != kind.encode_numpy(x)[:, half:]).any()


@FAMILY
def test_rows_are_independent(kind):
    x = blocks("student t4").reshape(8, -1)
    np.testing.assert_array_equal(np.concatenate([kind.encode_numpy(row[None]) for row in x]), kind.encode_numpy(x))


def test_the_highest_of_seven_bits_turns_the_other_level_of_a_pair():
    for name in ("sq5w", "sq6w"):
        levels = windows.tables()[name].levels.astype(int)
        assert len(levels) == 128 and (levels[np.arange(128) ^ 65] == -1 - levels).all()


def test_half_of_sq3ws_table_is_enough():
    """Which the AVX2 kernels rely on."""
    levels = windows.tables()["sq3w"].levels.astype(int)
    assert (levels[np.arange(64) ^ 32] == -1 - levels).all()
