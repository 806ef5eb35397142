# SPDX-License-Identifier: MIT
"""The programs and libraries of the patched llama.cpp: builds them, tests them on this machine, finds them again."""

import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import EnvironmentFailed
from ..resources import cores
from . import cache, fetching, patching

PROGRAMS = ["llama-perplexity", "llama-quantize", "llama-bench", "llama-imatrix", "llama-completion"]
PROGRAMS += ["llama-cli", "llama-server"]
SELF_TEST = "test-splitq"  # patches/files/tests/test-splitq.cpp
TESTS = ["test-quantize-fns", "test-quantize-perf", "test-backend-ops", "test-gguf"]
CMAKE_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "LLAMA_BUILD_TESTS": "ON",  # only makes the targets known; they are built on request
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",  # would be downloaded
    "FETCHCONTENT_FULLY_DISCONNECTED": "ON",
    "GGML_NATIVE": "ON",
    # Programs find the libraries beside themselves, wherever that is.
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": "@loader_path" if sys.platform == "darwin" else "$ORIGIN",
}
# For other machines: the CPU back end once for each generation of processors, chosen at run time, and no OpenMP, whose
# library many lack.
PORTABLE = {"GGML_NATIVE": "OFF", "GGML_BACKEND_DL": "ON", "GGML_CPU_ALL_VARIANTS": "ON", "GGML_OPENMP": "OFF"}
CMAKE_OLDEST = (3, 18)
SELF_TEST_LIMIT = 300  # seconds; it takes one
NO_AMX = ["-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"]


def build(tests: bool = False) -> Path:
    """The folder of built programs, built first where needed; `tests` adds upstream's test programs.

    A build counts as one when its products are right on this machine (`SELF_TEST`). Where they are not and the
    processor has AMX, it is made again without: compilers and virtual machines are known to break that.
    Raises EnvironmentFailed when it cannot be built or its products stay wrong.
    """
    targets = [*PROGRAMS, SELF_TEST, *(TESTS if tests else [])]
    if not set(targets) <= _built():
        cmake, ninja, compilers = _tools()
        source = fetching.fetch()
        with cache.exclusive(f"{cache.home().name}.lock"):
            if not set(targets) <= _built():  # another process may have built them meanwhile
                folder = _compile(source, targets, cmake, ninja, compilers)
                if (cause := _self_test(folder)) and (flags := _without_amx(compilers["CC"])):
                    cache.say(f"The build fails its self-test ({cause}); building it again without AMX.")
                    _compile(source, targets, cmake, ninja, compilers, flags)
                    cause = _self_test(folder)
                if cause:
                    raise EnvironmentFailed(
                        f"The built llama.cpp fails its self-test on this machine ({cause}); set CC and CXX to another "
                        f"compiler and delete {folder}."
                    )
                _record(folder, targets)
    return path()


def build_unpatched(*targets: str) -> Path:
    """The folder of programs of llama.cpp as upstream has it, built first where needed; for comparisons only."""
    home = cache.folder() / f"{cache.pin9()}-unpatched"
    stamp = home / _build_folder().name / "built"
    if not (stamp.exists() and set(targets) <= set(stamp.read_text().split())):
        cmake, ninja, compilers = _tools()
        with cache.exclusive("fetch.lock"):
            upstream = fetching.pristine()
            if not home.exists():
                with cache.new_tree(home / "llama.cpp") as folder:
                    fetching.copy(upstream, folder)
        with cache.exclusive(f"{home.name}.lock"):
            # Nothing checks that upstream's AMX survived the compiler, and nobody measures speed with this build.
            flags = _without_amx(compilers["CC"])
            _record(_compile(home / "llama.cpp", list(targets), cmake, ninja, compilers, flags), targets)
    return stamp.parent / "bin"


def build_portable() -> Path:
    """The folder of programs for every processor of this kind, built first where needed; for archives.

    Raises EnvironmentFailed when they cannot be built.
    """
    cmake, ninja, compilers = _tools()
    source = fetching.fetch()
    folder = cache.home() / "build-portable"
    with cache.exclusive(f"{cache.home().name}.lock"):
        if not (folder / "built").exists():
            _compile(source, PROGRAMS, cmake, ninja, compilers, name=folder.name, more=PORTABLE)
            _record(folder, PROGRAMS)
    return folder / "bin"


def path() -> Path:
    """The folder of built programs; EnvironmentFailed when they are not built for the present patches."""
    if not set(PROGRAMS) <= _built():
        raise EnvironmentFailed("The patched llama.cpp is not built; run `gguf-splitq runtime build` (`make runtime`).")
    return _build_folder() / "bin"


def program(name: str) -> Path:
    """One built program, such as "llama-perplexity"."""
    found = path() / name
    if not found.exists():
        raise EnvironmentFailed(f"{name} is not in {found.parent}; `make test` builds the test programs, too.")
    return found


def library() -> Path | None:
    """The built ggml-base shared library, which holds the quantizers; None when nothing is built."""
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    found = _build_folder() / "bin" / f"libggml-base{suffix}"
    return found if _built() and found.exists() else None


def _build_folder() -> Path:
    return cache.home() / f"build-{cache.processor()}"


def _built() -> set[str]:
    stamp = _build_folder() / "built"
    return set(stamp.read_text().split()) if stamp.exists() else set()


def _tools() -> tuple[str, str, dict[str, str]]:
    """cmake, ninja, and the compilers by the variables that name them."""
    cmake, ninja = _tool("cmake"), _tool("ninja")
    return cmake, ninja, {"CC": _compiler("CC", "cc", "gcc", "clang"), "CXX": _compiler("CXX", "c++", "g++", "clang++")}


def _tool(name: str) -> str:
    """cmake or ninja, from PATH or from this Python's own environment, whichever is there and new enough."""
    beside = Path(sys.executable).parent / name
    for candidate in filter(None, (shutil.which(name), shutil.which(str(beside)))):
        done = subprocess.run([candidate, "--version"], capture_output=True, text=True)
        version = tuple(map(int, re.findall(r"\d+", done.stdout)[:2]))
        if done.returncode == 0 and (name != "cmake" or version >= CMAKE_OLDEST):
            return candidate
    wanted = f"cmake {'.'.join(map(str, CMAKE_OLDEST))} or newer" if name == "cmake" else name
    raise EnvironmentFailed(f"{wanted} was not found, and building llama.cpp needs it; run `pip install {name}`.")


def _compiler(variable: str, *names: str) -> str:
    own = os.environ.get(variable)
    if own and shutil.which(shlex.split(own)[0]):
        return own
    if not own:
        for name in names:
            if found := shutil.which(name):
                return found
    language = "C++" if variable == "CXX" else "C"
    what = f"The {language} compiler {variable}={own}" if own else f"A {language} compiler"
    raise EnvironmentFailed(
        f"{what} was not found, and building llama.cpp needs it; install one, for example `apt-get install g++`."
    )


def _compile(
    source: Path, targets: list[str], cmake: str, ninja: str, compilers: dict[str, str], flags: Sequence[str] = (),
    name: str | None = None, more: Mapping[str, str] | None = None,
) -> Path:  # fmt: skip
    """Configure and build `targets`; returns the build's folder. `flags` stay in force in that folder.

    name: of the folder, this processor's own by default. more: options of CMake beside CMAKE_OPTIONS.
    Call with the build's lock held.
    """
    cache.need_disk()
    folder = source.parent / (name or _build_folder().name)  # beside the source, should patches/ have changed meanwhile
    options = CMAKE_OPTIONS | {"CMAKE_MAKE_PROGRAM": ninja, "LLAMA_BUILD_COMMIT": cache.pin9()} | dict(more or {})
    if flags:
        for name, variable in (("CMAKE_C_FLAGS", "CFLAGS"), ("CMAKE_CXX_FLAGS", "CXXFLAGS")):
            options[name] = " ".join([os.environ.get(variable, ""), *flags]).strip()
    # With these, ccache (used where installed) hits across changes of the patches, which change the folder's name.
    env = patching.isolated(source) | compilers | {"CCACHE_BASEDIR": str(folder.parent), "CCACHE_NOHASHDIR": "1"}
    folder.mkdir(exist_ok=True)
    log = folder / "log"
    log.unlink(missing_ok=True)
    defines = [f"-D{name}={value}" for name, value in options.items()]
    configure = [cmake, "-G", "Ninja", "-S", str(source), "-B", str(folder), *defines]
    _run_logged(configure, log, env, "Configuring llama.cpp")
    _run_logged([ninja, "-C", str(folder), "-j", str(cores()), *targets], log, env, "Building llama.cpp")
    return folder


def _record(folder: Path, targets: Iterable[str]) -> None:
    """Note that these targets are built and may be used."""
    (folder / "built").write_text("\n".join(targets) + "\n")


def _self_test(folder: Path) -> str | None:
    """What is wrong with the products of a build on this machine, None when they are right."""
    program = folder / "bin" / SELF_TEST
    try:
        done = subprocess.run([program], capture_output=True, text=True, errors="replace", timeout=SELF_TEST_LIMIT)
    except subprocess.TimeoutExpired:
        return f"{SELF_TEST} gave no result within {SELF_TEST_LIMIT} s"
    if done.returncode < 0:
        return f"{SELF_TEST} was killed by {signal.Signals(-done.returncode).name}"
    if done.returncode:
        return (done.stdout + done.stderr).strip().partition("\n")[0] or f"{SELF_TEST} failed"
    return None


def _without_amx(cc: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Flags that keep -march=native from using AMX; none where it would not anyway."""
    if platform.machine() != "x86_64" or not cpuinfo.exists() or "amx_tile" not in cpuinfo.read_text():
        return []
    # a compiler that does not know the flags does not generate AMX either
    try_it = [*shlex.split(cc), *NO_AMX, "-E", "-x", "c", os.devnull]
    return [] if subprocess.run(try_it, capture_output=True).returncode else NO_AMX


def _run_logged(command: list[str], log: Path, env: dict[str, str], what: str) -> None:
    """Run one step of the build, its output to `log` and its progress to the terminal (else in plain lines)."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    said = 0
    console.print(f"{what} (log: {log})", soft_wrap=True)
    with open(log, "a") as out, console.status(what) as status:
        with subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            assert process.stdout
            for line in process.stdout:
                out.write(line)
                if step := re.match(r"\[(\d+)/(\d+)\]", line):
                    done, total = map(int, step.groups())
                    status.update(f"{what} {done}/{total}")
                    if not console.is_terminal and done * 10 // total > said:
                        said = done * 10 // total
                        console.print(f"{what} {done}/{total}")
    if process.returncode:
        cache.say("".join(log.read_text(errors="replace").splitlines(keepends=True)[-20:]))
        raise EnvironmentFailed(f"{what} failed with exit code {process.returncode}; see the lines above and {log}.")
