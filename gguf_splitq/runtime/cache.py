# SPDX-License-Identifier: MIT
"""The cache folder of the runtime: $GGUF_SPLITQ_CACHE, else $XDG_CACHE_HOME/gguf-splitq, else ~/.cache/gguf-splitq.

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
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import EnvironmentFailed
from . import patching

DISK_NEEDED = 2 << 30  # bytes: two trees of 0.2 GB, a build of 0.4 GB, the download, and room to spare


def folder() -> Path:
    """The cache folder, which need not exist yet."""
    if own := os.environ.get("GGUF_SPLITQ_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "gguf-splitq"


def home() -> Path:
    """What belongs to the pin with these patches: the patched tree and its builds."""
    return folder() / f"{pin9()}-{patching.digest()[:12]}"


def pin9() -> str:
    """The pinned commit, short."""
    return patching.pin()["commit"][:9]


@functools.cache
def processor() -> str:
    """Stands for what -march=native means here, since homes are shared between unlike machines."""
    info = Path("/proc/cpuinfo")
    features = re.search(r"^(flags|Features)\s*:.*", info.read_text(), re.MULTILINE) if info.exists() else None
    return hashlib.sha256(f"{platform.machine()} {features and features[0]}".encode()).hexdigest()[:8]


@contextmanager
def exclusive(name: str) -> Iterator[None]:
    """Hold a lock of the cache folder; waits for another process that holds it, and says so."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        handle = open(folder() / name, "w")
    except OSError as error:
        raise EnvironmentFailed(f"Cannot write {folder()} ({error.strerror}); set GGUF_SPLITQ_CACHE.") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another process is preparing llama.cpp; waiting for it.")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder inside the cache, so that a finished tree can be renamed; remains of killed runs go first."""
    for stale in folder().glob("tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=folder(), ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextmanager
def new_tree(target: Path) -> Iterator[Path]:
    """A folder to fill, which gets its final name only when that succeeded. Call with fetch.lock held."""
    need_disk()
    with scratch() as place:
        try:
            yield place / "tree"
            target.parent.mkdir(exist_ok=True)
            (place / "tree").rename(target)
        except OSError as error:
            raise EnvironmentFailed(f"Cannot write {target} ({error}); free space or set GGUF_SPLITQ_CACHE.") from error


def need_disk() -> None:
    """EnvironmentFailed when the cache's disk has too little room for what is fetched and built."""
    free = shutil.disk_usage(folder()).free
    if free < DISK_NEEDED:
        raise EnvironmentFailed(
            f"The cache's disk has {free / 2**30:.1f} GB free, and llama.cpp needs {DISK_NEEDED >> 30} GB; "
            f"free some space or set GGUF_SPLITQ_CACHE (now {folder()})."
        )


def say(line: str) -> None:
    """One line for the person who waits."""
    print(line, file=sys.stderr, flush=True)
