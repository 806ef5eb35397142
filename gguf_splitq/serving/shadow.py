# SPDX-License-Identifier: MIT
"""`ollama serve`: the installed Ollama with our llama.cpp for models of our types, and its own for all others.

What runs is a shadow of the installation in the cache (ollama/shadow.sh has how), one for each pair of installation and
build of llama.cpp, made again at every start. The installation itself is not touched.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

from ..errors import EnvironmentFailed
from ..runtime import building, cache
from . import creating

SCRIPTS = Path(__file__).with_name("ollama")
PLACES = (  # where an Ollama may be that is not in PATH
    "/Applications/Ollama.app/Contents/Resources/ollama",
    "/opt/homebrew/bin/ollama",
    "/usr/local/bin/ollama",
    "/usr/bin/ollama",
)
STOP_LIMIT = 30  # seconds for Ollama to end its runners


class Ollama(NamedTuple):
    """An installation: its executable, links resolved, and the folder of its llama-server."""

    executable: Path
    libraries: Path


def find(root: Path | None = None) -> Ollama:
    """The installed Ollama, of this system or of one in the folder `root`.

    Raises EnvironmentFailed when there is none, or one without llama-server.
    """
    places = [f"{root or ''}{place}" for place in PLACES]
    found = (None if root else shutil.which("ollama")) or next(filter(shutil.which, places), None)
    if found is None:
        where = f" in {root}" if root else ""
        raise EnvironmentFailed(f"Ollama is not installed{where}; get it from ollama.com, or add its folder to PATH.")
    executable = Path(found).resolve()
    if (wrapped := executable.parents[1] / "libexec" / "ollama").exists():  # Homebrew's bin/ollama is a script
        executable = wrapped
    beside = [executable.parents[1] / "lib" / "ollama", executable.parent / "lib" / "ollama"]
    if sys.platform == "darwin":  # Ollama's own order
        beside = [*reversed(beside), executable.parent]
    for folder in beside:
        if os.access(folder / "llama-server", os.X_OK):
            return Ollama(executable, folder)
    raise EnvironmentFailed(
        f"{executable}: there is no lib/ollama/llama-server beside it, which Ollama has since 0.30: upgrade Ollama"
    )


def serve() -> NoReturn:
    """Become `ollama serve` in the shadow of the installed Ollama.

    Raises EnvironmentFailed without Ollama or without a build of llama.cpp, and where a server is there already.
    """
    ollama, runtime = find(), building.path()
    _, host, port, _ = creating.address(os.environ.get("OLLAMA_HOST", ""))
    with socket.socket() as probe:
        probe.settimeout(1)
        if probe.connect_ex((host, port)) == 0:
            raise EnvironmentFailed(
                f"A server is running at {host}:{port}; end it (`sudo systemctl stop ollama`, quit the app), or set "
                "OLLAMA_HOST to another port."
            )
    shadow = _shadow(ollama, runtime)
    make(ollama, runtime, shadow)
    cache.say(
        f"{ollama.executable} with llama.cpp {cache.pin9()} from {runtime}: "
        "models of gguf-splitq's types run there, on the CPU, all others as before."
    )
    program = shadow / "bin" / "ollama"
    shadow.with_suffix(f".{os.getpid()}").touch()
    os.execv(program, [str(program), "serve"])


def make(ollama: Ollama, runtime: Path, shadow: Path) -> None:
    """Make or renew the folder `shadow`; see ollama/shadow.sh. Raises EnvironmentFailed when it cannot be made."""
    with cache.exclusive("ollama.lock"):
        shadow.parent.mkdir(parents=True, exist_ok=True)
        words = [SCRIPTS / "shadow.sh", *ollama, runtime, shadow]
        done = subprocess.run(["sh", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise EnvironmentFailed(f"{shadow}: cannot be made ({done.stderr.strip()}): check the disk and its rights")


def stop() -> None:
    """End the servers that `serve` started, and wait for their end."""
    marks = [mark for mark in _home().glob("*.*") if mark.suffix[1:].isdigit()]
    running = [mark for mark in marks if _runs(mark)]
    for mark in running:
        os.kill(int(mark.suffix[1:]), signal.SIGTERM)
    limit = time.monotonic() + STOP_LIMIT
    while still := [mark.suffix[1:] for mark in running if _runs(mark)]:
        if time.monotonic() > limit:
            raise EnvironmentFailed(f"Ollama (process {still[0]}) does not end; end it with `kill -9 {still[0]}`.")
        time.sleep(0.05)
    for mark in marks:
        mark.unlink(missing_ok=True)


def remove() -> None:
    """End the servers that `serve` started and delete their shadows; the installed Ollama is as it always was."""
    stop()
    shutil.rmtree(_home(), ignore_errors=True)


def _home() -> Path:
    return cache.folder() / "ollama"


def _shadow(ollama: Ollama, runtime: Path) -> Path:
    """The folder for this installation and this build."""
    return _home() / hashlib.sha256(f"{ollama.executable}\0{runtime}".encode()).hexdigest()[:12]


def _runs(mark: Path) -> bool:
    """Whether the process that made the file SHADOW.PID is still an Ollama of that shadow."""
    pid, program = mark.suffix[1:], mark.with_suffix("") / "bin" / "ollama"
    try:
        if sys.platform == "linux":
            said = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
        else:
            said = subprocess.run(["ps", "-o", "args=", "-p", pid], capture_output=True, text=True).stdout
    except OSError:
        return False
    return said.startswith(f"{program} serve")
