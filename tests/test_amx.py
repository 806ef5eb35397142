# SPDX-License-Identifier: MIT
"""The AMX tile configuration in the patched tree is what its function says, whatever the compiler made of it.

LDTILECFG is replaced in the compiled function by a copy of the 64 bytes that it would load: this runs on any x86.
"""

import platform
import re
import struct
import subprocess

import pytest

from gguf_splitq.runtime import building

PROGRAM = """
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
extern "C" unsigned char seen[64];
unsigned char seen[64];
%s
__attribute__((noinline)) void in_a_thread() { ggml_tile_config_init(); } // main is optimized less
int main() {
    in_a_thread();
    return fwrite(seen, 1, sizeof(seen), stdout) != sizeof(seen);
}
"""
COPY = "".join(f"\tmovdqu\t{at}(%r11), %xmm15\n\tmovdqu\t%xmm15, seen+{at}(%rip)\n" for at in range(0, 64, 16))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is of x86-64 processors")
@pytest.mark.parametrize("optimization", ["-O0", "-O2", "-O3"])
def test_all_of_the_tile_configuration_is_in_memory_when_it_is_loaded(patched_tree, tmp_path, optimization):
    compiler = building._tools()[2]["CXX"].split()
    source = (patched_tree / "ggml/src/ggml-cpu/amx/mmq.cpp").read_text()
    parts = [
        re.search(start + r".*?^\}", source, re.DOTALL | re.MULTILINE)[0]
        for start in (r"struct tile_config_t\s*\{", r"inline void ggml_tile_config_init\(void\) \{")
    ]
    flags = [optimization, "-mamx-tile", "-fno-lto"]
    command = [*compiler, *flags, "-x", "c++", "-S", "-", "-o", "-"]
    done = subprocess.run(command, input=PROGRAM % ";\n".join(parts), capture_output=True, text=True)
    if done.returncode and "amx" in done.stderr:
        pytest.skip("this compiler does not know AMX")
    code, count = re.subn(r"^\s*ldtilecfg\s+(\S+)\n", rf"\tleaq\t\1, %r11\n{COPY}", done.stdout, flags=re.MULTILINE)
    assert count == 1, done.stderr
    (tmp_path / "tile.s").write_text(code)
    subprocess.run([*compiler, tmp_path / "tile.s", "-o", tmp_path / "tile"], check=True)
    found = subprocess.run([tmp_path / "tile"], check=True, capture_output=True).stdout
    columns, rows = [64, 64, 32, 32, 64, 64, 64, 64], [8, 8, 16, 16, 16, 16, 16, 16]  # tiles 0 to 7, see the source
    assert found == struct.pack("<B15x16H16B", 1, *columns, *[0] * 8, *rows, *[0] * 8)
