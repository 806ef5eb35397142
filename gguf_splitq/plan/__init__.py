# SPDX-License-Identifier: MIT
"""The plan of a conversion: which type each tensor gets, and why. Pure: no file is touched here."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .. import types
from ..errors import UnsupportedError, UsageError
from ..files.gguf_file import Tensor, n_bytes, type_name
from ..types import TensorType, columns
from ..types.stock import StockType

FLOATS = ("f32", "f16", "bf16")

# Names of 2-D weights that llama.cpp never quantizes, because they are small or because its kernels want floats:
# tensor_allows_quantization in src/llama-quant.cpp at the pin.
_KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight",
    "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight", "time_mix_v1.weight",
    "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight", "time_mix_g1.weight",
    "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight",
    "attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd",
    ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
_KEPT_WHOLE = ("position_embd.weight", "token_types.weight")
_KEPT_BY_ARCHITECTURE = {
    "glm5-next": (
        "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate",
        "indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight",
        "ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight",
    ),
}  # fmt: skip

_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
ENDS = ("token_embd.weight", "output.weight")  # what a model begins and ends with; where tied, the first is both

# What a row that does not divide falls back to (f16 when that does not divide either). Stock types as upstream's
# tensor_type_fallback in src/llama-quant.cpp; sq4x is this project's own rule.
_FALLBACK = {
    "sq4x": "q8_0", "q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0",
    "iq1_s": "iq4_nl", "iq1_m": "iq4_nl", "iq2_xxs": "iq4_nl", "iq2_xs": "iq4_nl", "iq2_s": "iq4_nl",
    "iq3_xxs": "iq4_nl", "iq3_s": "iq4_nl", "iq4_xs": "iq4_nl",
}  # fmt: skip

# Reasons of a type that nobody asked for by the tensor's name; what is quantized already is not changed for them.
_UNSAID = ("--type", "bit budget", "embeddings", "output")

# Types that the `gguf` package cannot decode.
ONE_WAY = ("q1_0", "q8_1", "q8_k", "i8", "i16", "i32", "i64", "f64")

# Stock types whose encoder is useless, or aborts, without an importance matrix (tensor_requires_imatrix, same file).
_NEEDS_IMPORTANCE = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs")


@dataclass(frozen=True)
class Entry:
    """One tensor's decision.

    fallback: the cause when the type asked for could not be used. layout: of a type with a side tensor.
    """

    tensor: Tensor
    target: TensorType | None  # None: copied as stored, a type this project does not encode (integers)
    reason: str
    fallback: str | None = None
    layout: columns.Layout = columns.PLAIN

    @property
    def name(self) -> str:
        """The tensor's."""
        return self.tensor.name

    @property
    def source_name(self) -> str:
        """Its type in the input."""
        return type_name(self.tensor.type_id)

    @property
    def target_id(self) -> int:
        """The `ggml_type` of what is written."""
        return self.tensor.type_id if self.target is None else self.target.gguf_id

    @property
    def target_name(self) -> str:
        """The type of what is written."""
        return type_name(self.target_id)

    @property
    def coder(self) -> TensorType:
        """The target of a tensor that has one, as everything quantized has."""
        assert self.target is not None, f"{self.name} is copied as stored"
        return self.target

    @property
    def columns(self) -> columns.ColumnType | None:
        """The target if it has a side tensor."""
        return self.target.columns if self.target else None

    @property
    def copied(self) -> bool:
        """Whether the bytes are taken over."""
        return self.target_id == self.tensor.type_id

    @property
    def quantized(self) -> bool:
        """Whether it becomes, or stays, a type of ours or of ggml that is no float."""
        return self.target is not None and self.target.name not in FLOATS

    @property
    def stored(self) -> list[tuple[str, tuple[int, ...], int]]:
        """(name, NumPy shape, type id) of what is written: the tensor, and its side tensor if its type has one."""
        out = [(self.name, self.tensor.shape, self.target_id)]
        if self.columns:
            *experts, n_rows, n_cols = self.tensor.shape
            shape = (*experts, self.columns.side_bytes(n_rows, n_cols, self.layout))
            out.append((columns.side_name(self.name), shape, columns.SIDE_TYPE))
        return out

    @property
    def n_bytes(self) -> int:
        """Of all that is written for it."""
        return sum(n_bytes(shape, type_id) for _, shape, type_id in self.stored)

    @property
    def bpw(self) -> float:
        """Stored bits per weight, the side tensor included."""
        return 8 * self.n_bytes / self.tensor.n_weights


def quantizable(tensor: Tensor, architecture: str = "") -> bool:
    """Whether llama.cpp would quantize this tensor at all (2-D or more, a weight, not on its list of exceptions)."""
    name = tensor.name
    kept = (*_KEPT, *_KEPT_BY_ARCHITECTURE.get(architecture, ()))
    # The dimensions that count are those above 1 in front: ggml_n_dims ignores leading ones.
    n_dims = len(tensor.shape) - next((i for i, n in enumerate(tensor.shape) if n > 1), len(tensor.shape))
    return n_dims >= 2 and name.endswith("weight") and name not in _KEPT_WHOLE and not any(k in name for k in kept)


def is_linear(tensor: Tensor, architecture: str = "") -> bool:
    """A quantizable weight that is neither an embedding nor the output: what "linear layers only" measures."""
    return quantizable(tensor, architecture) and tensor.name not in (*_EMBEDDINGS, "output.weight")


def make(
    tensors: Sequence[Tensor],
    type: str | TensorType,
    tensor_type: Iterable[str] = (),
    token_embedding_type: str | None = None,
    output_tensor_type: str | None = None,
    architecture: str = "",
    importance: Collection[str] | None = None,
    chosen: Mapping[str, str] | None = None,
    claq_metric: str = "hessian",
) -> list[Entry]:
    """Decide every tensor's type. tensor_type: `REGEX=TYPE` rules, searched in the name, the first match wins.

    Embeddings and output get q8_0, with K and IQ types q6_k where a row divides, unless told otherwise or unless `type`
    is larger anyway; an explicit embedding or output type beats the rules, and a tied embedding takes the output's, as
    in llama-quantize.
    importance: names of the tensors that the importance matrix covers, None without a matrix. chosen: tensor -> type,
    before `type`. claq_metric: what makes a column of cq2.x, sq2.x and so on worth more bits, "hessian" or "outlier".
    What is quantized already is copied as stored, unless a rule or an option names a type for that very tensor.
    Raises UsageError for bad rules, missing importance and a size that cannot be met, UnsupportedError for a file whose
    linear layers are all quantized already.
    """
    base = types.get(type) if isinstance(type, str) else type
    rules = [_Rule(text) for text in tensor_type]
    embedding = types.get(token_embedding_type) if token_embedding_type else None
    output = types.get(output_tensor_type) if output_tensor_type else None
    tied = not any(t.name == "output.weight" for t in tensors)

    def large(tensor: Tensor) -> TensorType:
        # q6_k is encoded by llama.cpp's library alone, which K and IQ types need anyway.
        of_library = isinstance(base, StockType) and base.block_size == 256
        least = types.get("q6_k" if of_library and tensor.n_cols % 256 == 0 else "q8_0")
        return base if base.bpw > least.bpw else least

    def choose(tensor: Tensor) -> tuple[TensorType, str]:
        rule = next((r for r in rules if r.pattern.search(tensor.name)), None)
        if tensor.name == "output.weight" and output:
            return output, "--output-tensor-type"
        if tensor.name in _EMBEDDINGS and embedding and not (rule and tensor.name == "per_layer_token_embd.weight"):
            return embedding, "--token-embedding-type"
        if rule:
            rule.used = True
            return rule.type, f"--tensor-type {rule.text}"
        if chosen and tensor.name in chosen:
            return types.get(chosen[tensor.name]), "bit budget"
        if tensor.name in _EMBEDDINGS:
            return (output, "--output-tensor-type, tied") if tied and output else (large(tensor), "embeddings")
        return (large(tensor), "output") if tensor.name == "output.weight" else (base, "--type")

    def decide(tensor: Tensor) -> Entry:
        source = type_name(tensor.type_id)
        if not quantizable(tensor, architecture):
            if source in FLOATS and len(tensor.shape) <= 1:
                return Entry(tensor, types.get("f32"), "one dimension")
            return Entry(tensor, types.get(source) if source in FLOATS else None, "never quantized")
        entry = Entry(tensor, *choose(tensor))
        if source not in FLOATS:
            if entry.reason in _UNSAID:
                return Entry(tensor, None, entry.reason, f"quantized already ({source}): copied as stored")
            if source in ONE_WAY or tensor.type_id in columns.IDS:
                raise UnsupportedError(
                    f"tensor {tensor.name!r} is already quantized ({source}), which {entry.reason} cannot change: "
                    "leave that out, or convert from the F32, F16 or BF16 original"
                )
        if entry.columns:
            if not is_linear(tensor, architecture):
                raise UsageError(f"{entry.columns.name} is for linear layers only: give {entry.name!r} another type")
            entry = replace(entry, layout=columns.Layout(metric=claq_metric))
        return replace(entry, **_fit(entry.coder, tensor))

    entries = [decide(tensor) for tensor in tensors]
    for rule in rules:
        if not rule.used:
            raise UsageError(f"--tensor-type {rule.text!r} decides no tensor: check the pattern with --dry-run")
    _check_importance(entries, importance)
    linear = [e for e in entries if is_linear(e.tensor, architecture)]
    if linear and all(e.target is None for e in linear):
        raise UnsupportedError(
            f"tensor {linear[0].name!r} is already quantized ({linear[0].source_name}), and so is every linear layer: "
            "convert from the F32, F16 or BF16 original"
        )
    return _filled(entries)


def widen(entry: Entry, largest: float) -> Entry:
    """The entry again with a type that holds weights as large as `largest`, which the planned one does not.

    Where F16 does not, that is BF16; where no smaller type does either, the stored one.
    """
    asked, stored = entry.coder, entry.source_name if entry.source_name in FLOATS else "bf16"
    for name in ("bf16",) if asked.name == "f16" else ("q8_0", "f16", stored):
        wider = types.get(name)
        if entry.tensor.n_cols % wider.block_size == 0 and (wider.max_abs is None or largest <= wider.max_abs):
            break
    cause = f"a weight of {largest:.6g} is beyond {asked.name}'s {asked.max_abs:g}"
    return replace(entry, target=wider, fallback=f"{cause}: {asked.name} -> {wider.name}")


def bpw(entries: Iterable[Entry]) -> float:
    """Stored bits per weight over all the entries."""
    sizes = [(e.n_bytes, e.tensor.n_weights) for e in entries]
    return 8 * sum(size for size, _ in sizes) / max(1, sum(weights for _, weights in sizes))


def text(entries: Sequence[Entry]) -> str:
    """The plan as lines: name, shape, types, bytes, reason; then totals and fallbacks."""
    lines = [
        f"{e.name:<40} {'x'.join(map(str, e.tensor.shape)):>16} {e.source_name:>5} -> {e.target_name:<7} "
        f"{e.n_bytes:>13,} B  {e.fallback or e.reason}"
        for e in entries
    ]
    size, weights = sum(e.n_bytes for e in entries), sum(e.tensor.n_weights for e in entries)
    lines.append(f"{len(entries)} tensors, {weights:,} weights, {size:,} bytes, {bpw(entries):.3f} bpw")
    lines += [f"fallback x{count}: {cause}" for cause, count in fallbacks(entries).items()]
    return "\n".join(lines) + "\n"


def fallbacks(entries: Iterable[Entry]) -> dict[str, int]:
    """Cause -> number of tensors that could not have the type asked for."""
    return dict(Counter(e.fallback for e in entries if e.fallback))


def _check_importance(entries: Iterable[Entry], importance: Collection[str] | None) -> None:
    """UsageError when a type that cannot do without an importance matrix has no entry there."""
    lacking = [
        e for e in entries if e.target and e.target.name in _NEEDS_IMPORTANCE and e.name not in (importance or ())
    ]
    if not lacking:
        return
    name, wanted = lacking[0].name, lacking[0].coder.name
    if importance is None:
        raise UsageError(f"type {wanted} for {name!r} needs importance data: pass --imatrix")
    more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    raise UsageError(
        f"the importance matrix has no entry for {name!r}{more}, and type {wanted} needs one: give another type with "
        f"--tensor-type '{re.escape(name)}=q2_k', or make the matrix on more text"
    )


class _Rule:
    def __init__(self, text: str):
        pattern, found, name = text.rpartition("=")
        if not (pattern and found):
            raise UsageError(f"--tensor-type {text!r} is not of the form REGEX=TYPE: write e.g. ffn_down=q8_0")
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise UsageError(f"--tensor-type {text!r} is not a regular expression ({error}): correct it") from error
        self.text, self.type, self.used = text, types.get(name), False


def _filled(entries: Sequence[Entry]) -> list[Entry]:
    """Entries with a target (cq2.x, sq2.x ...) with what of wide columns and outliers brings all of one name to it."""
    room = {}
    for name, target in {e.columns.name: e.columns.target for e in entries if e.columns and e.columns.target}.items():
        chosen = [e for e in entries if e.target and e.target.name == name]
        weights, least = sum(e.tensor.n_weights for e in chosen), bpw(chosen)
        if least > target:
            raise UsageError(f"{name} cannot be met: codes and columns take {least:.3f} bits per weight: give more")
        room[name] = (target * weights / 8 - sum(e.n_bytes for e in chosen)) / weights
    left = dict.fromkeys(room, 0.0)  # bytes that the tensors before could not use

    def fill(entry: Entry) -> Entry:
        kind = entry.columns
        if kind is None or (name := kind.name) not in room:
            return entry
        *stack, n_rows, n_cols = entry.tensor.shape
        matrices = math.prod(stack)
        left[name] += room[name] * entry.tensor.n_weights
        size = kind.matrix_bytes(n_rows, n_cols, entry.layout) + int(left[name] / matrices)
        filled = replace(entry, layout=kind.within(n_rows, n_cols, size, entry.layout))
        left[name] -= filled.n_bytes - entry.n_bytes
        return filled

    return [fill(entry) for entry in entries]


def _fit(target: TensorType, tensor: Tensor) -> dict:
    """`target` and `fallback` of an entry for this tensor."""
    cause = target.unfit(tensor.name, tensor.shape)
    if cause is None:
        return {"target": target}
    found = _fit(types.get(target.stand_in or _FALLBACK.get(target.name, "f16")), tensor)
    return found | {"fallback": f"{cause}: {target.name} -> {found['target'].name}"}
