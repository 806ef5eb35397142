# SPDX-License-Identifier: MIT
"""Training what is stored of a quantized model (`--tune`): block scales, norm weights, and the codes if wanted.

The model is trained as a whole to give the float model's distribution (mean KL divergence over all positions, Adam, a
cosine to zero), on the calibration text and, in a longer run, on text drawn from the float model: without that codes
learn the text by heart. Other text decides whether the result is taken: if it diverges more than before, the file stays
as it was. training.py has what is trained of a matrix; of formats with side tensors norms alone are.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import kl_div
from torch.overrides import TorchFunctionMode

from ..coding import formats
from ..files.gguf_file import Gguf
from ..plan import Entry
from ..rewrite import Rows, each_matrix, to_float32
from . import fisher, layerwise, moments
from .model import BATCH, CONTEXT, Model
from .stored import decoded, rounded
from .training import OWN_SCALE, Bundle, Piece, Quantized, by_bits, descend, groups_of, whole

STEPS = {"scales": 64, "codes": 640, "layers": layerwise.STEPS}  # by what is trained, each layer of the last
DRAWN = 1 << 20  # tokens that the model draws, at most
PASSES = 2  # over the calibration text before more is drawn
RATES = {"scales": 3e-3, "codes": 1e-3}  # of scales and norms, relative to their own size, by what is trained
CODE_RATES = {3.0: 3e-3, 4.0: 2e-3, math.inf: 2e-4}  # of codes, in mean gaps of levels, below so many bits a weight
HELD_OUT = 16  # one sequence in so many, where the text has no others


class _Trained(TorchFunctionMode):
    """F.linear takes other weights than the model's own, by their addresses."""

    def __init__(self, weights: Mapping[int, torch.Tensor]):
        super().__init__()
        self.weights = weights

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear and (found := self.weights.get(args[1].data_ptr())) is not None:
            args = (args[0], found.to(args[1].dtype), *args[2:])
        return func(*args, **(kwargs or {}))


def drawn(steps: int, tokens: int) -> int:
    """How many tokens are to be drawn from the model for so many steps, beside a calibration text of `tokens`."""
    return min(max(steps * BATCH * CONTEXT - PASSES * tokens, 0), DRAWN) // CONTEXT * CONTEXT


def run(
    model: Callable[[], Model],
    file: Gguf,
    entries: Sequence[Entry],
    rows: Mapping[str, Rows],
    tokens: torch.Tensor,
    held: torch.Tensor,
    what: str,
    steps: int,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensor name -> the rows to store instead, a report).

    model: makes the float model. rows: tensor name -> uint8 [n_rows, row_bytes] as solved. tokens: int64 [sequences,
    CONTEXT], to train on; held: others, to judge by; where there are none, some of `tokens`. what: "scales" (and
    norms), or "codes", those too. Both models are whole in memory. progress: batches done and in all. The report has
    the divergence on held-out tokens "before" and "after", in nats a token, which are equal when nothing is stored
    instead, and the share of codes that have "changed".
    """
    teacher, student = model(), model()
    chance = torch.Generator().manual_seed(0)
    if not len(held):
        apart = torch.arange(len(tokens)) % HELD_OUT == 0
        tokens, held = tokens[~apart], tokens[apart]
    with contextlib.ExitStack() as stack:
        for each in (teacher, student):
            layers = [stack.enter_context(each.layer(index)) for index in range(len(each))]
        pieces = _pieces(student, layers, file, entries, rows, what == "codes")
        quantized = Quantized(pieces, what == "codes", student.device, chance)
        norms = _norms(student, file)
        original = {name: parameter.detach().clone() for name, (parameter, _) in norms.items()}
        for parameter, _ in norms.values():
            parameter.requires_grad_(True)
        slower = _slower(quantized.bundles, STEPS[what], steps)
        rate = slower * RATES[what]
        groups = [*groups_of(quantized.bundles, lambda bundle: (rate, slower * by_bits(CODE_RATES, bundle)))]
        groups += [{"params": [parameter], "lr": rate * _size(parameter)} for parameter, _ in norms.values()]
        codes = [bundle.codes for bundle in quantized.bundles]
        loss = functools.partial(_loss, teacher, student, quantized)
        before = after = _divergence(student, loss, held)
        if groups:
            with moments.tf32(student.device):  # as precise as a gradient has to be
                _train(student, loss, quantized.bundles, groups, tokens, steps, chance, progress)
            after = _divergence(student, loss, held)
        changed: dict[str, np.ndarray] = {}
        share = 0.0
        if after < before:
            changed = quantized.packed()
            moved = sum(int((old != b.codes).sum()) for old, b in zip(codes, quantized.bundles, strict=True))
            share = moved / max(sum(map(torch.numel, codes)), 1)
            for name, (parameter, shift) in norms.items():
                if not torch.equal(parameter.detach(), original[name]):
                    changed[name] = (parameter.detach().float().cpu().numpy() + shift).view(np.uint8).reshape(1, -1)
    tried = {"what": what, "steps": steps, "tokens": tokens.numel()}
    return changed, tried | {"before": before, "after": min(after, before), "changed": share}


def _slower(bundles: Sequence[Bundle], usual: int, steps: int) -> float:
    """What rates are multiplied by in a run of more than the `usual` steps: at full rates sq2w loses what it gained."""
    paths = any(bundle.windows and bundle.fmt.type.bpw < 3 for bundle in bundles)
    return min(1.0, usual / steps) if paths else 1.0


def _train(
    student: Model,
    loss: Callable[[torch.Tensor], torch.Tensor],
    bundles: Sequence[Bundle],
    groups: list[dict[str, Any]],
    tokens: torch.Tensor,
    steps: int,
    chance: torch.Generator,
    progress: Callable[[int, int], None],
) -> None:
    """Train the leaves in `groups` on batches drawn without putting back. loss: of a batch, summed over its tokens."""
    batches: list[torch.Tensor] = []

    def gradients(clear: Callable[[], object]) -> None:
        if not batches:
            batches.extend(tokens[torch.randperm(len(tokens), generator=chance)].split(BATCH))
        batch = batches.pop()

        def backward(part: torch.Tensor) -> None:
            with torch.enable_grad():
                loss(part).div(batch.numel()).backward()

        fisher.as_fits(student, backward, batch, again=clear)

    descend(bundles, groups, steps, chance, gradients, progress)


def _size(values: torch.Tensor) -> float:
    return float(values.detach().float().square().mean().sqrt())


def _loss(teacher: Model, student: Model, quantized: Quantized, tokens: torch.Tensor) -> torch.Tensor:
    """The divergence, summed over the tokens [batch, CONTEXT]."""
    tokens = tokens.to(teacher.device)
    with torch.no_grad():
        wanted = teacher.module(tokens, use_cache=False).logits.float().log_softmax(-1)
    with _Trained(quantized.weights()):
        given = student.module(tokens, use_cache=False).logits.float().log_softmax(-1)
    return kl_div(given, wanted, reduction="sum", log_target=True)


@torch.no_grad()
def _divergence(student: Model, loss: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor) -> float:
    parts = (fisher.as_fits(student, lambda part: float(loss(part)), batch) for batch in tokens.split(BATCH))
    return sum(map(sum, parts)) / tokens.numel()


def _pieces(
    student: Model,
    modules: Sequence[torch.nn.Module],
    file: Gguf,
    entries: Sequence[Entry],
    rows: Mapping[str, Rows],
    codes: bool,
) -> list[Piece]:
    """Puts what is stored into the model; returns what can be trained."""
    pieces: list[Piece] = []
    for index, module in enumerate(modules):
        layers = moments.layers_of(module)
        stored: dict[str, list[tuple[moments.Layer, torch.Tensor, torch.Tensor]]] = {}
        for entry in entries:
            if entry.quantized and entry.name.startswith(f"blk.{index}."):
                fmt, first = formats.for_type(entry.coder), 0
                trains = entry.name in rows and fmt and (codes or isinstance(fmt, OWN_SCALE))
                for matrix in each_matrix(file, entry.tensor):
                    found = moments.match(matrix, layers)
                    if found is None:
                        break
                    layer, order = found
                    here = slice(first, first + len(matrix))
                    if entry.name in rows:
                        weight = decoded(entry, rows, first // len(matrix), here)
                    elif entry.columns:
                        break
                    else:
                        weight = rounded(torch.from_numpy(matrix), entry)
                    stored.setdefault(layer.name, []).append((layer, order, weight))
                    if trains:
                        packed = np.asarray(rows[entry.name][here])
                        pieces.append(Piece(entry, layer, order, packed, matrix if codes else None))
                    first += len(matrix)
        for parts in stored.values():
            for layer, order, weight in parts:
                layer.weight[order.to(layer.weight.device)] = weight.to(layer.weight)
    return whole(pieces)


def _norms(student: Model, file: Gguf) -> dict[str, tuple[torch.nn.Parameter, float]]:
    """GGUF name -> a norm's weight in the model, and what llama.cpp's converter has added to it (1 for Gemma's)."""
    found = {}
    tensors = {tensor.name: tensor for tensor in file.tensors}
    for name, key in _gguf_names(student, file.get("general.architecture", str, "")):
        tensor = tensors.get(name)
        parameter = student.module.get_parameter(key)
        if tensor is not None and parameter.dim() == 1 and "norm" in key and tensor.n_weights == parameter.numel():
            values = torch.from_numpy(to_float32(file.read_rows(tensor, 0, tensor.n_rows), tensor.type_id)).flatten()
            for shift in (0.0, 1.0):
                if torch.allclose(values, parameter.detach().float().cpu() + shift, atol=1e-6):
                    found[name] = parameter, shift
                    break
    return found


def _gguf_names(student: Model, architecture: str) -> Iterator[tuple[str, str]]:
    """(GGUF name, parameter name), by the table of the gguf package."""
    import gguf

    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture in known:
        table = gguf.get_tensor_name_map(known[architecture], len(student))
        for key, _ in student.module.named_parameters():
            if name := table.get_name(key, try_suffixes=(".weight",)):
                yield name, key
