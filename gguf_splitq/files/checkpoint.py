# SPDX-License-Identifier: MIT
"""What MODEL may be: a Hugging Face folder, a Hub id, or a GGUF in F32, F16 or BF16; all become a readable GGUF.

A folder is checked first (configuration, index, every safetensors header against its file), then llama.cpp's own
converter runs on it in a child process (hf_to_gguf.py) and writes an intermediate GGUF in the checkpoint's own
precision in a temporary folder beside the output, which can be read while it grows. Tensors that need no change are
not in it: they are read where the checkpoint has them.
"""

from __future__ import annotations

import contextlib
import functools
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
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ..errors import EnvironmentFailed, InputError, SplitqError, UnsupportedError, UsageError, one_line
from ..runtime import fetching
from . import gguf_file
from .gguf_file import Gguf

ADAPTER = Path(__file__).with_name("hf_to_gguf.py")
ADAPTER_RAM = 1 << 30  # bytes: PyTorch, transformers and the tokenizer in the child process
HEAD, SAMPLE, SAMPLES = 1 << 20, 1 << 14, 1 << 10  # of a file: bytes in front, bytes of a sample, samples of the rest
INDEX = "model.safetensors.index.json"
LAYERS = ("n_layers", "num_hidden_layers", "n_layer", "num_layers")  # keys of a configuration
MTP_LAYERS = ("mtp_num_hidden_layers", "num_nextn_predict_layers")

_WANTED = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]  # of a Hub repository, beside the weights
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MERGE = (
    'python -c "from peft import AutoPeftModelForCausalLM as Model; '
    + "Model.from_pretrained('{0}').merge_and_unload().save_pretrained('{0}-merged')"
    + '"'
)
_PART = re.compile(r"(model.*)-\d{5}-of-(\d{5})\.safetensors")
_KINDS = {"unsupported": UnsupportedError, "environment": EnvironmentFailed, "input": InputError}
_STEPS = {
    "unsupported": "convert another model, or wait for a version with a newer llama.cpp",
    "environment": "check memory and the installation",
    "input": "compare config.json, tokenizer and README.md with the original's, or get them again",
}


@dataclass
class Source:
    """A checkpoint ready to be planned. header: tensors and metadata, the data perhaps not there yet."""

    name: str
    path: Path  # of the Hugging Face folder or of the GGUF file
    header: Gguf
    files: list[Path]  # all inputs, none of which may be overwritten
    child: _Child | None = None
    config: dict = field(default_factory=dict)  # of a folder
    notes: list[str] = field(default_factory=list)  # what is worth a line in the summary
    mmproj: Path | None = None  # the vision or audio part, written already, in the temporary folder

    def data(self, progress: Callable[[int, int], None] = lambda done, total: None) -> Gguf:
        """The GGUF with its data, once the child (if any) has written it; progress gets bytes done and in all."""
        return self.child.finish(progress) if self.child else self.header

    def growing(self) -> Gguf:
        """The GGUF at once: reading it waits for what the child has not written yet."""
        if self.child:
            self.header.growing = self.child.running
        return self.header


@contextlib.contextmanager
def opened(
    model: str | Path, scratch: Path, revision: str | None = None, header_only: bool = False, mmproj: bool = False
) -> Iterator[Source]:
    """Resolve and check MODEL. scratch: the folder for intermediate files, gone afterwards. mmproj: also write
    the vision or audio part, first, which takes little beside the rest.

    Raises UsageError (no such model), InputError (damaged), UnsupportedError (pickles, unknown architecture),
    EnvironmentFailed (network, disk, a missing package).
    """
    path, name = resolve(str(model), revision)
    if path.is_file():
        _check_is_no_part(path)
        if mmproj:
            raise UsageError(
                f"{path}: --mmproj takes the vision part of a Hugging Face folder, not of a GGUF: give that"
            )
        with gguf_file.read(path) as file:
            yield Source(stem(path), path, file, file.files)
        return
    shards, outtype = check_folder(path)
    hub_name = "" if Path(model).exists() else name  # a downloaded folder is named by a hash
    total = sum(shard.stat().st_size for shard in shards)
    with temporary_folder(scratch, name) as temp:
        written = None
        if mmproj and not header_only:
            with _Child(path, temp / f"{name[:90]}.mmproj.gguf", outtype, hub_name, total, False, mmproj=True) as child:
                written = child.finish().path
        with _Child(path, temp / f"{name[:100]}.gguf", outtype, hub_name, total, header_only) as child:
            head, files, config = child.header(), [*shards, path / "config.json"], _json(path / "config.json", "")
            if not head.tensors:
                raise InputError(f"{path}: llama.cpp's converter finds no tensor in it: get the checkpoint again")
            notes = [*child.notes, *_absent(head, config, *child.aside, mmproj)]
            yield Source(name, path, head, files, child, config, notes, written)


def _absent(head: Gguf, config: dict, count: int, able: int, mmproj: bool) -> Iterator[str]:
    """What of the checkpoint is not in the file, or not as the configuration says. count, able: `_Child.aside`."""
    if count:
        way = "they are in the mmproj file" if mmproj else "--mmproj writes them to a file of their own"
        way = way if able else "llama.cpp has no use for them"
        yield f"{count} tensors of the vision or audio part are left out: {way}"
    kinds = ("ForCausalLM", "ForConditionalGeneration")
    generates = any(str(name).endswith(kinds) for name in config.get("architectures") or ())
    untied = config.get("tie_word_embeddings") is False and all(t.name != "output.weight" for t in head.tensors)
    if generates and untied:
        yield "tie_word_embeddings is false and there is no output matrix: llama.cpp takes the embedding for it"


def keep_mmproj(written: Path, path: Path) -> None:
    """Copy the vision or audio part to its final name, under which it appears whole or not at all."""
    with open(written, "rb") as part, gguf_file.atomic(path, written.stat().st_size) as out:
        shutil.copyfileobj(part, out)


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
        download = functools.partial(huggingface_hub.snapshot_download, model)
        folder = Path(download(revision=revision, allow_patterns=_WANTED))
        if (folder / "config.json").exists():  # the same weights are often there in other formats, too
            wanted = sorted(set(_index(folder).values())) or ["model*.safetensors"]
            download(revision=folder.name, allow_patterns=wanted)  # of the very commit, should a branch have moved
        return folder, model.split("/")[1]
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UsageError(f"{model}: not a path here nor a model on the Hub: check name and --revision") from error
    except (HfHubHTTPError, OSError) as error:
        raise EnvironmentFailed(f"{model}: the download failed ({one_line(error)}): check the network") from error


def stem(model: str | Path) -> str:
    """What {name} stands for: the name of the folder, of the Hub id, or of the file without its ending."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", path.name)


def check_folder(folder: Path) -> tuple[list[Path], str]:
    """(safetensors files, precision most weights are stored in: f32, f16 or bf16) of a sound Hugging Face folder."""
    if not (folder / "config.json").exists() or not any(folder.glob("model*.safetensors*")):
        _explain_other_kinds(folder)
    config = _json(folder / "config.json", "a Hugging Face checkpoint needs it")
    _check_architectures(folder / "config.json", config)
    shards = _weights(folder)
    weights_of: Counter[str] = Counter()
    for tensors in shards.values():
        for kind, count in tensors.values():
            weights_of[kind] += count
    if not any(config.get(key) for key in ("quantization_config", "quantization", "compression_config")):
        for shard, tensors in shards.items():
            for name, (kind, _) in tensors.items():
                if name.endswith(".weight") and re.fullmatch(r"[IU]\d+|BOOL", kind):
                    raise UnsupportedError(
                        f"{shard}: tensor {name!r} holds integers ({kind}) and config.json declares no quantization: "
                        "get the F32, F16 or BF16 original"
                    )
    # Integers are codes of quantized weights.
    main = max(("BF16", "F16", "F32", "F64"), key=lambda kind: weights_of[kind])
    return list(shards), {"F32": "f32", "F64": "f32", "F16": "f16"}.get(main, "bf16")


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that it is taken from, whoever reads the checkpoint."""
    return {name: shard for shard, tensors in _weights(folder).items() for name in tensors}


def indexed_files(folder: Path) -> list[Path]:
    """The files that an index names and that are there; none where the index is damaged."""
    with contextlib.suppress(SplitqError):
        return [folder / name for name in set(_index(folder).values()) if os.path.isfile(folder / name)]
    return []


def _weights(folder: Path) -> dict[Path, dict[str, tuple[str, int]]]:
    """File -> name -> (dtype, weights): what the index maps to it, or without an index what model*.safetensors hold.

    A file that the index does not name is not looked at, nor a tensor where the index has it in another file.
    """
    index = folder / INDEX
    where = _index(folder)
    if where:
        shards = [_shard(folder, index, shard) for shard in sorted(set(where.values()))]
    else:
        shards = sorted(folder.glob("model*.safetensors"))
        for shard in shards:
            if numbered := _PART.fullmatch(shard.name):
                _check_parts(folder, numbered[1], int(numbered[2]))
    if not shards:
        raise InputError(f"{folder}: there is no model.safetensors: check that the download is complete")
    found = {shard: _safetensors(shard) for shard in shards}
    for name, part in where.items():
        if name not in found[folder / part]:
            raise InputError(f"{index}: tensor {name!r} is not in {part} as the index says: get the checkpoint again")
    first: dict[str, Path] = {}
    for shard, tensors in found.items():
        for name in list(tensors):
            if not where and first.setdefault(name, shard) != shard:
                raise InputError(
                    f"{folder}: tensor {name!r} is in {first[name].name} and in {shard.name}, and no index says which "
                    "counts: take the file that is not meant out of the folder"
                )
            if where and name not in where:
                raise InputError(f"{index}: tensor {name!r} of {shard.name} is not in it: get the checkpoint again")
            if where and folder / where[name] != shard:
                del tensors[name]
    return found


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> name of the file that the index maps it to; empty without an index."""
    index = folder / INDEX
    where: Any = _json(index, "").get("weight_map") if index.exists() else {}
    if index.exists() and not (where and isinstance(where, dict) and all(isinstance(s, str) for s in where.values())):
        raise InputError(f"{index}: there is no weight_map of names: get the file again")
    return where


def _check_parts(folder: Path, stem: str, count: int) -> None:
    """InputError unless all parts that their names count are there."""
    for number in range(1, count + 1):
        part = f"{stem}-{number:05}-of-{count:05}.safetensors"
        if not (folder / part).is_file():
            raise InputError(f"{folder}: {part} is missing: complete the download")


def _check_is_no_part(path: Path) -> None:
    """UsageError for a file of a checkpoint in place of its folder; UnsupportedError for a pickle."""
    if path.suffix in (".safetensors", ".json", ".model"):
        raise UsageError(f"{path}: this is a file of a checkpoint: give its folder, {path.absolute().parent}")
    if path.suffix in _PICKLES:
        raise UnsupportedError(
            f"{path}: this is a pickle, which can run code when loaded: give the folder of a checkpoint in safetensors"
        )


def _check_architectures(path: Path, config: dict) -> None:
    """InputError unless the configuration names the model's class."""
    places = [config, config.get("text_config")]
    named = [place["architectures"] for place in places if isinstance(place, dict) and place.get("architectures")]
    if not named and "ssm_cfg" not in config:  # which llama.cpp's converter knows by that
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

        kind = config.get("model_type")
        known = CLASSES.get(kind) if isinstance(kind, str) else None
        for_this = f" for model_type {kind!r}" if known else ""
        raise InputError(
            f"{path}: there is no `architectures`, which names the model's class: add it, "
            f'"architectures": ["{known or "LlamaForCausalLM"}"]{for_this or " for a Llama"}'
        )
    for names in named:
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise InputError(f"{path}: `architectures` is not a list of names: get the file again")


def _explain_other_kinds(folder: Path) -> None:
    """Raise what a folder that is not a whole checkpoint in safetensors seems to be, with the way on; or nothing."""
    names = {p.name for p in folder.iterdir() if p.is_file()}
    others = sorted(n for n in names if n.endswith(".safetensors") and not n.startswith("consolidated"))
    if "adapter_config.json" in names or "adapter_model.safetensors" in names:
        raise UnsupportedError(
            f"{folder}: this is a LoRA adapter, not a model: merge it first with `{_MERGE.format(folder)}`, and copy "
            "the tokenizer's files beside the result"
        )
    if any(n.startswith("consolidated") and n.endswith(".safetensors") for n in names):
        raise UnsupportedError(
            f"{folder}: the weights are in Mistral's own format alone (consolidated.safetensors): get the model in "
            "the Hugging Face format, or give a GGUF that llama.cpp's `convert_hf_to_gguf.py --mistral-format` made"
        )
    if "model_index.json" in names:
        raise UnsupportedError(f"{folder}: this is a pipeline of diffusers, not a language model: give one of those")
    if ggufs := sorted(n for n in names if n.endswith(".gguf")):
        raise InputError(f"{folder}: model.safetensors or config.json is missing, but a GGUF is there: give {ggufs[0]}")
    if "config.json" in names and others:
        raise InputError(
            f"{folder}: there is no model.safetensors, and {others[0]} is not named as weights of a model are: rename "
            "it to model.safetensors if it holds all of them"
        )
    if not others and any(Path(n).suffix in _PICKLES for n in names):
        raise UnsupportedError(
            f"{folder}: the weights are pickles, which can run code when loaded: convert them to safetensors first"
        )
    if "config.json" not in names and (below := sorted(folder.glob("*/config.json"))):
        raise InputError(f"{folder}: config.json is missing here, but {below[0].parent} has one: give that folder")


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
        temp = Path(tempfile.mkdtemp(prefix=f".{name[:100]}.", suffix=".tmp", dir=where))
    except OSError as error:
        raise gguf_file.disk_error(error, where, 0) from error
    try:
        yield temp
    finally:
        shutil.rmtree(temp, ignore_errors=True)


class _Child:
    """The converter process. It writes the header first, so that the plan can be checked before the long job."""

    def __init__(
        self, folder: Path, outfile: Path, outtype: str, name: str, total: int, header_only: bool, mmproj: bool = False
    ):
        self.folder, self.outfile = folder, outfile
        self.total = total  # bytes it writes at most; as they are when the header is known
        self.parts: dict[str, tuple[gguf_file.Part, ...]] = {}  # of tensors that it does not write
        self.lock = threading.Lock()
        self.failed: SplitqError | None = None
        self.notes: list[str] = []  # known with the header
        self.aside = 0, 0  # tensors of a vision or audio part, and whether an mmproj file can hold them
        command = [sys.executable, *map(str, (ADAPTER, fetching.fetch(), folder, outfile, outtype, name))]
        command += ["--header-only"] * header_only + ["--mmproj"] * mmproj
        env = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.log = open(outfile.with_name("log"), "w+b")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, env=env, text=True)

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.output.close()
        self.log.close()

    @property
    def output(self) -> IO[str]:
        """Its standard output."""
        assert self.process.stdout
        return self.process.stdout

    def header(self) -> Gguf:
        """Wait for the header; upstream's complaint comes out as one sentence."""
        lines = []
        for line in self.output:
            if line.strip() == "header":
                head = self._read(data=False)
                self.total = sum(t.n_bytes for t in head.tensors if not t.parts)
                return head
            if line.startswith("note "):
                self.notes.append(json.loads(line.removeprefix("note ")))
            elif line.startswith("at "):
                name, parts = json.loads(line.removeprefix("at "))
                self.parts[name] = tuple(gguf_file.Part(Path(file), *where) for file, *where in parts)
            elif line.startswith("aside "):
                _, count, able = line.split()
                self.aside = int(count), int(able)
            lines.append(line)
        raise self.failure(lines)

    def finish(self, progress: Callable[[int, int], None] = lambda done, total: None) -> Gguf:
        """Wait for the data, then check the whole file."""
        while self.process.poll() is None:
            progress(min(512 * self.outfile.stat().st_blocks if self.outfile.exists() else 0, self.total), self.total)
            time.sleep(0.1)
        if self.process.returncode:
            raise self.failure(self.output.readlines())
        progress(self.total, self.total)
        return self._read(data=True)

    def _read(self, data: bool) -> Gguf:
        """The file, each tensor with its place."""
        with gguf_file.read(self.outfile, data) as file:
            tensors = [replace(t, parts=self.parts.get(t.name, ())) for t in file.tensors]
            return replace(file, tensors=tensors)

    def running(self) -> bool:
        """False when the process has ended well; raises what it failed with."""
        code = self.process.poll()
        if code:
            with self.lock:  # threads ask
                self.failed = self.failed or self.failure(self.output.readlines())
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
            cause = f"llama.cpp's converter cannot convert this checkpoint: {one_line(report['message'])}"
            step = _STEPS[report["kind"]]
            return _KINDS[report["kind"]](f"{self.folder}: {cause}: {step}")
        self.log.seek(0)
        last = self.log.read().decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        return EnvironmentFailed(
            f"{self.folder}: the converter process ended with code {self.process.wait()} ({one_line(last[0])}): "
            "check memory and the installation"
        )


def _json(path: Path, why: str) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: the file is missing{why and f' and {why}'}: check the folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({one_line(error)}): get the file again") from error
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
            found = {name: (s.get_dtype(), _product(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        with open(path, "rb") as file:
            if file.read(16) == b"version https://":
                raise InputError(f"{path}: a Git LFS pointer, not the weights: run `git lfs pull`") from error
        raise InputError(f"{path}: not a sound safetensors file ({one_line(error)}): get it again") from error
    for name, (_, count) in found.items():
        if count == 0:
            cause = f"tensor {name!r} has no weights, as when each process saved its share"
            raise InputError(f"{path}: {cause}: save the checkpoint again with its parameters gathered")
    return found


def _product(shape: list[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total
