# SPDX-License-Identifier: MIT
"""Two extensions of sq2wc and its kind that were measured: sizes between, and chains that need not close. On the demo.

Sizes between are what sq2.x are of sq2c: some columns are sq3wc's. `--bpw` is the peer, which gives whole matrices a
type. What a matrix costs is the plan's cost of sq2w times its error, seen by the Hessian, over that of sq2w. Side
tensors are not counted, in favour of sizes between, which store the order of their columns besides.

A chain that begins in a state which the scale byte stores can end in any other. The byte then has room for a sign and
for steps within two octaves, the best two of each matrix. This is plain rounding, without data; both sides alike with
a scale for each row as well.

  python -m experiments.between
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from gguf_splitq import plan, types
from gguf_splitq.calibration import sensitivity
from gguf_splitq.coding import codebooks, columns, solver, windows
from gguf_splitq.coding.formats import WindowFormat
from gguf_splitq.files import gguf_file
from gguf_splitq.files.gguf_file import Gguf, Tensor
from gguf_splitq.plan.budget import choose
from gguf_splitq.types.columns import Layout
from gguf_splitq.types.splitquant import SCALES
from gguf_splitq.types.windows import Window, tables

from .common import BUILD, DEMO, convert, parser, provenance, run, save
from .paper_claq import FOLLOWED, KEPT, hessian, with_outliers

WHOLE = ["sq2w", "sq3w", "sq4w", "sq5w"], ["sq2wc", "sq3wc", "sq4wc"]
SHARES = [0.25, 0.5, 0.75]  # of the blocks, which have one bit more
TOKENS = 16384
BLOCKS = 128  # of each matrix, rounded with free chains
STEPS = {2: 2, 3: 1, 4: 2}  # eighths of an octave between scales, for which the state leaves room


def between(weight: torch.Tensor, hessian: torch.Tensor, wide: int) -> torch.Tensor:
    """What a matrix becomes whose `wide` blocks of dearest columns are sq3wc's and whose others are sq2wc's."""
    scale, inverse, hessian = columns._scaled(weight, hessian)
    h = solver.damped(hessian)
    order = codebooks.order(Layout(wide), [weight.T], codebooks.prices(h) * inverse**2)
    h, aim = h[order][:, order], (weight * inverse)[:, order].T
    sides, rows, moves = [slice(32 * wide), slice(32 * wide, None)], [], []
    for kind, here, other in zip(("sq3w", "sq2w"), sides, sides[::-1], strict=True):
        trellis, own = windows.Trellis.of(types.get(kind)), h[here, here]
        moves.append(torch.linalg.solve(own, h[here, other]).float())
        if not rows:  # what is coded first is repaired by the rest
            own = own - h[here, other] @ torch.linalg.solve(h[other, other], h[other, here])
        _, turn, factor, _ = solver.factored(
            own, 0, lambda diagonal, trellis=trellis: windows._order(diagonal, trellis)
        )
        given = h[here, here].float(), WindowFormat(types.get(kind)), turn, solver.pushes(factor), solver.costs(factor)
        rows.append(windows._Rows(aim[here].T.contiguous(), *given, trellis))

    def aimed(n: int) -> windows._Rows:
        """One side, its weights where they are best given the other."""
        rows[n].weight = aim[sides[n]] + moves[n] @ (aim[sides[1 - n]] - rows[1 - n].value())
        return rows[n]

    rows[0].feedback()
    aimed(1).feedback()
    chance = torch.Generator().manual_seed(0)
    for _ in range(windows.PASSES):
        for side in map(aimed, (0, 1)):
            side.search(chance, side.refit())
    for side in map(aimed, (0, 1)):
        side.refit()
    found = torch.empty_like(weight)
    found[:, order] = torch.cat([side.value() for side in rows]).T * scale.float()[order]
    return found


def linear(source: Gguf) -> list[Tensor]:
    return [t for t in source.tensors if plan.is_linear(t)]


def rows_of(source: Gguf, tensor: Tensor) -> np.ndarray:
    return source.read_rows(tensor, 0, tensor.n_rows).view(np.float32)


def errors(source: Gguf, plain: Gguf, hessians: Gguf, threads: int) -> dict[str, dict]:
    """Matrix -> type or share -> trace of E H E^T. hessians: of `plain`, whose norms the source may have multiplied."""
    norm = {follower: name for name, followers in FOLLOWED.items() for follower in followers}
    own, before = ({t.name: rows_of(file, t) for t in file.tensors if t.n_rows == 1} for file in (source, plain))

    def one(tensor: Tensor) -> dict:
        weight, h = torch.from_numpy(rows_of(source, tensor).copy()), hessian(hessians, tensor.name)
        role = tensor.name.split(".")[2]
        if (name := tensor.name.replace(role, norm.get(role, role))) in own:
            gain = torch.from_numpy(own[name] / before[name]).double()
            h = h * gain * gain.T
        found = {name: windows.solve(weight, h, types.get(name)).weight for name in WHOLE[0]}
        found |= {name: columns.solve_windows(weight, h, types.get(name)).weight for name in WHOLE[1]}
        found |= {share: between(weight, h, round(share * weight.shape[1] / 32)) for share in SHARES}
        off = {kind: (weight - value).double() for kind, value in found.items()}
        return {kind: float(((e @ h) * e).sum()) for kind, e in off.items()}

    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
        return dict(zip((t.name for t in linear(source)), pool.map(one, linear(source)), strict=True))


def sums(source: Gguf, costs: dict[str, dict]) -> list[list[str]]:
    """A row for each budget: the least sum of costs with window codes alone, and what else matrices may have."""
    bits = {name: types.get(name).bpw for kinds in WHOLE for name in kinds} | {share: 2.25 + share for share in SHARES}
    weights = {t.name: t.n_weights for t in linear(source)}
    size = {name: {kind: int(n * bits[kind] / 8) for kind in bits} for name, n in weights.items()}
    rows = []
    for share in SHARES:
        found = []
        for kinds in (WHOLE[0], sum(WHOLE, []), [*sum(WHOLE, []), *SHARES], [share]):
            allowed = {name: {kind: its[kind] for kind in kinds} for name, its in costs.items()}
            chosen = choose(allowed, size, int((2.25 + share) * sum(weights.values()) / 8))
            found.append(sum(costs[name][kind] for name, kind in chosen.items()))
        rows.append([f"{2.25 + share:.2f}", *(f"{total:.3f}" for total in found)])
    return rows


def free(kind: Window, blocks: np.ndarray, scale: np.float32) -> np.ndarray:
    """float32 [n]: least squared error of blocks [n, 32] whose chains begin and end in any state."""
    units = (blocks / scale)[:, kind.chain]
    cost = np.zeros((*units.shape[:2], kind.n_states), np.float32)
    for unit in np.moveaxis(units, 2, 0)[::-1]:
        cost = kind._ways(cost, np.square(unit[..., None] - kind.edges.astype(np.float32))).min(-2)
    return cost.min(-1).sum(-1) * scale**2


def started(source: Gguf, bits: int) -> list[str]:
    """A type's blocks outside two octaves, in the mean of the matrices and at most, and what a stored state changes,
    alike; then that with rows divided by their root mean squares.
    """
    kind, figures = types.get(f"sq{bits}w"), []
    positive = SCALES[:128].astype(np.float32)
    for by_row in (False, True):
        chance, outside, changes = np.random.default_rng(0), [], []
        for tensor in linear(source):
            units = rows_of(source, tensor)
            units = units / columns.scales(units).astype(np.float32)
            units = units / (np.sqrt(np.square(units).mean(1, keepdims=True)) if by_row else 1)
            blocks = units.reshape(-1, 32)
            wanted = np.sqrt(np.square(blocks).mean(1)) / tables()[kind.name].rms
            nearest = np.searchsorted((positive[1:] + positive[:-1]) / 2, wanted)
            within = np.convolve(np.bincount(nearest, minlength=128), np.ones(16), "valid")
            outside.append(1 - within.max() / len(blocks))
            some = blocks[chance.permutation(len(blocks))[:BLOCKS]]
            grid = positive[within.argmax() :][: 16 : STEPS[bits]]
            least = np.min([free(kind, sign * some, scale) for scale in grid for sign in (1, -1)], 0)
            changes.append(10 * np.log10(least.sum() / np.square(some - kind.decode(kind.encode(some, None))).sum()))
        figures += [] if by_row else [f"{np.mean(outside):.1%}", f"{max(outside):.1%}"]
        figures += [f"{np.mean(changes):+.2f}", f"{max(changes):+.2f}"]
    return [f"`sq{bits}wc`", *figures]


def main() -> None:
    args = parser(__doc__).parse_args()
    folder, calib = BUILD / "between", DEMO / "calib.txt"
    measured = folder / "hessians.gguf"
    measured.unlink(missing_ok=True)
    f32 = convert(DEMO, "f32", folder / "f32.gguf", threads=args.threads)
    feedback = {
        "calib": str(calib),
        "calib_tokens": TOKENS,
        "hessians": measured,
        "aim": "plain",
        "threads": args.threads,
    }
    convert(DEMO, "sq2w", folder / "sq2w.gguf", **KEPT, **feedback)
    rows, unit = [], {}
    with gguf_file.read(f32) as source, gguf_file.read(measured) as hessians:
        wanted = {t.name: [types.get("sq2w")] for t in linear(source)}
        where = calib, TOKENS, args.threads, folder, lambda done, total: None
        priced = sensitivity.of_checkpoint(DEMO, source, wanted, *where)
        with gguf_file.read(with_outliers(source, folder / "outliers.gguf")) as other:
            for name, model in {"as it is": source, "with outlier channels": other}.items():
                found = errors(model, source, hessians, args.threads)
                unit = unit or {matrix: priced[matrix]["sq2w"] / its["sq2w"] for matrix, its in found.items()}
                costs = {m: {kind: unit[m] * error for kind, error in its.items()} for m, its in found.items()}
                rows += [[name, *row] for row in sums(model, costs)]
        state = [started(source, bits) for bits in (2, 3, 4)]
    ways = ["`--bpw` of window codes", "and of `wc` types", "and of sizes between", "one size between for all"]
    octaves = [
        "type",
        "blocks outside two octaves",
        "most, of a matrix",
        "error, dB",
        "at worst",
        "with scales of rows",
        "at worst",
    ]
    found = {"sizes": (["demo", "bits per weight", *ways], rows), "state": (octaves, state)}
    for headings, part in found.values():
        print("", *(" | ".join(row) for row in [headings, *part]), sep="\n")
    made = provenance()
    content = {name: {"headings": head, "rows": part, "measured": made} for name, (head, part) in found.items()}
    save("between", {"tables": content}, args.keep)


if __name__ == "__main__":
    run(main)
