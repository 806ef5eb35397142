# SPDX-License-Identifier: MIT
"""Instructions of the kernels' inner loops, counted in what compilers make of them: `python -m experiments.count`.

Sources of the patched tree are compiled to assembly, for x86-64 by the system's compiler and for Arm by zig's clang
(`pip install ziglang`). Of a function the innermost loop with most products counts: its instructions, over what it
multiplies, times as many weights as a table is for. Nothing is run, so any x86-64 machine counts for all of them.
--keep puts the tables into docs/results/kernels.json.
"""

import functools
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gguf_splitq import types
from gguf_splitq.errors import EnvironmentFailed
from gguf_splitq.runtime import fetching

from .common import RESULTS, parser, provenance, run, show

CODES = ["sq4", "sq3", "sq2", "sdr4", "sq4w", "sq3w", "sq2w"]
OPEN = ["sq3wo", "sq2wo"]  # which have no dot product
COLUMNS = ["cq4", "cq3", "cq2", "cq3_wide", "cq2_wide", "sq3c", "sq2c", "sq3c_wide", "sq2c_wide"]
STOCK = {"q4_K": 1, "q3_K": 2, "q2_K": 1}  # how often llama.cpp's dot product multiplies a weight
KERNELS = Path(__file__).with_name("count.c")
RESULT = RESULTS / "kernels.json"

X86 = re.compile(r"(vpdpbusd|vpmaddubsw) .*%(?P<register>[xyz])mm\d+$")
REGISTER = {"x": 16, "y": 32, "z": 64}  # bytes
ARM = re.compile(r"[su]{1,2}(?P<kind>dot|mmla) ")
# The same as llama.cpp's inline assembly has them, for assemblers that do not know the names: mask, value.
ENCODED = {"dot": [(0xFFC0F400, 0x4F80E000), (0xFFE0FC00, 0x4E809400)], "mmla": [(0xFFE0FC00, 0x4E80A400)]}
PRODUCTS = {"dot": 16, "mmla": 32}
BRANCH = re.compile(r"(j[a-z]+|b(\.?[a-z]{2})?|cbn?z|tbn?z) (.*, ?)?(?P<label>[\w.$]+)$")


@dataclass(frozen=True)
class Target:
    """What compiles, and for which processor."""

    compiler: tuple[str, ...]
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        """As a table's source says it: gcc 12.2.0 -march=haswell."""
        first = subprocess.run([*self.compiler, "--version"], check=True, capture_output=True, text=True).stdout
        version = re.findall(r"\d+\.\d+[\d.]*", first.splitlines()[0])[-1]
        return " ".join(["clang" if "clang" in first else "gcc", version, *(o for o in self.options if "=" in o)])

    @functools.cache  # noqa: B019 - a handful of targets
    def functions(self, source: str | Path) -> dict[str, list[str]]:
        """Function -> its lines of assembly. source: absolute, or in the tree's ggml/src/ggml-cpu."""
        ggml = fetching.fetch() / "ggml"
        include = [f"-I{ggml / part}" for part in ("src/ggml-cpu", "src", "include")]
        path, compiler = ggml / "src/ggml-cpu" / source, list(self.compiler)
        if path.suffix == ".cpp":
            compiler[-1] = "c++"
        standard = "-std=gnu++17" if path.suffix == ".cpp" else "-std=gnu11"
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.s"
            options = [standard, "-D_GNU_SOURCE", "-DNDEBUG", "-O3", "-g0", "-w", "-S", *self.options, *include]
            subprocess.run([*compiler, *options, path, "-o", out], check=True)
            return functions(out.read_text())

    def count(self, source: str | Path, function: str, weights: int, repeated: int = 1) -> float:
        """Instructions for `weights` weights (times tokens). repeated: how often the function multiplies a weight."""
        loop = max(loops(self.functions(source)[function]), key=lambda loop: sum(map(products, loop)))
        return len(loop) * weights * repeated / sum(map(products, loop))


def products(instruction: str) -> int:
    """Products of bytes that one instruction makes."""
    if match := X86.match(instruction):
        return REGISTER[match["register"]]
    if match := ARM.match(instruction):
        return PRODUCTS[match["kind"]]
    if instruction.startswith(".inst "):
        word = int(instruction.split()[1], 0)
        for kind, forms in ENCODED.items():
            if any(word & mask == value for mask, value in forms):
                return PRODUCTS[kind]
    return 0


def functions(assembly: str) -> dict[str, list[str]]:
    """Function -> its lines, in assembly for ELF."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in assembly.splitlines():
        if match := re.match(r"([A-Za-z_]\w*):", line):
            lines = found.setdefault(match[1], [])
        lines.append(line)
    return found


def loops(lines: list[str]) -> Iterator[list[str]]:
    """The instructions of each innermost loop: from a label to a jump back to it, with no such jump in between."""
    code: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in lines:
        text = " ".join(re.sub(r"\s(//|#)\s.*", "", line).split())
        if label := re.match(r"([\w.$]+):", text):
            labels[label[1]] = len(code)
        elif text and (not text.startswith((".", "//", "#")) or text.startswith(".inst ")):
            code.append(text)
            jump = BRANCH.match(text)
            if jump and jump["label"] in labels:
                spans.append((labels[jump["label"]], len(code)))
    for start, end in spans:
        if not any(start <= first and last <= end and (start, end) != (first, last) for first, last in spans):
            yield code[start:end]


def zig() -> tuple[str, ...]:
    """zig's C compiler; EnvironmentFailed where it is not installed."""
    if importlib.util.find_spec("ziglang") is None:
        raise EnvironmentFailed("Counting for Arm needs zig's cross compiler: pip install ziglang")
    return sys.executable, "-m", "ziglang", "cc"


def kernels(target: Target, name: str, weights: int) -> list[float]:
    """Of one of our types: row by row, interleaved with one token, and with as many as a pass takes, for each."""
    return [target.count(KERNELS, f"{kind}_{name}", weights) for kind in ("mul_rows", "one", "many")]


def x86(target: Target) -> dict:
    """For 512 weights, llama.cpp's own dot products below."""
    headings = ["", "dot products", "row by row", "interleaved", "interleaved, 16 tokens, for each"]
    rows = []
    for name in CODES:
        dot = target.count("sdr.c" if name == "sdr4" else "splitq.c", f"splitq_vec_dot_{name}_q8_0", 512)
        rows.append([f"`{name}`", dot, *kernels(target, name, 512)])
    rows += [[f"`{name}`", None, *kernels(target, name, 512)] for name in OPEN]
    for name, repeated in STOCK.items():
        dot = target.count("arch/x86/quants.c", f"ggml_vec_dot_{name}_q8_K", 512, repeated)
        rows.append([f"llama.cpp's {name.upper()}", dot, None, None, None])
    return {"targets": [target], "headings": headings, "rows": rows}


def neon(targets: list[Target]) -> dict:
    """For 128 weights, with llama.cpp's own kernels that are interleaved too; targets: without i8mm, with it."""
    headings = ["", "bytes", "row by row", "interleaved", "8 tokens, for each: M1", "M2"]
    rows: list[list] = []
    for name in CODES + OPEN:
        one, two = (kernels(target, name, 128) for target in targets)
        rows.append([f"`{name}`", 4 * types.get(name).block_bytes, *one, two[-1]])
    for name, layouts in (("q4_0", ("4x4", "4x8")), ("iq4_nl", ("4x4", "4x4"))):
        row = targets[0].count("arch/arm/quants.c", f"ggml_vec_dot_{name}_q8_0", 128)
        one, many = (
            [target.count("arch/arm/repack.cpp", f"ggml_{kind}_{name}_{layout}_q8_0", 128)
             for target, layout in zip(targets, layouts, strict=True)]
            for kind in ("gemv", "gemm")
        )  # fmt: skip
        single = f"{one[0]:.0f}" if one[0] == one[1] else f"{one[0]:.0f}, on M2 {one[1]:.0f}"
        rows.append([f"llama.cpp's {name.upper()}", 72, row, single, *many])
    return {"targets": targets, "headings": headings, "rows": rows}


def columns(x86: Target, arm: Target) -> dict:
    """Of types whose columns have codebooks or scales."""
    rows = []
    for name in COLUMNS:
        label = ("wide blocks of " if name.endswith("_wide") else "") + f"`{name.removesuffix('_wide')}`"
        found = [x86.count(KERNELS, f"{kind}_{name}", 512) for kind in ("one", "many")]
        rows.append([label, *found, arm.count(KERNELS, f"one_{name}", 128)])
    headings = ["instructions", "AVX-512, 512 weights", "16 tokens, for each", "NEON, 128 weights"]
    return {"targets": [x86, arm], "headings": headings, "rows": rows}


def kept(table: dict) -> dict:
    """As kernels.json has it."""
    measured = provenance() | {"machine": "; ".join(target.name for target in table["targets"])}
    return {
        "measured": measured,
        "headings": table["headings"],
        "rows": [list(map(cell, row)) for row in table["rows"]],
    }


def cell(value: str | float | None) -> str:
    """What a table shows of a count."""
    return "" if value is None else value if isinstance(value, str) else f"{value:.0f}"


def main() -> None:
    args = parser(__doc__).parse_args()
    avx512, avx2 = (Target(("cc",), (f"-march={cpu}",)) for cpu in ("icelake-server", "haswell"))
    arm = [Target(zig(), ("-target", "aarch64-linux-musl", f"-mcpu=apple_m{n}")) for n in (1, 2)]
    tables = {"x86": x86(avx512), "avx2": x86(avx2), "neon": neon(arm), "columns": columns(avx512, arm[0])}
    found = {name: kept(table) for name, table in tables.items()}
    for name, table in found.items():
        rows = [dict(zip(table["headings"], row, strict=True)) for row in table["rows"]]
        show(f"{name}: {table['measured']['machine']}", rows, dict.fromkeys(table["headings"], ""))
    if args.keep:
        content = json.loads(RESULT.read_text())
        content["tables"] |= found
        RESULT.write_text(json.dumps(content, indent=1) + "\n")
        print(f"written: {RESULT}")


if __name__ == "__main__":
    run(main)
