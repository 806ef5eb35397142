# SPDX-License-Identifier: MIT
"""sq2c and sq3c in Python: their bytes, scales of columns, the encoder with and without data, whole conversions."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import crafted
import numpy as np
import pytest
import torch
from test_claq import check_experts, check_that_c_agrees, entry_of, wide_llama, without_data
from test_solve import problem

from gguf_splitq import convert, inspection, plan, types
from gguf_splitq.coding import columns as coder
from gguf_splitq.coding import solver
from gguf_splitq.dequantize import dequantize
from gguf_splitq.errors import InputError, UsageError
from gguf_splitq.files import gguf_file
from gguf_splitq.types import columns, splitquant

KINDS = [(name, wide) for name in ("sq2c", "sq3c") for wide in (0, 2, 5)]
ROWS, COLUMNS = 37, 160


def kind_of(name, wide=0, **options):
    return types.get(name), columns.Layout(wide, **options)


def random_matrix(kind, layout, rng, n_rows=ROWS, n_cols=COLUMNS):
    """Codes, scale bytes and a side tensor of random sound contents."""
    codes = (rng.integers(0, 16, (n_rows, n_cols)) % (1 << kind.bits(n_cols, layout))).astype(np.uint8)
    order = rng.permutation(n_cols).astype(np.uint16) if layout.wide else np.arange(n_cols)
    side = columns.Side(order, rng.normal(size=n_cols).astype(np.float16))
    return codes, rng.integers(0, 256, (n_rows, n_cols // 32)).astype(np.uint8), side


@pytest.mark.parametrize(("name", "wide"), KINDS)
def test_what_is_packed_stands_for_the_documented_weights(name, wide):
    kind, layout = kind_of(name, wide)
    codes, d, side = random_matrix(kind, layout, np.random.default_rng(3))
    packed, data = kind.pack(codes, side, layout, d)
    assert packed.shape == (ROWS, kind.row_bytes(COLUMNS)) and len(data) == kind.side_bytes(ROWS, COLUMNS, layout)
    expected = np.zeros((ROWS, COLUMNS))
    for i in range(COLUMNS):
        levels = splitquant.codebooks()[f"sq{kind.bits(COLUMNS, layout)[i]}"].levels
        for r in range(ROWS):
            scale = float(side.scale[i]) * float(splitquant.SCALES[d[r, i // 32]])
            expected[r, side.order[i]] = scale * levels[codes[r, i]]
    read = types.get(name).read_side(data, ROWS, COLUMNS, "x")  # which knows of no wide columns
    np.testing.assert_allclose(kind.decode_rows(packed, read, 0), expected, rtol=1e-6)
    np.testing.assert_array_equal(kind.decode_rows(packed[17:30], read, 17), kind.decode_rows(packed, read, 0)[17:30])
    np.testing.assert_array_equal(read.order, side.order)
    np.testing.assert_array_equal(read.scale, side.scale)


@pytest.mark.parametrize(("name", "wide"), KINDS)
def test_c_reads_the_same_weights(runtime_library, name, wide):
    kind, layout = kind_of(name, wide)
    codes, d, side = random_matrix(kind, layout, np.random.default_rng(4))
    check_that_c_agrees(runtime_library, kind, *kind.pack(codes, side, layout, d))


@pytest.mark.parametrize(("name", "codes", "extra"), [("sq2c", {4 + 2: 2 << 6}, 4), ("sq3c", {4 + 2: 2 << 6}, 8)])
def test_the_place_of_every_byte(name, codes, extra):
    kind, layout = kind_of(name, 1)
    given, d, side = random_matrix(kind, layout, np.random.default_rng(0), 18, 64)
    given[:], d[:] = 0, 0
    given[17, 16 + 4 * 3 + 2] = 2 | extra
    d[17] = 7, 9
    packed, data = kind.pack(given, side, layout, d)
    size = kind.block_bytes
    assert size == {"sq2c": 9, "sq3c": 13}[name] and not packed[:17].any()
    assert {int(at): int(packed[17, at]) for at in np.flatnonzero(packed[17])} == codes | {size - 1: 7, 2 * size - 1: 9}
    assert data[:32].view("<u4").tolist() == [0x51414C43, 18, 64, 1, 0, 0, 0, 0]
    assert data[32:160].view("<u2").tolist() == side.order.tolist()
    assert data[160:288].tobytes() == side.scale.tobytes()
    assert np.flatnonzero(data[288:]).tolist() == [64 + 4 * 1 + 2] and data[288 + 70] == 1 << 4 + 3
    assert len(data) == 288 + 2 * 16 * 4
    _, plain = kind.pack(given, side, columns.PLAIN, d)
    assert len(plain) == 32 + 128 and plain[32:].tobytes() == side.scale.tobytes()


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, 1, "not that of a matrix"),
        (4, 9, "not that of a matrix"),
        (20, 1, "not that of a matrix"),
        (12, 6, "do not fit"),
        (18, 200, "do not fit"),
        (16, 1, "1 outliers, which this type cannot have"),
        (12, 5, "bytes where"),
        (32, 7, "not a permutation"),
        (32 + 320 + 1, 0x7C, "not finite"),
        (None, None, "no side tensor"),
    ],
)
def test_a_damaged_side_tensor_is_refused_by_name(at, value, words):
    kind, layout = kind_of("sq2c", 2)
    codes, d, side = random_matrix(kind, layout, np.random.default_rng(1))
    _, data = kind.pack(codes, side, layout, d)
    data = data.copy() if at is not None else data[:7]
    if at is not None:
        data[at] = value
    with pytest.raises(InputError, match=f"blk.0.x.columns.*{words}"):
        types.get("sq2c").read_side(data, ROWS, COLUMNS, "blk.0.x.columns")


def test_types_with_side_tensors_are_known_by_their_ids():
    assert sorted(kind.gguf_id for kind in types.COLUMNS) == list(columns.IDS)


def test_scales_of_columns_make_all_weights_fit():
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(300, 64)) * 10 ** rng.uniform(-8, 3.5, 64)).astype(np.float32)
    weight[:, 3] = 0
    weight[:, 4] = 0
    weight[7, 4] = 500  # alone in its column
    scale = coder.scales(weight).astype(np.float32)
    assert np.isfinite(scale).all() and scale[3] == 0 and (np.delete(scale, 3) > 0).all()
    assert (np.abs(weight).max(0) <= scale * splitquant.MAX_ABS).all()
    usual = scale > 1e-4
    usual[4] = False
    np.testing.assert_allclose(scale[usual], 8 * np.sqrt(np.square(weight[:, usual]).mean(0)), rtol=1e-3)
    for hessian in (None, torch.from_numpy(1 / np.maximum(scale, 1e-6) ** 2).diag()):
        given, kind = torch.from_numpy(weight), kind_of("sq3c", 1)
        found = without_data(given, *kind)[0] if hessian is None else coder.solve(given, hessian, *kind).weight
        found = found.numpy()
        assert not found[:, 3].any() and abs(found[7, 4] - 500) < 60
        error = np.square(found - weight)[:, usual].sum(0) / np.square(weight[:, usual]).sum(0)
        assert (error < 0.2).all()


@pytest.mark.parametrize("metric", ["hessian", "outlier"])
@pytest.mark.parametrize(("name", "wide"), [("sq2c", 0), ("sq2c", 2), ("sq3c", 1)])
def test_every_stage_lowers_the_output_error_and_the_bytes_are_what_it_reports(name, wide, metric):
    weight, hessian = problem(64, 128)
    weight[5] = 0
    weight[:, 9] *= 30  # more than 13 times the mean
    kind, layout = kind_of(name, wide, metric=metric)
    result = coder.solve(weight, hessian, kind, layout)
    assert result.errors["polish"] < 0.9 * result.errors["feedback"] < 0.8 * result.errors["nearest"]
    side = kind.read_side(result.side, 64, 128, "x")
    np.testing.assert_array_equal(kind.decode_rows(result.packed.numpy(), side, 0), result.weight.numpy())
    difference, size = (weight - result.weight).double(), torch.from_numpy(coder.scales(weight.numpy())).double()
    h = solver.damped(hessian, result.damping, size)
    expected = float(((difference @ h) * difference).sum()) / len(weight)
    assert result.errors["polish"] == pytest.approx(expected, rel=1e-3)
    if wide:
        assert 9 in side.order[:32]
    again = coder.solve(weight, hessian, kind, layout)
    assert torch.equal(again.packed, result.packed) and np.array_equal(again.side, result.side)


def test_more_bits_go_to_the_columns_that_need_them():
    weight, hessian = problem(128, 128)
    for low, high in (("sq2c", "sq3c"), ("sq3c", "sq4")):
        errors = [coder.solve(weight, hessian, *kind_of(low, wide)).errors["polish"] for wide in range(5)]
        assert all(after < 0.9 * before for before, after in zip(errors, errors[1:], strict=False))
        if high == "sq3c":  # all columns wide
            assert errors[4] == pytest.approx(coder.solve(weight, hessian, *kind_of(high)).errors["polish"], rel=0.05)
    order = types.get("sq2c").read_side(coder.solve(weight, hessian, *kind_of("sq2c", 1)).side, 128, 128, "x").order
    h = solver.damped(hessian)
    cost = weight.square().sum(0) / torch.linalg.inv(h).diagonal()
    assert cost[order[:32].astype(int)].min() > 0.9 * cost[order[32:].astype(int)].max()


def test_columns_of_very_different_sizes_cost_nothing():
    """Where inputs have outlier channels and the weights are small there; without scales most of those are lost."""
    weight, hessian = problem(128, 128)
    size = torch.ones(128)
    size[::25] = 40
    for kind in (kind_of("sq2c"), kind_of("sq2c", 1)):
        plain = coder.solve(weight, hessian, *kind).errors["polish"]
        scaled = coder.solve(weight / size, hessian * size * size[:, None], *kind).errors["polish"]
        assert scaled == pytest.approx(plain, rel=0.05)


def test_without_a_hessian_importance_decides():
    weight, _ = problem(128, 128)
    plain, _ = without_data(weight, *kind_of("sq2c"))
    importance = torch.ones(128)
    importance[96:] = 100
    result, side = without_data(weight, *kind_of("sq2c", 1), importance)
    assert set(side.order[:32]) == set(range(96, 128))
    errors = [(weight - found).square().mean(0) for found in (plain, result)]
    assert errors[1][96:].mean() < 0.4 * errors[0][96:].mean()
    assert not without_data(0 * weight, *kind_of("sq2c", 1))[0].any()
    assert not coder.solve(0 * weight, 0 * problem(128, 128)[1], *kind_of("sq2c", 1)).weight.any()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return crafted.write_gguf(tmp_path_factory.mktemp("sqc") / "tiny-f16.gguf", crafted.llama_tensors(256, 512))


@pytest.mark.parametrize("name", ["sq2.5", "sq3.7"])
def test_the_size_asked_for_is_the_size_stored(llama, tmp_path, name):
    report = tmp_path / "report.json"
    out = convert.convert(llama, name, tmp_path / "out.gguf", report=report, threads=2)
    assert inspection.linear_bpw(out) == pytest.approx(float(name[2:]), abs=0.01)
    with gguf_file.read(llama) as file:
        linear = [e for e in plan.make(file.tensors, name) if plan.is_linear(e.tensor)]
    assert plan.bpw(linear) == pytest.approx(inspection.linear_bpw(out)) and all(e.layout.wide for e in linear)
    kv, stored = crafted.read_gguf(out)
    assert kv["general.file_type"] == types.get(name).file_type and kv["gguf_splitq.type"] == name
    assert stored["blk.0.attn_v.columns"][0] == "I8"
    _, back = crafted.read_gguf(dequantize(out, tmp_path / "back.gguf", threads=1))
    _, before = crafted.read_gguf(llama)
    assert list(back) == list(before)
    for row in json.loads(report.read_text())["tensors"]:
        if row["type"] in ("sq2c", "sq3c"):
            weight, found = (tensors[row["name"]][1].astype(np.float32) for tensors in (before, back))
            noise = 10 * np.log10(np.square(weight).sum() / np.square(found - weight).sum())
            assert noise == pytest.approx(row["sqnr_db"], abs=0.05) and noise > (10.5 if name == "sq2.5" else 17)
    again = convert.convert(llama, name, tmp_path / "again.gguf", threads=1)
    assert again.read_bytes() == out.read_bytes()


def test_the_demo_in_2_and_a_half_bits(demo_f16, tmp_path):
    noise = {}
    for name in ("sq2", "sq2c", "sq2.5"):
        report = tmp_path / "report.json"
        out = convert.convert(demo_f16, name, tmp_path / f"{name}.gguf", tensor_type=["ffn_down=sq3.5"], report=report)
        rows = [row for row in json.loads(report.read_text())["tensors"] if ".attn_" in row["name"]]
        noise[name] = np.mean([row["sqnr_db"] for row in rows if row["sqnr_db"]])
    assert noise["sq2"] < noise["sq2c"] < noise["sq2.5"]
    rows = {row["kind"]: row for row in inspection.inspect(out)["kinds"]}
    assert rows["blk.*.ffn_down.weight"]["type"] == "sq3c" and rows["blk.*.ffn_up.weight"]["type"] == "sq2c"


def test_experts_have_side_tensors_each_and_their_own_importance(tmp_path):
    tensors = crafted.llama_tensors(128, 128, blocks=1, experts=3)
    name = "blk.0.ffn_up_exps.weight"
    sums = np.ones((3, 128), np.float32)
    for expert in range(3):
        sums[expert, 32 * expert : 32 * expert + 32] = 1e6
    imatrix = crafted.gguf_imatrix(tmp_path / "imatrix.gguf", {name: (sums, np.ones(3))})
    source = crafted.write_gguf(tmp_path / "moe.gguf", tensors)
    out = convert.convert(source, "sq2.9", tmp_path / "out.gguf", imatrix=imatrix, threads=1)
    _, stored = crafted.read_gguf(out)
    for expert, data in enumerate(stored["blk.0.ffn_up_exps.columns"][1]):
        side = types.get("sq2c").read_side(data.view(np.uint8), 128, 128, "x")
        assert set(side.order[: side.wide]) >= set(range(32 * expert, 32 * expert + 32))
        assert 32 <= side.wide <= 96
    check_experts(out, tensors, tmp_path)


def test_tensors_that_cannot_have_the_type_get_another():
    entry = functools.partial(entry_of, "sq3c")
    assert entry("blk.0.attn_q.weight", 32, 64).target_name == "sq3c"
    few = entry("blk.0.attn_q.weight", 31, 64)
    assert few.target_name == "sq3" and "31 rows are too few to share a side tensor: sq3c -> sq3" in few.fallback
    assert entry("blk.0.attn_q.weight", 256, 33).target_name == "f16"
    assert entry("blk.0.attn_k_b.weight", 8, 128, 64).target_name == "sq3"
    assert entry("blk.0.ffn_up_exps.weight", 8, 128, 64).target_name == "sq3c"
    assert entry("token_embd.weight", 128, 64).target_name == "q8_0"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"type": "sq2.1"}, "sq2.1 cannot be met: .* take 2.3"),
        ({"type": "sq4.5"}, "'sq4.5' is not known"),
        ({"type": "sq4c"}, "'sq4c' is not known"),
        ({"type": "sq4", "token_embedding_type": "sq3c"}, "linear layers only.*token_embd"),
    ],
)
def test_types_that_cannot_be_are_refused(llama, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        convert.convert(llama, outfile=tmp_path / "out.gguf", dry_run=True, **options)


def test_a_quantized_file_is_no_source(llama, tmp_path):
    out = convert.convert(llama, "sq2c", tmp_path / "out.gguf", threads=1)
    with pytest.raises(gguf_file.UnsupportedError, match="already quantized"):
        convert.convert(out, "sq3c", tmp_path / "again.gguf", threads=1)


TOKENS = 2048


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return wide_llama(tmp_path_factory.mktemp("sqc"), layers=2)


def calibrated(folder, name, outfile, threads=1, **options):
    options |= {"calib": str(crafted.DEMO / "calib.txt"), "calib_tokens": TOKENS}
    return convert.convert(folder, name, outfile, threads=threads, **options)


def test_calibration_lowers_the_error_at_any_number_of_threads(checkpoint, tmp_path):
    report, cache = tmp_path / "report.json", tmp_path / "hessians.gguf"
    out = calibrated(checkpoint, "sq2.6", tmp_path / "out.gguf", report=report, hessians=cache)
    calibration = json.loads(report.read_text())["calibration"]
    assert calibration["left"] == [] and len(calibration["errors"]) == 14
    assert all(e["polish"] < e["feedback"] < e["nearest"] for e in calibration["errors"].values())
    assert inspection.linear_bpw(out) == pytest.approx(2.6, abs=0.02)
    again = calibrated(checkpoint, "sq2.6", tmp_path / "again.gguf", threads=2, hessians=cache)
    assert again.read_bytes() == out.read_bytes()
    by_size = calibrated(checkpoint, "sq2.6", tmp_path / "metric.gguf", hessians=cache, claq_metric="outlier")
    assert inspection.linear_bpw(by_size) == pytest.approx(2.6, abs=0.02)


def test_norms_are_tuned_beside_scaled_columns(checkpoint, tmp_path):
    report = tmp_path / "report.json"
    calibrated(checkpoint, "sq2c", tmp_path / "out.gguf", report=report, tune="codes", tune_steps=2)
    tuned = json.loads(report.read_text())["calibration"]["tuned"]
    assert 0 < tuned["after"] < tuned["before"]


def test_a_killed_run_goes_on_to_the_same_bytes(checkpoint, tmp_path):
    """With side tensors of both families."""
    out, rules = tmp_path / "out.gguf", ["attn=sq2.8"]
    options = ["--type", "cq2.8", "--tensor-type", *rules, "--calib", crafted.DEMO / "calib.txt"]
    options += ["--calib-tokens", TOKENS, "--outfile", out, "--threads", 1]
    command = [sys.executable, "-m", "gguf_splitq", "convert", checkpoint, *options]
    child = subprocess.Popen([*map(str, command)], stderr=subprocess.DEVNULL, start_new_session=True)
    kept = tmp_path / ".out.gguf.unfinished"
    while child.poll() is None and not (kept / "layer-00001.safetensors").exists():
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and kept.exists() and not out.exists()
    resumed, solved = calibrated(checkpoint, "cq2.8", out, tensor_type=rules), inspection.inspect(out)["types"]
    assert {row["type"] for row in solved} >= {"cq2", "sq2c"} and not kept.exists()
    whole = calibrated(checkpoint, "cq2.8", tmp_path / "whole.gguf", tensor_type=rules)
    assert resumed.read_bytes() == whole.read_bytes()
