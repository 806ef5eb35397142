# SPDX-License-Identifier: MIT
"""The pinned llama.cpp source: fetches it, checks that it is the pin, patches a copy."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from ..errors import EnvironmentFailed
from . import cache, patching


def fetch() -> Path:
    """The patched source tree, fetched and patched first when it is not in the cache."""
    target = cache.home() / "llama.cpp"
    if not target.exists():
        with cache.exclusive("fetch.lock"):
            if not target.exists():
                upstream = pristine()
                with cache.new_tree(target) as folder:
                    copy(upstream, folder)
                    patching.apply(folder)
    return target


def tree() -> Path:
    """The patched source tree; EnvironmentFailed when it has not been fetched."""
    found = cache.home() / "llama.cpp"
    if not found.exists():
        raise EnvironmentFailed("The llama.cpp source is not in the cache; run `gguf-splitq runtime fetch`.")
    return found


def patches_check() -> dict[str, int]:
    """Apply the series to a clean copy of the pinned tree, without fuzz; returns how many lines each patch changes."""
    with cache.exclusive("fetch.lock"):
        upstream = pristine()
        _verify(upstream, str(upstream))
        with cache.scratch() as scratch:
            copy(upstream, scratch / "llama.cpp")
            patching.apply(scratch / "llama.cpp")
    return {patch.name: patching.changed_lines(patch) for patch in patching.series()}


def pristine() -> Path:
    """The clean pinned tree, from LLAMA_CPP_DIR, else git, else the source package. Call with fetch.lock held."""
    target = cache.folder() / f"llama.cpp-{cache.pin9()}"
    if target.exists():
        return target
    if own := os.environ.get("LLAMA_CPP_DIR"):
        sources = {f"LLAMA_CPP_DIR={own}": _from_folder}
    else:
        sources = {patching.pin()["repository"]: _from_git, patching.pin()["sdist"]: _from_sdist}
    reasons = []
    for name, source in sources.items():
        cache.say(f"Fetching llama.cpp {cache.pin9()} from {name}")
        try:
            with cache.new_tree(target) as folder:
                source(folder)
                _verify(folder, name)
            return target
        except SourceFailed as error:
            reasons.append(f"{name}: {error}")
    raise EnvironmentFailed(
        f"llama.cpp {cache.pin9()} could not be fetched ({'; '.join(reasons)}); connect to a network, "
        "or set LLAMA_CPP_DIR to a checkout of that commit."
    )


class SourceFailed(Exception):
    """A source cannot be reached; where there is another one, that is tried."""


def _verify(folder: Path, name: str) -> None:
    """Every source must give the very same files."""
    wanted = patching.pin().get("tree")
    if wanted and (found := patching.content_hash(folder)) != wanted:
        raise EnvironmentFailed(
            f"The source from {name} is not llama.cpp {cache.pin9()} (content {found[:12]}, expected {wanted[:12]}); "
            f"delete what was changed in it, or check out commit {cache.pin9()}."
        )


def _from_folder(folder: Path) -> None:
    """A user's own copy, only read: the pinned commit when it is a git checkout, its files as they are otherwise."""
    own = Path(os.environ["LLAMA_CPP_DIR"]).expanduser().absolute()
    if not (own / "ggml" / "CMakeLists.txt").is_file():
        raise EnvironmentFailed(f"LLAMA_CPP_DIR={own} holds no llama.cpp source; set it to a checkout or unset it.")
    commit = patching.pin()["commit"]
    if patching.git("rev-parse", "--git-dir", cwd=own).returncode:
        copy(own, folder)
        return
    archive = folder.with_name("archive.tar")
    if patching.git("archive", f"--output={archive}", commit, cwd=own).returncode:
        raise EnvironmentFailed(
            f"The checkout LLAMA_CPP_DIR={own} does not have commit {cache.pin9()}; "
            f"run `git fetch origin {commit}` in it."
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
        raise SourceFailed(f"no answer within {timeout} s") from None
    if done.returncode:
        raise SourceFailed((done.stderr.strip() or "git failed").splitlines()[-1])


def _from_sdist(folder: Path) -> None:
    """The tree inside the source package, verified by SHA-256 before anything in it is read or, by pip, run."""
    pin = patching.pin()
    extract_sdist(download(pin["sdist"], pin["sdist_sha256"], folder.with_name("download"), source=True), folder)


def download(requirement: str, sha256: str, place: Path, source: bool = False) -> Path:
    """The wheel, or the source package, of NAME==VERSION, fetched by pip into the folder `place`, and compared first.

    Raises EnvironmentFailed where the index has another file, SourceFailed with pip's last line when it has none.
    """
    wanted = place.with_name("requirements.txt")
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    kind = ["--no-binary", requirement.split("==")[0]] if source else ["--only-binary", ":all:"]
    options = ["--quiet", "--no-deps", *kind, "--require-hashes", "--dest", str(place)]
    command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(wanted)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        raise SourceFailed("pip gave no result within 900 s") from None
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise EnvironmentFailed(
            f"{requirement} has another SHA-256 than the pinned {sha256}, and was not used; check the package index."
        )
    if done.returncode:
        raise SourceFailed((done.stderr.strip() or "pip failed").splitlines()[-1])
    return next(place.iterdir())


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


def copy(source: Path, folder: Path) -> None:
    """Copy a tree without .git; OSError names the first file that could not be copied."""
    try:
        shutil.copytree(source, folder, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    except shutil.Error as error:
        failed, _, cause = error.args[0][0]  # one entry for every file that could not be copied
        raise OSError(f"{failed}: {cause}, and {len(error.args[0]) - 1} more") from error
