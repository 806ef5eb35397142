# SPDX-License-Identifier: MIT
"""The options of each command, and every check of them that can be made before work starts.

A field that holds a path says whether the file is read or written. No file that is read may be written, no two outputs
may be one file, and every output must have a folder that takes it: all of that is asked first, since what it would cost
later is a model or hours.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from . import output, plan, resources, types
from .calibration import ranks, text
from .errors import InputError, UsageError
from .files import checkpoint
from .plan import mix
from .runtime import native
from .types.stock import missing_library

MAX_THREADS = 4096
MOST_TOKENS = 1 << 30  # of a chunk, or chunks of a text
MAX_REPORT = 1 << 28  # bytes of a JSON file that is looked into
CHANGED = "the --card"  # what messages call a file that must be there, and stays but for a part
MAX_CARD = 1 << 20  # bytes of a model card
_SUFFIX = ".00000000.tmp"  # the longest of the names that are used beside an output's own


def _path(role: str, name: str, default: str | None | object = MISSING, at: str | None = None) -> Any:
    """A field for a path. role: read or written; name: what messages call it; at: what has the path it stands for."""
    return field(default=default, metadata={"role": role, "name": name, "at": at})


@dataclass(frozen=True)
class Options:
    """What the options of all commands have in common."""

    overwrite = False  # where there is no such option

    def paths(self, role: str) -> list[tuple[str, Path]]:
        """(what messages call it, path) of the files given in this role."""
        given = [f for f in fields(self) if f.metadata.get("role") == role]
        found = [(f.metadata["name"], getattr(self, f.metadata["at"] or f.name)) for f in given]
        return [(name, Path(path)) for name, path in found if path is not None]

    @functools.cached_property
    def writes(self) -> list[tuple[str, Path]]:
        """`paths` of what this run writes, as they were when they were first asked for."""
        return self.paths("written")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Keep other runs from the outputs; UsageError when one has them, or has just made them."""
        with output.locked(places(self.writes)):
            check_outputs(self.writes, self.overwrite)
            yield

    def check_paths(self) -> None:
        """UsageError for a path that the system cannot even look up, InputError for a file that may not be read."""
        for f in fields(self):
            if "role" in f.metadata and getattr(self, f.name) is not None:
                check_path(f.metadata["name"], getattr(self, f.name))
        for _, path in self.paths("read"):
            if path.exists() and not os.access(path, os.R_OK):
                raise InputError(f"{path}: cannot be read (Permission denied): check its rights")


@dataclass(frozen=True)
class Convert(Options):
    """What `convert` is given.

    bpw, instead of `type`: types for the linear layers that cost the least divergence at that many stored bits per
    weight, measured on `calib`; file_bpw, the same for all tensors of the file, and size, for its bytes, as of max_ram.
    save_plan writes such types to a JSON file, which plan_file reads, instead of all of these.
    model: a Hugging Face folder, a Hub id (with `revision`), or a GGUF in F32, F16 or BF16. tensor_type: `REGEX=TYPE`
    rules. imatrix: an importance matrix of llama-imatrix, in either format. calib: a text, or "self", to calibrate
    error feedback on with `calib_tokens` tokens. hessians: a file of what was measured, read if it is there, else
    written. tune: train afterwards, "scales" (of blocks, and norms) or "codes", those too, in tune_steps steps, or
    "layers", scales and codes of each layer when it is solved, in so many.
    calib_dtype: what the Hessians are computed in: "f32", "bf16", or "auto" for what the device is fast in.
    device: what a calibration runs on: "cpu",
    "cuda", "cuda:1", or "auto" for a GPU where there is one. aim: "half" to repair half of what the matrices before
    have done to a matrix's outputs, or "plain". claq_metric: what gives a column of cq2.x, sq2.x and so on more bits,
    "hessian" or "outlier".
    dry_run: print the plan, write nothing but save_plan. report: a JSON file for the per-tensor errors. max_ram: bytes,
    or text like "2G"; max_vram: the same of a GPU's memory. load: try whether the patched llama.cpp, where it is built,
    loads the file. mmproj: a file or template for the vision or audio part of the checkpoint; the template alone lies
    beside the output. container: write this project's types as rows of bytes that every GGUF reader takes
    (`files/container.py`), not with their own ids. card: a model card for a hub; README.md alone lies beside the
    output. overwrite: replace an existing outfile, save_plan and card; a report replaces an earlier one anyway.
    """

    model: str | Path = _path("read", "the model")
    type: str | None = None
    outfile: str | Path = _path("written", "--outfile", output.TEMPLATE, at="path")
    bpw: float | None = None
    file_bpw: float | None = None
    size: str | int | None = None
    plan_file: str | Path | None = _path("read", "--plan", None)
    save_plan: str | Path | None = _path("written", "--save-plan", None)
    tensor_type: Iterable[str] = ()
    token_embedding_type: str | None = None
    output_tensor_type: str | None = None
    imatrix: str | Path | None = _path("read", "--imatrix", None)
    calib: str | Path | None = _path("read", "--calib", None)
    calib_tokens: int = 131_072
    hessians: str | Path | None = _path("read", "--hessians", None)
    tune: str | None = None
    tune_steps: int | None = None
    calib_dtype: str = "auto"
    device: str = "auto"
    aim: str = "half"
    claq_metric: str = "hessian"
    dry_run: bool = False
    report: str | Path | None = _path("written", "--report", None)
    load: bool = True
    mmproj: str | Path | None = _path("written", "--mmproj", None, at="mmproj_path")
    container: bool = True
    card: str | Path | None = _path("written", "--card", None, at="card_path")
    threads: int | None = None
    max_ram: str | int | None = None
    max_vram: str | int | None = None
    overwrite: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensor_type", tuple(self.tensor_type))

    @functools.cached_property
    def workers(self) -> int:
        """The number of threads."""
        return check_threads(self.threads)

    @functools.cached_property
    def limit(self) -> int | None:
        """Bytes of memory to stay below."""
        return parse_size(self.max_ram)

    @functools.cached_property
    def room(self) -> int | None:
        """Bytes of the file at most."""
        return parse_size(self.size, "--size")

    @functools.cached_property
    def vram(self) -> int | None:
        """Bytes of a GPU's memory to stay below."""
        return parse_size(self.max_vram, "--max-vram")

    @functools.cached_property
    def plan(self) -> mix.Mix | None:
        """What --plan holds."""
        return mix.load(self.plan_file) if self.plan_file else None

    @property
    def budget(self) -> mix.Budget | None:
        """That of a saved plan too; None without one, and of `size`, which is known with the model alone."""
        if self.plan:
            return mix.Budget(self.plan.bpw, self.plan.whole)
        if self.file_bpw is not None:
            return mix.Budget(self.file_bpw, True)
        return None if self.bpw is None else mix.Budget(self.bpw)

    @property
    def measures(self) -> bool:
        """Whether types are chosen here, by running the model."""
        return any(given is not None for given in (self.bpw, self.file_bpw, self.size))

    @property
    def mixed(self) -> bool:
        """Whether tensors have the types of a budget."""
        return self.measures or self.plan is not None

    @property
    def plans_only(self) -> bool:
        """Whether the headers are all that is needed."""
        return self.dry_run and not self.measures

    @property
    def base(self) -> str:
        """The type of what neither a rule nor a plan decides."""
        return self.type if self.type is not None else mix.base(self.budget.bpw if self.budget else 0)

    @property
    def label(self) -> str:
        """What stands for {type} in the output's name."""
        if self.room is not None:
            return "".join(str(self.size).split())
        return mix.label(self.budget.bpw, self.budget.whole) if self.budget else types.get(self.base).name

    @functools.cached_property
    def path(self) -> Path:
        """The output."""
        return output.path(self.outfile, checkpoint.stem(self.model), self.label)

    @functools.cached_property
    def mmproj_path(self) -> Path | None:
        """The file of the vision or audio part."""
        if self.mmproj is None:
            return None
        beside = str(self.mmproj) == output.MMPROJ
        template = self.path.parent / output.MMPROJ if beside else Path(self.mmproj)
        return output.path(template / output.MMPROJ if template.is_dir() else template, checkpoint.stem(self.model), "")

    @functools.cached_property
    def card_path(self) -> Path | None:
        """The model card."""
        if self.card is None:
            return None
        return self.path.with_name(output.CARD) if str(self.card) == output.CARD else Path(self.card)

    @property
    def hub_id(self) -> str | None:
        """The model as a hub names it, if it was given so."""
        known = re.fullmatch(r"[\w.-]+/[\w.-]+", str(self.model), re.ASCII) and not Path(self.model).exists()
        return str(self.model) if known else None

    @functools.cached_property
    def precision(self) -> str:
        """What calibration computes in here: "f32" or "bf16"."""
        from .calibration import solve

        return solve.precision(self.calib_dtype, self.processor)

    @functools.cached_property
    def processor(self) -> str:
        """What a calibration runs on, as PyTorch names it; under torchrun a GPU of this process' own."""
        return ranks.own(check_device(self.device))

    @functools.cached_property
    def steps(self) -> int:
        """What `tune` takes; 0 without it."""
        from .calibration import tune

        return (self.tune_steps or tune.STEPS[self.tune]) if self.tune else 0

    @property
    def trains_whole(self) -> str | None:
        """What `tune` trains of the model as a whole."""
        return None if self.tune == "layers" else self.tune

    @property
    def journal(self) -> Path:
        """The folder of what a calibration has finished."""
        return self.path.with_name(f".{self.path.name}.unfinished")

    @property
    def scratch(self) -> Path:
        """The folder for intermediate files."""
        return Path(tempfile.gettempdir()) if self.dry_run else output.folder(self.outfile)

    def paths(self, role: str) -> list[tuple[str, Path]]:
        found = dict(super().paths(role))
        if role == "written":
            if self.hessians is not None and not Path(self.hessians).exists():
                found["--hessians"] = Path(self.hessians)
        else:
            if self.calib == "self":
                del found["--calib"]
            if self.hessians is not None and not Path(self.hessians).exists():
                del found["--hessians"]
        return list(found.items())

    @functools.cached_property
    def writes(self) -> list[tuple[str, Path]]:
        """`paths` of what this run writes: with dry_run, the plan alone."""
        return [(name, path) for name, path in self.paths("written") if not self.dry_run or name == "--save-plan"]

    def check(self) -> None:
        """Raise what is wrong with these options, the model's own content aside."""
        self.check_paths()
        _ = self.workers, self.limit, self.room, self.vram
        if self.device != "auto":
            check_device(self.device)
        check_choice(self.type, self.bpw, self.file_bpw, self.size, self.plan_file, self.save_plan, self.calib)
        check_calibration(self.calib, self.calib_tokens, self.imatrix, self.hessians, self.tune, self.tune_steps)
        if self.tune == "layers":
            check_layers(self.aim)
        self.check_files(Path(self.model))
        check_outputs(self.writes, self.overwrite)
        if not self.plans_only:
            self.check_library()

    def check_files(self, model: Path) -> None:
        """UsageError when an output is an input or another output. model: what --revision and a Hub id stand for."""
        others = [(name, path) for name, path in self.paths("read") if name != "the model"]
        journal = self.journal if self.calib and not self.dry_run else None
        check_files(self.paths("written"), others, model, journal)

    def check_library(self) -> None:
        """EnvironmentFailed when a type that is asked for needs the C library and that is not built."""
        rules = [rule.rpartition("=")[2] for rule in self.tensor_type if "=" in rule]
        planned = self.plan.types.values() if self.plan else ()
        ends = [name for name in (self.token_embedding_type, self.output_tensor_type) if name]
        weighted = bool(self.imatrix or self.calib)
        for kind in map(types.get, (self.base, *planned, *rules, *ends)):
            if kind.needs_library(weighted) and native.library() is None:
                raise missing_library(kind.name, weighted)


@dataclass(frozen=True)
class Dequantize(Options):
    """What `dequantize` is given."""

    file: str | Path = _path("read", "the model")
    outfile: str | Path | None = _path("written", "--outfile", None, at="path")  # the template unless given
    type: str = "f16"
    threads: int | None = None
    overwrite: bool = False

    @functools.cached_property
    def path(self) -> Path:
        """The output."""
        return output.path(self.outfile or output.TEMPLATE, Path(self.file).stem, types.get(self.type).name)

    @functools.cached_property
    def workers(self) -> int:
        """The number of threads."""
        return check_threads(self.threads)

    def check(self) -> None:
        """Raise what is wrong with these options, the file's own content aside."""
        self.check_paths()
        _ = self.workers
        if types.get(self.type).name not in plan.FLOATS:
            raise UsageError(f"--type {self.type.lower()} is not a float type: choose f16, bf16 or f32")
        check_files(self.writes, [], Path(self.file))
        check_outputs(self.writes, self.overwrite)


@dataclass(frozen=True)
class Repack(Options):
    """What `repack` is given. container: the form to write; otherwise types have their own ids."""

    file: str | Path = _path("read", "the model")
    container: bool = True
    outfile: str | Path | None = _path("written", "--outfile", None, at="path")  # the template unless given
    overwrite: bool = False

    @functools.cached_property
    def path(self) -> Path:
        """The output."""
        name = re.sub(r"-(container|native|\d{5}-of-\d{5})$", "", Path(self.file).stem)
        return output.path(self.outfile or output.TEMPLATE, name, "container" if self.container else "native")

    def check(self) -> None:
        """Raise what is wrong with these options, the file's own content aside."""
        self.check_paths()
        check_files(self.writes, [], Path(self.file))
        check_outputs(self.writes, self.overwrite)


@dataclass(frozen=True)
class Validate(Options):
    """What `validate` is given.

    report: a JSON file for the same dict that is returned. card: a model card that `convert` wrote, to put the numbers
    into. force: measure even on text that `file` was calibrated on. max_kld: nats.
    """

    file: str | Path = _path("read", "the model")
    baseline: str | Path = _path("read", "--baseline")
    text: str | Path = _path("read", "--text")
    ctx: int = 512
    chunks: int | None = None
    threads: int | None = None
    max_kld: float | None = None
    max_ppl_ratio: float | None = None
    report: str | Path | None = _path("written", "--report", None)
    card: str | Path | None = _path("written", CHANGED, None)
    force: bool = False

    def check(self) -> None:
        """Raise what is wrong with these options, the files' own content aside."""
        self.check_paths()
        check_threads(self.threads)
        for name, count in (("--ctx", self.ctx), ("--chunks", self.chunks)):
            if count is not None and count > MOST_TOKENS:
                raise UsageError(f"{name} {count} is more than any text has: give a smaller number")
        for name, limit in (("--max-kld", self.max_kld), ("--max-ppl-ratio", self.max_ppl_ratio)):
            if limit is not None and not limit >= 0:
                raise UsageError(f"{name} {limit} is no limit: give a number from 0 on")
        check_files(self.writes, [("--text", Path(self.text))], Path(self.file))
        check_files(self.writes, [], Path(self.baseline), name="--baseline")
        check_outputs(self.writes, self.overwrite)


@dataclass(frozen=True)
class OllamaCreate(Options):
    """What `ollama create` is given. host: of the server, instead of OLLAMA_HOST."""

    name: str
    file: str | Path = _path("read", "the model")
    modelfile: str | Path | None = _path("read", "--modelfile", None)
    overwrite: bool = False
    host: str | None = None

    def check(self) -> None:
        """Raise what is wrong with these options; what a name may be, the server says."""
        self.check_paths()


@dataclass(frozen=True)
class Inspect(Options):
    """What `inspect` is given, its form aside."""

    file: str | Path = _path("read", "the file")

    def check(self) -> None:
        """Raise what is wrong with these options."""
        self.check_paths()


def check_path(name: str, path: str | Path) -> None:
    """UsageError for a path that the system cannot even look up: empty, too long, with a zero byte, or forbidden."""
    given = os.fspath(path)
    try:
        if given:
            os.stat(given)
            return
        cause = "it is empty"
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        cause = getattr(error, "strerror", None) or str(error)
    shown = given if len(given) <= 60 else given[:57] + "..."
    raise UsageError(f"{name} {shown!r} is no path that can be used ({cause}): give another")


def check_files(
    written: Iterable[tuple[str, Path]],
    read: Iterable[tuple[str, Path]],
    model: Path,
    journal: Path | None = None,
    name: str = "the model",
) -> None:
    """UsageError when an output is an input or another output, by whatever name, or lies in a folder that will go.

    written, read: (what messages call it, path). model: a file, which may be one of several shards, or a folder, all
    of whose files count, but for the output of an earlier run. journal: the folder that is removed in the end.
    """
    written, read = list(written), list(read)
    for number, (option, path) in enumerate(written):
        for what, file in [*read, *((name, file) for file in model_files(model))]:
            if same(path, file) and not (what == name and model.is_dir() and is_earlier(option, path)):
                raise UsageError(f"{path}: {option} would replace its own input, {what}: choose another name")
        for other, file in written[:number]:
            if same(path, file):
                raise UsageError(f"{path}: {other} and {option} are one file: choose another name for one of them")
    for option, path in [*written, *read, (name, model)]:
        if journal and any(same(folder, journal) for folder in (path, *Path(os.path.realpath(path)).parents)):
            raise UsageError(f"{path}: {option} is in the folder of an unfinished run: choose another name")


def check_outputs(written: Iterable[tuple[str, Path]], overwrite: bool) -> None:
    """UsageError when something is there that an output may not replace, or no folder to put it in.

    A report replaces an earlier one or an empty file, and goes to a device as it is; others need `overwrite`.
    """
    for option, path in written:
        if re.fullmatch(r"\..+\.(lock|unfinished)", path.name):
            raise UsageError(f"{path}: such a name is used beside outputs: choose another one for {option}")
        if path.is_dir() or path.exists() and not path.is_file() and option != "--report":
            what = "folder" if path.is_dir() else "device"
            raise UsageError(f"{path}: there is already a {what}: choose another name for {option}")
        if option == CHANGED:
            if not is_earlier(option, path):
                raise UsageError(f"{path}: this is no card that `convert --card` wrote: make one")
            continue
        if path.is_file() and option == "--report" and path.stat().st_size and not is_earlier(option, path):
            raise UsageError(f"{path}: there is already a file that is no earlier report: choose another --report")
        if path.is_file() and option == "--hessians":  # it was not there a moment ago
            raise UsageError(f"{path}: another run has just written it: run the command again to read it")
        if path.is_file() and option != "--report" and not overwrite:
            raise UsageError(f"{path}: there is already a file: pass --overwrite or another name")
    for option, path in places(written):
        if not path.parent.is_dir():
            raise UsageError(f"{path.parent}: there is no such folder: make it or choose another {option}")
        try:
            os.stat(path.with_name(f".{path.name}{_SUFFIX}"))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UsageError(f"{path}: the name cannot be used ({error.strerror}): choose another {option}") from error


def places(written: Iterable[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """The same with the files that appear in the end: texts are written through links, and a device is no file."""
    files = [(option, path) for option, path in written if path.is_file() or not path.exists()]
    texts = ("--report", "--save-plan", "--card", CHANGED)
    return [(o, Path(os.path.realpath(p)) if o in texts else p) for o, p in files]


def same(one: Path, other: Path) -> bool:
    """Whether two paths are one file: through links, by another name, or once they are written."""
    try:
        return one.samefile(other)
    except OSError:  # at least one is not there yet
        one, other = Path(os.path.realpath(one)), Path(os.path.realpath(other))
        return one == other or one.name == other.name and _same_folder(one.parent, other.parent)


def _same_folder(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def model_files(model: Path) -> list[Path]:
    """All files of a checkpoint's folder, or all shards of a GGUF file."""
    if model.is_dir():
        files = [path for path in model.iterdir() if os.path.isfile(path)]
        return files + checkpoint.indexed_files(model)  # which may be in folders, and these be links
    if shard := re.fullmatch(r"(.*)-\d{5}-of-(\d{5}\.gguf)", model.name):
        return [model, *model.parent.glob(f"{glob.escape(shard[1])}-?????-of-{shard[2]}")]
    return [model]


def is_earlier(option: str, path: Path) -> bool:
    """Whether the file is what this option writes: a report, a plan, a card, a GGUF file."""
    try:
        with open(path, "rb") as file:
            if option in ("--card", CHANGED):
                return output.NUMBERS.encode() in file.read(MAX_CARD)
            start = file.read(4)
            if option not in ("--report", "--save-plan"):
                return start == b"GGUF"
            if not start.lstrip().startswith(b"{") or path.stat().st_size > MAX_REPORT:
                return False
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    keys = [{"bpw", "types", "costs"}] if option == "--save-plan" else [{"file", "tensors"}, {"file", "mean_kld"}]
    return isinstance(content, dict) and any(content.keys() >= wanted for wanted in keys)


def check_threads(threads: int | None) -> int:
    """The number of worker threads, by default the CPUs this process may use."""
    if threads is not None and not 0 < threads <= MAX_THREADS:
        raise UsageError(f"--threads {threads} is no number of threads to work with: give 1 to {MAX_THREADS}")
    return threads or resources.cores()


def check_device(device: str) -> str:
    """As PyTorch names it; of "auto" a GPU where there is one. UsageError for one that PyTorch does not see."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device, re.ASCII):
        raise UsageError(f"--device {device[:60]}: not a device to solve on: give cpu, cuda, cuda:N or auto")
    if device == "cpu":
        return device
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    if int(device.partition(":")[2] or 0) >= count:
        seen = f"{count} GPU{'s' * (count != 1)}"
        raise UsageError(
            f"--device {device}: PyTorch {torch.__version__} sees {seen}: give another, or install PyTorch for CUDA"
        )
    return device


def parse_size(size: str | int | None, option: str = "--max-ram") -> int | None:
    """Bytes from text such as "1500M" or "2G" (powers of 1024); UsageError for what no machine has."""
    if size is None:
        return None
    match = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?)\s*([KMGT]?)(i?B)?", str(size).strip(), re.IGNORECASE | re.ASCII)
    found = int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if not 0 < found < 1 << 63:
        raise UsageError(f"{option} {str(size)[:60]!r} is not a size: write e.g. 1500M or 2G")
    return found


def check_choice(
    type: str | None,
    bpw: float | None,
    file_bpw: float | None,
    size: str | int | None,
    plan_file: str | Path | None,
    save_plan: str | Path | None,
    calib: str | Path | None,
) -> None:
    """UsageError unless exactly one of type, budget and plan is given, and with a budget a text to measure on."""
    if sum(given is not None for given in (type, bpw, file_bpw, size, plan_file)) != 1:
        raise UsageError(
            "what the tensors become is not clear: give one of --type, --bpw, --file-bpw, --size and --plan"
        )
    budgets = {"--bpw": bpw, "--file-bpw": file_bpw, "--size": size}
    budget = next((option for option, given in budgets.items() if given is not None), None)
    for option, bits in (("--bpw", bpw), ("--file-bpw", file_bpw)):
        if bits is not None and not 0 < bits < 32:
            raise UsageError(f"{option} {bits:g} is no number of bits for a weight: give for example 3.5")
    if budget and not calib:
        raise UsageError(f"{budget} measures on a text what each type costs: give --calib TEXT, or --calib self")
    if save_plan is not None and not budget:
        raise UsageError(f"--save-plan {save_plan}: only --bpw, --file-bpw and --size make a plan: give one of them")
    if save_plan is not None and not Path(save_plan).absolute().parent.is_dir():
        raise UsageError(f"--save-plan {save_plan}: its folder does not exist: create it first")


def check_layers(aim: str) -> None:
    """UsageError where layers cannot be trained one by one."""
    if aim != "half":
        raise UsageError(f"--aim {aim}: --tune layers trains a layer behind the stored ones: leave one of them out")
    if ranks.launched():
        raise UsageError("--tune layers is for one process: start it without torchrun, or leave it out")


def check_calibration(
    calib: str | Path | None,
    tokens: int,
    imatrix: str | Path | None,
    hessians: str | Path | None = None,
    tune: str | None = None,
    steps: int | None = None,
) -> None:
    """UsageError unless the options of a calibration fit together."""
    if calib and imatrix:
        raise UsageError("--calib and --imatrix exclude each other: the calibration measures the whole Hessian itself")
    if (hessians or tune) and not calib:
        option = f"--hessians {hessians}" if hessians else "--tune"
        raise UsageError(f"{option} needs a text to run the model on: give --calib TEXT, or --calib self")
    if steps is not None and (not tune or steps < 1):
        cause = "nothing is trained without --tune" if not tune else "too few to train anything"
        raise UsageError(f"--tune-steps {steps}: {cause}: give --tune codes --tune-steps 640, or leave it")
    if hessians and (Path(hessians).is_dir() or not Path(hessians).absolute().parent.is_dir()):
        raise UsageError(f"--hessians {hessians}: not a file in a folder that exists: name another")
    if calib and calib != "self":
        if not Path(calib).is_file():
            cause = "not a regular file" if Path(calib).exists() else "there is no such text"
            raise UsageError(f"{calib}: {cause}: give a file, or `self`")
        text.read(Path(calib))
    if tokens < 2048:
        raise UsageError(f"--calib-tokens {tokens} is too few to tell anything: give 2048 or more")
