# SPDX-License-Identifier: MIT
"""Training what a quantized model stores in floating point: block scales and norm weights (`--tune`).

The codes stay. The model is trained as a whole to give the float model's distribution on the calibration tokens (KL
divergence, Adam, two passes), block scales rounded to what the format can store in each step, the gradient passing
the rounding unchanged. One sequence in 16 is held out: the state that does best on those is kept, the untrained one
included. A super-block's integer scales are too coarse for small steps: for such formats, and for those with side
tensors, the norms are trained alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import kl_div
from torch.overrides import TorchFunctionMode

from ..coding import formats
from ..files.gguf_file import Gguf
from ..plan import Entry
from ..rewrite import Rows, each_matrix, to_float32
from . import moments
from .model import BATCH, Model
from .stored import decoded, rounded

PASSES = 2
RATE = 3e-3  # of both, relative to the values' own size
HELD_OUT = 16  # one sequence in so many
OWN_SCALE = (formats.ScaleByteFormat, formats.HalfFormat)


@dataclass
class _Piece:
    """A GGUF matrix with trainable scales. codes: uint8 [rows, columns]; change: float32 [rows, blocks], relative."""

    entry: Entry
    fmt: formats.BlockFormat
    codes: torch.Tensor
    params: torch.Tensor
    change: torch.Tensor

    def stored(self) -> torch.Tensor:
        """The parameters with the storable scales nearest to the trained ones."""
        scale = self.fmt.scale(self.params) * (1 + self.change.detach())
        return self.fmt.nearest(scale, self.fmt.offset(self.params), self.params)

    def weight(self) -> torch.Tensor:
        """float32 [rows, columns] as stored, differentiable by `change`."""
        scale = self.fmt.scale(self.params) * (1 + self.change)
        scale = scale + (self.fmt.scale(self.stored()) - scale).detach()
        unit = self.fmt.levels[self.codes.int()].unflatten(1, (scale.shape[1], -1))
        return (unit * scale[..., None] + self.fmt.offset(self.params)[..., None]).flatten(1)


class _Trained(TorchFunctionMode):
    """F.linear takes the trained weight of a matrix instead of the model's own."""

    def __init__(self, pieces: Mapping[int, list[tuple[_Piece, torch.Tensor]]]):
        super().__init__()
        self.pieces = pieces  # by the matrix's address: its pieces and the number in it of each of their rows

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear and (found := self.pieces.get(args[1].data_ptr())):
            order = torch.cat([rows for _, rows in found]).argsort()
            weight = torch.cat([piece.weight() for piece, _ in found])[order]
            args = (args[0], weight.to(args[1].dtype), *args[2:])
        return func(*args, **(kwargs or {}))


def run(
    model: Callable[[], Model],
    file: Gguf,
    entries: Sequence[Entry],
    rows: Mapping[str, Rows],
    tokens: torch.Tensor,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """(tensor name -> the rows to store instead, the held-out divergence "before" and "after", in nats a token).

    model: makes the float model. rows: tensor name -> uint8 [n_rows, row_bytes] as solved. tokens: int64 [sequences,
    CONTEXT]. Both models are whole in memory. progress: batches done and in all.
    """
    teacher, student = model(), model()
    held = torch.arange(len(tokens)) % HELD_OUT == 0
    train, test = tokens[~held], tokens[held]
    with contextlib.ExitStack() as stack:
        for each in (teacher, student):
            layers = [stack.enter_context(each.layer(index)) for index in range(len(each))]
        pieces = _pieces(student, layers, file, entries, rows)
        norms = _norms(student, file)
        original = {name: parameter.detach().clone() for name, (parameter, _) in norms.items()}
        for parameter, _ in norms.values():
            parameter.requires_grad_(True)
        changes = [piece.change for found in pieces.values() for piece, _ in found]
        leaves = [*changes, *(parameter for parameter, _ in norms.values())]
        best, before = [leaf.detach().clone() for leaf in leaves], _divergence(teacher, student, pieces, test)
        least, done, steps = before, 0, PASSES * math.ceil(len(train) / BATCH)
        optimizer = torch.optim.Adam(leaves, lr=RATE, betas=(0.9, 0.99))
        shuffle = torch.Generator().manual_seed(0)
        for _ in range(PASSES):
            for batch in train[torch.randperm(len(train), generator=shuffle)].split(BATCH):
                for group in optimizer.param_groups:
                    group["lr"] = RATE * min(1, (done + 1) / 5) * (1 + math.cos(math.pi * done / steps)) / 2
                optimizer.zero_grad()
                with torch.enable_grad():
                    _loss(teacher, student, pieces, batch).div(batch.numel()).backward()
                optimizer.step()
                done += 1
                progress(done, steps)
            after = _divergence(teacher, student, pieces, test)
            if after < least:
                least, best = after, [leaf.detach().clone() for leaf in leaves]
        changed = {}
        if least < before:
            with torch.no_grad():
                for leaf, value in zip(leaves, best, strict=True):
                    leaf.copy_(value)
            changed = _packed(pieces)
            for name, (parameter, shift) in norms.items():
                if not torch.equal(parameter.detach(), original[name]):
                    changed[name] = (parameter.detach().float().cpu().numpy() + shift).view(np.uint8).reshape(1, -1)
    return changed, {"before": before, "after": least}


def _loss(teacher: Model, student: Model, pieces: Mapping, tokens: torch.Tensor) -> torch.Tensor:
    """The divergence, summed over the tokens [batch, CONTEXT]."""
    tokens = tokens.to(teacher.device)
    with torch.no_grad():
        wanted = teacher.module(tokens, use_cache=False).logits.float().log_softmax(-1)
    with _Trained(pieces):
        given = student.module(tokens, use_cache=False).logits.float().log_softmax(-1)
    return kl_div(given, wanted, reduction="sum", log_target=True)


@torch.no_grad()
def _divergence(teacher: Model, student: Model, pieces: Mapping, tokens: torch.Tensor) -> float:
    return sum(float(_loss(teacher, student, pieces, part)) for part in tokens.split(BATCH)) / tokens.numel()


def _pieces(
    student: Model,
    modules: Sequence[torch.nn.Module],
    file: Gguf,
    entries: Sequence[Entry],
    rows: Mapping[str, Rows],
) -> dict[int, list[tuple[_Piece, torch.Tensor]]]:
    """Puts what is stored into the model; what can be trained is returned by the address of its matrix."""
    pieces: dict[int, list[tuple[_Piece, torch.Tensor]]] = {}
    for index, module in enumerate(modules):
        layers = moments.layers_of(module)
        stored: dict[str, list[tuple[moments.Layer, torch.Tensor, torch.Tensor]]] = {}
        for entry in entries:
            if entry.quantized and entry.name.startswith(f"blk.{index}."):
                fmt, first = formats.for_type(entry.coder, student.device), 0
                for matrix in each_matrix(file, entry.tensor):
                    found = moments.match(matrix, layers)
                    if found is None:
                        break
                    layer, order = found
                    here, solved = slice(first, first + len(matrix)), entry.name in rows
                    if solved:
                        weight = decoded(entry, rows, first // len(matrix), here)
                    elif entry.columns:
                        break
                    else:
                        weight = rounded(torch.from_numpy(matrix), entry)
                    device = student.device
                    stored.setdefault(layer.name, []).append((layer, order.to(device), weight.to(device)))
                    if solved and isinstance(fmt, OWN_SCALE):
                        piece = piece_of(entry, fmt, rows[entry.name][here])
                        pieces.setdefault(layer.weight.data_ptr(), []).append((piece, order.to(student.device)))
                    first += len(matrix)
        for parts in stored.values():
            for layer, order, weight in parts:
                layer.weight[order] = weight.to(layer.weight)
            whole = parts[0][0].weight
            if sum(len(order) for _, order in pieces.get(whole.data_ptr(), [])) != len(whole):
                pieces.pop(whole.data_ptr(), None)  # a matrix is trained whole or not at all
    return pieces


def piece_of(entry: Entry, fmt: formats.BlockFormat, packed: np.ndarray) -> _Piece:
    """From uint8 [rows, row_bytes]."""
    codes, params = fmt.unpack(packed)
    return _Piece(entry, fmt, codes, params, torch.zeros_like(fmt.scale(params), requires_grad=True))


def _packed(pieces: Mapping[int, list[tuple[_Piece, torch.Tensor]]]) -> dict[str, np.ndarray]:
    """Tensor name -> rows as trained; the experts of a stack follow one another."""
    parts: dict[str, list[np.ndarray]] = {}
    complete = {}
    for found in pieces.values():
        for piece, _ in found:
            parts.setdefault(piece.entry.name, []).append(piece.fmt.pack(piece.codes, piece.stored()).cpu().numpy())
            complete[piece.entry.name] = piece.entry.tensor.n_rows
    return {name: np.concatenate(part) for name, part in parts.items() if sum(map(len, part)) == complete[name]}


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
