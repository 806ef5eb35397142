"""Every instruction set's C code gives the same bits: encoders equal NumPy's bytes, dot products the scalar floats.

The C sources of the patch series are built here by themselves (tests/c/driver.c) for each instruction set; the Arm
ones run under qemu-aarch64.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gguf_splitq import types

CPU_FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]

# name: compiler, flags, CPU flag it needs (x86) or "qemu"
TARGETS = {
    "scalar": ("gcc", [], ""),
    "avx2": ("gcc", AVX2, "avx2"),
    "avx512": ("gcc", AVX512, "avx512_vnni"),
    "neon": ("aarch64-linux-gnu-gcc", ["-static"], "qemu"),
    "neon-dotprod": ("aarch64-linux-gnu-gcc", ["-static", "-march=armv8.2-a+dotprod"], "qemu"),
}
ROWS = 40


@pytest.fixture(scope="module", params=TARGETS)
def driver(request, patched_tree, tmp_path_factory):
    """Command line of tests/c/driver.c built for one instruction set."""
    return build(request.param, patched_tree, tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def scalar(patched_tree, tmp_path_factory):
    return build("scalar", patched_tree, tmp_path_factory.mktemp("scalar"))


def build(target: str, tree: Path, folder: Path) -> list[str]:
    compiler, flags, needs = TARGETS[target]
    if needs == "qemu":
        for tool in (compiler, "qemu-aarch64"):
            if shutil.which(tool) is None:
                pytest.skip(f"{tool} is not installed: apt-get install gcc-aarch64-linux-gnu qemu-user")
    elif needs not in CPU_FLAGS:
        pytest.skip(f"this processor has no {needs}")
    program = folder / target
    includes = [f"-I{tree / 'ggml' / part}" for part in ("include", "src", "src/ggml-cpu")]
    subprocess.run(
        [compiler, "-std=gnu11", "-O2", "-ffp-contract=off", *flags, *includes,
         str(Path(__file__).parent / "c" / "driver.c"), "-o", str(program), "-lm"],
        check=True,
    )  # fmt: skip
    return (["qemu-aarch64"] if needs == "qemu" else []) + [str(program)]


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
