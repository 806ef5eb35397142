# SPDX-License-Identifier: MIT
"""What a user installs: the wheel and the sdist hold all that a conversion and a run need, outside the checkout."""

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import crafted
import pytest

from gguf_splitq.runtime import patching

ROOT = Path(__file__).parents[1]


def run(*command, cwd):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def wheel(source: Path, folder: Path) -> Path:
    """The wheel of a checkout or an sdist, made with the build back end that is installed here, so without network."""
    pip = sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source, cwd=folder.parent)
    return next(folder.glob("*.whl"))


def content(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel of the checkout."""
    return wheel(ROOT, tmp_path_factory.mktemp("wheel") / "dist")


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The programs' folder of an empty environment with the wheel in it; dependencies come from this test's own."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home.parent)
    pip = sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "--python", home / "bin" / "python"
    run(*pip, "install", "--no-deps", "--no-index", built, cwd=home.parent)
    ours = next(home.glob("lib/python*/site-packages"))
    theirs = sysconfig.get_path("purelib")
    (ours / "dependencies.pth").write_text(f"{theirs}\n")  # a .pth file in there is not followed: no editable install
    return home / "bin"


def test_the_sdist_gives_the_same_wheel(built, tmp_path):
    dist = tmp_path / "dist"
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", dist, cwd=ROOT)
    assert content(wheel(next(dist.glob("*.tar.gz")), tmp_path / "again")) == content(built)


def test_the_wheel_holds_the_package_and_no_rubbish(built):
    names = set(content(built))
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "gguf_splitq").rglob("*.py")}
    patches = {f"gguf_splitq/data/{path.relative_to(ROOT)}" for path in (ROOT / "patches").rglob("*") if path.is_file()}
    assert package | patches <= names
    assert not [name for name in names if "__pycache__" in name or not name.startswith("gguf_splitq")]


def test_the_installed_program_converts_and_runs(installed, runtime_programs, tmp_path):
    python, program = installed / "python", installed / "gguf-splitq"
    code = "from gguf_splitq.runtime import patching; print(patching.__file__); print(patching.digest())"
    where, digest = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(installed.parent) and digest == patching.digest()
    assert run(program, "runtime", "path", cwd=tmp_path).strip() == str(runtime_programs)
    for name in ("f16", "sq4"):
        run(program, "convert", crafted.DEMO, "--type", name, cwd=tmp_path)  # llama.cpp tries to load it, too
    words = ["--baseline", "demo-f16.gguf", "--text", crafted.DEMO / "eval.txt", "--chunks", "1", "--max-kld", "0.5"]
    run(program, "validate", "demo-sq4.gguf", *words, "--report", "r.json", cwd=tmp_path)
    assert 0 < json.loads((tmp_path / "r.json").read_text())["mean_kld"]
