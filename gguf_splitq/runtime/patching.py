# SPDX-License-Identifier: MIT
"""The llama.cpp pin and the patch series on top of it: reads them, hashes them, applies them.

patches/PIN         what the series is made for, one `key = value` a line
patches/series      names of the patches, in order; absent or empty means an unpatched tree
patches/*.patch     what must change inside upstream's files (-p1)
patches/files/**    own files, copied to the same relative path
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..errors import EnvironmentFailed
from ..resources import folder

STAMP = ".gguf-splitq-patches"  # in a patched tree: the digest of what was applied


def pin() -> dict[str, str]:
    """patches/PIN: repository, commit, tree (git's hash of the content), sdist, sdist_sha256, sdist_folder."""
    lines = (folder("patches") / "PIN").read_text().splitlines()
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    return {key.strip(): value.strip() for key, value in pairs}


def series() -> list[Path]:
    """The patches in the order in which they are applied."""
    path = folder("patches") / "series"
    lines = path.read_text().splitlines() if path.exists() else []
    return [path.parent / line.strip() for line in lines if line.strip() and not line.startswith("#")]


def changed_lines(patch: Path) -> int:
    """How many lines of upstream's files a patch adds and removes, blank ones counted."""
    lines = patch.read_text().splitlines()
    return sum(line[:1] in ("+", "-") and line[:4] not in ("+++ ", "--- ") for line in lines)


def files() -> dict[str, Path]:
    """Own files to copy: path inside the tree -> source."""
    top = folder("patches") / "files"
    return {path.relative_to(top).as_posix(): path for path in sorted(top.rglob("*")) if path.is_file()}


def digest() -> str:
    """Hash of everything that ends up in a patched tree; PIN is not part of it."""
    total = hashlib.sha256()
    for name, path in [(path.name, path) for path in series()] + list(files().items()):
        total.update(f"{name}\0{hashlib.sha256(_read(path)).hexdigest()}\n".encode())
    return total.hexdigest()


def apply(tree: Path) -> None:
    """Patch a clean pinned `tree` in place; does nothing when this very series is already in it.

    Context must match exactly: there is no fuzz. Raises EnvironmentFailed naming the patch that does not apply,
    which leaves the tree half patched and without its stamp, so hand in a copy that can be thrown away.
    """
    stamp, wanted = tree / STAMP, digest()
    if stamp.exists():
        if stamp.read_text() == wanted:
            return
        raise EnvironmentFailed(f"{tree} already holds another patch series; delete it and fetch it again.")
    for patch in series():
        done = git("apply", "--whitespace=nowarn", str(patch.resolve()), cwd=tree)
        if done.returncode:
            cause = (done.stderr.strip() or "git apply failed").splitlines()[0].removeprefix("error: ")
            raise EnvironmentFailed(
                f"{patch.name} does not apply to {tree} ({cause}); regenerate patches/{patch.name} against "
                f"llama.cpp {pin()['commit'][:9]} with the patches before it applied."
            )
    for name, source in files().items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, tree / name)
    stamp.write_text(wanted)


def content_hash(tree: Path) -> str:
    """Git's tree hash of a folder's content, equal to `git rev-parse COMMIT^{tree}` of the commit it came from."""
    with tempfile.TemporaryDirectory() as scratch:
        inside = [f"--git-dir={scratch}", f"--work-tree={tree}"]
        for command in (["init", "-q", "--bare", scratch], [*inside, "add", "-A", "-f", "."], [*inside, "write-tree"]):
            done = git(*command, cwd=tree)
            if done.returncode:
                raise EnvironmentFailed(f"git cannot read all of {tree} ({done.stderr.strip()}); repair or replace it.")
    return done.stdout.strip()


def git(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run git deaf to the user's settings and to a repository around `cwd`, in which `git apply` would skip files."""
    command = ["git", "-c", "safe.directory=*", *args]
    env = isolated(cwd) | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    try:
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        raise EnvironmentFailed("git is not installed, and patching llama.cpp needs it; install git.") from None


def isolated(folder: Path) -> dict[str, str]:
    """An environment in which git, started in `folder`, sees no repository above it."""
    kept = {key: value for key, value in os.environ.items() if key not in _GIT_LOCATION}
    return kept | {"GIT_CEILING_DIRECTORIES": str(folder.resolve().parent), "LC_ALL": "C"}


_GIT_LOCATION = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX", "GIT_COMMON_DIR"}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise EnvironmentFailed(f"patches/series names a missing {path.name}; add it or drop the line.") from None
