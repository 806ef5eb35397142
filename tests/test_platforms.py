# SPDX-License-Identifier: MIT
"""ggml's CPU back end with our C files compiles and links for platforms that are not here, by zig's cross compiler.

The Linux one is linked without glibc, so that musl's headers are tested too, and runs under qemu. zig keeps objects in
its own cache, which makes the second run fast.
"""

import shutil
import subprocess
import sys

import pytest

from gguf_splitq.runtime import building

OFF = [f"GGML_{part}" for part in ("METAL", "ACCELERATE", "BLAS", "OPENMP", "NATIVE", "LLAMAFILE")]
OFF += [f"LLAMA_BUILD_{part}" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")]
# zig's name of a platform: CMake's, and a processor that the kernels have code for
TARGETS = {
    "aarch64-macos": ("Darwin", "apple_m2"),
    "aarch64-linux-musl": ("Linux", "generic+v8_2a+dotprod+i8mm"),
}


@pytest.fixture(params=TARGETS)
def self_test(request, patched_tree, tmp_path):
    """(target, test-splitq built for it)."""
    pytest.importorskip("ziglang", reason="pip install ziglang")
    target, tools = request.param, {}
    system, processor = TARGETS[target]
    for name in ("cc", "c++", "ar", "ranlib"):
        options = f"-target {target} -mcpu={processor}" if name in ("cc", "c++") else ""
        tools[name] = tmp_path / name.replace("+", "x")
        tools[name].write_text(f'#!/bin/sh\nexec {sys.executable} -m ziglang {name} {options} "$@"\n')
        tools[name].chmod(0o755)
    options = dict.fromkeys(OFF, "OFF") | {
        "CMAKE_SYSTEM_NAME": system, "CMAKE_SYSTEM_PROCESSOR": target.partition("-")[0],
        "CMAKE_C_COMPILER": tools["cc"], "CMAKE_CXX_COMPILER": tools["c++"], "CMAKE_AR": tools["ar"],
        "CMAKE_RANLIB": tools["ranlib"], "CMAKE_C_FLAGS": "-O1", "CMAKE_CXX_FLAGS": "-O1", "BUILD_SHARED_LIBS": "OFF",
        "GGML_CPU_ARM_ARCH": "", "CMAKE_OSX_ARCHITECTURES": "", "CMAKE_OSX_SYSROOT": "",
        "CMAKE_INSTALL_NAME_TOOL": "/bin/true",
    }  # fmt: skip
    build, cmake = tmp_path / "build", building._tool("cmake")
    defines = [f"-D{key}={value}" for key, value in options.items()]
    run(cmake, "-G", "Ninja", "-S", patched_tree, "-B", build, *defines)
    run(cmake, "--build", build, "--target", "ggml")
    libraries = sorted(build.glob("ggml/**/*.a"), key=lambda path: ("cpu" not in path.name, "base" in path.name))
    program, source = tmp_path / "test-splitq", patched_tree / "tests/test-splitq.cpp"
    run(tools["c++"], "-std=c++17", f"-I{patched_tree / 'ggml/include'}", source, *libraries, *libraries, "-o", program)
    return target, program


def run(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_the_products_are_right_elsewhere(self_test):
    target, program = self_test
    if target == "aarch64-linux-musl" and shutil.which("qemu-aarch64"):
        run("qemu-aarch64", "-cpu", "max", program)
        run("qemu-aarch64", "-cpu", "max", program, "fused", "1")
