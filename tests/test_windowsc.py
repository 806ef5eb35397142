# SPDX-License-Identifier: MIT
"""sq4wc, sq3wo and their like in Python: rows of window types with scales of columns, coded with and without data."""

import json
from dataclasses import replace

import crafted
import numpy as np
import pytest
import torch
from test_claq import COLUMNS, ROWS, check_experts, check_that_c_agrees, entry_of, wide_llama, without_data
from test_solve import problem

from gguf_splitq import convert, inspection, types
from gguf_splitq.coding import columns as coder
from gguf_splitq.coding import solver, windows
from gguf_splitq.errors import InputError
from gguf_splitq.types.columns import PLAIN

NAMES = ["sq4wc", "sq3wc", "sq2wc", "sq3wo", "sq2wo"]
GRIDS = {"sq3wo": (50, 2), "sq2wo": (60, 1)}  # base and step of block scales


def random_matrix(kind, n_rows=ROWS, n_cols=COLUMNS):
    """Packed rows, scales of columns, the side tensor, of random sound contents, and the type of the rows."""
    rng = np.random.default_rng(3)
    scale, plain = rng.normal(size=n_cols).astype(np.float16), kind.plain
    if kind.name in GRIDS:
        plain = replace(plain, base=GRIDS[kind.name][0], step=GRIDS[kind.name][1])
    packed = rng.integers(0, 256, (n_rows, kind.row_bytes(n_cols)), np.uint8)
    return packed, scale, kind.side_of(n_rows, scale, plain), plain


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_window_type_times_the_scales(name):
    kind = types.get(name)
    packed, scale, side, plain = random_matrix(kind)
    read = kind.read_side(side, ROWS, COLUMNS, "x")
    expected = plain.decode_numpy(packed) * scale.astype(np.float32)
    np.testing.assert_array_equal(kind.decode_rows(packed, read, 0), expected)
    np.testing.assert_array_equal(kind.decode_rows(packed[7:], read, 7), expected[7:])
    assert name in GRIDS or plain == types.get(name[:-1])
    assert side[:32].view("<u4").tolist() == [0x51414C43, ROWS, COLUMNS, 0, 0, *GRIDS.get(name, (0, 0)), 0]
    assert side[32:].tobytes() == scale.tobytes() and len(side) == kind.side_bytes(ROWS, COLUMNS, PLAIN)


@pytest.mark.parametrize("name", NAMES)
def test_c_reads_the_same_weights(runtime_library, name):
    kind = types.get(name)
    packed, _, side, _ = random_matrix(kind)
    check_that_c_agrees(runtime_library, kind, packed, side)


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [(12, 1, "do not fit"), (16, 1, "1 outliers"), (33, 0x7C, "not finite"), (4, 9, "not that")],
)
def test_a_damaged_side_tensor_is_refused_by_name(at, value, words):
    kind = types.get("sq2wc")
    side = random_matrix(kind)[2].copy()
    side[at] = value
    with pytest.raises(InputError, match=f"blk.0.x.columns.*{words}"):
        kind.read_side(side, ROWS, COLUMNS, "blk.0.x.columns")


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_lowers_the_output_error_and_the_bytes_are_what_it_reports(name):
    weight, hessian = problem(64, 128)
    weight[5] = 0
    weight[:, 9] *= 30
    kind = types.get(name)
    result = coder.solve_windows(weight, hessian, kind)
    assert result.errors["polish"] < result.errors["feedback"] < 0.9 * result.errors["nearest"]
    side = kind.read_side(result.side, 64, 128, "x")
    np.testing.assert_array_equal(kind.decode_rows(result.packed.numpy(), side, 0), result.weight.numpy())
    difference, size = (weight - result.weight).double(), torch.from_numpy(coder.scales(weight.numpy())).double()
    h = solver.damped(hessian, result.damping, size)
    expected = float(((difference @ h) * difference).sum()) / len(weight)
    assert result.errors["polish"] == pytest.approx(expected, rel=1e-3)
    again = coder.solve_windows(weight, hessian, kind)
    assert torch.equal(again.packed, result.packed) and np.array_equal(again.side, result.side)


def test_columns_of_very_different_sizes_cost_nothing():
    """Where inputs have outlier channels and the weights are small there; without scales most of those are lost."""
    weight, hessian = problem(128, 128)
    size = torch.ones(128)
    size[::25] = 40
    kind, given = types.get("sq2wc"), (weight / size, hessian * size * size[:, None])
    plain = coder.solve_windows(weight, hessian, kind).errors["polish"]
    assert coder.solve_windows(*given, kind).errors["polish"] == pytest.approx(plain, rel=0.05)
    assert windows.solve(*given, kind.plain).errors["polish"] > 1.5 * plain


def test_without_a_hessian_importance_decides_within_blocks():
    weight, _ = problem(128, 128)
    kind = types.get("sq2wc")
    importance = torch.ones(128)
    importance[::4] = 100
    errors = [(weight - without_data(weight, kind, PLAIN, by)[0]).square().mean(0) for by in (None, importance)]
    assert errors[1][::4].mean() < 0.8 * errors[0][::4].mean() and errors[1][1::4].mean() > errors[0][1::4].mean()
    assert not without_data(0 * weight, kind, PLAIN)[0].any()


def test_experts_have_side_tensors_each(tmp_path):
    tensors = crafted.llama_tensors(128, 128, blocks=1, experts=3)
    source = crafted.write_gguf(tmp_path / "moe.gguf", tensors)
    check_experts(convert.convert(source, "sq3wc", tmp_path / "out.gguf", threads=1), tensors, tmp_path)


def test_tensors_that_cannot_have_the_type_get_the_one_without_scales():
    assert entry_of("sq3wc", "blk.0.attn_q.weight", 32, 64).target_name == "sq3wc"
    few = entry_of("sq3wc", "blk.0.attn_q.weight", 31, 64)
    assert few.target_name == "sq3w" and "31 rows are too few to share a side tensor: sq3wc -> sq3w" in few.fallback


def test_calibrated_files_have_the_bits_that_they_say(tmp_path):
    folder, report = wide_llama(tmp_path, layers=1), tmp_path / "report.json"
    options = {"calib": str(crafted.DEMO / "calib.txt"), "calib_tokens": 2048, "report": report, "threads": 1}
    out = convert.convert(folder, "sq2wc", tmp_path / "out.gguf", **options)
    errors = json.loads(report.read_text())["calibration"]["errors"]
    assert len(errors) == 7 and all(e["polish"] < e["feedback"] < e["nearest"] for e in errors.values())
    assert 2.25 < inspection.linear_bpw(out) < 2.4
