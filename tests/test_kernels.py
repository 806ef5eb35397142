# SPDX-License-Identifier: MIT
"""Every instruction set's C code gives the same bits: encoders equal NumPy's bytes, dot products the scalar floats.
Matrix products add in an order of their own and are compared with the exact product of the same numbers.

The C sources of the patch series are built here by themselves (tests/c/driver.c) for each instruction set; on other
machines the Arm ones run under qemu-aarch64. Products that need ggml's allocator or threads are test-splitq's
(patches/files/tests), a whole model's are llama-perplexity's.
"""

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import crafted
import numpy as np
import pytest
from test_solve_windows import exact_block, held_states

from gguf_splitq import types
from gguf_splitq.coding import windows
from gguf_splitq.convert import convert

ARM = platform.machine() in ("aarch64", "arm64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
AMX = [*AVX512, "-mavx512vbmi", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
AMX_C = str(Path(__file__).parent / "c" / "amx.c")  # tile instructions for processors without them

# x86: flags, and the feature in /proc/cpuinfo that running needs
X86 = {
    "scalar": (["-DSPLITQ_LANES=0"], ""),
    "avx2": ([*AVX2, "-DSPLITQ_LANES=8"], "avx2"),
    "avx-vnni": ([*AVX2, "-mavxvnni"], "avx_vnni"),
    "avx512": (AVX512, "avx512_vnni"),
    "avx512-vbmi": ([*AVX512, "-mavx512vbmi"], "avx512vbmi"),
    "avx512-vbmi2": ([*AVX512, "-mavx512vbmi", "-mavx512vbmi2"], "avx512_vbmi2"),
    "amx": (AMX, "amx_bf16"),
    "amx-emulated": ([*AMX, AMX_C], "avx512_bf16"),
}
# Arm: flags, the feature as Linux and as macOS name it, and a processor for qemu that has nothing more
NEON = {
    "neon": (["-DSPLITQ_LANES=0"], "", "", "cortex-a53"),
    "neon-dotprod": (["-march=armv8.2-a+dotprod"], "asimddp", "FEAT_DotProd", "cortex-a76"),
    "neon-i8mm": (["-march=armv8.2-a+dotprod+i8mm"], "i8mm", "FEAT_I8MM", "max"),
}
TARGETS = [*X86, *NEON]
ROWS = 40
TILES_FROM = 16  # tokens, as in splitq-amx.h


@pytest.fixture(scope="module", params=TARGETS)
def driver(request, patched_tree, tmp_path_factory):
    """Command line of tests/c/driver.c built for one instruction set."""
    return build(request.param, patched_tree, tmp_path_factory.mktemp("driver"))


@pytest.fixture
def has_products(driver) -> bool:
    """Whether the instruction set of `driver` has matrix products; ggml's own path serves the others."""
    return Path(driver[-1]).name not in ("scalar", "neon")


@pytest.fixture(scope="module")
def scalar(patched_tree, tmp_path_factory):
    return build("scalar", patched_tree, tmp_path_factory.mktemp("scalar"))


@pytest.fixture(scope="module")
def unforced(patched_tree, tmp_path_factory):
    """The driver for no instruction set in particular, whose encoders choose for themselves."""
    return compile_driver([], patched_tree, tmp_path_factory.mktemp("unforced") / "driver")


def build(target: str, tree: Path, folder: Path) -> list[str]:
    """The command of the driver for a target; skips what cannot be built or run here."""
    if target in X86:
        if platform.machine() != "x86_64" and target != "scalar":
            pytest.skip("for x86-64")
        flags, feature = X86[target]
        program = compile_driver(flags, tree, folder / target)
        if feature not in features():
            pytest.skip(f"compiles, but this processor has no {feature}")
        if target == "amx-emulated" and X86["amx"][1] in features():
            pytest.skip("this processor has tiles of its own")
        return [str(program)]
    flags, linux, macos, processor = NEON[target]
    if ARM:
        if (macos if sys.platform == "darwin" else linux) not in features():
            pytest.skip(f"this processor has no {target}")
        return [str(compile_driver(flags, tree, folder / target))]
    for tool in ("aarch64-linux-gnu-gcc", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: make cross-tools")
    program = compile_driver(["-static", *flags], tree, folder / target, "aarch64-linux-gnu-gcc")
    return ["qemu-aarch64", "-cpu", processor, str(program)]


@functools.cache
def features() -> str:
    """The names of what this processor can do, in one text."""
    if sys.platform == "darwin":
        listed = subprocess.run(["sysctl", "hw.optional.arm"], capture_output=True, text=True).stdout
        return " ".join(re.findall(r"(FEAT_\w+): 1", listed))
    return Path("/proc/cpuinfo").read_text()


def compile_driver(flags: list[str], tree: Path, program: Path, compiler: str = "cc") -> Path:
    includes = [f"-I{tree / 'ggml' / part}" for part in ("include", "src", "src/ggml-cpu")]
    subprocess.run(
        [compiler, "-std=gnu11", "-O2", "-ffp-contract=off", *flags, *includes,
         str(Path(__file__).parent / "c" / "driver.c"), "-o", str(program), "-lm", "-pthread"],
        check=True,
    )  # fmt: skip
    return program


@pytest.mark.skipif(platform.machine() != "x86_64", reason="for x86-64")
@pytest.mark.parametrize("flags", [["-mavx", "-mf16c"], AVX512[:-1]], ids=["ivybridge", "skylakex"])
def test_sets_between_those_above_compile(patched_tree, tmp_path, flags):
    """GGML_CPU_ALL_VARIANTS builds for processors that have a part of what a kernel needs."""
    compile_driver(flags, patched_tree, tmp_path / "driver")


def run(command: list[str], *args, data: bytes) -> bytes:
    return subprocess.run([*command, *map(str, args)], input=data, stdout=subprocess.PIPE, check=True).stdout


def random_blocks(tensor_type, n_blocks: int, rng) -> np.ndarray:
    blocks = rng.integers(0, 256, (n_blocks, tensor_type.block_bytes), dtype=np.uint8)
    if tensor_type.name == "sq4x":  # finite halves
        blocks[:, 1:12:2] &= 0xBF
    return blocks


def random_q8_0(n_blocks: int, rng) -> np.ndarray:
    blocks = np.empty((n_blocks, 34), np.uint8)
    blocks[:, :2] = rng.normal(0, 0.02, (n_blocks, 1)).astype("<f2").view(np.uint8)
    blocks[:, 2:] = rng.integers(-127, 128, (n_blocks, 32)).astype(np.int8).view(np.uint8)
    return blocks


@pytest.mark.parametrize("blocks", [1, 2, 5, 18], ids="{} blocks".format)
@pytest.mark.parametrize("tensor_type", types.CUSTOM, ids=lambda t: t.name)
def test_dot_products_equal_scalar_bit_for_bit(driver, scalar, tensor_type, blocks):
    rng = np.random.default_rng(blocks)
    columns = blocks * tensor_type.block_size
    x = random_blocks(tensor_type, ROWS * blocks, rng)
    y = random_q8_0(ROWS * columns // 32, rng)
    args = ("dot", tensor_type.gguf_id, columns, ROWS)
    data = x.tobytes() + y.tobytes()
    got = np.frombuffer(run(driver, *args, data=data), np.float32)
    np.testing.assert_array_equal(got, np.frombuffer(run(scalar, *args, data=data), np.float32))

    activations = y[:, :2].copy().view("<f2").astype(np.float64) * y[:, 2:].view(np.int8)
    exact = tensor_type.decode_numpy(x).reshape(ROWS, columns).astype(np.float64)
    terms = exact * activations.reshape(ROWS, columns)
    np.testing.assert_allclose(got, terms.sum(1), rtol=0, atol=1e-5 * np.abs(terms).sum(1).max())


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("tensor_type", types.CUSTOM, ids=lambda t: t.name)
def test_encoders_equal_numpy_byte_for_byte(driver, tensor_type, weighted):
    rng = np.random.default_rng(3)
    rows = (rng.normal(0, 1, (ROWS, 512)) * 2.0 ** rng.integers(-12, 2, (ROWS, 512))).astype(np.float32)
    rows[0], rows[1, 1:] = 0, 0
    importance = rng.exponential(1, 512).astype(np.float32) if weighted else None
    data = rows.tobytes() + (importance.tobytes() if weighted else b"")
    got = run(driver, "encode", tensor_type.gguf_id, 512, ROWS, int(weighted), data=data)
    assert got == tensor_type.encode_numpy(rows, importance).tobytes()


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("qemu-x86_64"), reason="no qemu-x86_64 here")
@pytest.mark.parametrize("processor", ["Nehalem", "SandyBridge", "Haswell"])
@pytest.mark.parametrize("tensor_type", types.CUSTOM, ids=lambda t: t.name)
def test_encoders_use_what_the_processor_has(unforced, tensor_type, processor):
    """They are compiled for several processors at once, and choose when they run."""
    rows = np.random.default_rng(0).normal(0, 1, (4, 512)).astype(np.float32)
    emulated = ["qemu-x86_64", "-cpu", processor, str(unforced)]
    got = run(emulated, "encode", tensor_type.gguf_id, 512, 4, 0, data=rows.tobytes())
    assert got == tensor_type.encode_numpy(rows, None).tobytes()


PRODUCTS = [t for t in types.CUSTOM if t.name in ("sq4", "sq3", "sq2", "sdr4", "sq6w", "sq5w", "sq4w", "sq3w", "sq2w")]


def activations(shape: tuple, rng) -> tuple[np.ndarray, np.ndarray]:
    """Random float32 activations with a block of zeros and some outliers; the same through q8_0, in float64."""
    x = (rng.normal(0, 1, shape) * np.where(rng.random(shape) < 0.01, 20, 1)).astype(np.float32)
    blocks = x.reshape(-1, 32)
    blocks[1:2] = 0
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scale, where=scale > 0, out=np.zeros_like(scale))
    q8 = scale.astype(np.float16).astype(np.float64) * np.rint(blocks * inverse)
    return x, q8.reshape(shape)


def by_tiles(driver, counts) -> np.ndarray:
    """Where so many tokens of one matrix are multiplied by AMX tiles, which round both factors to bfloat16."""
    return (np.asarray(counts) >= TILES_FROM) & Path(driver[-1]).name.startswith("amx")


def bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to 8 significant bits, ties to even; as float64."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32).astype(np.float64)


def multiply(driver, command: str, tensor_type, columns: int, rows: int, *sizes, data: bytes, last=()) -> np.ndarray:
    """The driver's products, which must not depend on the number of threads."""
    results = [
        run(driver, command, tensor_type.gguf_id, columns, rows, *sizes, threads, *last, data=data)
        for threads in (1, 2, 3, 4)
    ]
    assert all(result == results[0] for result in results)
    return np.frombuffer(results[0], np.float32)


def check_products(got: np.ndarray, exact: np.ndarray, full: np.ndarray, usual: float = 0) -> None:
    """`exact`: the product with activations as q8_0, `full`: with the activations themselves.

    usual: the sum of the products' squares that is to be expected, where few of them may be small by chance.
    """
    got = got.reshape(exact.shape)
    assert np.square(got - exact).sum() <= 1e-12 * np.square(exact).sum()
    assert np.square(got - full).sum() < 5e-4 * max(np.square(full).sum(), usual)


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("name", ["sq6w", "sq5w", "sq4w", "sq3w", "sq2w"])
def test_sweeps_of_error_feedback_give_the_same_codes(driver, runtime_library, name, states):
    given = exact_block(name, 29, 6)
    held = held_states(given, 29) if states else None
    trellis = given[5]
    data = b"".join(part.numpy().tobytes() for part in (trellis.levels, *given[:5]))
    data += held.numpy().tobytes() if states else b""
    out = run(driver, "sweep", trellis.bits, 29, 6, windows.CLOSED, int(states), data=data)
    edges, choice = windows.in_c(*given, held)
    assert out == edges.numpy().tobytes() + choice.numpy().astype(np.int64).tobytes()


@pytest.mark.parametrize("interleaved", [0, 1], ids=["as stored", "interleaved"])
@pytest.mark.parametrize("blocks, rows, tokens", [
    (1, 1, 1), (18, 37, 1), (33, 70, 2), (48, 5, 3), (16, 33, 4), (3, 64, 5), (18, 37, 17), (5, 33, 16), (40, 130, 33),
    (7, 19, 600),
])  # fmt: skip
@pytest.mark.parametrize("tensor_type", PRODUCTS, ids=lambda t: t.name)
def test_matrix_products(driver, has_products, tensor_type, blocks, rows, tokens, interleaved):
    rng = np.random.default_rng(rows)
    rows = -(-rows // 16) * 16 if interleaved else rows
    x = random_blocks(tensor_type, rows * blocks, rng)
    y, q8 = activations((tokens, 32 * blocks), rng)
    data = x.tobytes() + y.tobytes()
    got = multiply(driver, "mul", tensor_type, 32 * blocks, rows, 1, tokens, 1, interleaved, data=data)
    assert (got.size > 0) == has_products
    if has_products:
        weights = tensor_type.decode_numpy(x).reshape(rows, -1).astype(np.float64)
        exact, full = q8 @ weights.T, y @ weights.T
        usual = np.square(y.astype(np.float64)) @ np.square(weights.T)
        if by_tiles(driver, tokens):
            assert np.square(got.reshape(full.shape) - full).sum() < 0.2 * np.square(exact - full).sum()
            exact = bfloat16(y) @ bfloat16(weights.T)
        check_products(got, exact, full, usual.sum())


def test_only_whole_panels_are_interleaved(driver):
    sq2 = next(t for t in PRODUCTS if t.name == "sq2")
    data = bytes(33 * sq2.block_bytes) + bytes(32 * 4)
    assert multiply(driver, "mul", sq2, 32, 33, 1, 1, 1, 1, data=data).size == 0


@pytest.mark.parametrize("tokens", [1, 7])
def test_batches_share_a_matrix(driver, has_products, tokens):
    """src0 [2 matrices], src1 [6 batches]: batch b meets matrix b // 3."""
    rng = np.random.default_rng(tokens)
    sq4 = next(t for t in PRODUCTS if t.name == "sq4")
    x = random_blocks(sq4, 2 * 21 * 4, rng)
    y, q8 = activations((6, tokens, 128), rng)
    got = multiply(driver, "mul", sq4, 128, 21, 2, tokens, 3, 0, data=x.tobytes() + y.tobytes())
    if has_products:
        weights = sq4.decode_numpy(x).reshape(2, 21, 128).astype(np.float64).repeat(3, 0).swapaxes(1, 2)
        tiles = by_tiles(driver, 3 * tokens)
        check_products(got, bfloat16(y) @ bfloat16(weights) if tiles else q8 @ weights, y @ weights)


@pytest.mark.parametrize("interleaved", [0, 1], ids=["as stored", "interleaved"])
@pytest.mark.parametrize("shared", [False, True], ids=["a row for each expert", "one row for all"])
@pytest.mark.parametrize("tokens, used, experts", [(1, 2, 8), (5, 3, 4), (40, 2, 5), (64, 1, 200)])
@pytest.mark.parametrize("tensor_type", PRODUCTS, ids=lambda t: t.name)
def test_experts(driver, has_products, tensor_type, tokens, used, experts, shared, interleaved):
    rng = np.random.default_rng(tokens)
    blocks, rows = 5, 48 if interleaved else 35
    x = random_blocks(tensor_type, experts * rows * blocks, rng)
    y, q8 = activations((tokens, 1 if shared else used, 32 * blocks), rng)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :used].astype(np.int32)
    data = x.tobytes() + y.tobytes() + ids.tobytes()
    sizes = (experts, tokens, used, interleaved)
    got = multiply(driver, "mul_id", tensor_type, 32 * blocks, rows, *sizes, data=data, last=[int(shared)])
    if has_products:
        weights = tensor_type.decode_numpy(x).reshape(experts, rows, -1).astype(np.float64)
        exact, tiled, full = (
            (w[ids] @ a[..., None])[..., 0] for w, a in ((weights, q8), (bfloat16(weights), bfloat16(y)), (weights, y))
        )
        tiles = by_tiles(driver, np.bincount(ids.ravel(), minlength=experts)[ids])
        check_products(got, np.where(tiles[..., None], tiled, exact), full)


def perplexity(programs, model, *options, environment=None, threads=2) -> tuple[float, bool]:
    """Of the demo's text; whether weights were interleaved."""
    command = [programs / "llama-perplexity", "-m", model, "-f", crafted.DEMO / "eval.txt", *options]
    command += ["-c", "128", "--chunks", "2", "-t", threads, "--verbose"]
    environment = os.environ | (environment or {})
    output = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, env=environment)
    output = output.stdout + output.stderr
    return float(re.search(r"Final estimate: PPL = ([\d.]+)", output)[1]), "CPU_SPLITQ model buffer" in output


@pytest.mark.parametrize("name", ["sq3", "sdr4", "sq2w"])
def test_interleaved_and_mapped_weights_give_the_same_perplexity(demo_f16, runtime_programs, tmp_path, name):
    model = convert(demo_f16, name, tmp_path / f"{name}.gguf")
    fast, interleaved = perplexity(runtime_programs, model)
    assert interleaved
    assert perplexity(runtime_programs, model, "--no-repack") == (pytest.approx(fast, rel=1e-4), False)


def test_weights_for_activations_of_4_bits_are_not_interleaved(demo_f16, runtime_programs, tmp_path):
    model = convert(demo_f16, "sdr4", tmp_path / "sdr4.gguf")
    found, interleaved = perplexity(runtime_programs, model, environment={"SPLITQ_W4A4": "1"})
    assert not interleaved and found != perplexity(runtime_programs, model)[0]


ONE_BY_ONE = ["-b", "1", "-ub", "1"]
FUSED, SEPARATE = ({"GGML_CPU_DISABLE_FUSION": off} for off in "01")


def test_gate_up_and_their_product_in_one_pass_give_the_same_perplexity(demo_f16, runtime_programs, tmp_path):
    model = convert(demo_f16, "sq4", tmp_path / "sq4.gguf")
    found = [perplexity(runtime_programs, model, *ONE_BY_ONE, environment=e)[0] for e in (FUSED, SEPARATE)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("name", ["sq4", "cq3"])
def test_also_in_a_model_whose_feed_forward_is_narrow(runtime_programs, tmp_path, name):
    """There the allocator puts the product where the activations were."""
    folder = crafted.hf_folder(tmp_path / "narrow", hidden_size=512, intermediate_size=256)
    model = convert(folder, name, tmp_path / "narrow.gguf")
    wanted, _ = perplexity(runtime_programs, model, *ONE_BY_ONE, environment=SEPARATE)
    for threads in (1, 2, 4):
        found, _ = perplexity(runtime_programs, model, *ONE_BY_ONE, environment=FUSED, threads=threads)
        assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("repack", [0, 1], ids=["as stored", "interleaved"])
def test_gate_up_and_their_product_never_depend_on_threads(runtime_programs, repack):
    done = subprocess.run(
        [runtime_programs / "test-splitq", "fused", "20", str(repack)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
