# SPDX-License-Identifier: MIT
"""A type for every linear layer: chosen under a bit budget (`--bpw`), kept in a file and used again (`--plan`).

The budget is stored bits per weight of all linear layers, those included whose type a `--tensor-type` rule decides.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import output, plan, types
from ..errors import InputError, UsageError
from ..files import gguf_file
from ..types import TensorType
from . import Entry

MOST_BYTES = 1 << 26  # of a plan; what is longer is a model given by mistake, not to be read whole
CANDIDATES = ("sq2w", "sq3w", "sq4w", "q5_k", "q6_k", "q8_0")


@dataclass(frozen=True)
class Mix:
    """bpw: the budget. types: tensor -> type. costs: tensor -> type -> expected divergence added, in nats."""

    bpw: float
    types: dict[str, str]
    costs: dict[str, dict[str, float]]


def base(bpw: float) -> str:
    """The type of tensors that could not be measured: the largest of ours within the budget."""
    return next((name for name in ("sq4w", "sq3w") if types.get(name).bpw <= bpw), "sq2w")


def label(bpw: float) -> str:
    """What stands for {type} in the output's name."""
    return f"{bpw:g}bpw"


def candidates(entries: Iterable[Entry]) -> dict[str, list[TensorType]]:
    """Tensor -> the types its rows divide into, for the linear layers that no rule decides."""
    every = [types.get(name) for name in CANDIDATES]
    free = [e for e in entries if e.reason == "--type" and not e.fallback]
    return {e.name: [t for t in every if e.tensor.n_cols % t.block_size == 0] for e in free}


def check(entries: Sequence[Entry], bpw: float, architecture: str = "") -> None:
    """UsageError when not even the smallest types keep to the budget."""
    weights, limit, sizes = _sizes(entries, bpw, architecture)
    if not weights:
        raise UsageError(f"--bpw {bpw:g} is for linear layers and there are none: give --type")
    least = sum(min(found.values()) for found in sizes.values())
    if least > limit:
        smallest = 8 * (least - limit) / max(weights, 1) + bpw
        raise UsageError(
            f"--bpw {bpw:g} cannot be met: with the smallest types the linear layers take {smallest:.4g} bits per "
            "weight: give that or more"
        )


def choose(entries: Sequence[Entry], costs: Mapping[str, dict[str, float]], bpw: float, architecture: str = "") -> Mix:
    """The types with the least sum of costs within the budget; tensors without costs stay as they are in `entries`."""
    from . import budget

    _, limit, sizes = _sizes(entries, bpw, architecture)
    fixed = [e for e in entries if e.name in sizes and e.name not in costs]
    chosen = budget.choose(costs, sizes, limit - sum(e.n_bytes for e in fixed))
    return Mix(bpw, chosen | {e.name: e.target_name for e in fixed}, dict(costs))


def summary(mix: Mix, entries: Iterable[Entry], architecture: str = "") -> str:
    """One line: what is stored, and the divergence expected of it."""
    stored = plan.bpw(e for e in entries if plan.is_linear(e.tensor, architecture))
    cost = sum(costs[mix.types[name]] for name, costs in mix.costs.items())
    return f"linear layers: {stored:.3f} bits per weight of {mix.bpw:g}, expected KL divergence {cost:.2g}"


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
    return all(type(n) in (int, float) for n in numbers) and 0 < mix.bpw < 32


def check_names(mix: Mix, entries: Sequence[Entry], path: str | Path, architecture: str = "") -> None:
    """InputError unless the plan is of these tensors."""
    linear = {e.name for e in entries if plan.is_linear(e.tensor, architecture)}
    if not linear:
        raise InputError(f"{path}: a plan is for linear layers and this model has none: give --type")
    for name in sorted(mix.types.keys() - linear):
        raise InputError(f"{path}: tensor {name!r} is not a linear layer of this model: make a plan for it with --bpw")
    for name in sorted(candidates(entries).keys() - mix.types.keys()):
        raise InputError(f"{path}: tensor {name!r} has no type there: make a plan for this model with --bpw")


def most_used(entries: Iterable[Entry], architecture: str = "") -> TensorType:
    """The type of most weights of the linear layers, for general.file_type."""
    weights: Counter[str] = Counter()
    for e in entries:
        if e.target and plan.is_linear(e.tensor, architecture):
            weights[e.target.name] += e.tensor.n_weights
    return types.get(weights.most_common(1)[0][0])


def _sizes(entries: Sequence[Entry], bpw: float, architecture: str) -> tuple[int, int, dict[str, dict[str, int]]]:
    """Weights of all linear layers, bytes left for those that are free, and tensor -> type -> bytes of these."""
    linear = [e for e in entries if plan.is_linear(e.tensor, architecture)]
    free, weights = candidates(linear), sum(e.tensor.n_weights for e in linear)
    limit = math.floor(bpw * weights / 8) - sum(e.n_bytes for e in linear if e.name not in free)
    sizes = {
        e.name: {t.name: e.tensor.n_rows * t.row_bytes(e.tensor.n_cols) for t in free[e.name]}
        for e in linear
        if e.name in free
    }
    return weights, limit, sizes
