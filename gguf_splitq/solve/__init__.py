"""Error feedback for a whole model: calibrate layer by layer, solve every matrix, keep the bytes for the writer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..gguf_file import Gguf, disk_error
from ..plan import Entry
from ..rewrite import to_float32


@dataclass
class Solved:
    """rows: tensor name -> uint8 [n_rows, row_bytes], memory-mapped. errors: tensor name -> the solver's, by stage.

    left: tensors of a type the solver handles that no linear layer of the model matches; they are rounded to nearest.
    pooled: matrices solved with the Hessian of all experts of the layer, because this expert saw too few tokens.
    """

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    pooled: list[str] = field(default_factory=list)
    tokens: int = 0


def peak_ram(entries: Sequence[Entry], tokens: int) -> int:
    """Bytes that `run` needs at most: the model in float32 twice while it loads, hidden states, Hessians, PyTorch."""
    widest = max((e.tensor.n_cols for e in entries if len(e.tensor.shape) > 1), default=0)
    hidden = max((e.tensor.n_cols for e in entries if e.name == "token_embd.weight"), default=0)
    weights = sum(e.tensor.n_weights for e in entries)
    return (1 << 30) + 8 * weights + 12 * tokens * hidden + 5 * 8 * widest**2


def run(
    folder: Path,
    file: Gguf,
    entries: Sequence[Entry],
    calib: str | Path,
    tokens: int,
    scratch: Path,
    threads: int,
    progress: Callable[[int, int], None],
) -> Solved:
    """Solve every tensor that has a format, on a GPU when there is one.

    folder: the Hugging Face checkpoint that `file` was made from. calib: a text file, or "self" for text sampled from
    the model. scratch: where the solved rows are kept. progress: decoder layers done and in all.
    Raises InputError (too little text, damaged activations) and UnsupportedError (transformers cannot load it).
    """
    import torch

    from . import calibrate, formats, solver
    from .model import Model

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model(folder, device)
    calibration = model.sample_tokens(tokens) if calib == "self" else model.read_tokens(Path(calib), tokens)
    wanted = [e for e in entries if e.quantized and e.name.startswith("blk.")]
    solved = Solved(tokens=calibration.numel())

    def solve_layer(index: int, layers: list[calibrate.Layer]) -> None:
        chosen = [entry for entry in wanted if entry.name.startswith(f"blk.{index}.")]
        for entry, result in zip(chosen, pool.map(lambda entry: solve_tensor(entry, layers), chosen), strict=True):
            if result is not None:
                solved.rows[entry.name], solved.errors[entry.name] = result
            elif formats.for_type(entry.target):
                solved.left.append(entry.name)

    def solve_tensor(entry: Entry, layers: list[calibrate.Layer]) -> tuple[np.ndarray, dict[str, float]] | None:
        """The stored rows and the errors; puts into the model what is stored, so that the next layers see it."""
        tensor, fmt = entry.tensor, formats.for_type(entry.target, device)
        matrices, errors = [], []
        for first in range(0, tensor.n_rows, tensor.shape[-2]):
            rows = to_float32(file.read_rows(tensor, first, tensor.shape[-2]), tensor.type_id)
            found = calibrate.match(rows, layers)
            if found is None:
                return None
            layer, order = found
            if fmt is None:
                stored = torch.from_numpy(entry.target.decode(entry.target.encode(rows)))
                layer.weight[order.to(device)] = stored.to(layer.weight)
                continue
            if layer.pooled:
                solved.pooled.append(entry.name if len(tensor.shape) < 3 else f"{entry.name}[{len(matrices)}]")
            try:
                solution = solver.solve(torch.from_numpy(rows).to(device), layer.hessian, fmt)
            except InputError as error:
                raise InputError(f"tensor {entry.name!r}: {error}") from error
            layer.weight[order.to(device)] = solution.weight.to(layer.weight)
            matrices.append(solution.packed.cpu().numpy())
            errors.append(solution.errors)
        if fmt is None:
            return None
        path = scratch / entry.name
        packed = np.concatenate(matrices)
        try:
            packed.tofile(path)
        except OSError as error:
            raise disk_error(error, scratch, packed.nbytes) from error
        stored = np.memmap(path, np.uint8, "r", shape=(tensor.n_rows, entry.target.row_bytes(tensor.n_cols)))
        return stored, {stage: float(np.mean([e[stage] for e in errors])) for stage in errors[0]}

    states = model.inputs(calibration)
    # The solver's operations are too small to share: one matrix to a thread, and one thread to a matrix.
    with ThreadPoolExecutor(threads, "solve", lambda: torch.set_num_threads(1)) as pool, torch.no_grad():
        for index in range(len(model)):
            with model.layer(index) as module:
                solve_layer(index, calibrate.layers_of(model, module, index, states))
                for i, state in enumerate(states):
                    states[i] = model.forward(module, index, state).to(state.device)
            progress(index + 1, len(model))
    solved.pooled.sort()
    return solved
