"""Error feedback: the codes of one weight matrix, chosen for the outputs they give on calibration inputs.

Knows no format. A `Format` gives three things: it fits the parameters of its blocks, rounds a column given them, and
packs; the solver decides the order and what each column is rounded to.

1. Feedback (GPTQ, Frantar et al., arXiv 2210.17323): columns are coded in the order of falling Hessian diagonal, with
   block parameters fixed beforehand, and each column's error is pushed into the columns not yet coded through the
   Cholesky factor of the inverse Hessian, lazily in groups of columns.
2. Polish: the scale of every block is set to its least-squares value for the codes it has, and every code to its best
   value given all the others, in turn, while the error falls. Neither step can raise the error, and both see the whole
   Hessian, where feedback sees only the columns that are still to come.

The error is the trace of (W - Q) H (W - Q)^T, H the second moment of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import InputError

DAMPING = 1e-3  # of the Hessian's mean diagonal; GPTQ uses ten times as much
GROUP = 128  # columns whose errors are pushed on together
ROUNDS = 6  # of polish, at most
LEAST_GAIN = 2e-3  # relative; a round that gains less is the last


class Format(Protocol):
    """What the solver needs of a block format: weight = scale * unit + offset.

    Parameters are one tensor [n_rows, n_cols / block_size, ...], whatever the format keeps for a block.
    """

    block_size: int

    def fit(self, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        """Block parameters for float32 weights [n_rows, n_cols], columns weighted by importance [n_cols]."""

    def round(self, column: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """float32 [n_rows] -> uint8 codes [n_rows], given the parameters [n_rows, ...] of the column's block."""

    def unit(self, codes: torch.Tensor) -> torch.Tensor:
        """What a code stands for at scale 1, float32 like `codes`."""

    def scale(self, params: torch.Tensor) -> torch.Tensor:
        """float32 scale of each block."""

    def offset(self, params: torch.Tensor) -> torch.Tensor:
        """float32 offset of each block."""

    def nearest(self, scale: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """The parameters of a block with the storable scale nearest to `scale`, the rest unchanged."""

    def pack(self, codes: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """uint8 [n_rows, row_bytes]."""


@dataclass(frozen=True)
class Solution:
    """packed: uint8 [n_rows, row_bytes]; weight: float32, what the bytes stand for; errors: by stage, per row."""

    packed: torch.Tensor
    weight: torch.Tensor
    errors: dict[str, float]


def solve(weight: torch.Tensor, hessian: torch.Tensor, fmt: Format, damping: float = DAMPING) -> Solution:
    """Code `weight` float32 [n_rows, n_cols] against `hessian` [n_cols, n_cols], on the device they are on.

    damping: added to the diagonal, relative to its mean. Raises InputError when the damped Hessian is not positive
    definite, or not finite.
    """
    hessian = damped(hessian, damping)
    h = hessian.float()
    params = fmt.fit(weight, h.diagonal())
    nearest = _codes(weight, params, fmt)
    errors = {"nearest": _error(weight, nearest, params, fmt, h)}

    codes = _feedback(weight, hessian, params, fmt)
    errors["feedback"] = _error(weight, codes, params, fmt, h)
    if errors["feedback"] > errors["nearest"]:  # possible where the Hessian is nearly diagonal
        codes = nearest
    error = min(errors.values())
    for _ in range(ROUNDS):
        tried = _polish(weight, codes, params, fmt, h)
        lower = _error(weight, *tried, fmt, h)
        if not lower < error:
            break
        codes, params = tried
        gain, error = 1 - lower / error, lower
        if gain < LEAST_GAIN:
            break
    errors["polish"] = error
    return Solution(fmt.pack(codes, params), _weight(codes, params, fmt), errors)


def damped(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """float64 Hessian with `damping` times its mean diagonal added; columns that were never active get a 1."""
    h = hessian.double().clone()
    diagonal = h.diagonal()
    if not torch.isfinite(h).all():
        raise InputError("the Hessian is not finite: an activation was NaN or Inf; calibrate in float32")
    diagonal[diagonal <= 0] = 1
    diagonal += damping * diagonal.mean()
    return h


def _feedback(weight: torch.Tensor, hessian: torch.Tensor, params: torch.Tensor, fmt: Format) -> torch.Tensor:
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor, failed = torch.linalg.cholesky_ex(hessian[order][:, order])
    if not failed:
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if failed:
        raise InputError("the Hessian is not positive definite: use more calibration text or a larger damping")
    factor, scale, offset = factor.float(), fmt.scale(params), fmt.offset(params)
    work, n_cols = weight[:, order].contiguous(), weight.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, n_cols, GROUP):
        end = min(start + GROUP, n_cols)
        group = work[:, start:end].T.contiguous()  # a column of the matrix is a row here: contiguous
        errors = torch.empty_like(group)
        for i in range(end - start):
            column, block = order[start + i], order[start + i] // fmt.block_size
            code = fmt.round(group[i], params[:, block])
            codes[:, column] = code
            value = scale[:, block] * fmt.unit(code) + offset[:, block]
            errors[i] = (group[i] - value) / factor[start + i, start + i]
            group[i + 1 :].addr_(factor[start + i, start + i + 1 : end], errors[i], alpha=-1)
        work[:, end:] -= errors.T @ factor[start:end, end:]
    return codes


def _polish(
    weight: torch.Tensor, codes: torch.Tensor, params: torch.Tensor, fmt: Format, h: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass over the scales, then one over the codes."""
    codes, params, size = codes.clone(), params.clone(), fmt.block_size
    error = weight - _weight(codes, params, fmt)
    pull = error @ h
    for block, at in enumerate(range(0, weight.shape[1], size)):
        inside = slice(at, at + size)
        unit, old = fmt.unit(codes[:, inside]), fmt.scale(params[:, block])
        slope = (pull[:, inside] * unit).sum(1)
        curve = ((unit @ h[inside, inside]) * unit).sum(1)
        new = fmt.nearest(old + torch.where(curve > 0, slope / curve, 0), params[:, block])
        step = fmt.scale(new) - old
        better = step * (step * curve - 2 * slope) < 0
        params[better, block] = new[better]
        change = torch.where(better, step, 0)[:, None] * unit
        pull -= change @ h[inside]

    scale, offset = fmt.scale(params), fmt.offset(params)
    pull = (weight - _weight(codes, params, fmt)) @ h
    for start in range(0, weight.shape[1], GROUP):
        end = min(start + GROUP, weight.shape[1])
        group = pull[:, start:end].T.contiguous()
        changes = torch.empty_like(group)
        for i in range(end - start):
            column, block = start + i, (start + i) // size
            old = scale[:, block] * fmt.unit(codes[:, column])
            aim = old + offset[:, block] + group[i] / h[column, column]
            codes[:, column] = fmt.round(aim, params[:, block])
            changes[i] = scale[:, block] * fmt.unit(codes[:, column]) - old
            group.addr_(h[column, start:end], changes[i], alpha=-1)
        pull[:, end:] -= changes.T @ h[start:end, end:]
    return codes, params


def _codes(weight: torch.Tensor, params: torch.Tensor, fmt: Format) -> torch.Tensor:
    columns = [fmt.round(weight[:, i], params[:, i // fmt.block_size]) for i in range(weight.shape[1])]
    return torch.stack(columns, 1)


def _weight(codes: torch.Tensor, params: torch.Tensor, fmt: Format) -> torch.Tensor:
    scale, offset = (part.repeat_interleave(fmt.block_size, 1) for part in (fmt.scale(params), fmt.offset(params)))
    return fmt.unit(codes) * scale + offset


def _error(weight: torch.Tensor, codes: torch.Tensor, params: torch.Tensor, fmt: Format, h: torch.Tensor) -> float:
    difference = weight - _weight(codes, params, fmt)
    return float(((difference @ h) * difference).sum(dtype=torch.float64)) / len(weight)
