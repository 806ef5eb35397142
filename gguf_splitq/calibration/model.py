# SPDX-License-Identifier: MIT
"""A language model that is never whole in memory: one decoder layer at a time, read when its turn comes.

transformers builds the model from its configuration without weights (on PyTorch's meta device) and converts the
checkpoint's tensors as it loads them: renames, joins, stacks the experts of a mixture. Both are its own machinery
(core_model_loading.py), here given the tensors of one layer instead of all. What a layer is called with besides the
hidden states (masks, positions, which differ between layers with and without sliding attention) is caught from a run
of the model itself, its layers left out.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import tempfile
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open

from ..errors import EnvironmentFailed, InputError, SplitqError, UnsupportedError, one_line
from ..files import checkpoint
from ..files.gguf_file import disk_error
from . import text
from .ranks import ALONE, Alone

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        convert_and_load_state_dict_in_model,
        rename_source_key,
    )
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )
except ImportError as error:
    raise EnvironmentFailed(
        f"transformers {transformers.__version__} cannot load models layer by layer ({error}): install 5.23 or later"
    ) from error

CONTEXT = 512  # tokens per sequence: what llama-perplexity and llama-imatrix use
BATCH = 8  # sequences
SAMPLED, SAMPLED_ON_GPU = 16, 256  # sequences that a thread draws at a time
TOGETHER = 4  # threads that draw, so that memory is bounded
SPARE = 0.5  # of a GPU's memory, that hidden states leave to the layer being run and solved
HELD_OUT = 16  # one sequence, of those not calibrated on, to so many that are
SEED = 0  # of drawn text
SAMPLING = {"temperature": 1.0, "seed": SEED}
CHARACTERS = 16  # per token, at most, that are looked at of a long text
REST = -1  # stands for the tensors outside the decoder layers


@dataclass
class Room:
    """What a calibration may take.

    vram: bytes of the GPU's memory to stay below, None for all it has. ram: bytes of memory that hidden states may take
    where the GPU has no room for them; what is left goes to a file. say: who is told of what was too much.
    """

    vram: int | None = None
    ram: int = 0
    say: Callable[[str], None] = field(default=lambda line: None)
    pinned: list[weakref.ref[torch.Tensor]] = field(default_factory=list, repr=False)

    def place(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A GPU's tensor where it may stay: as it is, as long as SPARE of the memory is free besides, or in memory."""
        free, own, total = _gpu_memory(tensor.device)
        allowed = total if self.vram is None else min(self.vram, total)
        if min(free, allowed - own) - tensor.nbytes > SPARE * allowed:
            return tensor.detach()
        self.pinned = [ref for ref in self.pinned if ref() is not None]
        if sum(kept.nbytes for ref in self.pinned if (kept := ref()) is not None) + tensor.nbytes > self.ram:
            return None
        kept = _pinned(tensor.detach())
        self.pinned.append(weakref.ref(kept))
        return kept

    def half(self, at_once: int, most: int) -> int:
        """Sequences that a GPU is to run at a time once its memory has run out: half as many. Said the first time."""
        if at_once == most:
            self.say("the GPU's memory ran out: fewer sequences are run at a time, which takes longer")
        torch.cuda.empty_cache()
        return at_once // 2


class Model:
    """A causal language model, or an encoder, of which one decoder layer at a time is in memory.

    folder: a Hugging Face checkpoint in safetensors, or a GGUF file of an architecture that transformers can read.
    dtype: of weights and hidden states, float32 or bfloat16. Embeddings, final norm and output stay loaded.
    encoder: it gives hidden states and no logits. room: what it may take. at_once: sequences that a GPU runs at a time;
    None on a CPU, a thread of which takes one. finite: bool [] of a GPU's batches, to be looked at: see `fisher.check`.
    Raises UnsupportedError when transformers cannot load it, InputError when a tensor is missing or damaged.
    """

    def __init__(self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, room: Room | None = None):
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.path, self.device, self.dtype = Path(folder), torch.device(device), dtype
        self.room, cuda = room or Room(), self.device.type == "cuda"
        self.at_once = BATCH if cuda else None
        self.finite: list[torch.Tensor] = []
        self.reader = ThreadPoolExecutor(1, "read") if cuda else None
        if cuda and self.room.vram is not None:
            total = _gpu_memory(self.device)[2]
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.room.vram / total), self.device.index)
        if cuda:  # PyTorch loads its linear algebra at the first call, which threads must not make at once (#90613)
            torch.linalg.cholesky(torch.eye(1, device=self.device))
        self.ahead: tuple[int, Future[dict[str, Any]]] | None = None  # a layer that is being read meanwhile
        # What transformers is pointed at: a folder, with the name of the GGUF in it when it is one.
        self.source, self.advice = {"pretrained_model_name_or_path": str(folder)}, "convert without --calib"
        if self.path.is_file():
            self.source = {"pretrained_model_name_or_path": str(self.path.parent), "gguf_file": self.path.name}
            self.advice = "convert its Hugging Face folder, or without --calib"
        self.arguments: dict[torch.Size, list[tuple[tuple, dict]]] = {}  # by [batch, CONTEXT], then by layer
        self.tuples = False  # whether a layer returns its hidden states as the first of a tuple
        with self._explained():
            self._build()

    def __len__(self) -> int:
        """The number of decoder layers."""
        return len(self.layers)

    def read_tokens(self, path: Path, count: int) -> torch.Tensor:
        """int64 [sequences, CONTEXT] taken evenly from a text, the model's first token in front of each sequence, and
        behind it what separates an encoder's.

        Raises InputError when the text is none or gives less than four sequences, or the tokenizer is not this
        model's, and UnsupportedError when transformers cannot load it.
        """
        return self.split_text(path, count)[0]

    def split_text(self, path: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`read_tokens`, and `held_out` sequences from between those, or as many as there are."""
        documents = text.read(path)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(**self.source, trust_remote_code=False)
            words = self._words(tokenizer, path, documents, CHARACTERS * count)
            ids = tokenizer(words, add_special_tokens=False)["input_ids"]
        except SplitqError:
            raise
        except Exception as error:  # a tokenizer's library raises whatever it likes
            raise UnsupportedError(
                f"{self.path}: transformers cannot load a tokenizer from it ({one_line(error)}): use --calib self"
            ) from error
        marks = (tokenizer.cls_token_id, tokenizer.sep_token_id) if self.encoder else (tokenizer.bos_token_id, None)
        first, last = ([] if mark is None else [mark] for mark in marks)
        size = self.module.get_input_embeddings().num_embeddings
        if (largest := max(first + ids + last, default=0)) >= size:
            raise InputError(
                f"{self.path}: the tokenizer gives token {largest} and the embedding has {size} rows: "
                "put the tokenizer there that belongs to this checkpoint"
            )
        body = CONTEXT - len(first) - len(last)
        available = len(ids) // body
        sequences = min(available, count // CONTEXT)
        if sequences < 4:
            raise InputError(f"{path}: {len(ids)} tokens are too few to calibrate on: give at least {4 * body}")
        rows = torch.tensor(ids[: available * body]).view(available, body)
        used = torch.linspace(0, available - 1, sequences).long()
        others = torch.tensor(sorted({*range(available)} - {*used.tolist()}), dtype=torch.long)
        others = others[torch.linspace(0, len(others) - 1, min(len(others), held_out(sequences))).long()]
        start, end = (torch.tensor(mark, dtype=torch.long) for mark in (first, last))

        def marked(chosen: torch.Tensor) -> torch.Tensor:
            return torch.cat([start.expand(len(chosen), -1), rows[chosen], end.expand(len(chosen), -1)], 1)

        return marked(used), marked(others)

    def _words(self, tokenizer: Any, path: Path, documents: Mapping[int, str | text.Chat], limit: int) -> str:
        """The documents as one text, or parts of it taken evenly when it is longer than `limit` characters."""
        texts = [document for document in documents.values() if isinstance(document, str)]
        if len(texts) == len(documents):
            return _thinned("\n".join(texts), limit)
        size, parts = sum(len(text.plain(document)) for document in documents.values()), []
        for line, document in list(documents.items())[:: max(1, size // limit)]:
            if not isinstance(document, str):
                if not tokenizer.chat_template:
                    raise InputError(
                        f"{path}: line {line:,}: a chat, and the tokenizer of {self.path} has no chat template: give "
                        "texts"
                    )
                try:
                    document = tokenizer.apply_chat_template(document, tokenize=False)
                except Exception as error:  # whatever a template raises
                    raise InputError(
                        f"{path}: line {line:,}: the model's chat template does not take this chat "
                        f"({one_line(error)}): correct or remove the line"
                    ) from error
            parts.append(document)
        return "\n".join(parts)

    def sample_tokens(self, count: int, threads: int = 1, seed: int = SEED, ranks: Alone = ALONE) -> torch.Tensor:
        """int64 [sequences, CONTEXT] drawn from the model itself, as it speaks (temperature 1).

        A sequence starts with the model's first token, if it has one, and a random one, so that no two are alike. The
        model is whole in memory meanwhile. Another seed gives other text, a processor of another kind too, and a GPU
        that has no room for SAMPLED_ON_GPU sequences at a time and draws fewer. The same at any number of threads, of
        which at most TOGETHER are used, and of processes, which have a share each; the first one gets all.
        Raises UnsupportedError of an encoder.
        """
        if self.encoder:
            raise UnsupportedError(f"{self.path}: an encoder writes no text: give --calib TEXT")
        first = self.module.generation_config.bos_token_id
        vocabulary = self.module.get_input_embeddings().num_embeddings
        most = SAMPLED if self.device.type == "cpu" else SAMPLED_ON_GPU
        sequences, at_once = max(4, count // CONTEXT), most
        own = ranks.share(range(0, sequences, most))[1]

        def draw(start: int) -> torch.Tensor:
            random = torch.Generator(self.device).manual_seed(seed * sequences + start)
            size = min(at_once, sequences - start), 1
            prompt = torch.randint(vocabulary, size, generator=random, device=self.device)
            if first is not None:
                prompt = torch.cat([torch.full_like(prompt, first), prompt], 1)
            left = CONTEXT - prompt.shape[1]
            return self.module.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=left,
                max_new_tokens=left, pad_token_id=first or 0, logits_processor=[_Drawn(random)],
            ).cpu()  # fmt: skip

        together = TOGETHER if self.device.type == "cpu" else 1
        alone = functools.partial(torch.set_num_threads, 1)
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(min(threads, together), "draw", alone) as pool:
            for index in range(len(self)):
                stack.enter_context(self.layer(index))
            while True:
                try:
                    starts = [start for first in own for start in range(first, min(first + most, sequences), at_once)]
                    found = [*pool.map(draw, starts)]
                    break
                except torch.OutOfMemoryError:
                    if at_once == 1:
                        raise
                at_once = self.room.half(at_once, most)
        drawn = torch.cat(found) if found else torch.empty(0, CONTEXT, dtype=torch.long)
        return torch.cat([drawn[:0], *ranks.gathered(drawn)])

    @torch.no_grad()
    def inputs(
        self, tokens: torch.Tensor | Sequence[torch.Tensor], folder: Path | None = None
    ) -> list[torch.Tensor] | OnDisk:
        """The hidden states entering layer 0 for int64 [sequences, CONTEXT]: [BATCH, CONTEXT, hidden], on the CPU.

        tokens: or batches of them, the first one the largest. folder: a file there keeps the states instead of memory;
        use them as `states[i]` and `states[i] = ...`.
        Raises UnsupportedError when layers are given more than hidden states that depends on the tokens.
        """
        states: list[torch.Tensor] | OnDisk = [] if folder is None else OnDisk(folder, self.room)
        batches = tokens.split(BATCH) if isinstance(tokens, torch.Tensor) else tokens
        for batch in batches:
            with self._explained():
                hidden, arguments = self._catch(batch.to(self.device))
            shares = any(value == {} for _, kwargs in arguments for value in kwargs.values() if isinstance(value, dict))
            if hidden.dim() != 3 or shares or not _same(arguments, self.arguments.setdefault(batch.shape, arguments)):
                raise UnsupportedError(
                    f"{self.path}: decoder layers of {type(self.module).__name__} are given more than one another's "
                    f"hidden states: {self.advice}"
                )
            states.append(hidden if isinstance(states, OnDisk) else hidden.cpu())
        if batches:
            self._arguments_of(batches[0][:1].shape)  # now, not from several threads at once
        return states

    @contextlib.contextmanager
    def layer(self, index: int, then: int | None = None) -> Iterator[torch.nn.Module]:
        """The decoder layer with its weights, which are gone afterwards.

        then: the one that comes next, which is read while a GPU runs this one.
        Raises InputError when a tensor is missing, has the wrong shape, or holds NaN or Inf.
        """
        layer = self.layers[index]
        empty = layer.state_dict(keep_vars=True)
        try:
            with self._explained():
                self._load(index)
                self._read_ahead(then)
            yield layer.requires_grad_(False)
        finally:
            for name, tensor in empty.items():
                owner, _, attribute = name.rpartition(".")
                setattr(layer.get_submodule(owner), attribute, tensor)

    def forward(self, layer: torch.nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """[batch, CONTEXT, hidden] after `layer`, on the device, called as the model calls its layer `index`."""
        args, kwargs = self._arguments_of(hidden.shape[:2])[index]
        result = layer(hidden.to(self.device), *args, **kwargs)
        self.tuples = isinstance(result, tuple)
        return result[0] if self.tuples else result

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits [batch, tokens, vocabulary] of the hidden states after the last layer, or an encoder's output
        [batch, tokens, hidden].
        """
        with self.heads() as head:
            return head(hidden)

    @contextlib.contextmanager
    def heads(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """`head`, for any number of threads at once."""
        now = threading.local()

        def head(hidden: torch.Tensor) -> torch.Tensor:
            now.hidden = hidden.to(self.device)
            tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
            found = self.module(tokens, use_cache=False)
            return (found.last_hidden_state if self.encoder else found.logits).float()

        with self._standing_in(lambda *_, **__: (now.hidden,) if self.tuples else now.hidden):
            yield head

    def matrix(self, end: str) -> torch.nn.Parameter:
        """[vocabulary, hidden]: the "embedding" or the "output". UnsupportedError when the model has no such matrix."""
        return self._end(end).weight

    @contextlib.contextmanager
    def standing(self, instead: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Other matrices in place of the "embedding" and the "output", tied or not."""
        before = [(self._end(end), self._end(end).weight) for end in instead]
        for (module, weight), other in zip(before, instead.values(), strict=True):
            module.weight = torch.nn.Parameter(other.to(weight), requires_grad=False)
        try:
            yield
        finally:
            for module, weight in before:
                module.weight = weight

    def _end(self, end: str) -> Any:
        found = self.module.get_input_embeddings() if end == "embedding" else self.module.get_output_embeddings()
        if not isinstance(getattr(found, "weight", None), torch.nn.Parameter):
            raise UnsupportedError(f"{self.path}: {type(self.module).__name__} has no {end} matrix: {self.advice}")
        return found

    # How it is built and loaded

    def _build(self) -> None:
        if re.search(r"-of-\d{5}\.gguf$", self.path.name):
            raise UnsupportedError(f"{self.path}: transformers cannot load a split GGUF: {self.advice}")
        config = transformers.AutoConfig.from_pretrained(**self.source, trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            raise UnsupportedError(f"{self.path}: the checkpoint is quantized already: {self.advice}")
        kind = _kind(config)
        self.encoder = kind is transformers.AutoModel
        with contextlib.ExitStack() as stack:
            for context in transformers.PreTrainedModel.get_init_context(self.dtype, False, False, None):
                stack.enter_context(context)
            # "eager" calls F.linear for each expert, which is where moments.py listens.
            self.module = kind.from_config(
                config, dtype=self.dtype, experts_implementation="eager", trust_remote_code=False
            )
        self.module.eval().requires_grad_(False)
        if config.get_text_config() is not config:
            self._leave_out_others()
        lists = {name: m for name, m in self.module.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m)}
        if not lists:
            raise UnsupportedError(
                f"{self.path}: {type(self.module).__name__} has no list of decoder layers: {self.advice}"
            )
        self.prefix = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
        self.layers = lists[self.prefix]
        self._find_tensors()
        for tensor in self.layers.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True  # these stay empty; what else the checkpoint lacks is made below
        found = self._load(REST)
        found.missing_keys -= {key for key in found.missing_keys if key.startswith(self.prefix + ".")}
        self.module._finalize_model_loading(self.module, self.loading, found)
        for name in sorted(found.missing_keys):
            if not (self.encoder and name.startswith("pooler.")):  # which not all encoders have, and llama.cpp has not
                raise self._damaged(f"tensor {name!r} is missing")

    def _leave_out_others(self) -> None:
        """Take out what is not on the way from tokens to logits: the vision or audio part."""
        embedding, output = self.module.get_input_embeddings(), self.module.get_output_embeddings()
        way = next(name for name, module in self.module.named_modules() if module is embedding).split(".")[:-1]
        for depth, step in enumerate(way):
            owner = self.module.get_submodule(".".join(way[:depth]))
            for name, child in list(owner.named_children()):
                if name != step and child is not output:
                    setattr(owner, name, None)

    def _find_tensors(self) -> None:
        """Which checkpoint tensors make up each layer, by the names that transformers gives them."""
        quantizer = None
        if "gguf_file" in self.source:
            from transformers.quantizers.quantizer_gguf import GgufHfQuantizer
            from transformers.utils.quantization_config import GgufConfig

            quantizer = GgufHfQuantizer(GgufConfig(dequantize=True))
            quantizer.read_header(str(self.path))
            quantizer.update_dtype(self.dtype)
            quantizer.preprocess_model(model=self.module, dtype=self.dtype, device_map=None, checkpoint_files=None)
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                self.tensors = quantizer.get_state_dict(str(self.path), self.module)
        else:
            self.tensors = checkpoint.weight_files(self.path)
        mapping = get_model_conversion_mapping(self.module, None, quantizer)
        self.loading = LoadStateDictConfig(
            pretrained_model_name_or_path=str(self.path), device_map={"": self.device}, dtype=self.dtype,
            dtype_plan=self.module._get_dtype_plan(self.dtype), hf_quantizer=quantizer, weight_mapping=mapping,
        )  # fmt: skip
        mapping, known = deepcopy(mapping), self.module.state_dict()
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.names: dict[int, list[str]] = defaultdict(list)
        for name in self.tensors:
            target, _ = rename_source_key(name, renamings, converters, self.module.base_model_prefix, known)
            target = name if target not in known and name in known else target
            number = target.removeprefix(self.prefix + ".").split(".")[0] if target.startswith(self.prefix) else ""
            self.names[int(number) if number.isdecimal() else REST].append(name)

    def _load(self, index: int) -> Any:
        """Fill the parameters of a layer, or of all that is outside of layers; returns what transformers reports."""
        with self._tensors(index) as tensors:
            loading = replace(self.loading, weight_mapping=deepcopy(self.loading.weight_mapping))  # it keeps state
            found, _ = convert_and_load_state_dict_in_model(self.module, tensors, loading)
        ours = f"{self.prefix}.{index}."
        for name, has, wants in found.mismatched_keys:
            raise self._damaged(f"tensor {name!r} is {list(has)} where the configuration wants {list(wants)}")
        for name in found.conversion_errors:
            raise UnsupportedError(f"{self.path}: transformers cannot convert {name!r}: {self.advice}")
        for name in sorted(found.missing_keys):
            if name.startswith(ours):
                raise self._damaged(f"tensor {name!r} is missing")
        for name, parameter in (self.module if index == REST else self.layers[index]).named_parameters():
            if not parameter.is_meta and not torch.isfinite(parameter).all():
                name = name if index == REST else ours + name
                raise self._damaged(f"tensor {name!r} holds NaN or Inf")
        return found

    @contextlib.contextmanager
    def _tensors(self, index: int) -> Iterator[dict[str, Any]]:
        """What the checkpoint has of a layer: read already, or to be read."""
        ahead, self.ahead = self.ahead, None
        if ahead and ahead[0] == index:
            yield ahead[1].result()
            return
        read = self._read_loaded if "gguf_file" in self.source else self._read_files  # no method is kept: a model would
        with read(self.names[index]) as tensors:  # then be a part of itself, and its memory not given back at once
            yield tensors

    def _read_ahead(self, index: int | None) -> None:
        """Begin to read a layer into memory, if there is one of that number and something reads."""
        if self.reader and index is not None and 0 <= index < len(self) and "gguf_file" not in self.source:
            self.ahead = index, self.reader.submit(self._in_memory, self.names[index])

    def _in_memory(self, names: list[str]) -> dict[str, Any]:
        with self._read_files(names) as slices:
            return {name: _pinned(part[...]) for name, part in slices.items()}

    def _damaged(self, what: str) -> SplitqError:
        if "gguf_file" in self.source:  # which was checked before: transformers reads it otherwise than llama.cpp
            return UnsupportedError(f"{self.path}: transformers cannot load it ({what}): {self.advice}")
        return InputError(f"{self.path}: {what}: get the checkpoint again")

    @contextlib.contextmanager
    def _read_files(self, names: list[str]) -> Iterator[dict[str, Any]]:
        with contextlib.ExitStack() as stack:
            files = {
                path: stack.enter_context(safe_open(path, framework="pt"))
                for path in sorted({self.tensors[name] for name in names})
            }
            yield {name: files[self.tensors[name]].get_slice(name) for name in names}

    @contextlib.contextmanager
    def _read_loaded(self, names: list[str]) -> Iterator[dict[str, Any]]:
        yield {name: self.tensors[name] for name in names}

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Whatever transformers raises comes out as one sentence."""
        try:
            yield
        except (SplitqError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if "can't allocate memory" in str(error):  # PyTorch's word for it on the CPU
                raise
            what = f"transformers cannot load it ({one_line(error)})"
            raise UnsupportedError(f"{self.path}: {what}: {self.advice}") from error

    # How the layers are called

    @contextlib.contextmanager
    def _standing_in(self, forward: Callable) -> Iterator[None]:
        """Every layer does `forward` instead of its own work."""
        for layer in self.layers:
            layer.forward = forward
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def _arguments_of(self, shape: torch.Size) -> list[tuple[tuple, dict]]:
        """What the layers are called with, besides hidden states [*shape, hidden]."""
        if shape not in self.arguments:
            self.arguments[shape] = self._catch(torch.zeros(shape, dtype=torch.long, device=self.device))[1]
        return self.arguments[shape]

    def _catch(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[tuple[tuple, dict]]]:
        """The hidden states entering layer 0, and for each layer the other arguments it is called with."""
        states, arguments = [], []

        def catch(*args: Any, **kwargs: Any) -> Any:
            args = (kwargs.pop("hidden_states"),) if "hidden_states" in kwargs else args
            states.append(args[0])
            kept = {name: value for name, value in kwargs.items() if "past_key" not in name and name != "use_cache"}
            arguments.append((args[1:], kept))
            if len(arguments) == len(self):
                raise _Caught
            return states[0]

        with self._standing_in(catch), contextlib.suppress(_Caught), torch.no_grad():
            self.module(tokens, use_cache=False)
        return states[0], arguments


class OnDisk:
    """A list of tensors in a file without a name in `folder`, each read when it is asked for.

    Those that are on a GPU stay there or in memory, as `Room` says. All have the size of the first, the last may be
    smaller; what is put back has the size of what was there.
    """

    def __init__(self, folder: Path, room: Room):
        self.folder, self.room, self.dtype, self.size = folder, room, torch.float32, 0
        self.shapes: list[torch.Size] = []
        self.kept: dict[int, torch.Tensor] = {}
        self.file = tempfile.TemporaryFile(dir=folder)

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return map(self.__getitem__, range(len(self)))

    def append(self, tensor: torch.Tensor) -> None:
        """Write one more."""
        self.size, self.dtype = self.size or tensor.nbytes, tensor.dtype
        self.shapes.append(tensor.shape)
        self[len(self) - 1] = tensor

    def __getitem__(self, index: int) -> torch.Tensor:
        if index in self.kept:
            return self.kept[index]
        shape = self.shapes[index]
        self.file.seek(index * self.size)
        tensor = torch.empty(shape, dtype=self.dtype)  # aligned as any other tensor, on which a sum may depend
        self.file.readinto(tensor.view(-1).view(torch.uint8).numpy().data)
        return tensor

    def __setitem__(self, index: int, tensor: torch.Tensor) -> None:
        self.kept.pop(index, None)
        if _on_gpu(tensor) and (kept := self.room.place(tensor)) is not None:
            self.kept[index] = kept
            return
        try:
            self.file.seek(index * self.size)
            self.file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            self.file.flush()
        except OSError as error:
            raise disk_error(error, self.folder, len(self) * self.size) from error


def _on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def _gpu_memory(device: torch.device) -> tuple[int, int, int]:
    """Bytes of a GPU that are free to this process, that its tensors have, and in all."""
    (free, total), own = torch.cuda.mem_get_info(device), torch.cuda.memory_allocated(device)
    return free + torch.cuda.memory_reserved(device) - own, own, total


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """The same in memory that a GPU reads without help."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


class _Drawn(transformers.LogitsProcessor):
    """Makes the likeliest token a random one: the largest logit plus Gumbel noise is a draw from their softmax."""

    def __init__(self, random: torch.Generator):
        self.random = random

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=self.random).log_().neg_()
        return scores.float() + noise


class _Caught(Exception):
    pass


def _same(a: Any, b: Any) -> bool:
    """Equal arguments, tensors by value."""
    if a is b:
        return True
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(a == b)


def _kind(config: Any) -> Any:
    """What makes such a model. An encoder is what fills in words, unless it is one of its kind that writes."""
    writes = any(name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in config.architectures or ())
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not writes:
        return transformers.AutoModel
    sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if sees and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def held_out(sequences: int) -> int:
    """Sequences to try on what was made with so many."""
    return min(max(sequences // HELD_OUT, 1), BATCH)


def _thinned(text: str, limit: int) -> str:
    """The text, or pieces of it taken evenly when it is longer than `limit` characters."""
    piece = CHARACTERS * CONTEXT
    if len(text) <= limit:
        return text
    return "".join(text[at : at + piece] for at in np.linspace(0, len(text) - piece, limit // piece, dtype=int))
