# SPDX-License-Identifier: MIT
"""A type for every tensor: chosen under a bit budget (`--bpw`, `--file-bpw`, `--size`), kept in a file (`--plan`).

The budget of `--bpw` is stored bits per weight of all linear layers, those included whose type a `--tensor-type` rule
decides. That of a whole file is all its tensors, embedding and output among them, for which types are chosen as well.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .. import output, plan, types
from ..errors import InputError, UsageError
from ..files import gguf_file
from ..types import TensorType
from . import Entry

MOST_BYTES = 1 << 26  # of a plan; what is longer is a model given by mistake, not to be read whole
CANDIDATES = ("sq2w", "sq3w", "sq4w", "sq5w", "sq6w", "q8_0")
SCALED = {"sq2wo": "sq2w", "sq3wo": "sq3w", "sq4wc": "sq4w"}  # for linear layers, and the same without scales
WORTH = 0.8  # of the divergence without: what scales of columns have to bring it down to, since they cannot be trained


@dataclass(frozen=True)
class Budget:
    """bpw: stored bits per weight of the linear layers, or with `whole` of all tensors, their padding counted.

    size: what `bpw` was made of, bytes of the file, of which the first `header` are no tensors; else None.
    """

    bpw: float
    whole: bool = False
    size: int | None = None
    header: int = 0

    @classmethod
    def of_size(cls, size: int, header: int, entries: Iterable[Entry]) -> Budget:
        """What leaves room for a header of `header` bytes in a file of `size` bytes with these tensors."""
        weights = sum(e.tensor.n_weights for e in entries)
        return cls(8 * (size - header) / max(weights, 1), True, size, header)

    @property
    def option(self) -> str:
        """As messages call it."""
        if self.size is not None:
            return f"--size {gguf_file.mib(self.size)}"
        return f"--file-bpw {self.bpw:g}" if self.whole else f"--bpw {self.bpw:g}"


@dataclass(frozen=True)
class Mix:
    """bpw: the budget, of linear layers or of the `whole` file. types: tensor -> type.

    costs: tensor -> type -> expected divergence added, in nats.
    """

    bpw: float
    types: dict[str, str]
    costs: dict[str, dict[str, float]]
    whole: bool = False


def base(bpw: float) -> str:
    """The type of tensors that could not be measured: the largest of ours within the budget."""
    return next((name for name in ("sq6w", "sq5w", "sq4w", "sq3w") if types.get(name).bpw <= bpw), "sq2w")


def label(bpw: float, whole: bool = False) -> str:
    """What stands for {type} in the output's name."""
    return f"{bpw:g}bpw-file" if whole else f"{bpw:g}bpw"


def candidates(entries: Iterable[Entry], whole: bool = False) -> dict[str, list[TensorType]]:
    """Tensor -> the types its rows divide into, for the linear layers that no rule decides.

    whole: for the embedding and the output as well.
    """
    found = {}
    for e in entries:
        at_end = whole and e.name in plan.ENDS and e.reason in ("embeddings", "output")
        if (e.reason == "--type" or at_end) and not e.fallback:
            kinds = [types.get(name) for name in (CANDIDATES if at_end else (*CANDIDATES, *SCALED))]
            found[e.name] = [kind for kind in kinds if kind.unfit(e.name, e.tensor.shape) is None]
    return found


def largest(free: Mapping[str, Sequence[TensorType]], base: str) -> dict[str, str]:
    """Tensor -> of its `candidates` what takes the most memory to solve and the most of a header: a side tensor, if
    one may be; else `base`.
    """
    return {name: next((kind.name for kind in kinds if kind.columns), base) for name, kinds in free.items()}


def check(entries: Sequence[Entry], budget: Budget, architecture: str = "") -> None:
    """UsageError when not even the smallest types keep to the budget."""
    weights, limit, sizes = _sizes(entries, budget, architecture)
    if not any(plan.is_linear(e.tensor, architecture) for e in entries):
        raise UsageError(f"{budget.option} is for linear layers and there are none: give --type")
    least = sum(min(found.values()) for found in sizes.values())
    if least <= limit:
        return
    smallest = 8 * (least - limit) / max(weights, 1) + budget.bpw
    taken = f"the linear layers take {smallest:.4g} bits per weight"
    if budget.whole:
        taken = f"the file takes {smallest:.4g} bits per weight"
    if budget.size is not None:
        taken = f"the file takes {(budget.size + least - limit + (1 << 20) - 1) >> 20} MiB"
    raise UsageError(f"{budget.option} cannot be met: with the smallest types {taken}: give that or more")


def choose(
    entries: Sequence[Entry], costs: Mapping[str, dict[str, float]], budget: Budget, architecture: str = ""
) -> Mix:
    """The types with the least sum of costs within the budget; tensors without costs stay as they are in `entries`.

    Types with scales of columns are taken where they are WORTH it.
    """
    from .budget import choose as chosen

    _, limit, sizes = _sizes(entries, budget, architecture)
    fixed = [e for e in entries if e.name in sizes and e.name not in costs]
    worth = {
        tensor: {type: cost for type, cost in of.items() if cost <= WORTH * of.get(SCALED.get(type, ""), math.inf)}
        for tensor, of in costs.items()
    }
    found = chosen(worth, sizes, limit - sum(_bytes(e, budget.whole) for e in fixed))
    return Mix(budget.bpw, found | {e.name: e.target_name for e in fixed}, dict(costs), budget.whole)


def summary(mix: Mix, entries: Sequence[Entry], architecture: str = "") -> str:
    """One line: what is stored, and the divergence expected of it."""
    linear = plan.bpw(e for e in entries if plan.is_linear(e.tensor, architecture))
    cost = sum(costs[mix.types[name]] for name, costs in mix.costs.items())
    stored = f"linear layers: {linear:.3f} bits per weight of {mix.bpw:g}"
    if mix.whole:
        stored = f"file: {plan.bpw(entries):.3f} bits per weight of {mix.bpw:.5g}, linear layers {linear:.3f}"
    return f"{stored}, expected KL divergence {cost:.2g}"


def save(mix: Mix, path: str | Path) -> None:
    """Write a plan for `load`; EnvironmentFailed when it cannot be written."""
    output.write_json(path, asdict(mix))


def load(path: str | Path) -> Mix:
    """What `save` wrote; InputError for anything else, UsageError for a type that is not known."""
    gguf_file.require_file(path)
    try:
        if os.stat(path).st_size > MOST_BYTES:
            raise ValueError
        mix = Mix(**json.loads(Path(path).read_bytes()))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): make it with --bpw and --save-plan") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a plan: make it with --bpw and --save-plan") from error
    if not _is_plan(mix):
        raise InputError(f"{path}: not a plan: make it with --bpw and --save-plan")
    for name in mix.types.values():
        types.get(name)
    return mix


def _is_plan(mix: Mix) -> bool:
    """Whether the fields are what `Mix` says, and every tensor with costs has one for the type it got."""
    if not all(isinstance(found, dict) for found in (mix.types, mix.costs)):
        return False
    if not all(isinstance(name, str) for name in mix.types.values()):
        return False
    if not all(isinstance(found, dict) and mix.types.get(name) in found for name, found in mix.costs.items()):
        return False
    numbers = [mix.bpw, *(cost for found in mix.costs.values() for cost in found.values())]
    return type(mix.whole) is bool and all(type(n) in (int, float) for n in numbers) and 0 < mix.bpw < 32


def check_names(mix: Mix, entries: Sequence[Entry], path: str | Path, architecture: str = "") -> None:
    """InputError unless the plan is of these tensors."""
    linear = {e.name for e in entries if plan.is_linear(e.tensor, architecture)}
    if not linear:
        raise InputError(f"{path}: a plan is for linear layers and this model has none: give --type")
    ends = {e.name for e in entries if mix.whole and e.name in plan.ENDS}
    for name in sorted(mix.types.keys() - linear - ends):
        raise InputError(f"{path}: tensor {name!r} is not a linear layer of this model: make a plan for it with --bpw")
    for name in sorted(candidates(entries, mix.whole).keys() - mix.types.keys()):
        raise InputError(f"{path}: tensor {name!r} has no type there: make a plan for this model with --bpw")


def most_used(entries: Iterable[Entry], architecture: str = "") -> TensorType:
    """The type of most weights of the linear layers, for general.file_type."""
    weights: Counter[str] = Counter()
    for e in entries:
        if e.target and plan.is_linear(e.tensor, architecture):
            weights[e.target.name] += e.tensor.n_weights
    return types.get(weights.most_common(1)[0][0])


def _sizes(entries: Sequence[Entry], budget: Budget, architecture: str) -> tuple[int, int, dict[str, dict[str, int]]]:
    """Weights that the budget is for, bytes left for tensors that are free, and tensor -> type -> bytes of these."""
    counted = [e for e in entries if budget.whole or plan.is_linear(e.tensor, architecture)]
    free, weights = candidates(counted, budget.whole), sum(e.tensor.n_weights for e in counted)
    limit = math.floor(budget.bpw * weights / 8) - sum(_bytes(e, budget.whole) for e in counted if e.name not in free)
    sizes = {
        e.name: {kind.name: _bytes(replace(e, target=kind), budget.whole) for kind in free[e.name]}
        for e in counted
        if e.name in free
    }
    return weights, limit, sizes


def _bytes(entry: Entry, whole: bool) -> int:
    """What a tensor takes, in a file with its padding."""
    if not whole:
        return entry.n_bytes
    return sum(gguf_file.padded(gguf_file.n_bytes(shape, type_id)) for _, shape, type_id in entry.stored)
