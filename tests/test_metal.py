# SPDX-License-Identifier: MIT
"""The Metal kernels, run on the CPU by tests/c/metal.cpp: no Metal device has run them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gguf_splitq import types

TYPES = ["sq4", "sq3", "sq2", "sq6w", "sq5w", "sq4w", "sq3w", "sq2w"]
CMAKE = shutil.which("cmake") or str(Path(sys.executable).parent / "cmake")


@pytest.fixture(scope="module")
def metal(patched_tree, tmp_path_factory):
    """tests/c/metal.cpp as a program. C++ gets the kernels without Metal's attributes, and mul_mm.metal without what it
    includes and without upstream's instantiations."""
    needs = "#include <barrier>\n_Float16 half;"
    if subprocess.run(["g++", "-std=gnu++20", "-fsyntax-only", "-xc++", "-"], input=needs, text=True).returncode:
        pytest.skip("this g++ lacks std::barrier or _Float16; g++ 12 has both")
    folder = tmp_path_factory.mktemp("metal")
    source = patched_tree / "ggml" / "src" / "ggml-metal"
    for name in ("splitq.h", "mul_mm.metal"):
        lines = (source / "kernels" / name).read_text().splitlines()
        ours = [line for line in lines if name == "splitq.h" or "host_name" not in line]
        text = "\n".join(line for line in ours if not re.match('#include "(common|dequantize).h"', line))
        (folder / name).write_text(re.sub(r"\[\[.*?]]", "", text))
    code = __file__.replace("test_metal.py", "c/metal.cpp")
    includes = [f"-I{path}" for path in (folder, source, source.parent, source.parents[1] / "include")]
    flags = ["-std=gnu++20", "-O1", "-DGGML_METAL_SPLITQ", *includes]
    subprocess.run(["g++", *flags, code, "-o", folder / "metal", "-pthread"], check=True)
    return folder / "metal"


def run(*command, data: bytes, dtype=np.float32) -> np.ndarray:
    return np.frombuffer(subprocess.run(list(map(str, command)), input=data, stdout=-1, check=True).stdout, dtype)


@pytest.mark.parametrize("name", TYPES)
def test_decodes_every_scale_and_code_bit_for_bit(metal, name):
    tensor_type = types.get(name)
    blocks = np.random.default_rng(0).integers(0, 256, (2048, tensor_type.block_bytes), dtype=np.uint8)
    blocks[:, -1] = np.arange(2048)  # all 256 scales
    weights = tensor_type.decode_numpy(blocks).ravel()
    found = run(metal, "decode", name, 0, data=blocks.tobytes())
    np.testing.assert_array_equal(found.view(np.uint32), weights.view(np.uint32))
    found = run(metal, "decode", name, 1, data=blocks.tobytes(), dtype=np.float16)
    np.testing.assert_array_equal(found, weights.astype(np.float16))


@pytest.mark.parametrize("kernel, tolerance, sizes", [
    *[("mul_mv", 3e-7, sizes) for sizes in [(32, 1, 1, 1, 1), (544, 7, 1, 1, 1), (64, 3, 2, 2, 2)]],
    *[("mul_mm", 3e-4, sizes) for sizes in [(32, 1, 1, 1, 1), (96, 70, 1, 35, 1), (64, 3, 2, 2, 2)]],  # in halves
])  # fmt: skip
@pytest.mark.parametrize("name", TYPES)
def test_products(metal, name, kernel, tolerance, sizes):
    columns, rows, matrices, tokens, repeats = sizes
    rng = np.random.default_rng(rows)
    tensor_type = types.get(name)
    blocks = rng.integers(0, 256, (matrices * rows * columns // 32, tensor_type.block_bytes), dtype=np.uint8)
    y = rng.normal(0, 1, (matrices * repeats, tokens, columns)).astype(np.float32)
    found = run(metal, kernel, name, *sizes, data=y.tobytes() + blocks.tobytes())
    weights = tensor_type.decode_numpy(blocks).reshape(matrices, rows, columns).astype(np.float64)
    weights = weights.repeat(repeats, 0).swapaxes(1, 2)
    error = np.abs(found.reshape(*y.shape[:2], rows) - y @ weights).max()
    assert error < tolerance * (np.abs(y) @ np.abs(weights)).max()


def test_kernels_have_the_names_that_the_host_asks_for(patched_tree):
    source = patched_tree / "ggml" / "src" / "ggml-metal"
    includes = [f"-I{path}" for path in (source, source.parent, source.parents[1] / "include")]
    lists = re.findall(r"#define (SPLITQ_\w+_KERNELS)", (source / "kernels" / "splitq.h").read_text())
    places = "".join(path.read_text() for path in (source / "kernels").glob("*.metal"))
    assert len(lists) == 3 and all(places.count(f"\n{name}\n") == 1 for name in lists)
    code = '#include "kernels/splitq.h"\n' + "\n".join(lists)
    preprocess = ["gcc", "-E", "-D__METAL_VERSION__", *includes, "-"]
    done = subprocess.run(preprocess, input=code, capture_output=True, text=True, check=True)
    found = re.findall(r'host_name\("kernel_(\w+)"\)]][^;]*?\bsplitq_\w+<(\d, \w+)>', done.stdout)
    names = ["mul_mv_{}_f32", "mul_mv_id_{}_f32", "get_rows_{}"]
    names += [f"mul_mm_{experts}{{}}_{y}" for experts in ("", "id_") for y in ("f32", "f16")]
    arguments = {name: f"{name[2]}, {str(name.endswith('w')).lower()}" for name in TYPES}
    wanted = [(name.format(kind), arguments[kind]) for name in names for kind in TYPES]
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_build_puts_the_kernels_behind_upstreams_header(patched_tree, tmp_path, wanted):
    source = patched_tree / "ggml" / "src"
    shutil.copytree(source / "ggml-metal", tmp_path / "metal")
    for name in ("ggml-splitq-levels.h", "ggml-windows-tables.h"):
        shutil.copy(source / name, tmp_path)
    (tmp_path / "metal" / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.14)\nproject(metal NONE)\n"
        "set(METALLIB_KERNELS_DEQUANTIZE kernels/dequantize.h)\n"
        "include(splitq.cmake)\nmessage(STATUS header=${METALLIB_KERNELS_DEQUANTIZE})\n"
    )
    command = [CMAKE, "-S", tmp_path / "metal", "-B", tmp_path / "build"]
    option = f"-DGGML_METAL_SPLITQ={'ON' if wanted else 'OFF'}"
    done = subprocess.run([*command, option], capture_output=True, text=True, check=True)
    header = re.search("header=(.*)", done.stdout)[1]
    upstream = (source / "ggml-metal" / "kernels" / "dequantize.h").read_text()
    if not wanted:
        assert header == "kernels/dequantize.h" and "splitq" not in upstream
        return
    made = open(header).read()
    assert made.startswith(upstream)
    ours = made[len(upstream) :]
    assert "#define GGML_METAL_SPLITQ\n" in ours
    for name in ("ggml-splitq-levels.h", "ggml-windows-tables.h"):
        assert (source / name).read_text() in ours
    assert "#define N_R0_SPLITQ" in ours
    host = {'#include "ggml.h"', "#include <stdbool.h>", "#include <stddef.h>"}
    assert set(re.findall("#include.*", ours)) == host
