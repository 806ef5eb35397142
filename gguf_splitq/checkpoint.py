"""What MODEL may be: a Hugging Face folder, a Hub id, or a GGUF in F32, F16 or BF16; all become a readable GGUF.

A folder is checked first (configuration, index, every safetensors header against its file), then llama.cpp's own
converter runs on it in a child process (convert/hf_to_gguf.py) and writes an intermediate GGUF in the checkpoint's own
precision in a temporary folder beside the output, which can be read while it grows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from . import gguf_file, resources, runtime
from .errors import EnvironmentFailed, InputError, SplitqError, UnsupportedError, UsageError
from .gguf_file import Gguf

ADAPTER_RAM = 1 << 30  # bytes: PyTorch, transformers and the tokenizer in the child process
HEAD, SAMPLE, SAMPLES = 1 << 20, 1 << 14, 1 << 10  # of a file: bytes in front, bytes of a sample, samples of the rest
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]  # of a Hub repository
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_KINDS = {"unsupported": UnsupportedError, "environment": EnvironmentFailed, "input": InputError}


@dataclass
class Source:
    """A checkpoint ready to be planned. header: tensors and metadata, the data perhaps not there yet."""

    name: str
    path: Path  # of the Hugging Face folder or of the GGUF file
    header: Gguf
    files: list[Path]  # all inputs, none of which may be overwritten
    child: _Child | None = None

    def data(self, progress: Callable[[int, int], None] = lambda done, total: None) -> Gguf:
        """The GGUF with its data, once the child (if any) has written it; progress gets bytes done and in all."""
        return self.child.finish(progress) if self.child else self.header

    def growing(self) -> Gguf:
        """The GGUF at once: reading it waits for what the child has not written yet."""
        self.header.growing = self.child.running
        return self.header


@contextlib.contextmanager
def opened(
    model: str | Path, scratch: Path, revision: str | None = None, header_only: bool = False
) -> Iterator[Source]:
    """Resolve and check MODEL. scratch: the folder for the intermediate file, which is gone afterwards.

    Raises UsageError (no such model), InputError (damaged), UnsupportedError (pickles, unknown architecture),
    EnvironmentFailed (network, disk, a missing package).
    """
    path, name = resolve(str(model), revision)
    if path.is_file():
        with gguf_file.read(path) as file:
            yield Source(stem(path), path, file, file.files)
        return
    shards, outtype = check_folder(path)
    hub_name = "" if Path(model).exists() else name  # a downloaded folder is named by a hash
    total = sum(shard.stat().st_size for shard in shards)
    with temporary_folder(scratch, name) as temp:
        with _Child(path, temp / "model.gguf", outtype, hub_name, total, header_only) as child:
            yield Source(name, path, child.header(), [*shards, path / "config.json"], child)


def resolve(model: str, revision: str | None = None) -> tuple[Path, str]:
    """(file or folder, the model's name); a Hub id is downloaded through huggingface_hub."""
    path = Path(model)
    if path.exists():
        if revision:
            raise UsageError(f"--revision is for Hub ids and {path} is on this disk: leave it out")
        return path, path.resolve().name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise UsageError(f"{model}: there is no such file, folder or Hub id: check the path")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=_WANTED)
        return Path(folder), model.split("/")[1]
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UsageError(f"{model}: not a path here nor a model on the Hub: check name and --revision") from error
    except (HfHubHTTPError, OSError) as error:
        raise EnvironmentFailed(f"{model}: the download failed ({_line(error)}): check the network") from error


def stem(model: str | Path) -> str:
    """What {name} stands for: the name of the folder, of the Hub id, or of the file without its ending."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", path.name)


def check_folder(folder: Path) -> tuple[list[Path], str]:
    """(safetensors files, precision most weights are stored in: f32, f16 or bf16) of a sound Hugging Face folder."""
    _json(folder / "config.json", "a Hugging Face checkpoint needs it")
    shards, bytes_of = _weights(folder), Counter()
    for tensors in shards.values():
        for kind, count in tensors.values():
            bytes_of[kind] += count
    main = max(bytes_of, key=bytes_of.get, default="BF16")
    return list(shards), {"F32": "f32", "F64": "f32", "F16": "f16"}.get(main, "bf16")


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that it is taken from, whoever reads the checkpoint."""
    return {name: shard for shard, tensors in _weights(folder).items() for name in tensors}


def _weights(folder: Path) -> dict[Path, dict[str, tuple[str, int]]]:
    """File -> name -> (dtype, weights): what the index maps to this file, or without an index all of model*.safetensors.

    A file that the index does not name is not looked at, nor a tensor where the index has it in another file.
    """
    index = folder / "model.safetensors.index.json"
    where: dict[str, str] = {}
    if index.exists():
        where = _json(index, "").get("weight_map")
        if not (isinstance(where, dict) and where and all(isinstance(shard, str) for shard in where.values())):
            raise InputError(f"{index}: there is no weight_map of names: get the file again")
        shards = [_shard(folder, index, shard) for shard in sorted(set(where.values()))]
    else:
        shards = sorted(folder.glob("model*.safetensors"))
    if not shards:
        if any(p.suffix in _PICKLES for p in folder.iterdir()):
            raise UnsupportedError(
                f"{folder}: the weights are pickles, which can run code when loaded: convert them to safetensors first"
            )
        raise InputError(f"{folder}: there is no model.safetensors: check that the download is complete")
    found = {shard: _safetensors(shard) for shard in shards}
    for name, shard in where.items():
        if name not in found[folder / shard]:
            raise InputError(f"{index}: tensor {name!r} is not in {shard} as the index says: get the checkpoint again")
    for shard, tensors in found.items() if where else ():
        for name in list(tensors):
            if name not in where:
                raise InputError(f"{index}: tensor {name!r} of {shard.name} is not in it: get the checkpoint again")
            if folder / where[name] != shard:
                del tensors[name]
    return found


def fingerprint(files: Iterable[Path]) -> str:
    """16 hexadecimal digits, the same for a copy: of the files' sizes, their first bytes and samples of the rest.

    Other weights or settings give others; a change of a few bytes in a file above 17 MiB may be overlooked.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(b"%d\n" % size)
        with path.open("rb") as file:
            digest.update(file.read(HEAD))
            for at in range(HEAD, size, max(SAMPLE, (size - HEAD) // SAMPLES)):
                file.seek(at)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def temporary_folder(where: Path, name: str) -> Iterator[Path]:
    """A folder in `where` that is gone afterwards, whatever happens."""
    try:
        temp = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=where))
    except OSError as error:
        raise gguf_file.disk_error(error, where, 0) from error
    try:
        yield temp
    finally:
        shutil.rmtree(temp, ignore_errors=True)


class _Child:
    """The converter process. It writes the header first, so that the plan can be checked before the long job."""

    def __init__(self, folder: Path, outfile: Path, outtype: str, name: str, total: int, header_only: bool):
        self.folder, self.outfile, self.total = folder, outfile, total
        self.lock, self.failed = threading.Lock(), None
        script, tree = resources.folder("convert") / "hf_to_gguf.py", runtime.fetch()
        command = [sys.executable, script, tree, folder, outfile, outtype, name, *["--header-only"][: int(header_only)]]
        env = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
        self.log = open(outfile.with_name("log"), "w+b")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, env=env, text=True)

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def header(self) -> Gguf:
        """Wait for the header; upstream's complaint comes out as one sentence."""
        lines = []
        for line in self.process.stdout:
            if line.strip() == "header":
                return gguf_file.read(self.outfile, data=False)
            lines.append(line)
        raise self.failure(lines)

    def finish(self, progress: Callable[[int, int], None]) -> Gguf:
        """Wait for the data, then check the whole file."""
        while self.process.poll() is None:
            progress(min(self.outfile.stat().st_size, self.total), self.total)
            time.sleep(0.1)
        if self.process.returncode:
            raise self.failure(self.process.stdout.readlines())
        progress(self.total, self.total)
        return gguf_file.read(self.outfile)

    def running(self) -> bool:
        """False when the process has ended well; raises what it failed with."""
        code = self.process.poll()
        if code:
            with self.lock:  # threads ask
                self.failed = self.failed or self.failure(self.process.stdout.readlines())
            raise self.failed
        return code is None

    def failure(self, lines: list[str]) -> SplitqError:
        with contextlib.suppress(ValueError, IndexError):
            report = json.loads(lines[-1])
            if report["kind"] == "disk":
                return EnvironmentFailed(
                    f"{self.outfile.parent.parent}: the disk filled up while the intermediate file of "
                    f"{gguf_file.mib(self.total)} was being written: make room or choose another --outfile"
                )
            return _KINDS[report["kind"]](
                f"{self.folder}: llama.cpp's converter cannot convert this checkpoint: {_short(report['message'])}"
            )
        self.log.seek(0)
        last = self.log.read().decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        return EnvironmentFailed(
            f"{self.folder}: the converter process ended with code {self.process.wait()} ({_short(last[0])}): "
            "check memory and the installation"
        )


def _json(path: Path, why: str) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: the file is missing{why and f' and {why}'}: check the folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({_line(error)}): get the file again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object: get the file again")
    return content


def _shard(folder: Path, index: Path, name: str) -> Path:
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in name:
        raise InputError(f"{index}: shard {name!r} lies outside the folder: do not trust this checkpoint")
    if not (folder / name).is_file():
        raise InputError(f"{index}: shard {name!r} is missing: complete the download")
    return folder / name


def _safetensors(path: Path) -> dict[str, tuple[str, int]]:
    """name -> (dtype, weights); the header and the file's length are checked by safetensors itself."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: (s.get_dtype(), _product(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a sound safetensors file ({_line(error)}): get it again") from error


def _product(shape: list[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _line(error: Exception) -> str:
    return _short(" ".join(str(error).split()) or type(error).__name__)


def _short(text: str) -> str:
    return text if len(text) <= 300 else text[:297] + "..."
