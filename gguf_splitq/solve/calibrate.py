"""Calibration: the inputs of every linear layer, measured one decoder layer at a time behind the quantized prefix.

The model runs in PyTorch through transformers. For each decoder layer, in order: its linear layers see the calibration
tokens as they come out of the layers already quantized, their input second moments X^T X are added up in float32 per
batch and float64 in all, their weights are solved, put back, and the layer runs again to feed the next one. The huge
activations of a sequence's first token stay in the moments: without them the result measured worse.

GGUF tensors are found by content, not by name: a matrix of the GGUF is a permutation of the rows of one linear layer
(llama.cpp reorders the rows of Q and K), so rows are matched by their values. What no layer matches (experts in fused
parameters, transformed weights) is left to nearest rounding and is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError, UnsupportedError

CONTEXT = 512  # tokens per sequence: what llama-perplexity and llama-imatrix use
BATCH = 8  # sequences


@dataclass(frozen=True)
class Layer:
    """One linear layer, ready to be solved. weight: float32 [out, in]; hessian: float64 [in, in]."""

    name: str
    module: torch.nn.Linear
    hessian: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        return self.module.weight.data.float()


def load(folder: Path, device: str) -> torch.nn.Module:
    """The checkpoint as a transformers model in float32. Raises UnsupportedError when transformers cannot."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise UnsupportedError(f"{folder}: transformers cannot load it ({error}): convert without --calib") from error
    return model.to(device).eval().requires_grad_(False)


def read_tokens(folder: Path, text: Path, count: int) -> torch.Tensor:
    """int64 [sequences, CONTEXT] taken evenly from a text, the model's first token in front of each sequence.

    Raises InputError when the text gives less than four sequences.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids = tokenizer(text.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False)["input_ids"]
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = CONTEXT - len(first)
    available = len(ids) // body
    sequences = min(available, count // CONTEXT)
    if sequences < 4:
        raise InputError(f"{text}: {len(ids)} tokens are too few to calibrate on: give at least {4 * body}")
    rows = torch.tensor(ids[: available * body]).view(available, body)
    rows = rows[torch.linspace(0, available - 1, sequences).long()]
    return torch.cat([torch.tensor(first, dtype=torch.long).expand(sequences, len(first)), rows], 1)


def sample_tokens(model: torch.nn.Module, count: int, seed: int = 0, temperature: float = 1.0) -> torch.Tensor:
    """int64 [sequences, CONTEXT] drawn from the model itself, each sequence started by its first token."""
    first = model.generation_config.bos_token_id
    if first is None:
        raise UnsupportedError("the model names no first token to start sampling from: give a --calib text")
    torch.manual_seed(seed)
    device, sequences = next(model.parameters()).device, max(4, count // CONTEXT)
    parts = []
    for start in range(0, sequences, 64):
        prompt = torch.full((min(64, sequences - start), 1), first, device=device)
        parts.append(
            model.generate(
                prompt, do_sample=True, temperature=temperature, top_k=0, top_p=1.0, min_new_tokens=CONTEXT - 1,
                max_new_tokens=CONTEXT - 1, pad_token_id=first,
            ).cpu()
        )  # fmt: skip
    return torch.cat(parts)


@torch.no_grad()
def run(model: torch.nn.Module, tokens: torch.Tensor, solve: Callable[[int, int, list[Layer]], None]) -> None:
    """Walk through the decoder layers; `solve(index, count, layers)` replaces the weights of the linear ones.

    Raises InputError when an activation is NaN or Inf, UnsupportedError when the model has no list of decoder layers.
    """
    decoder = _decoder_layers(model)
    device = next(model.parameters()).device
    states, arguments = _first_inputs(model, decoder[0], tokens, device)
    for index, block in enumerate(decoder):
        linears = {name: m for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        moments, counts = _moments(block, linears, states, arguments)
        layers = []
        for name, module in linears.items():
            if counts[name]:
                if not torch.isfinite(moments[name]).all():
                    where = f"decoder layer {index}, {name}"
                    raise InputError(f"{where}: an activation is NaN or Inf: check the checkpoint")
                layers.append(Layer(name, module, moments[name] / counts[name]))
        solve(index, len(decoder), layers)
        for i, state in enumerate(states):
            states[i] = _output(block(state.to(device), **arguments[i])).to(state.device)


def match(gguf_rows: np.ndarray, layers: list[Layer]) -> tuple[Layer, np.ndarray] | None:
    """The layer whose rows, in the returned order, are `gguf_rows` float32 [n_rows, n_cols], or None."""
    wanted = _row_keys(gguf_rows)
    order = np.argsort(wanted, kind="stable")
    for layer in layers:
        weight = layer.weight
        if tuple(weight.shape) == gguf_rows.shape:
            keys = _row_keys(weight.cpu().numpy())
            its_order = np.argsort(keys, kind="stable")
            if np.array_equal(keys[its_order], wanted[order]):
                rows = np.empty_like(order)
                rows[order] = its_order
                return layer, rows
    return None


def _row_keys(rows: np.ndarray) -> np.ndarray:
    return np.array([hash(row.tobytes()) for row in np.ascontiguousarray(rows)])


def _decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    if not lists:
        raise UnsupportedError(f"{type(model).__name__} has no list of decoder layers: convert without --calib")
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))


class _Stop(Exception):
    pass


def _first_inputs(
    model: torch.nn.Module, first: torch.nn.Module, tokens: torch.Tensor, device: torch.device
) -> tuple[list[torch.Tensor], list[dict]]:
    """What the first decoder layer is called with, batch by batch."""
    states, arguments = [], []

    def catch(module, args, kwargs):
        states.append(args[0])
        arguments.append({k: v for k, v in kwargs.items() if "past_key" not in k and k != "use_cache"})
        raise _Stop

    handle = first.register_forward_pre_hook(catch, with_kwargs=True)
    for batch in tokens.split(BATCH):
        try:
            model(batch.to(device), use_cache=False)
        except _Stop:
            pass
    handle.remove()
    return states, arguments


def _moments(
    block: torch.nn.Module, linears: dict[str, torch.nn.Linear], states: list[torch.Tensor], arguments: list[dict]
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """X^T X and the number of input rows of each linear layer; layers fed by the same tensor share the work."""
    moments = {name: 0 for name in linears}
    counts = dict.fromkeys(linears, 0)
    last: list = [None, None]  # the input seen last and its moment: Q, K and V are fed by one tensor

    def add(name):
        def hook(module, args):
            x = args[0]
            if x is not last[0]:
                rows = x.reshape(-1, x.shape[-1]).float()
                last[:] = [x, (rows.T @ rows).double()]
            moments[name] = moments[name] + last[1]
            counts[name] += x.numel() // x.shape[-1]

        return hook

    handles = [module.register_forward_pre_hook(add(name)) for name, module in linears.items()]
    for state, keywords in zip(states, arguments, strict=True):
        block(state, **keywords)
    for handle in handles:
        handle.remove()
    return moments, counts


def _output(result) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


