# SPDX-License-Identifier: MIT
"""The plan against golden text files; `SPLITQ_GOLDEN=write pytest tests/test_plan.py` writes them anew."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from gguf_splitq import plan
from gguf_splitq.errors import UnsupportedError, UsageError
from gguf_splitq.files.gguf_file import Tensor

GOLDEN = Path(__file__).parent / "golden"
F32, F16, Q4_0, BF16, I32, MXFP4 = 0, 1, 2, 30, 26, 39


def tensors(shapes, type_id=F16):
    return [
        Tensor(name, shape, F32 if len(shape) == 1 and type_id != Q4_0 else type_id, 0, 0, Path("m.gguf"))
        for name, shape in shapes.items()
    ]


LLAMA = tensors(
    {
        "token_embd.weight": (1000, 576),
        "blk.0.attn_norm.weight": (576,),
        "blk.0.attn_q.weight": (576, 576),
        "blk.0.attn_k.weight": (192, 576),
        "blk.0.ffn_down.weight": (576, 1536),
        "blk.0.ffn_gate_inp.weight": (8, 576),
        "blk.0.ffn_up_exps.weight": (8, 1536, 576),
        "blk.0.odd.weight": (16, 100),
        "blk.0.ssm_conv1d.weight": (64, 4),
        "output_norm.weight": (576,),
        "output.weight": (1000, 576),
    }
)
TIED = [t for t in LLAMA if t.name != "output.weight"]

CASES = {
    "sq4": (LLAMA, dict(type="sq4")),
    "sq4x": (LLAMA, dict(type="sq4x")),
    "f16": (LLAMA, dict(type="f16")),
    "q4_k": (LLAMA, dict(type="Q4_K")),
    "mixed": (
        LLAMA,
        dict(
            type="sq3",
            tensor_type=[r"blk\.0\.attn_(q|k)=q8_0", "ffn_.*exps=SQ2"],
            token_embedding_type="q6_k",
            output_tensor_type="sq4",
        ),
    ),
    "tied": (TIED, dict(type="sq2", output_tensor_type="bf16")),
}


@pytest.mark.parametrize("name", CASES)
def test_golden_plan(name):
    given, options = CASES[name]
    text = plan.text(plan.make(given, **options))
    path = GOLDEN / f"plan-{name}.txt"
    if os.environ.get("SPLITQ_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize(
    ("type", "columns", "ends"),
    [
        ("q4_k", 512, "q6_k"), ("iq4_xs", 512, "q6_k"), ("q4_k", 576, "q8_0"), ("q6_k", 512, "q6_k"),
        ("sq4w", 512, "q8_0"), ("sq4x", 512, "q8_0"), ("q4_0", 512, "q8_0"), ("f16", 512, "f16"),
    ],
)  # fmt: skip
def test_ends_have_the_type_that_goes_with_the_layers(type, columns, ends):
    names = ("token_embd.weight", "blk.0.attn_q.weight", "output.weight")
    entries = plan.make(tensors(dict.fromkeys(names, (64, columns))), type)
    assert entries[0].target_name == entries[2].target_name == ends and not (entries[0].fallback or entries[2].fallback)
    entries = plan.make([e.tensor for e in entries], type, token_embedding_type="q8_0", output_tensor_type="q8_0")
    assert entries[0].target_name == entries[2].target_name == "q8_0"


def test_planning_changes_nothing_and_is_repeatable():
    before = list(LLAMA)
    assert plan.make(LLAMA, "sq4") == plan.make(LLAMA, "sq4")
    assert before == LLAMA


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(type="sq5"), "sq5"),
        (dict(type="sq4", tensor_type=["attn_q"]), "REGEX=TYPE"),
        (dict(type="sq4", tensor_type=["=q8_0"]), "REGEX=TYPE"),
        (dict(type="sq4", tensor_type=["attn_(q=q8_0"]), "regular expression"),
        (dict(type="sq4", tensor_type=["attn_q=q9"]), "q9"),
        (dict(type="sq4", tensor_type=["nowhere=q8_0"]), "nowhere"),
        (dict(type="sq4", tensor_type=["attn=q8_0", "attn_q=sq2"]), "attn_q=sq2"),  # never its turn
        (dict(type="sq4", tensor_type=["attn_norm=q8_0"]), "attn_norm"),  # never quantized
        (dict(type="iq2_xs"), "--imatrix"),
    ],
)
def test_bad_options_are_refused_by_name(options, words):
    with pytest.raises(UsageError, match=words):
        plan.make(LLAMA, **options)


def test_importance_satisfies_types_that_need_it():
    shapes = {"blk.0.attn_q.weight": (256, 256)}
    entries = plan.make(tensors(shapes), "iq2_xs", importance=shapes)
    assert [e.target_name for e in entries] == ["iq2_xs"]


@pytest.mark.parametrize(("importance", "words"), [(None, "pass --imatrix"), ((), "has no entry for .blk.0.attn_q")])
def test_a_missing_entry_is_not_a_missing_matrix(importance, words):
    shapes = {f"blk.{i}.attn_q.weight": (256, 256) for i in range(3)}
    with pytest.raises(UsageError, match=words):
        plan.make(tensors(shapes), "iq2_xs", importance=importance)


def test_the_next_step_for_a_missing_entry_works():
    shapes = {f"blk.{i}.attn_q.weight": (256, 256) for i in range(3)}
    with pytest.raises(UsageError, match="and 1 more") as error:
        plan.make(tensors(shapes), "iq2_xs", importance=["blk.0.attn_q.weight"])
    rule = re.search("--tensor-type '(.*?)'", str(error.value))[1]
    with pytest.raises(UsageError, match="blk.2.attn_q"):
        plan.make(tensors(shapes), "iq2_xs", [rule], importance=["blk.0.attn_q.weight"])


def test_quantized_input_is_refused():
    quantized = tensors({"blk.0.attn_q.weight": (64, 64), "blk.1.attn_q.weight": (64, 64)}, Q4_0)
    with pytest.raises(UnsupportedError, match="already quantized .q4_0."):
        plan.make(quantized, "sq4")
    with pytest.raises(UnsupportedError, match="already quantized .q4_0."):  # only the embedding is not
        plan.make(quantized + tensors({"token_embd.weight": (64, 64)}), "sq4")


@pytest.mark.parametrize("type_id", [Q4_0, MXFP4])
def test_what_is_quantized_already_is_copied_unless_a_rule_says_otherwise(type_id):
    given = tensors({"blk.0.attn_q.weight": (64, 64)})
    given += tensors({"token_embd.weight": (64, 64), "blk.0.ffn_up_exps.weight": (2, 64, 64)}, type_id)
    q, embedding, experts = plan.make(given, "sq4")
    assert q.target_name == "sq4" and embedding.copied and experts.copied
    assert list(plan.fallbacks([q, embedding, experts]).values()) == [2]
    assert "quantized already" in experts.fallback and "copied" in experts.fallback
    q, embedding, experts = plan.make(given, "sq4", ["exps=sq3"], "q8_0")
    assert [q.target_name, embedding.target_name, experts.target_name] == ["sq4", "q8_0", "sq3"]
    plan.make(given[1:], "sq4", ["exps=sq3"])  # a rule applies before a refusal


def test_a_rule_for_what_cannot_be_decoded_is_refused():
    given = tensors({"blk.0.attn_q.weight": (64, 64), "blk.0.attn_k.weight": (64, 64)})
    given[1] = replace(given[1], type_id=I32)
    assert plan.make(given, "sq4")[1].copied
    with pytest.raises(UnsupportedError, match="attn_k.*--tensor-type attn_k=q8_0"):
        plan.make(given, "sq4", ["attn_k=q8_0"])


def test_rows_of_one_count_as_one_dimension():
    entries = plan.make(tensors({"blk.0.a.weight": (1, 64), "blk.0.b.weight": (64, 1)}), "f32")
    assert [e.target_name for e in entries] == ["f16", "f32"]


def test_integers_are_copied():
    (entry,) = plan.make(tensors({"blk.0.ffn_gate_tid2eid.weight": (8, 64)}, I32), "sq4")
    assert entry.copied and entry.target_name == "i32"


def test_widening_takes_a_type_that_fits():
    shapes = {"blk.0.attn_q.weight": (64, 64), "blk.0.odd.weight": (64, 33)}
    q, odd = plan.make(tensors(shapes, F32), "f16")
    assert plan.widen(q, 70000.0).target_name == plan.widen(odd, 70000.0).target_name == "bf16"
    assert "70000" in plan.widen(q, 70000.0).fallback
    (q,) = plan.make(tensors({"blk.0.attn_q.weight": (64, 64)}, BF16), "sq4")
    assert [plan.widen(q, largest).target_name for largest in (15, 1e6, 1e7)] == ["q8_0", "q8_0", "bf16"]
