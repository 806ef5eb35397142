# SPDX-License-Identifier: MIT
"""`ollama install --system`: Ollama's systemd service runs in a shadow; `uninstall` leaves nothing of it.

The service's user cannot read the cache of whoever installs, so the build is copied to HOME, and nothing there needs
Python. Ollama's unit is not touched: a drop-in has root make the shadow and starts what is in it, each time that the
service starts. So an upgraded Ollama is shadowed anew.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from ..errors import EnvironmentFailed, UsageError
from ..runtime import cache, installing
from . import shadow

LIVE = Path("/")
HOME = "usr/local/lib/gguf-splitq"
UNIT = "ollama.service"
UNITS = ("etc/systemd/system", "usr/local/lib/systemd/system", "usr/lib/systemd/system", "lib/systemd/system")
DROP_IN = f"etc/systemd/system/{UNIT}.d/gguf-splitq.conf"
MADE_FOLDER = "made-folder"  # in HOME: the drop-in's folder was not there before


def install(root: str | Path = LIVE) -> None:
    """Set up the service of the system in the folder `root` and, where that is the running one, restart it.

    Raises EnvironmentFailed without root's rights, the service or Ollama, UsageError when it is set up already; then
    nothing is left behind.
    """
    top = _top(root, "install")
    home, drop_in = top / HOME, top / DROP_IN
    if drop_in.exists() or home.exists():
        raise UsageError(f"{home}: already installed: run `gguf-splitq ollama uninstall --system` first")
    if not any((top / folder / UNIT).exists() for folder in UNITS):
        raise EnvironmentFailed(f"{top}: there is no {UNIT} of systemd: use `gguf-splitq ollama serve`")
    ollama = shadow.find() if top == LIVE else shadow.find(top)
    os.umask(0o022)  # the service's user reads all of it
    try:
        installing.install(home / "llama.cpp")
        for script in shadow.SCRIPTS.iterdir():
            shutil.copy(script, home)
        if not drop_in.parent.exists():
            drop_in.parent.mkdir()
            (home / MADE_FOLDER).touch()
        drop_in.write_text(_drop_in(*(LIVE / path.relative_to(top) for path in ollama)))
        _restart(top)
    except BaseException:
        _remove(top)
        raise
    print(f"{drop_in}: {UNIT} runs gguf-splitq's models on the CPU, all others as before")


def uninstall(root: str | Path = LIVE) -> None:
    """Undo `install` and restart the service. Raises EnvironmentFailed without root's rights, UsageError without it."""
    top = _top(root, "uninstall")
    if not (top / HOME).exists() and not (top / DROP_IN).exists():
        raise UsageError(f"{top / HOME}: not installed: there is nothing to undo")
    _remove(top)
    _restart(top)


def _top(root: str | Path, action: str) -> Path:
    top = Path(root).absolute()
    if top == LIVE and os.geteuid() != 0:
        words = ["sudo", f"GGUF_SPLITQ_CACHE={cache.folder()}", os.path.abspath(sys.argv[0]), "ollama", action]
        raise EnvironmentFailed(f"{top / DROP_IN}: only root may write it: run `{shlex.join(words)} --system`")
    return top


def _drop_in(executable: Path, libraries: Path) -> str:
    home = LIVE / HOME
    make = [home / "shadow.sh", executable, libraries, home / "llama.cpp" / "bin", home / "ollama"]
    return (
        "# Made by `gguf-splitq ollama install --system`, deleted by `gguf-splitq ollama uninstall --system`.\n"
        "[Service]\n"
        f"ExecStartPre=+/bin/sh {' '.join(map(_quoted, make))}\n"  # + as root
        "ExecStart=\n"
        f"ExecStart={_quoted(home / 'ollama' / 'bin' / 'ollama')} serve\n"
    )


def _quoted(path: Path) -> str:
    """As one word of a unit's command line, to which % is special."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{text}"'


def _remove(top: Path) -> None:
    drop_in, home = top / DROP_IN, top / HOME
    drop_in.unlink(missing_ok=True)
    if (home / MADE_FOLDER).exists() and not any(drop_in.parent.iterdir()):
        drop_in.parent.rmdir()
    shutil.rmtree(home, ignore_errors=True)


def _restart(top: Path) -> None:
    if top != LIVE:
        return
    for words in (["daemon-reload"], ["try-restart", UNIT]):
        try:
            done = subprocess.run(["systemctl", *words], capture_output=True, text=True)
            cause = done.stderr.strip() if done.returncode else None
        except OSError as error:
            cause = error.strerror
        if cause is not None:
            raise EnvironmentFailed(f"`systemctl {shlex.join(words)}` failed ({cause}): see `journalctl -u {UNIT}`")
