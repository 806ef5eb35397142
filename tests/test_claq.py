# SPDX-License-Identifier: MIT
"""CLAQ's types in Python: their bytes, the encoder, sizes that are asked for, whole conversions."""

import ctypes
import functools
import json

import crafted
import numpy as np
import pytest
import torch
from test_solve import problem

from gguf_splitq import convert, inspection, plan, types
from gguf_splitq.coding import codebooks as coder
from gguf_splitq.coding import families, free, solver
from gguf_splitq.coding.kmeans import kmeans
from gguf_splitq.dequantize import dequantize
from gguf_splitq.errors import InputError, UsageError
from gguf_splitq.files import gguf_file
from gguf_splitq.types import columns

NAMES = ("cq4", "cq3", "cq2")
KINDS = [(name, wide, outliers) for name in NAMES for wide in (0, 2) for outliers in (0, 77)]
KINDS = [kind for kind in KINDS if kind[:2] != ("cq4", 2)]
ROWS, COLUMNS = 37, 160


def kind_of(name, wide=0, outliers=0):
    return types.get(name), columns.Layout(wide, outliers)


def random_side(kind, layout, rng, n_rows=ROWS, n_cols=COLUMNS):
    """A side tensor of random sound contents; of unused codes the levels are 0."""
    levels = np.sort(rng.integers(-127, 128, (n_cols, 16)).astype(np.int8), 1)
    levels[32 * layout.wide :, 1 << kind.code_bits :] = 0
    places = np.sort(rng.choice(n_rows * n_cols, layout.outliers, replace=False))
    start = np.searchsorted(places, n_cols * np.arange(n_rows + 1)) if layout.outliers else []
    return columns.Side(
        rng.permutation(n_cols).astype(np.uint16) if layout.wide else np.arange(n_cols),
        rng.random(n_cols).astype(np.float16),
        rng.random(n_rows).astype(np.float16),
        levels,
        np.asarray(start, np.uint32),
        (places % n_cols).astype(np.uint16),
        rng.normal(size=layout.outliers).astype(np.float16),
        grid=np.array([0, 0] if kind.has_grid(0, 0) else [60, 2]),
    )


@pytest.mark.parametrize(("name", "wide", "outliers"), KINDS)
def test_what_is_packed_stands_for_the_documented_weights(name, wide, outliers):
    (kind, layout), rng = kind_of(name, wide, outliers), np.random.default_rng(3)
    side = random_side(kind, layout, rng)
    codes = (rng.integers(0, 16, (ROWS, COLUMNS)) % (1 << kind.bits(COLUMNS, layout))).astype(np.uint8)
    packed, data = kind.pack(codes, side, layout)
    assert packed.shape == (ROWS, kind.row_bytes(COLUMNS)) and len(data) == kind.side_bytes(ROWS, COLUMNS, layout)

    expected = np.zeros((ROWS, COLUMNS))
    for r in range(ROWS):
        for i in range(COLUMNS):
            weight = float(side.row[r]) * float(side.scale[i]) * float(side.levels[i, codes[r, i]])
            expected[r, side.order[i]] = weight
        for at in range(*(side.start[r : r + 2] if outliers else (0, 0))):
            expected[r, side.order[side.column[at]]] += float(side.value[at])
    read = types.get(name).read_side(data, ROWS, COLUMNS, "x")  # which knows of no wide columns and outliers
    np.testing.assert_allclose(kind.decode_rows(packed, read, 0), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(kind.decode_rows(packed[17:30], read, 17), kind.decode_rows(packed, read, 0)[17:30])
    for field in ("order", "row", "scale", "levels", "start", "column", "value"):
        np.testing.assert_array_equal(getattr(read, field), getattr(side, field))


class CSide(ctypes.Structure):
    """`struct columns_side` of patches/files/ggml/src/ggml-columns.h."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("rows", "columns", "wide", "outliers", "base", "step")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("order", "row", "scale", "levels", "extra", "start", "column")]
    _fields_ += [("value", ctypes.c_void_p), ("size", ctypes.c_size_t)]


@pytest.mark.parametrize(("name", "wide", "outliers"), KINDS)
def test_c_reads_the_same_weights(runtime_library, name, wide, outliers):
    (kind, layout), rng = kind_of(name, wide, outliers), np.random.default_rng(4)
    codes = (rng.integers(0, 16, (ROWS, COLUMNS)) % (1 << kind.bits(COLUMNS, layout))).astype(np.uint8)
    check_that_c_agrees(runtime_library, kind, *kind.pack(codes, random_side(kind, layout, rng), layout))


def check_that_c_agrees(lib, kind, packed, data):
    """On the weights of a matrix of ROWS x COLUMNS."""
    check, lib.columns_side_at.restype = lib.ggml_splitq_check_columns, CSide
    check.restype = ctypes.c_char_p
    check.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_size_t]
    assert check(kind.gguf_id, COLUMNS, ROWS, data.ctypes.data, len(data)) is None
    assert b"too small" in check(kind.gguf_id, COLUMNS, ROWS, data.ctypes.data, len(data) - 32)
    side = lib.columns_side_at(kind.gguf_id, ctypes.c_void_p(data.ctypes.data))
    found = np.empty((ROWS, COLUMNS), np.float32)
    for r in range(ROWS):
        row, out = ctypes.c_void_p(packed[r].ctypes.data), ctypes.c_void_p(found[r].ctypes.data)
        lib.columns_decode_row(kind.gguf_id, ctypes.byref(side), row, 1, ctypes.c_uint32(r), out)
    expected = kind.decode_rows(packed, kind.read_side(data, ROWS, COLUMNS, "x"), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "column", "code", "bits"),
    [  # (byte, value) of a block in which one column has a code that is not 0
        ("cq4", 0, 13, {0: 13}),
        ("cq4", 4 + 3, 13, {3: 13 << 4}),
        ("cq4", 8 * 2 + 4 + 1, 13, {4 * 2 + 1: 13 << 4}),
        ("cq2", 16 + 4 * 3 + 2, 2, {4 + 2: 2 << 6}),
        ("cq3", 16 + 4 * 3 + 2, 6, {4 + 2: 2 << 6, 8 + 2: 1 << 4 + 3}),
        ("cq3", 4 * 1 + 3, 4, {8 + 3: 1 << 1}),
    ],
)
def test_the_place_of_a_code(name, column, code, bits):
    codes = np.zeros((1, 32), np.uint8)
    codes[0, column] = code
    packed = types.get(name).pack_codes(codes)[0]
    assert {int(at): int(packed[at]) for at in np.flatnonzero(packed)} == bits


def test_the_place_of_a_section_and_of_an_upper_bit():
    (kind, layout), rng = kind_of("cq3", 1, 1), np.random.default_rng(0)
    side, codes = random_side(kind, layout, rng, 18, 64), np.zeros((18, 64), np.uint8)
    codes[17, 16 + 4 * 2 + 1] = 8
    _, data = kind.pack(codes, side, layout)
    assert data[:20].view("<u4").tolist() == [0x51414C43, 18, 64, 1, 1] and not data[20:32].any()
    order, row, scale, levels = 32, 32 + 128, 32 + 128 + 64, 32 + 128 + 64 + 128
    extra = levels + 32 * 16 + 32 * 8
    start = extra + 2 * 16 * 4
    assert data[order:row].view("<u2").tolist() == side.order.tolist()
    assert data[row : row + 36].tobytes() == side.row.tobytes() and not data[row + 36 : scale].any()
    assert data[scale:levels].tobytes() == side.scale.tobytes()
    assert data[levels : levels + 16].view(np.int8).tolist() == side.levels[0].tolist()
    assert data[levels + 512 : levels + 520].view(np.int8).tolist() == side.levels[32, :8].tolist()
    assert np.flatnonzero(data[extra:start]).tolist() == [64 + 4 * 1 + 1] and data[extra + 69] == 1 << 4 + 2
    assert data[start : start + 76].tobytes() == side.start.tobytes()
    assert len(data) == start + 96 + 32 + 32


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, 1, "not that of a matrix"),
        (4, 9, "not that of a matrix"),
        (12, 200, "do not fit"),
        (18, 200, "do not fit"),
        (16, 255, "bytes where"),
        (32, 7, "not a permutation"),
        (32 + 320 + 1, 0x7C, "not finite"),
        (-192 - 160, 1, "do not rise"),  # the first start
        (-1, 0x7C, "not finite"),
        (-160 - 31, 200, "not there"),
        (None, None, "no side tensor"),
    ],
)
def test_a_damaged_side_tensor_is_refused_by_name(at, value, words):
    (kind, layout), rng = kind_of("cq2", 2, 80), np.random.default_rng(1)
    _, data = kind.pack(np.zeros((ROWS, COLUMNS), np.uint8), random_side(kind, layout, rng), layout)
    data = data.copy() if at is not None else data[:7]
    if at is not None:
        data[at] = value
    with pytest.raises(InputError, match=f"blk.0.x.columns.*{words}"):
        types.get("cq2").read_side(data, ROWS, COLUMNS, "blk.0.x.columns")


def best_of_all(values, weights, k):
    """The least weighted squared error of k clusters, by dynamic programming over all cuts."""
    order = np.argsort(values)
    x, w = values[order].astype(np.float64), weights[order]
    mass, first, second = (np.concatenate([[0], np.cumsum(w * x**power)]) for power in range(3))
    best = np.full(len(x) + 1, np.inf)
    best[0] = 0
    for _ in range(k):
        total = np.full((len(x) + 1,) * 2, np.inf)
        for end in range(1, len(x) + 1):
            inside = np.maximum(mass[end] - mass[:end], 1e-30)
            total[end, :end] = best[:end] + second[end] - second[:end] - (first[end] - first[:end]) ** 2 / inside
        best = total.min(1)
    return best[-1]


@pytest.mark.parametrize("k", [4, 8, 16])
@pytest.mark.parametrize("case", ["normal", "heavy tails", "outliers", "few values"])
def test_clusters_are_nearly_the_best_ones(case, k):
    rng = np.random.default_rng(k)
    values = rng.standard_t(3, 300) if case == "heavy tails" else rng.normal(size=300)
    if case == "outliers":
        values[:5] *= 20
    if case == "few values":
        values = values.round(1)
    values, weights = values.astype(np.float32), rng.random(300)
    centres = kmeans(values, weights, k)
    assert (np.diff(centres) >= 0).all()
    error = (weights * np.square(values[:, None] - centres).min(1)).sum()
    assert best_of_all(values, weights, k) * (1 - 1e-6) <= error <= best_of_all(values, weights, k) * 1.02


def test_clusters_of_less_than_there_are():
    assert set(kmeans(np.float32([3, 3, 1]), np.ones(3), 4)) == {1, 3}
    assert not kmeans(np.zeros(5, np.float32), np.zeros(5), 4).any()
    moved = kmeans(np.float32([0, 1, 10, 11]), np.ones(4), 2, np.array([0.0, 4.0]), rounds=3)
    assert moved.tolist() == [0.5, 10.5]


@pytest.mark.parametrize("metric", ["hessian", "outlier"])
@pytest.mark.parametrize(("name", "wide", "outliers"), [("cq4", 0, 0), ("cq3", 1, 0), ("cq2", 0, 90), ("cq2", 1, 90)])
def test_every_stage_lowers_the_output_error_and_the_bytes_are_what_it_reports(name, wide, outliers, metric):
    weight, hessian = problem(64, 128)
    weight[5] = 0
    weight[:, 9] *= 30  # more than 13 times the mean
    kind, layout = types.get(name), columns.Layout(wide, outliers, metric)
    result = coder.solve(weight, hessian, kind, layout)
    assert result.errors["feedback"] < 0.8 * result.errors["nearest"]
    assert result.errors["polish"] < 0.97 * result.errors["feedback"]
    side = kind.read_side(result.side, 64, 128, "x")
    np.testing.assert_array_equal(kind.decode_rows(result.packed.numpy(), side, 0), result.weight.numpy())
    difference = (weight - result.weight).double()
    h = solver.damped(hessian, result.damping, weight.double().square().mean(0).sqrt())
    expected = float(((difference @ h) * difference).sum()) / len(weight)
    assert result.errors["polish"] == pytest.approx(expected, rel=1e-3)
    assert (side.upper.shape[1], len(side.value)) == (wide, outliers) and not result.weight[5].any()
    if wide:
        assert 9 in side.order[:32]
    again = coder.solve(weight, hessian, kind, layout)
    assert torch.equal(again.packed, result.packed) and np.array_equal(again.side, result.side)


def test_more_bits_go_to_the_columns_that_need_them():
    weight, hessian = problem(128, 128)
    errors = {w: coder.solve(weight, hessian, *kind_of("cq2", w)).errors["polish"] for w in range(5)}
    assert all(errors[w + 1] < 0.9 * errors[w] for w in range(4))
    kept = coder.solve(weight, hessian, *kind_of("cq2", 0, 400)).errors["polish"]
    assert kept < 0.95 * errors[0]


def test_columns_of_very_different_sizes_cost_nothing():
    """Where inputs have outlier channels and the weights are small there; blocks of 32 columns lose most of them."""
    weight, hessian = problem(128, 128)
    size = torch.ones(128)
    size[::25] = 40
    plain = coder.solve(weight, hessian, *kind_of("cq3")).errors["polish"]
    scaled = coder.solve(weight / size, hessian * size * size[:, None], *kind_of("cq3")).errors["polish"]
    assert scaled == pytest.approx(plain, rel=0.05)


def without_data(weight, kind, layout, importance=None):
    """What the type makes of a matrix, and its side tensor."""
    packed, data = families.code(weight, kind, layout, importance)
    side = kind.read_side(data, *weight.shape, "x")
    return torch.from_numpy(kind.decode_rows(packed, side, 0)), side


def test_without_a_hessian_importance_only_orders_the_columns():
    weight, _ = problem(128, 128)
    plain, _ = without_data(weight, *kind_of("cq3"))
    importance = torch.ones(128)
    importance[96:] = 100
    _, side = without_data(weight, *kind_of("cq3", 1), importance)
    assert side.order.tolist() == [*range(96, 128), *range(96)]
    assert not without_data(0 * weight, *kind_of("cq2", 1, 5))[0].any()
    kind = types.get("cq3")
    packed, data = free.with_codebooks(weight, kind, passes=0)
    once = kind.decode_rows(packed, kind.read_side(data, 128, 128, "x"), 0)
    assert (weight - plain).square().sum() < 0.99 * (weight - once).square().sum()


@pytest.mark.parametrize("metric", ["hessian", "outlier"])
@pytest.mark.parametrize(("name", "wide", "outliers"), [("cq3", 0, 0), ("cq2", 1, 90), ("cq4", 0, 900)])
def test_slices_change_nothing(monkeypatch, name, wide, outliers, metric):
    weight, _ = problem(150, 128)
    weight[5] = 0
    weight[:, 9] *= 30
    weight, kind, layout = weight.half(), types.get(name), columns.Layout(wide, outliers, metric)
    packed, side = families.code(weight.float(), kind, layout, torch.arange(128).float())
    monkeypatch.setattr(free, "PIECE", 1700)
    for again in (
        families.code(weight, kind, layout, torch.arange(128).float()),
        families.code(weight.float(), kind, layout, torch.arange(128)),
    ):
        np.testing.assert_array_equal(again[0], packed)
        np.testing.assert_array_equal(again[1], side)
    decoded = kind.decode_rows(packed, kind.read_side(side, 150, 128, "x"), 0)
    assert not decoded[5].any() and decoded[:, 9] == pytest.approx(weight[:, 9].float().numpy(), rel=0.5, abs=0.5)


def test_outliers_are_the_weights_of_the_largest_cost():
    rng = np.random.default_rng(0)
    cost = rng.integers(0, 60, (7, 90)).astype(np.float32)
    cost[4:] = 3
    for count in (1, 50, 300, 600):
        least = np.sort(cost, None)[-count]
        expected = (cost > least).sum(1)
        for column, _ in np.argwhere(cost == least)[: count - expected.sum()]:
            expected[column] += 1
        for parts in ([cost], [cost[:3], cost[3:4], cost[4:]]):
            assert coder.counts(parts, count).tolist() == expected.tolist()


LLAMA = crafted.llama_tensors(256, 512, blocks=2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return crafted.write_gguf(tmp_path_factory.mktemp("claq") / "tiny-f16.gguf", LLAMA)


@pytest.mark.parametrize("name", ["cq2.9", "cq3.8"])
def test_the_size_asked_for_is_the_size_stored(llama, tmp_path, name):
    out = convert.convert(llama, name, tmp_path / "out.gguf", threads=1)
    assert inspection.linear_bpw(out) == pytest.approx(float(name[2:]), abs=0.01)
    shown = inspection.inspect(out)
    assert shown["bpw"] == pytest.approx(8 * sum(row["bytes"] for row in shown["types"]) / shown["weights"])
    with gguf_file.read(llama) as file:
        planned = plan.make(file.tensors, name)
    linear = [e for e in planned if plan.is_linear(e.tensor)]
    assert plan.bpw(linear) == pytest.approx(inspection.linear_bpw(out))
    assert any(e.layout.wide for e in linear) and any(e.layout.outliers for e in linear)


def test_a_conversion_and_back(llama, tmp_path):
    report = tmp_path / "report.json"
    out = convert.convert(llama, "cq3", tmp_path / "out.gguf", tensor_type=["attn_v=cq4"], report=report, threads=2)
    _, stored = crafted.read_gguf(out)
    assert list(stored)[:4] == ["token_embd.weight", "output_norm.weight", "output.weight", "blk.0.attn_norm.weight"]
    assert stored["blk.0.attn_v.weight"][0] == "SPLITQ_CQ4" and stored["blk.0.attn_v.columns"][0] == "I8"
    rows = {row["name"]: row for row in json.loads(report.read_text())["tensors"]}
    _, back = crafted.read_gguf(dequantize(out, tmp_path / "back.gguf", threads=1))
    assert list(back) == list(LLAMA)
    for name, weight in LLAMA.items():
        if ".attn_" in name and "norm" not in name:
            found = back[name][1].astype(np.float32)
            noise = 10 * np.log10(np.square(weight).sum() / np.square(found - weight).sum())
            assert noise == pytest.approx(rows[name]["sqnr_db"], abs=0.05)
            assert noise > (20 if "attn_v" in name else 14.5)
            assert rows[name]["bytes"] == gguf_bytes(out, name)
    again = convert.convert(llama, "cq3", tmp_path / "again.gguf", tensor_type=["attn_v=cq4"], threads=1)
    assert again.read_bytes() == out.read_bytes()


def gguf_bytes(path, name):
    """Of a weight and its side tensor."""
    with gguf_file.read(path) as file:
        return sum(t.n_bytes for t in file.tensors if t.name in (name, columns.side_name(name)))


def test_experts_have_codebooks_each(tmp_path):
    tensors = crafted.llama_tensors(128, 128, blocks=1, experts=3)
    source = crafted.write_gguf(tmp_path / "moe.gguf", tensors)
    out = convert.convert(source, "cq2.9", tmp_path / "out.gguf", threads=1)
    _, stored = crafted.read_gguf(out)
    assert stored["blk.0.ffn_up_exps.columns"][1].shape[0] == 3
    check_experts(out, tensors, tmp_path)


def check_experts(out, tensors, folder):
    """That each expert of a file comes back nearly as it was."""
    _, back = crafted.read_gguf(dequantize(out, folder / "back.gguf", threads=1))
    for name in ("blk.0.ffn_up_exps.weight", "blk.0.ffn_down_exps.weight"):
        error = np.square(back[name][1] - tensors[name]).sum((1, 2)) / np.square(tensors[name]).sum((1, 2))
        assert (error < 0.1).all()


def entry_of(type, name, *shape):
    """The plan's entry for one tensor."""
    return plan.make([gguf_file.Tensor(name, shape, 1, 0, 2 * int(np.prod(shape)), None)], type)[0]


def test_tensors_that_cannot_have_the_type_get_another():
    entry = functools.partial(entry_of, "cq3")
    assert entry("blk.0.attn_q.weight", 128, 64).target_name == "cq3"
    few = entry("blk.0.attn_q.weight", 127, 64)
    assert few.target_name == "sq3" and "127 rows are too few" in few.fallback
    odd = entry("blk.0.attn_q.weight", 256, 33)
    assert odd.target_name == "f16" and "not a multiple of 32: cq3 -> f16" in odd.fallback
    assert entry("blk.0.attn_k_b.weight", 8, 128, 64).target_name == "sq3"
    assert entry("blk.0.ffn_up_exps.weight", 8, 128, 64).target_name == "cq3"
    assert entry("blk.0.attn_output_a.weight", 128, 64).target_name == "sq3"
    looked_up = entry("blk.0.attn_compressor_ape.weight", 128, 512)
    assert looked_up.target_name == "sq3" and "looks rows up in it: cq3 -> sq3" in looked_up.fallback
    assert entry("token_embd.weight", 128, 64).target_name == "q8_0"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"type": "cq2.1"}, "cq2.1 cannot be met: .* take 2.2"),
        ({"type": "cq4.5"}, "'cq4.5' is not known"),
        ({"type": "cq2.0"}, "'cq2.0' is not known"),
        ({"type": "sq4", "token_embedding_type": "cq3"}, "linear layers only.*token_embd"),
        ({"type": "sq4", "tensor_type": ["output=cq3"]}, "linear layers only.*output.weight"),
    ],
)
def test_types_that_cannot_be_are_refused(llama, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        convert.convert(llama, outfile=tmp_path / "out.gguf", dry_run=True, **options)


def test_a_file_without_its_side_tensor_is_refused_by_name(llama, tmp_path):
    out = convert.convert(llama, "cq3", tmp_path / "out.gguf", threads=1)
    data = out.read_bytes()
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data.replace(b"blk.1.ffn_up.columns", b"blk.1.ffn_up.colunns"))
    with pytest.raises(InputError, match="'blk.1.ffn_up.weight'.*columns' is missing"):
        dequantize(bad, tmp_path / "back.gguf")
    assert not (tmp_path / "back.gguf").exists()
    flat = tmp_path / "flat.gguf"
    flat.write_bytes(gguf_file.header({}, [("x.weight", (32,), 106), ("x.columns", (32,), 24)]) + b"\0" * 64)
    with pytest.raises(InputError, match="'x.weight'.*'x.columns' is missing, or of a wrong type or shape"):
        dequantize(flat, tmp_path / "back.gguf")


def test_a_tensor_that_only_has_the_name_of_a_side_tensor_is_kept(tmp_path):
    path = crafted.write_gguf(tmp_path / "in.gguf", {"a.columns": crafted.weights(32, 32)})
    assert inspection.inspect(path)["weights"] == 1024
    assert "a.columns" in crafted.read_gguf(dequantize(path, tmp_path / "out.gguf"))[1]


def test_calibration_lowers_the_error_and_norms_are_tuned_beside_codebooks(tmp_path):
    report, text = tmp_path / "report.json", str(crafted.DEMO / "calib.txt")
    options = {"calib": text, "calib_tokens": 2048, "report": report, "tune": "scales", "tune_steps": 2}
    convert.convert(wide_llama(tmp_path), "cq2.9", tmp_path / "out.gguf", threads=1, **options)
    calibration = json.loads(report.read_text())["calibration"]
    assert 0 < calibration["tuned"]["after"] <= calibration["tuned"]["before"]
    assert calibration["left"] == [] and len(calibration["errors"]) == 7
    assert all(e["polish"] < e["feedback"] < e["nearest"] for e in calibration["errors"].values())


def wide_llama(folder, layers=1):
    """A random Llama whose matrices have rows enough, with the demo's vocabulary."""
    import shutil

    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    for name in crafted.TOKENIZER:
        shutil.copy(crafted.DEMO / name, folder / "model")
    return folder / "model"
