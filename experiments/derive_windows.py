# SPDX-License-Identifier: MIT
"""Where the tables of sq6w to sq2w come from; prints entries of patches/files/ggml/src/ggml-windows-tables.h.

    python -m experiments.derive_windows sample BLOCKS.npz ../shared/models/ref-a minilm    names of public.py, paths
    python -m experiments.derive_windows train BLOCKS.npz --bits 2 --device cuda
    python -m experiments.derive_windows train BLOCKS.npz --bits 5 6 --symmetric --seconds 200 --at-once 8 --few 512
    python -m experiments.derive_windows errors BLOCKS.npz      of the tables in the header

Training is Lloyd's iteration: every block gets the scale, the sign and the closed path of least error, then every level
becomes the weighted mean of the weights that use it. The result depends on where one starts, so there are three rounds,
each for a third of the time: many starts on few blocks, the best of them disturbed and trained again, the best few
trained on all blocks. Starts are T[i] = quantile((K i + c) mod n) of a Gaussian, K odd; linear permutations of the
quantiles; and quantiles dealt to the states. Blocks are Gaussian ones and as many of each model, half of them to train
on and half to choose by. The models must not have been quantized before: of SmolLM2, which public.py decodes from Q4_1,
a table of 4 bits learns the grid (0.4 dB better there, 0.05 worse elsewhere). Those of 5 and 6 bits are of ref-a and
the demo.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch

from gguf_splitq.types import windows
from gguf_splitq.types.splitquant import SCALES

BLOCK = 32
SAMPLE = 40_000  # blocks of a model that are kept
RMS = 0.02  # of each tensor's and of the Gaussian's weights, well inside the scales' range
LANES = 1 << 18  # paths searched at once, which bounds the memory: about 1 KB each, and 32 B for each step traced
CLOSED = 3  # scales of a block whose closed paths are searched, after open paths of all of them


@dataclass(frozen=True)
class Code:
    """A window code: `bits` of a weight's own, `window` in all. Indices are own code | next codes << bits here."""

    bits: int
    window: int = 6

    @property
    def n(self) -> int:
        """Entries of the table."""
        return 1 << self.window

    @property
    def states(self) -> int:
        """The bits that two neighbouring windows share."""
        return 1 << self.window - self.bits

    @property
    def chain(self) -> int:
        """Weights of a chain."""
        return 16 if self.bits >= 4 else 32

    def stored(self) -> np.ndarray:
        """int [n]: for each index of the type's bytes (ggml-windows.h), the index here."""
        i = np.arange(self.n)
        if (self.bits, self.window) == (3, 6):
            return i & 3 | (i >> 4 & 1) << 2 | (i >> 2 & 3) << 3 | (i >> 5) << 5
        if self.window == 7 and self.bits > 4:
            own, after = i & (1 << self.bits) - 1, i >> self.bits
            if self.bits == 5:
                after = after >> 1 | (after & 1) << 1
            # under other names, by which T[i ^ 65] = -1 - T[i]
            own, after = own ^ (own & 1) * ((1 << self.bits) - 2), after ^ (after & 1) * (self.states - 2)
            return own | after << self.bits
        return i

    @property
    def mask(self) -> int:
        """With --symmetric T[i ^ mask] is -1 - T[i]."""
        return self.n - 1 if self.bits > 4 else self.n // 2


@dataclass
class Tables:
    """R tables. levels: float32 [n, R], in units of the int8 levels; rms: [R], of the levels in use."""

    levels: torch.Tensor
    rms: torch.Tensor

    def __getitem__(self, some: torch.Tensor | slice) -> Tables:
        return Tables(self.levels[:, some], self.rms[some])


# --- blocks ------------------------------------------------------------------------------------------------------


def sample(model: Path) -> np.ndarray:
    """float32 [SAMPLE, 32]: blocks of all matrices but the embeddings, each tensor scaled to RMS."""
    parts = [x.reshape(-1, BLOCK) * (RMS / np.sqrt((x.astype(np.float64) ** 2).mean())) for x in _matrices(model)]
    blocks = np.concatenate(parts).astype(np.float32)
    return blocks[np.random.default_rng(0).choice(len(blocks), min(SAMPLE, len(blocks)), replace=False)]


def _matrices(model: Path) -> Iterator[np.ndarray]:
    """Yields float32 matrices of a checkpoint folder, or of a GGUF of F16."""
    if model.is_dir():
        from safetensors import safe_open

        for shard in sorted(model.glob("*.safetensors")):
            with safe_open(shard, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if len(file.get_slice(name).get_shape()) == 2 and "embed" not in name and "lm_head" not in name:
                        yield file.get_tensor(name).float().numpy()
        return
    from gguf_splitq.files import gguf_file

    with gguf_file.read(model) as file:
        for t in file.tensors:
            if len(t.shape) == 2 and t.name.startswith("blk.") and gguf_file.type_name(t.type_id) == "f16":
                yield file.read_rows(t, 0, t.n_rows).view(np.float16).astype(np.float32)


def load(file: Path, most: int, device: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Blocks to train on and blocks to choose by, name of the source -> float32 [n, 32], n at most `most`."""
    sources = dict(np.load(file))
    rng = np.random.default_rng(1)
    gaussian = rng.standard_normal((SAMPLE, BLOCK)) * RMS
    sources = {"Gaussian": gaussian * 2 ** rng.random((SAMPLE, 1)), **sources}  # every place between two scales
    blocks = {name: torch.tensor(x, dtype=torch.float32, device=device) for name, x in sources.items()}
    halves = [x.split(len(x) // 2) for x in blocks.values()]
    return tuple({name: half[i][:most] for name, half in zip(blocks, halves, strict=True)} for i in (0, 1))


# --- the search of scales and paths ------------------------------------------------------------------------------


def candidates(x: torch.Tensor, rms: torch.Tensor, steps: int) -> torch.Tensor:
    """float32 [R, 2 (2 steps + 1), n]: stored scales of both signs, near that which gives x [n, 32] the rms."""
    grid = torch.tensor(SCALES[:128], device=x.device)
    wanted = x.square().mean(1).sqrt() / rms[:, None]
    base = torch.bucketize(wanted, (grid[1:] + grid[:-1]) / 2)
    near = base[:, None] + torch.arange(-steps, steps + 1, device=x.device)[:, None]
    found = grid[near.clamp(1, 127)]
    return torch.cat([found, -found], 1)


def walk(code: Code, levels: torch.Tensor, y: torch.Tensor, closed: bool, start: torch.Tensor | None = None):
    """Viterbi. levels [n, R], y [R, N, chain] -> least error but for y's own square [R, N] and, with closed, the start.

    closed: every state is tried as start and end, and the best is returned; start [R, N] holds it, and returns the
    windows int64 [R, N, chain] of the best closed path from there.
    """
    r, n, length = y.shape
    shape = (code.states, 1, r, n)
    if start is not None:
        cost = torch.full(shape, torch.inf, device=y.device).scatter_(0, start[None, None], 0.0)
    elif closed:
        eye = torch.eye(code.states, device=y.device)[:, :, None, None]
        cost = torch.where(eye > 0, 0.0, torch.inf).expand(-1, -1, r, n)
    else:
        cost = torch.zeros(shape, device=y.device)
    square, twice = levels.square()[:, :, None], -2 * levels[:, :, None]
    came: list[torch.Tensor] = []
    for t in range(length):
        own = torch.addcmul(square, twice, y[None, :, :, t]).view(1 << code.bits, code.states, 1, r, n)
        # window = new bits * states + state; the state after it is its upper bits
        every = (own + cost).view(code.states, 1 << code.bits, cost.shape[1], r, n)
        if start is None:
            cost = every.amin(1)
        else:
            cost, last = every.min(1)
            came.append(last[:, 0].to(torch.uint8))
    if start is None:
        return torch.diagonal(cost, dim1=0, dim2=1).min(-1) if closed else cost.amin((0, 1))
    state, path = start, []
    for last in reversed(came):
        window = state << code.bits | last.gather(0, state[None])[0].long()
        path.append(window)
        state = window & code.states - 1
    return torch.stack(path[::-1], -1)


def encode(code: Code, tables: Tables, x: torch.Tensor, steps: int, trace: bool = True):
    """x [n, 32] -> its squared error [R, n] and, with trace, windows [R, n, 32] and scales [R, n]."""
    r, parts = len(tables.rms), []
    for piece in x.split(max(1, LANES // (r * 2 * (2 * steps + 1)))):
        scale = candidates(piece, tables.rms, steps)  # [R, C, n]
        square = piece.square().sum(1)
        opened = square + scale.square() * sum(_each(code, tables, piece, scale, False))
        scale = scale.gather(1, opened.topk(min(CLOSED, scale.shape[1]), 1, largest=False).indices)
        costs, starts = zip(*_each(code, tables, piece, scale, True), strict=True)
        error, best = (square + scale.square() * sum(costs)).min(1, keepdim=True)
        out = [error[:, 0]]
        if trace:
            scale = scale.gather(1, best)[:, 0]
            y = (piece / scale[..., None]).split(code.chain, -1)
            at = [s.gather(1, best)[:, 0] for s in starts]
            out += [torch.cat([walk(code, tables.levels, a, True, b) for a, b in zip(y, at, strict=True)], -1), scale]
        parts.append(out)
    return [torch.cat(part, 1) for part in zip(*parts, strict=True)]


def _each(code: Code, tables: Tables, x: torch.Tensor, scale: torch.Tensor, closed: bool) -> list:
    """`walk` over each chain of x [n, 32] at all scales [R, C, n]; its tensors have the scales' shape."""
    y = (x / scale[..., None]).flatten(1, 2)
    found = [walk(code, tables.levels, chain, closed) for chain in y.split(code.chain, -1)]
    return [tuple(part.view_as(scale) for part in f) if closed else f.view_as(scale) for f in found]


def decibels(code: Code, tables: Tables, blocks: dict[str, torch.Tensor], steps: int = 8) -> torch.Tensor:
    """[R, sources]: the relative squared error."""
    part = [
        encode(code, tables, x, steps, trace=False)[0].double().sum(1) / x.double().square().sum()
        for x in blocks.values()
    ]
    return 10 * torch.stack(part, 1).log10()


# --- Lloyd's iteration -------------------------------------------------------------------------------------------


def normal(tables: Tables) -> Tables:
    """The same with a largest magnitude of 127."""
    factor = 127 / tables.levels.abs().amax(0)
    return Tables(tables.levels * factor, tables.rms * factor)


def mirrored(code: Code, levels: torch.Tensor) -> torch.Tensor:
    """T[i ^ mask] = -1 - T[i], of the first half of `levels` [n, R], in units of levels whose largest is 127."""
    half = levels[: code.n // 2] + 0.5
    return both_halves(code, half * (126.5 / half.abs().amax(0))) - 0.5


def both_halves(code: Code, half: torch.Tensor) -> torch.Tensor:
    """[n / 2, R] -> [n, R] with T[i ^ mask] = -T[i]."""
    return torch.cat([half, -half[torch.arange(code.n // 2, code.n, device=half.device) ^ code.mask]])


def lloyd(
    code: Code, tables: Tables, x: torch.Tensor, rounds: int, symmetric: bool, steps: int = 3
) -> tuple[Tables, torch.Tensor]:
    """Tables after `rounds`, and the error [R] of those before the last round."""
    for _ in range(rounds):
        error, path, scale = encode(code, tables, x, steps)
        path, s = path.flatten(1), scale[..., None].expand(-1, -1, BLOCK).flatten(1)
        weights = x.flatten().expand_as(s)
        if symmetric:  # a level is +-t - 1/2: both halves vote on t
            other = path >= code.n // 2
            path = torch.where(other, path ^ code.mask, path)
            weights = torch.where(other, -1.0, 1.0) * (weights + 0.5 * s)
        zeros = torch.zeros(len(s), code.n // 2 if symmetric else code.n, device=x.device)
        among, above = zeros.scatter_add(1, path, s * s), zeros.scatter_add(1, path, s * weights)
        old = tables.levels.T[:, : zeros.shape[1]] + (0.5 if symmetric else 0)
        new = torch.where(among > 0, above / among, old)
        used = ((among * new * new).sum(1) / among.sum(1)).sqrt()
        if symmetric:
            tables = Tables(mirrored(code, new.T - 0.5), used * (126.5 / new.abs().amax(1)))
        else:
            tables = normal(Tables(new.T, used))
    return tables, error.sum(1)


def starts(code: Code, count: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [n, count]."""
    n = code.n
    quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)])
    i, out = np.arange(n), []
    while len(out) < count:
        kind = len(out) % 8
        if code.bits > 4:  # i ^ mask has the negative quantile
            factor = 2 * rng.integers(n // 2) + 1
            order = (factor * i + (factor - 1) // 2) % n
        elif kind < 5:
            order = ((2 * rng.integers(n // 2) + 1) * i + rng.integers(n)) % n
        elif kind < 7:  # a linear map over GF(2)
            order = np.zeros(n, int)
            for bit, mask in enumerate(rng.integers(1, n, code.window)):
                order |= (np.bitwise_count(i & mask) & 1) << bit
        else:  # the branches into a state are spread over the quantiles, in random order
            spread = [(np.arange(1 << code.bits) * code.states + s) for s in rng.permutation(code.states)]
            order = np.concatenate([rng.permutation(s) for s in spread])
        if len(np.unique(order)) == n:
            out.append(quantiles[order])
    return np.stack(out, 1).astype(np.float32)


def relabelled(code: Code, levels: torch.Tensor) -> torch.Tensor:
    """The same codes under other names, by the linear map that brings T[i ^ n/2] nearest to -1 - T[i].

    Good tables are nearly antisymmetric under some T[i ^ mask]; which mask that is depends on the names alone.
    """
    size, low = 1 << code.bits, (1 << code.window % code.bits) - 1  # of the last code a window holds the lower bits
    value = np.arange(size)
    columns = np.stack(np.meshgrid(*[value] * code.bits, indexing="ij"), -1).reshape(-1, code.bits)
    images = np.bitwise_xor.reduce(columns[:, None] * (value[:, None] >> np.arange(code.bits) & 1), -1)
    images = images[(np.sort(images, 1) == value).all(1) & ((images & low) == (images[:, value & low] & low)).all(1)]
    i, renamed = np.arange(code.n), 0
    for shift in range(0, code.window, code.bits):
        renamed = renamed | (images[:, i >> shift & size - 1] << shift & code.n - 1)
    names = torch.tensor(renamed, device=levels.device)
    uneven = torch.stack([(levels[to] + levels[to[i ^ code.n // 2]] + 1).abs().sum(0) for to in names])
    best = names[uneven.argmin(0)]
    return levels.gather(0, best.T)


def disturbed(levels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Each table changed: noise on all levels, or some of them exchanged."""
    out = levels.cpu().numpy().copy()
    for r in range(out.shape[1]):
        if r % 2:
            out[:, r] += rng.standard_normal(len(out)) * rng.choice([3, 8, 15])
        else:
            for _ in range(rng.integers(1, 5)):
                a, b = rng.choice(len(out), 2, replace=False)
                out[[a, b], r] = out[[b, a], r]
    return torch.tensor(out, device=levels.device)


def mixed(blocks: dict[str, torch.Tensor], count: int) -> torch.Tensor:
    """As many blocks of each source, `count` in all."""
    return torch.cat([x[: count // len(blocks)] for x in blocks.values()])


def train(code: Code, blocks: dict, chosen_by: dict, options: argparse.Namespace) -> Tables:
    """The best table, rounded, by the mean of the held-out sources' decibels."""
    seconds, symmetric, at_once, few = options.seconds, options.symmetric, options.at_once, options.few
    rng = np.random.default_rng(options.seed)
    device = next(iter(blocks.values())).device
    begin, tried = time.time(), 0
    small, medium, large = mixed(blocks, few), mixed(blocks, 4 * few), mixed(blocks, 16 * few)

    def fresh(levels: torch.Tensor) -> Tables:
        return normal(Tables(levels, levels.square().mean(0).sqrt()))

    def best(tables: Tables, error: torch.Tensor, count: int) -> tuple[Tables, torch.Tensor]:
        some = error.argsort()[:count]
        return tables[some], error[some]

    def joined(a: tuple[Tables, torch.Tensor], b: tuple[Tables, torch.Tensor]) -> tuple[Tables, torch.Tensor]:
        return (
            Tables(torch.cat([a[0].levels, b[0].levels], 1), torch.cat([a[0].rms, b[0].rms])),
            torch.cat([a[1], b[1]]),
        )

    def say(step: str, error: torch.Tensor, x: torch.Tensor) -> None:
        db = 10 * (error.double() / x.double().square().sum()).log10()
        print(f"  {step}: {tried} starts, {time.time() - begin:.0f} s, best {db.min():.3f} dB of {len(db)}", flush=True)

    pool = None
    while pool is None or time.time() - begin < seconds / 3:
        new = lloyd(code, fresh(torch.tensor(starts(code, at_once, rng), device=device)), small, 6, symmetric)
        tried += at_once
        pool = best(*(joined(pool, new) if pool else new), at_once)
    say("starts", pool[1], small)

    forced = symmetric and code.bits > 4  # all the time: there are too many names for `relabelled`
    pool = best(*lloyd(code, best(*pool, at_once // 2)[0], medium, 6, forced), at_once // 4)
    while time.time() - begin < seconds * 2 / 3:
        parents = torch.arange(at_once // 2, device=device) % len(pool[1])
        new = lloyd(code, fresh(disturbed(pool[0].levels[:, parents], rng)), medium, 6, forced)
        tried += at_once // 2
        pool = best(*joined(pool, new), at_once // 4)
    say("disturbed", pool[1], medium)

    tables = best(*pool, at_once // 8)[0]
    if symmetric and not forced:
        tables = fresh(mirrored(code, relabelled(code, tables.levels)))
    tables, error = lloyd(code, tables, large, 8, symmetric)
    while len(error) > 1 and time.time() - begin < seconds:
        tables, error = lloyd(code, best(tables, error, max(2, len(error) // 2))[0], large, 8, symmetric, 4)
    say("all blocks", error, large)
    tables = rounded(code, tables, symmetric)
    found = decibels(code, tables, chosen_by)
    winner = found.mean(1).argmin()
    print(f"  {' '.join(chosen_by)}: {' '.join(f'{v:.3f}' for v in found[winner])}", flush=True)
    return tables[winner : winner + 1]


def rounded(code: Code, tables: Tables, symmetric: bool) -> Tables:
    """Each table as integers, once as it is and with its outermost levels clipped for a finer grid of the others."""
    out = []
    for factor in (1.0, 1.05, 1.1, 1.2, 1.3):
        whole = (tables.levels * factor).round().clamp(-127, 127)
        if symmetric:
            whole = both_halves(code, whole[: len(whole) // 2].clamp(-127, 126) + 0.5) - 0.5
        out.append(Tables(whole, tables.rms * factor))
    return Tables(torch.cat([t.levels for t in out], 1), torch.cat([t.rms for t in out]))


def entry(code: Code, tables: Tables, x: torch.Tensor) -> str:
    """A table as the header has it; rms is that of the levels in use for x."""
    _, path, scale = encode(code, tables, x, 6)
    level = tables.levels[:, 0][path[0]]
    square = scale[0].square()
    rms = float(((level.square().mean(1) * square).sum() / square.sum()).sqrt())
    levels = tables.levels[:, 0].cpu().numpy().astype(int)[code.stored()][:64]
    lines = [", ".join(f"{v:4d}" for v in row) for row in levels.reshape(-1, 16)]
    return f"SPLITQ_WINDOWS(sq{code.bits}w, {code.bits}, {rms:.1f}f,\n    " + ",\n    ".join(lines) + ")"


def window_of(bits: int) -> int:
    """Bits of the type's windows."""
    return 7 if bits > 4 else 6


def in_header(bits: int, device: str) -> Tables:
    """The table of the header."""
    table = windows.tables()[f"sq{bits}w"]
    levels = np.empty(len(table.levels), np.float32)
    levels[Code(bits, window_of(bits)).stored()] = table.levels
    return Tables(torch.tensor(levels, device=device)[:, None], torch.tensor([table.rms], device=device))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("step", choices=("sample", "train", "errors"))
    p.add_argument("blocks", type=Path)
    p.add_argument("models", nargs="*")
    p.add_argument("--bits", type=int, nargs="+", default=[6, 5, 4, 3, 2])
    p.add_argument("--window", type=int, help="bits; default: those of the type")
    p.add_argument("--symmetric", action="store_true", help="one half of the table tells the other: sq3w, sq5w, sq6w")
    p.add_argument("--seconds", type=float, default=60, help="of training, for each table")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--at-once", type=int, default=64, help="tables trained at once")
    p.add_argument("--few", type=int, default=1024, help="blocks of the first round; the last has 16 times as many")
    p.add_argument("--device", default="cpu")
    o = p.parse_args()
    if o.step == "sample":
        from . import public

        np.savez(o.blocks, **{Path(name).name: sample(public.model(name)) for name in o.models})
        return
    blocks, held_out = load(o.blocks, 16 * o.few, o.device)
    for bits in o.bits:
        code = Code(bits, o.window or window_of(bits))
        if o.step == "errors":
            found = decibels(code, in_header(bits, o.device), held_out)[0]
            print(f"sq{bits}w  " + "  ".join(f"{k} {v:.3f}" for k, v in zip(held_out, found, strict=True)))
        else:
            print(f"{bits} bits, window of {code.window}{', symmetric' if o.symmetric else ''}", flush=True)
            print(entry(code, train(code, blocks, held_out, o), mixed(held_out, 16 * o.few)), flush=True)


if __name__ == "__main__":
    main()
