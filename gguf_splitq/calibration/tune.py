# SPDX-License-Identifier: MIT
"""Training what is stored of a quantized model (`--tune`): block scales, norm weights, and the codes if wanted.

The model is trained as a whole to give the float model's distribution (mean KL divergence over all positions, Adam, a
cosine to zero), on the calibration text and, in a longer run, on text drawn from the float model: without that codes
learn the text by heart. A scale is used as what the format can store of it, and a code as that of the level, or of the
path of levels, that is nearest to a number per weight; the gradient passes both roundings unchanged ("straight
through", Bengio et al., arXiv 1308.3432). Other text decides whether the result is taken: if it diverges more than
before, the file stays as it was.

The integer scales that blocks of a super-block have are too coarse for small steps: of such formats codes and norms are
trained, of those with side tensors norms alone.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import kl_div
from torch.overrides import TorchFunctionMode

from ..coding import formats, windows
from ..files.gguf_file import Gguf
from ..plan import Entry
from ..rewrite import Rows, each_matrix, to_float32
from . import fisher, moments
from .model import BATCH, CONTEXT, Model
from .stored import decoded, rounded

STEPS = {"scales": 64, "codes": 640}  # by what is trained
DRAWN = 1 << 20  # tokens that the model draws, at most
PASSES = 2  # over the calibration text before more is drawn
RATES = {"scales": 3e-3, "codes": 1e-3}  # of scales and norms, relative to their own size, by what is trained
CODE_RATES = {3.0: 3e-3, 4.0: 2e-3, math.inf: 2e-4}  # of codes, in mean gaps of levels, below so many bits a weight
WARM = 10  # steps until the rate is whole, an eighth of few
BETAS = 0.9, 0.98
EPSILON = 0.01  # Adam's, relative to the first gradient's root mean square: 1e-8 is more than many gradients here
EVERY = 4  # steps between searches for paths, which change slowly
NEAR = 0.9  # how far a code's number begins towards the weight, of the way to where another code would be nearer
HELD_OUT = 16  # one sequence in so many, where the text has no others
OWN_SCALE = (formats.ScaleByteFormat, formats.HalfFormat)


@dataclass
class Bundle:
    """Blocks of one type that are trained. codes: uint8 [n, weights of a block], as the format has them.

    params: of each block. change: float32 [n, scales of a block], relative. units: float32 like codes, of which these
    are the nearest, in levels. Of the last two, None is what is not trained.
    """

    fmt: formats.BlockFormat
    codes: torch.Tensor
    params: torch.Tensor
    change: torch.Tensor | None = None
    units: torch.Tensor | None = None

    @classmethod
    def of(cls, fmt: formats.BlockFormat, packed: Sequence[np.ndarray]) -> Bundle:
        """From rows uint8 [n_rows, row_bytes], one below the other; scales are trained where blocks have their own."""
        parts = [fmt.unpack(rows.reshape(-1, fmt.type.block_bytes)) for rows in packed]
        codes, params = (torch.cat(part) for part in zip(*parts, strict=True))
        change = torch.zeros_like(fmt.scale(params), requires_grad=True) if isinstance(fmt, OWN_SCALE) else None
        return cls(fmt, codes, params, change)

    def stored(self) -> torch.Tensor:
        """The parameters with the storable scales nearest to the trained ones."""
        if self.change is None:
            return self.params
        scale = self.fmt.scale(self.params) * (1 + self.change.detach())
        return self.fmt.nearest(scale, self.fmt.offset(self.params), self.params)

    def weight(self) -> torch.Tensor:
        """float32 like codes, as stored, differentiable by `change` and `units`."""
        return _Straight.apply(self.change, self.units, self)

    def packed(self) -> np.ndarray:
        """uint8 [n, block_bytes]."""
        return self.fmt.pack(self.codes, self.stored()).cpu().numpy()

    @property
    def every(self) -> int:
        """Steps from one choice of codes to the next."""
        return EVERY if isinstance(self.fmt, formats.WindowFormat) else 1

    def choose(self, chance: torch.Generator) -> None:
        """Take the codes nearest to the units."""
        assert self.units is not None
        self.codes = self._nearest(self.units.detach(), chance)

    @property
    def gap(self) -> float:
        """Between neighbouring levels of a weight, on average."""
        fmt = self.fmt
        count = 1 << fmt.type.code_bits if isinstance(fmt, formats.WindowFormat) else len(fmt.levels)
        return float(fmt.levels.max() - fmt.levels.min()) / (count - 1)

    @functools.cached_property
    def reach(self) -> tuple[float, float]:
        """What units may be."""
        return float(self.fmt.levels.min()) - self.gap / 2, float(self.fmt.levels.max()) + self.gap / 2

    def train_codes(self, weight: torch.Tensor, chance: torch.Generator) -> None:
        """Begin `units` between the levels and `weight` float32 like codes, where the codes are what they are."""
        fmt, scale = self.fmt, self.fmt.scale(self.params)[..., None]
        levels = fmt.levels[self.codes.int()]
        wanted = weight.unflatten(1, (scale.shape[1], -1)) - fmt.offset(self.params)[..., None]
        wanted = torch.where(scale == 0, 0, wanted / scale).flatten(1).clamp_(*self.reach).sub_(levels)
        units = levels
        for share in (0.2, 0.4, 0.6, 0.8, 1.0):
            same = self._nearest(levels + share * wanted, chance) == self.codes
            if isinstance(fmt, formats.WindowFormat):
                same = same.all(1, keepdim=True)  # one path
            units = torch.where(same, levels + NEAR * share * wanted, units)
        self.units = units.requires_grad_(True)

    def _nearest(self, units: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
        """uint8 codes of the levels nearest to `units`; of windows, of a path nearer than `codes`."""
        if isinstance(self.fmt, formats.WindowFormat):
            return windows.nearest(units, self.codes, self.fmt, chance)
        levels = self.fmt.levels
        return torch.bucketize(units, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)


class _Straight(torch.autograd.Function):
    """(scales' change, units) -> weights as stored. The gradient is that without any rounding."""

    @staticmethod
    def forward(ctx: Any, change: torch.Tensor | None, units: torch.Tensor | None, bundle: Bundle) -> torch.Tensor:
        """Keeps codes and parameters, which take less memory than the weights."""
        params, fmt = bundle.stored(), bundle.fmt
        ctx.bundle, ctx.codes, ctx.scale = bundle, bundle.codes, fmt.scale(params)
        weight = fmt.levels[ctx.codes.int()].unflatten(1, (ctx.scale.shape[1], -1)) * ctx.scale[..., None]
        return (weight + fmt.offset(params)[..., None] if fmt.has_offset else weight).flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """See the class."""
        fmt, blocks = ctx.bundle.fmt, grads[0].unflatten(1, (ctx.scale.shape[1], -1))
        change = units = None
        if ctx.needs_input_grad[0]:
            change = (blocks * fmt.levels[ctx.codes.int()].view_as(blocks)).sum(-1) * fmt.scale(ctx.bundle.params)
        if ctx.needs_input_grad[1]:
            units = (blocks * ctx.scale[..., None]).flatten(1)
        return change, units, None


@dataclass
class _Piece:
    """A GGUF matrix, or one of a stack. layer: the model's matrix that it is a part of.

    order: int64 [n_rows], the numbers of its rows in that. packed: uint8 [n_rows, row_bytes]. original: float32
    [n_rows, n_cols], until it is used.
    """

    entry: Entry
    layer: moments.Layer
    order: torch.Tensor
    packed: np.ndarray
    original: np.ndarray | None

    @property
    def address(self) -> int:
        """Of the model's matrix."""
        return self.layer.weight.data_ptr()

    @property
    def shape(self) -> tuple[int, int]:
        """Of its weights."""
        return len(self.packed), self.entry.tensor.n_cols


class _Quantized:
    """The student's matrices: their blocks, all of a type in one bundle, so that little is launched on a GPU."""

    def __init__(self, pieces: Sequence[_Piece], codes: bool, device: torch.device, chance: torch.Generator):
        self.pieces: list[tuple[Bundle, list[_Piece]]] = []
        types = {piece.entry.target_name: piece.entry.coder for piece in pieces}
        for name, kind in types.items():
            fmt = formats.for_type(kind, device)
            assert fmt
            same = [piece for piece in pieces if piece.entry.target_name == name]
            bundle = Bundle.of(fmt, [piece.packed for piece in same])
            if codes:
                weights = [torch.from_numpy(piece.original).reshape(-1, kind.block_size) for piece in same]
                bundle.train_codes(torch.cat([weight.to(device) for weight in weights]), chance)
                for piece in same:
                    piece.original = None
            self.pieces.append((bundle, same))
        self.orders: dict[int, torch.Tensor | None] = {}
        for address in {piece.address for piece in pieces}:
            order = torch.cat([p.order for _, same in self.pieces for p in same if p.address == address]).argsort()
            in_order = torch.equal(order, torch.arange(len(order)))
            self.orders[address] = None if in_order else order.to(device)

    @property
    def bundles(self) -> list[Bundle]:
        return [bundle for bundle, _ in self.pieces]

    def weights(self) -> dict[int, torch.Tensor]:
        """float32 [n_rows, n_cols] by address, as stored; differentiable."""
        parts: dict[int, list[torch.Tensor]] = {}
        for bundle, pieces in self.pieces:
            sizes = [math.prod(piece.shape) // bundle.codes.shape[1] for piece in pieces]
            for piece, part in zip(pieces, bundle.weight().split(sizes), strict=True):
                parts.setdefault(piece.address, []).append(part.view(piece.shape))
        whole = {address: found[0] if len(found) == 1 else torch.cat(found) for address, found in parts.items()}
        orders = self.orders
        return {address: w if (o := orders[address]) is None else w[o] for address, w in whole.items()}

    def packed(self) -> dict[str, np.ndarray]:
        """Tensor name -> rows as trained; the experts of a stack follow one another."""
        found: dict[str, list[np.ndarray]] = {}
        for bundle, pieces in self.pieces:
            rows, first = bundle.packed(), 0
            for piece in pieces:
                size = piece.packed.size // rows.shape[1]
                found.setdefault(piece.entry.name, []).append(rows[first : first + size].reshape(piece.packed.shape))
                first += size
        return {name: np.concatenate(parts) for name, parts in found.items()}


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
        quantized = _Quantized(pieces, what == "codes", student.device, chance)
        norms = _norms(student, file)
        original = {name: parameter.detach().clone() for name, (parameter, _) in norms.items()}
        for parameter, _ in norms.values():
            parameter.requires_grad_(True)
        rate = RATES[what]
        groups = [*_groups(quantized.bundles, rate)]
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

    def rate(step: int) -> float:
        return min(1, (step + 1) / min(WARM, 1 + steps // 8)) * (1 + math.cos(math.pi * step / steps)) / 2

    optimizer = torch.optim.Adam(groups, betas=BETAS, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    batches: list[torch.Tensor] = []
    for step in range(steps):
        if not batches:
            batches = list(tokens[torch.randperm(len(tokens), generator=chance)].split(BATCH))
        batch = batches.pop()

        def backward(part: torch.Tensor, size: int = batch.numel()) -> None:
            with torch.enable_grad():
                loss(part).div(size).backward()

        fisher.as_fits(student, backward, batch, again=optimizer.zero_grad)
        for group in optimizer.param_groups if step == 0 else ():
            size = torch.stack([leaf.grad.square().mean() for leaf in group["params"]]).mean().sqrt()
            group["eps"] = max(EPSILON * float(size), torch.finfo(torch.float32).tiny)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for bundle in bundles:
            if bundle.units is not None:
                bundle.units.data.clamp_(*bundle.reach)
                if step % bundle.every == 0 or step + 1 == steps:
                    bundle.choose(chance)
        progress(step + 1, steps)


def _groups(bundles: Sequence[Bundle], rate: float) -> Iterator[dict[str, Any]]:
    """Leaves with their rates. rate: of scales."""
    for bundle in bundles:
        if bundle.change is not None:
            yield {"params": [bundle.change], "lr": rate}
        if bundle.units is not None:
            of_codes = next(rate for bits, rate in CODE_RATES.items() if bundle.fmt.type.bpw < bits)
            yield {"params": [bundle.units], "lr": of_codes * bundle.gap}


def _size(values: torch.Tensor) -> float:
    return float(values.detach().float().square().mean().sqrt())


def _loss(teacher: Model, student: Model, quantized: _Quantized, tokens: torch.Tensor) -> torch.Tensor:
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
) -> list[_Piece]:
    """Puts what is stored into the model; returns what can be trained."""
    pieces: list[_Piece] = []
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
                        pieces.append(_Piece(entry, layer, order, packed, matrix if codes else None))
                    first += len(matrix)
        for parts in stored.values():
            for layer, order, weight in parts:
                layer.weight[order.to(layer.weight.device)] = weight.to(layer.weight)
    return _whole(pieces)


def _whole(pieces: list[_Piece]) -> list[_Piece]:
    """Those whose tensor and whose matrix all have pieces: either is trained whole or not at all."""
    while True:
        found: Counter[str | int] = Counter()
        for piece in pieces:
            found.update({piece.entry.name: len(piece.packed), piece.address: len(piece.packed)})
        kept = [
            p for p in pieces
            if found[p.entry.name] == p.entry.tensor.n_rows and found[p.address] == len(p.layer.weight)
        ]  # fmt: skip
        if len(kept) == len(pieces):
            return kept
        pieces = kept


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
