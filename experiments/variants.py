# SPDX-License-Identifier: MIT
"""One build for many processors, on this one: `python -m experiments.variants`.

Builds the variants of ggml's CPU back end (GGML_CPU_ALL_VARIANTS) with the patches in build/variants. test-splitq then
loads the best of them, encodes a matrix in each type and multiplies it with 1, 5, 33 and 70 tokens, in every kind of
buffer; the largest error of each type is shown, against the reference path, as a share of the product's square. Then
each variant alone that this processor can run.
"""

import re
import shlex
import subprocess
import tempfile
from pathlib import Path

from gguf_splitq.runtime import building, fetching, patching

from .common import BUILD, parser, processor, run, show

OPTIONS = building.CMAKE_OPTIONS | building.PORTABLE
NONE = "no CPU back end for this processor"


def build(jobs: int) -> Path:
    """The folder of the variants and of test-splitq."""
    cmake, ninja, compilers = building._tools()
    source, folder = fetching.fetch(), (BUILD / "variants").resolve()
    defines = [f"-D{key}={value}" for key, value in OPTIONS.items()]
    defines += [f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    folder.mkdir(parents=True, exist_ok=True)
    log, env = folder / "log", patching.isolated(source) | compilers
    configure = [cmake, "-G", "Ninja", "-S", str(source), "-B", str(folder), *defines]
    building._run_logged(configure, log, env, "Configuring llama.cpp")
    building._run_logged([ninja, "-C", str(folder), "-j", str(jobs), "ggml"], log, env, "Building the variants")
    (bin,) = {path.parent for path in folder.rglob("libggml-cpu-*")}
    libraries = [next(folder.rglob(f"libggml{part}.*")) for part in ("", "-base")]
    paths = [f"-Wl,-rpath,{library.parent}" for library in libraries]
    command = [*shlex.split(compilers["CXX"]), "-std=c++17", "-O2", f"-I{source / 'ggml/include'}"]
    command += [source / "tests/test-splitq.cpp", *libraries, *paths, "-o", bin / "test-splitq"]
    subprocess.run(command, check=True)
    return bin


def errors(program: Path, folder: Path) -> tuple[str, dict[str, float]]:
    """The variant that is the best of a folder, and type -> error; nothing where this processor can run none."""
    done = subprocess.run([program, "errors", folder], capture_output=True, text=True)
    if NONE in done.stdout:
        return "", {}
    if done.returncode:
        raise SystemExit(f"test-splitq of {folder} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    loaded = re.search(r"loaded CPU backend from .*ggml-cpu-(\w+(?:\.\d+_\d+)?)\.", done.stderr)
    assert loaded, done.stderr
    return loaded[1], {name: float(error) for name, error in map(str.split, done.stdout.splitlines())}


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--jobs", type=int, help="of the build; default: --threads")
    args = p.parse_args()
    bin = build(args.jobs or args.threads)
    best, found = errors(bin / "test-splitq", bin)
    print(f"\n{processor()}: {best or NONE}")
    show(
        "the largest error",
        [{"type": type, "NMSE": error} for type, error in found.items()],
        {"type": "", "NMSE": ".2g"},
    )
    rows = []
    for library in sorted(bin.glob("libggml-cpu-*")):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / library.name).symlink_to(library)
            name, each = errors(bin / "test-splitq", Path(folder))
        rows.append(
            {"variant": library.stem.removeprefix("libggml-cpu-"), "largest error": max(each.values(), default=None)}
        )
    show("each alone; none: not for this processor", rows, {"variant": "", "largest error": ".2g"})


if __name__ == "__main__":
    run(main)
