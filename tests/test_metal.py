# SPDX-License-Identifier: MIT
"""The Metal kernels, run on the CPU by tests/c/metal.cpp: no Metal device has run them."""

import re
import subprocess

import numpy as np
import pytest

from gguf_splitq import types

TYPES = {4: types.get("sq4"), 3: types.get("sq3"), 2: types.get("sq2")}
IDS = ["sq4", "sq3", "sq2"]


@pytest.fixture(scope="module")
def metal(patched_tree, tmp_path_factory):
    """tests/c/metal.cpp as a program. C++ gets the kernels without Metal's attributes, and mul_mm.metal without what it
    includes and without the instantiations for upstream's types."""
    needs = "#include <barrier>\n_Float16 half;"
    if subprocess.run(["g++", "-std=gnu++20", "-fsyntax-only", "-xc++", "-"], input=needs, text=True).returncode:
        pytest.skip("this g++ lacks std::barrier or _Float16; g++ 12 has both")
    folder = tmp_path_factory.mktemp("metal")
    source = patched_tree / "ggml" / "src" / "ggml-metal"
    for name in ("splitq.h", "mul_mm.metal"):
        lines = (source / "kernels" / name).read_text().splitlines()
        ours = [line for line in lines if "host_name" not in line or "splitq" in line]
        text = "\n".join(line for line in ours if not re.match('#include "(common|dequantize).h"', line))
        (folder / name).write_text(re.sub(r"\[\[.*?]]", "", text))
    code = __file__.replace("test_metal.py", "c/metal.cpp")
    flags = ["-std=gnu++20", "-O1", "-DGGML_METAL_SPLITQ", f"-I{folder}", f"-I{source}", f"-I{source.parent}"]
    subprocess.run(["g++", *flags, code, "-o", folder / "metal", "-pthread"], check=True)
    return folder / "metal"


def run(*command, data: bytes, dtype=np.float32) -> np.ndarray:
    return np.frombuffer(subprocess.run(list(map(str, command)), input=data, stdout=-1, check=True).stdout, dtype)


@pytest.mark.parametrize("bits", TYPES, ids=IDS)
def test_decodes_every_scale_and_code_bit_for_bit(metal, bits):
    tensor_type = TYPES[bits]
    blocks = np.random.default_rng(bits).integers(0, 256, (2048, tensor_type.block_bytes), dtype=np.uint8)
    blocks[:, -1] = np.arange(2048)  # all 256 scales
    weights = tensor_type.decode_numpy(blocks).ravel()
    found = run(metal, "decode", bits, 0, data=blocks.tobytes())
    np.testing.assert_array_equal(found.view(np.uint32), weights.view(np.uint32))
    found = run(metal, "decode", bits, 1, data=blocks.tobytes(), dtype=np.float16)
    np.testing.assert_array_equal(found, weights.astype(np.float16))


@pytest.mark.parametrize("kernel, tolerance, sizes", [
    *[("mul_mv", 1e-6, sizes) for sizes in [(32, 1, 1, 1, 1), (544, 7, 1, 1, 1), (64, 3, 2, 2, 2)]],
    *[("mul_mm", 1e-3, sizes) for sizes in [(32, 1, 1, 1, 1), (96, 70, 1, 35, 1), (64, 3, 2, 2, 2)]],  # in halves
])  # fmt: skip
@pytest.mark.parametrize("bits", TYPES, ids=IDS)
def test_products(metal, bits, kernel, tolerance, sizes):
    columns, rows, matrices, tokens, repeats = sizes
    rng = np.random.default_rng(rows)
    tensor_type = TYPES[bits]
    blocks = rng.integers(0, 256, (matrices * rows * columns // 32, tensor_type.block_bytes), dtype=np.uint8)
    y = rng.normal(0, 1, (matrices * repeats, tokens, columns)).astype(np.float32)
    found = run(metal, kernel, bits, *sizes, data=y.tobytes() + blocks.tobytes())
    weights = tensor_type.decode_numpy(blocks).reshape(matrices, rows, columns).astype(np.float64)
    exact = y @ weights.repeat(repeats, 0).swapaxes(1, 2)
    error = np.abs(found.reshape(exact.shape) - exact).max()
    assert error < tolerance * np.abs(exact).max()


def test_kernels_have_the_names_that_the_host_asks_for(patched_tree):
    folder = patched_tree / "ggml" / "src" / "ggml-metal" / "kernels"
    text = "".join((folder / f"{name}.metal").read_text() for name in ("mul_mv", "mul_mm", "quantize"))
    found = re.findall(r'host_name\("kernel_(\w+)"\)]].*\bsplitq_\w+<(\d)>', text)
    names = ["mul_mv_{}_f32", "mul_mv_id_{}_f32", "get_rows_{}"]
    names += [f"mul_mm_{experts}{{}}_{y}" for experts in ("", "id_") for y in ("f32", "f16")]
    wanted = [(name.format(TYPES[bits].name), str(bits)) for name in names for bits in TYPES]
    assert sorted(found) == sorted(wanted)
