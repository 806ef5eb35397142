# SPDX-License-Identifier: MIT
"""Products of weights that have a side tensor on every instruction set, and side tensors that must not be loaded."""

import re
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import crafted
import numpy as np
import pytest
from test_kernels import bfloat16, by_tiles, check_products, driver, has_products, run  # noqa: F401

from gguf_splitq import types
from gguf_splitq.files import gguf_file
from gguf_splitq.types.columns import Layout, Side
from gguf_splitq.types.splitquant import SCALES, codebooks

TYPES = {"cq4": 105, "cq3": 106, "cq2": 107, "sq2c": 108, "sq3c": 109}  # ggml_type
WINDOWS = {"sq4wc": 113, "sq3wc": 114, "sq2wc": 115, "sq3wo": 118, "sq2wo": 119}
TYPES |= WINDOWS
GRIDS = {"sq3wo": [(60, 2), (65, 1), (40, 4)], "sq2wo": [(60, 4), (65, 1), (68, 2)]}  # base and step of block scales


class Matrix:
    """A random matrix: `weights` and `side` as stored, and `dense`, what they stand for, float64 [rows, columns].

    As many wide blocks and outliers as asked for, if the type can have them.
    """

    def __init__(self, name: str, columns: int, rows: int, wide: int, outliers: int, rng, scale=0.01):
        own, windows = name.startswith("cq"), name in WINDOWS  # codebooks; levels that neighbours share
        kind = types.get(name)
        layout = Layout(int(wide) * (kind.wide_bits > kind.code_bits), int(outliers) * own)
        bits = kind.bits(columns, layout)
        codes = (rng.integers(0, 16, (rows, columns)) % (1 << bits)).astype(np.uint8)
        self.order = rng.permutation(columns) if layout.wide else np.arange(columns)
        self.scale = (scale * rng.exponential(1, columns)).astype("<f2")
        start = np.sort(rng.integers(0, layout.outliers + 1, rows + 1)).astype("<u4")
        start[0], start[-1] = 0, layout.outliers
        column = np.concatenate([np.sort(rng.choice(columns, n, False)) for n in np.diff(start)])
        value = rng.normal(0, 1, layout.outliers).astype("<f2")
        side = Side(self.order, self.scale)
        d = None
        if windows:
            stored = rng.integers(0, 256, (rows, kind.row_bytes(columns)), dtype=np.uint8)
            plain = kind.plain
            if name in GRIDS:
                base, step = GRIDS[name][rng.integers(3)]
                plain = replace(plain, base=base, step=step)
            else:
                stored.reshape(rows, -1, kind.block_bytes)[..., -1] &= 0xDF
            self.weights, self.side = stored.tobytes(), kind.side_of(rows, self.scale, plain).tobytes()
            self.levels, self.added = plain.decode_numpy(stored).astype(np.float64), np.zeros((rows, columns))
            self.dense = self.levels * self.scale.astype(np.float64)
            return
        if own:
            row = rng.uniform(0.5, 2, rows).astype("<f2")
            levels = np.stack([np.resize(np.sort(rng.integers(-127, 128, 1 << n)), 16) for n in bits])
            side = replace(side, row=row, levels=levels, start=start, column=column, value=value)
            factor = row[:, None]
        else:
            levels = np.stack([np.resize(codebooks()[f"sq{n}"].levels, 16) for n in bits])
            d = rng.integers(0, 256, (rows, columns // 32), dtype=np.uint8) & 0xDF  # no more than a few exponents
            factor = SCALES[d].repeat(32, 1)
        self.weights, self.side = (part.tobytes() for part in kind.pack(codes, side, layout, d))

        self.levels = factor.astype(np.float64) * levels[np.arange(columns), codes]
        self.added = np.zeros((rows, columns))
        self.added[np.repeat(np.arange(rows), np.diff(start)), column.astype(int)] = value
        self.dense = np.empty((rows, columns))
        self.dense[:, self.order] = self.levels * self.scale.astype(np.float64) + self.added

    def product(self, x: np.ndarray, tiles: bool = False) -> np.ndarray:
        """float64 [..., rows] of float32 [..., columns] as the kernels round it: 8 bits for 32 stored columns.

        tiles: as AMX tiles do, weights without their outliers and then with them.
        """
        x = x[..., self.order]
        if tiles:
            weights = bfloat16(self.levels * self.scale.astype(np.float64))
            return bfloat16(x) @ bfloat16(weights + self.added).T
        blocks = (x * self.scale.astype(np.float32)).reshape(-1, 32)
        largest = np.abs(blocks).max(1, keepdims=True)
        inverse = np.divide(127, largest, where=largest > 0, out=np.zeros_like(largest), dtype=np.float32)
        rounded = np.rint(blocks * inverse) * (largest / np.float32(127)).astype(np.float64)
        return rounded.reshape(x.shape) @ self.levels.T + x.astype(np.float64) @ self.added.T


def sides(matrices: list[Matrix]) -> tuple[int, bytes]:
    """Bytes of the side tensor of each matrix, filled up to the longest; all of them."""
    size = max(len(m.side) for m in matrices)
    return size, b"".join(m.side.ljust(size, b"\0") for m in matrices)


def activations(shape: tuple, rng) -> np.ndarray:
    x = (rng.normal(0, 1, shape) * np.where(rng.random(shape) < 0.01, 20, 1)).astype(np.float32)
    x.reshape(-1, 32)[1:2] = 0
    return x


def multiply(driver, command, name, columns, rows, *sizes, data, side, last=(), threads=(3,), reference=0):  # noqa: F811
    """The driver's products, which must not depend on the number of threads."""
    results = [
        run(driver, command, TYPES[name], columns, rows, *sizes, n, *last, side[0], reference, data=data + side[1])
        for n in threads
    ]
    assert all(result == results[0] for result in results)
    return np.frombuffer(results[0], np.float32)


def check(got: np.ndarray, exact: np.ndarray, full: np.ndarray, kernels: bool) -> None:
    """`exact`: as a kernel rounds activations, `full`: without rounding, which is what the reference computes."""
    check_products(got, exact if kernels else full, full)


# blocks, rows, tokens, wide blocks, outliers
PRODUCTS = [
    (1, 1, 1, 0, 0), (18, 150, 1, 3, 300), (33, 70, 2, 5, 0), (16, 33, 4, 16, 500), (18, 37, 17, 7, 200),
    (40, 130, 33, 3, 900), (7, 19, 600, 2, 60), (20, 33, 3, 1, 3500),
]  # fmt: skip
# The kernels of closed windows are those of types without a side tensor: what is new is how activations are packed.
CASES = dict.fromkeys(TYPES, PRODUCTS) | dict.fromkeys(WINDOWS, PRODUCTS[1:6:2]) | dict.fromkeys(GRIDS, PRODUCTS[1:])
ALL_PRODUCTS = [(name, *case) for name in TYPES for case in CASES[name]]


@pytest.mark.parametrize("interleaved", [0, 1], ids=["as stored", "interleaved"])
@pytest.mark.parametrize("name, blocks, rows, tokens, wide, outliers", ALL_PRODUCTS)
def test_matrix_products(driver, has_products, name, blocks, rows, tokens, wide, outliers, interleaved):  # noqa: F811
    rng = np.random.default_rng(rows + tokens)
    rows = -(-rows // 16) * 16 if interleaved else rows
    matrix = Matrix(name, 32 * blocks, rows, wide, outliers, rng)
    x = activations((tokens, 32 * blocks), rng)
    data = matrix.weights + x.tobytes()
    sizes = (32 * blocks, rows, 1, tokens, 1, interleaved)
    if interleaved and not has_products:
        assert multiply(driver, "mul", name, *sizes, data=data, side=sides([matrix])).size == 0
        return
    threads = (1, 2, 3, 4) if blocks in (18, 40) else (1,)
    got = multiply(driver, "mul", name, *sizes, data=data, side=sides([matrix]), threads=threads)
    full = x @ matrix.dense.T
    tiles = by_tiles(driver, tokens)
    if tiles:
        assert np.square(got.reshape(full.shape) - full).sum() < 0.2 * np.square(matrix.product(x) - full).sum()
    check(got, matrix.product(x, tiles), full, has_products)
    if has_products:
        got = multiply(driver, "mul", name, *sizes, data=data, side=sides([matrix]), reference=1)
        check(got, full, full, False)


@pytest.mark.parametrize("interleaved", [0, 1], ids=["as stored", "interleaved"])
@pytest.mark.parametrize("shared", [0, 1], ids=["a row for each expert", "one row for all"])
@pytest.mark.parametrize("tokens, used, experts", [(1, 2, 8), (40, 2, 5)])
@pytest.mark.parametrize("name", TYPES)
def test_experts(driver, has_products, name, tokens, used, experts, shared, interleaved):  # noqa: F811
    """Each expert has a side tensor of its own, and as many wide blocks and outliers as it likes."""
    if interleaved and not has_products:
        return
    rng = np.random.default_rng(tokens)
    columns, rows = 160, 48 if interleaved else 35
    wide = rng.integers(0, 4, experts)
    matrices = [Matrix(name, columns, rows, w, rng.integers(0, 90), rng) for w in wide]
    x = activations((tokens, 1 if shared else used, columns), rng)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :used].astype(np.int32)
    data = b"".join(m.weights for m in matrices) + x.tobytes() + ids.tobytes()
    sizes = (columns, rows, experts, tokens, used, interleaved)
    pairs = [(matrices[ids[t, u]], x[t, 0 if shared else u]) for t in range(tokens) for u in range(used)]
    tiles = by_tiles(driver, np.bincount(ids.ravel(), minlength=experts)[ids.ravel()])
    exact = np.stack([m.product(v[None], tiled)[0] for (m, v), tiled in zip(pairs, tiles, strict=True)])
    full = np.stack([v @ m.dense.T for m, v in pairs])
    got = multiply(driver, "mul_id", name, *sizes, data=data, side=sides(matrices), last=[shared], threads=(1, 4))
    check(got, exact, full, has_products)
    if has_products:
        got = multiply(driver, "mul_id", name, *sizes, data=data, side=sides(matrices), last=[shared], reference=1)
        check(got, full, full, False)


@pytest.mark.parametrize("name", ["cq2", "sq2c", "sq2wc", "sq2wo"])
def test_scales_too_small_for_a_half_do_not_vanish(driver, has_products, name):  # noqa: F811
    rng = np.random.default_rng(0)
    matrix = Matrix(name, 64, 16, 0, 0, rng, scale=1e-6)
    x = 1e-3 * activations((2, 64), rng)
    got = multiply(driver, "mul", name, 64, 16, 1, 2, 1, 0, data=matrix.weights + x.tobytes(), side=sides([matrix]))
    check(got, matrix.product(x), x @ matrix.dense.T, has_products)


def write_model(path: Path, kv: dict, tensors: dict[str, tuple]) -> Path:
    """A GGUF of `tensors`, name -> (shape, ggml_type, bytes), and `kv` as gguf_file reads it."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(kv))
    for key, value in kv.items():
        head += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", value.type) + value.raw
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        head += struct.pack("<Q", len(name)) + name.encode()
        head += struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, len(data))
        data += raw.ljust(-(-len(raw) // 32) * 32, b"\0")
    path.write_bytes(head.ljust(-(-len(head) // 32) * 32, b"\0") + data)
    return path


@pytest.fixture(scope="module", params=["dense", "experts"])
def model(request, demo_f16):
    """(metadata, tensors with side tensors, the same tensors decoded) of a small Llama with random linear layers."""
    rng = np.random.default_rng(0)
    coded, plain = {}, {}
    with gguf_file.read(demo_f16) as file:
        kv = dict(file.kv)
        experts = 4 if request.param == "experts" else 0
        if experts:
            kv |= {f"llama.expert_{key}": gguf_file.Value.of(experts) for key in ("count", "used_count")}
        names = iter(list(TYPES) * 100)
        for tensor in file.tensors:
            raw = file.read_rows(tensor, 0, tensor.n_rows).tobytes()
            if not re.search(r"(attn|ffn)_[a-z]+\.weight", tensor.name) or len(tensor.shape) < 2:
                coded[tensor.name] = plain[tensor.name] = (tensor.shape, tensor.type_id, raw)
                continue
            stack = experts if "ffn" in tensor.name else 0
            kind = next(names)
            if re.search("ffn_(gate|up)", tensor.name):  # one type for both, as they are computed in one pass
                kind = list(TYPES)[-1 - int(tensor.name.split(".")[1])]
            scale = 0.0005 if kind.startswith("cq") else 0.01
            matrices = [Matrix(kind, tensor.n_cols, tensor.n_rows, 1, i, rng, scale) for i in range(stack or 1)]
            name = tensor.name.replace(".weight", "_exps.weight") if stack else tensor.name
            shape = (stack, *tensor.shape) if stack else tensor.shape
            size, side = sides(matrices)
            coded[name] = (shape, TYPES[kind], b"".join(m.weights for m in matrices))
            coded[name.replace("weight", "columns")] = ((stack, size) if stack else (size,), 24, side)
            plain[name] = (shape, 1, np.stack([m.dense for m in matrices]).astype("<f2").tobytes())
            if "ffn_up" in name and stack:
                router = tensor.name.replace("ffn_up", "ffn_gate_inp")
                gate = rng.normal(0, 1, (stack, tensor.n_cols)).astype("<f4")
                coded[router] = plain[router] = (gate.shape, 0, gate.tobytes())
    return kv, coded, plain


def perplexity(programs: Path, model: Path, *options) -> tuple[int, str]:
    command = [programs / "llama-perplexity", "-m", model, "-f", crafted.DEMO / "eval.txt"]
    command += ["-c", "128", "--chunks", "2", "-t", "2", *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def perplexity_of(output: str) -> float:
    return float(re.search(r"Final estimate: PPL = ([\d.]+)", output)[1])


@pytest.mark.parametrize(
    "options", [[], ["--no-repack"], ["--load-mode", "none"], ["-b", "1", "-t", "1"]], ids=" ".join
)
def test_a_model_with_side_tensors_is_the_model_they_stand_for(model, runtime_programs, tmp_path, options):
    kv, coded, plain = model
    found = []
    for name, tensors in ("coded", coded), ("plain", plain):
        code, output = perplexity(runtime_programs, write_model(tmp_path / f"{name}.gguf", kv, tensors), *options)
        assert code == 0, output[-3000:]
        found.append(np.log(perplexity_of(output)))
    assert found[0] == pytest.approx(found[1], rel=4e-3)  # the plain one does not round activations


WEIGHT, SIDE = "blk.0.attn_q.weight", "blk.0.attn_q.columns"
COLUMNS, ROWS, OUTLIERS = 256, 256, 50
ORDER, ROW, SCALE, START = 32, 544, 1056, 1568 + 32 * 16 + 224 * 4 + 16 * 2 * 64  # where they are, with 1 wide block
COLUMN, VALUE = START + 1056, START + 1056 + 128
SQ2C_SCALE = ROW  # there is no row


def put(at: int, fmt: str, value: int):
    return lambda side: side[:at] + struct.pack(fmt, value) + side[at + struct.calcsize(fmt) :]


HOSTILE = {
    "another magic": (put(0, "<I", 1), "header"),
    "a reserved word": (put(28, "<I", 1), "header"),
    "rows": (put(4, "<I", ROWS + 1), "shape"),
    "columns": (put(8, "<I", 1 << 31), "shape"),
    "wide blocks": (put(12, "<I", 9), "wide"),
    "all sizes at once": (put(16, "<I", 0xFFFFFFFF), "too small"),
    "cut off": (lambda side: side[:-32], "too small"),
    "a header alone": (lambda side: side[:32], "too small"),
    "order twice": (lambda side: side[:ORDER] + side[ORDER + 2 : ORDER + 4] + side[ORDER + 2 :], "permutation"),
    "order too large": (put(ORDER, "<H", COLUMNS), "permutation"),
    "infinite row": (put(ROW, "<H", 0x7C00), "finite"),
    "scale not a number": (put(SCALE + 2 * COLUMNS - 2, "<H", 0xFFFF), "finite"),
    "infinite outlier": (put(VALUE, "<H", 0xFC00), "finite"),
    "first row": (put(START, "<I", 1), "share out"),
    "falling rows": (put(START + 4 * 20, "<I", OUTLIERS + 1), "share out"),
    "outlier outside": (put(COLUMN, "<H", COLUMNS), "does not exist"),
}  # fmt: skip
HOSTILE_SQ2C = {
    "another magic": (put(0, "<I", 1), "header"),
    "rows": (put(4, "<I", ROWS + 1), "shape"),
    "wide blocks": (put(12, "<I", 9), "wide"),
    "outliers": (put(16, "<I", 1), "has outliers"),
    "more wide blocks than bytes": (put(12, "<I", 2), "too small"),
    "cut off": (lambda side: side[:-32], "too small"),
    "order twice": (lambda side: side[:ORDER] + side[ORDER + 2 : ORDER + 4] + side[ORDER + 2 :], "permutation"),
    "scale not a number": (put(SQ2C_SCALE + 2 * COLUMNS - 2, "<H", 0xFFFF), "finite"),
}  # fmt: skip
ALL_HOSTILE = [pytest.param("cq2", *case, id=f"cq2 {name}") for name, case in HOSTILE.items()]
ALL_HOSTILE += [pytest.param("sq2c", *case, id=f"sq2c {name}") for name, case in HOSTILE_SQ2C.items()]
ALL_HOSTILE += [pytest.param("sq2wc", put(12, "<I", 1), "wide", id="sq2wc wide blocks")]
ALL_HOSTILE += [pytest.param("sq2wc", put(20, "<I", 1), "header", id="sq2wc base")]
ALL_HOSTILE += [pytest.param("sq2wo", put(20, "<I", base), "header", id=f"sq2wo base {base}") for base in (0, 126)]
ALL_HOSTILE += [pytest.param("sq2wo", put(24, "<I", step), "header", id=f"sq2wo step {step}") for step in (0, 3, 8)]


@pytest.fixture(scope="module")
def matrices():
    return {
        name: Matrix(name, COLUMNS, ROWS, 1, OUTLIERS, np.random.default_rng(0))
        for name in ("cq2", "sq2c", "sq2wc", "sq2wo")
    }


@pytest.fixture
def matrix(matrices):
    return matrices["cq2"]


@pytest.fixture
def loads(demo_f16, runtime_programs, tmp_path, matrices):
    """Function: exit code and output of a program that loads the demo with these bytes for a side tensor."""

    def load(side: bytes | None, shape=None, kind=24, name=SIDE, of="cq2", options=()):
        tensors = {}
        with gguf_file.read(demo_f16) as file:
            for t in file.tensors:
                tensors[t.name] = (t.shape, t.type_id, file.read_rows(t, 0, t.n_rows).tobytes())
            tensors[WEIGHT] = ((ROWS, COLUMNS), TYPES[of], matrices[of].weights)
            if side is not None:
                tensors[name] = (shape or (len(side),), kind, side)
            path = write_model(tmp_path / "hostile.gguf", file.kv, tensors)
        return perplexity(runtime_programs, path, *options)

    return load


def refused(result: tuple[int, str], *words: str) -> None:
    code, output = result
    assert code == 1, output[-2000:]
    assert any(all(word in line for word in words) for line in output.splitlines()), output[-2000:]


@pytest.mark.parametrize("options", [[], ["--load-mode", "none"]], ids=["mapped", "read"])
@pytest.mark.parametrize("of, change, word", ALL_HOSTILE)
def test_side_tensors_that_do_not_fit_are_refused(loads, matrices, of, change, word, options):
    refused(loads(change(matrices[of].side), of=of, options=options), SIDE, word)


def test_side_tensors_of_the_wrong_type_or_shape_are_refused(loads, matrix):
    side = matrix.side
    assert loads(side)[0] == 0
    refused(loads(None), WEIGHT, SIDE, "missing")
    refused(loads(side, kind=26, shape=(len(side) // 4,)), SIDE, "wrong type or shape")
    refused(loads(side + side, shape=(2, len(side))), SIDE, "wrong type or shape")
    refused(loads(side + bytes(1)), SIDE, "wrong type or shape")


def test_side_tensors_without_a_weight_that_has_them_are_refused(loads, matrix):
    refused(loads(matrix.side, name="blk.0.attn_x.columns"), WEIGHT, "missing")


def test_llama_quantize_copies_side_tensors_and_makes_none(loads, matrix, demo_f16, runtime_programs, tmp_path):
    code, output = loads(matrix.side)
    quantize, copy = runtime_programs / "llama-quantize", tmp_path / "copy.gguf"
    subprocess.run([quantize, tmp_path / "hostile.gguf", copy, "COPY"], check=True, capture_output=True)
    assert perplexity_of(output) == perplexity_of(perplexity(runtime_programs, copy)[1])
    command = [quantize, "--tensor-type", "attn_q=cq2", demo_f16, tmp_path / "q.gguf", "Q8_0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "gguf-splitq convert --type cq2" in done.stdout + done.stderr
