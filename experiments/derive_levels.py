# SPDX-License-Identifier: MIT
"""Where the levels of sq4, sq3 and sq2 come from; prints the levels in patches/files/ggml/src/ggml-splitq-levels.h.

    python -m experiments.derive_levels [MODEL]        MODEL: a checkpoint folder, examples/demo by default

Every block of 32 weights of the linear layers is divided by the scale (and mirrored where the scale is negative) that
the encoder would choose for it. One-dimensional k-means with k = 3 then splits these normalised weights into lower,
middle and upper, as SplitQuantV2 does (arXiv 2503.07657), and each range gets equally spaced levels. Two choices are
this project's:

- After plain k-means, whose boundaries fit three *centres*, the same iteration goes on with each centre replaced by its
  range of levels: a weight moves to the range that represents it best. With 3 + 10 + 3 levels this lowers the error of
  the plain boundaries considerably, which the table shows.
- The blocks' scales are chosen anew with the new levels, and all is repeated until nothing moves.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from gguf_splitq.coding.kmeans import kmeans
from gguf_splitq.types.splitquant import SCALES, codebooks

BLOCKS = 10_000  # a sample: twice as many move no level by more than two
COUNTS = {"sq4": (3, 10, 3), "sq3": (2, 4, 2), "sq2": (1, 2, 1)}
ROUNDS = 60  # the boundaries move outwards slowly


def sample_blocks(model: Path) -> np.ndarray:
    """float32 [BLOCKS, 32], drawn from all two-dimensional weights but the embeddings."""
    parts = []
    for shard in sorted(model.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if len(file.get_slice(name).get_shape()) == 2 and "embed" not in name and "lm_head" not in name:
                    parts.append(file.get_tensor(name).float().numpy().reshape(-1, 32))
    blocks = np.concatenate(parts)
    return blocks[np.random.default_rng(0).choice(len(blocks), min(BLOCKS, len(blocks)), replace=False)]


def fit_scales(blocks: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, float]:
    """Best scale of each block over a wide window, and the relative squared error in dB."""
    base = np.searchsorted(SCALES[:128], np.abs(blocks).max(1) / 127, side="right") - 1
    middles = (levels[:-1] + levels[1:]) / 2
    least, best = np.full(len(blocks), np.inf), np.zeros(len(blocks))
    for step in range(-9, 6):
        for sign in (1, -1):
            d = sign * SCALES[np.clip(base + step, 1, 127)]
            error = ((blocks - d[:, None] * levels[np.searchsorted(middles, blocks / d[:, None])]) ** 2).sum(1)
            best = np.where(error < least, d, best)
            least = np.minimum(least, error)
    return best, 10 * np.log10(least.sum() / (blocks.astype(np.float64) ** 2).sum())


def linear_range(x: np.ndarray, weight: np.ndarray, count: int) -> np.ndarray:
    """`count` equally spaced levels with the least weighted squared error, by alternating least squares."""
    if count == 1:
        return np.array([np.average(x, weights=weight)])
    step = (x.max() - x.min()) / count
    first = x.min() + step / 2
    for _ in range(20):
        index = np.clip(np.rint((x - first) / step), 0, count - 1)
        mean_index, mean_x = np.average(index, weights=weight), np.average(x, weights=weight)
        step = (weight * (index - mean_index) * (x - mean_x)).sum() / (weight * (index - mean_index) ** 2).sum()
        first = mean_x - step * mean_index
    return first + step * np.arange(count)


def derive(blocks: np.ndarray, counts: tuple[int, int, int], plain: bool) -> tuple[np.ndarray, float]:
    """Levels scaled to a largest magnitude of 127, and their error; `plain` keeps the boundaries of k-means."""
    levels = np.linspace(-127, 112, sum(counts))
    for turn in range(ROUNDS):
        scales, _ = fit_scales(blocks, levels)
        x = (blocks / scales[:, None]).ravel()
        weight = np.repeat(scales**2, 32)
        ends = np.cumsum(counts)
        if plain or turn == 0:
            centres = kmeans(x, weight, 3, np.array([-60.0, 0.0, 60.0]), 50)
            low, high = (centres[1:] + centres[:-1]) / 2
        else:
            low, high = ((levels[end - 1] + levels[end]) / 2 for end in ends[:2])
        ranges = [x <= low, (x > low) & (x < high), x >= high]
        fitted = [linear_range(x[inside], weight[inside], count) for inside, count in zip(ranges, counts, strict=True)]
        levels = np.sort(np.concatenate(fitted))
        levels *= 127 / np.abs(levels).max() * -np.sign(levels[np.abs(levels).argmax()])
        levels.sort()
    whole = np.rint(levels)
    return whole, fit_scales(blocks, whole)[1]


def main(model: str = "examples/demo") -> None:
    blocks = sample_blocks(Path(model))
    table = Table("type", "levels", "k-means boundaries, dB", "continued, dB", "in the header, dB")
    for name, counts in COUNTS.items():
        levels, error = derive(blocks, counts, plain=False)
        chosen = np.array(codebooks()[name].levels, np.float64)
        table.add_row(
            name,
            " | ".join(" ".join(f"{level:.0f}" for level in part) for part in np.split(levels, np.cumsum(counts)[:2])),
            f"{derive(blocks, counts, plain=True)[1]:.2f}",
            f"{error:.2f}",
            f"{fit_scales(blocks, chosen)[1]:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
