# SPDX-License-Identifier: MIT
"""A model with rows of 576 weights, which blocks of 256 do not divide: ours keep their size there, and it runs."""

from pathlib import Path

import pytest

from experiments import models
from gguf_splitq.convert import convert
from gguf_splitq.inspection import linear_bpw
from gguf_splitq.measure.validate import Baseline


@pytest.fixture(scope="module")
def narrow_f16(tmp_path_factory):
    """F16 file of a random Llama with 576-wide rows; ffn_down's rows have 1536."""
    folder = tmp_path_factory.mktemp("narrow")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[1])
        patch.setattr(models, "BUILD", folder)
        checkpoint = models.random_llama("narrow", **models.NARROW | {"layers": 1})
        return convert(checkpoint, "f16", folder / "narrow-f16.gguf")


def test_sq4_sq3_and_sq2_store_what_they_say_and_run(narrow_f16, runtime_programs, tmp_path):
    text = Path(__file__).parents[1] / "examples/demo/eval.txt"
    with Baseline(narrow_f16, text, chunks=1) as base:
        results = [base.compare(convert(narrow_f16, name, tmp_path / f"{name}.gguf")) for name in ("sq4", "sq3", "sq2")]
    assert [result["bpw"] for result in results] == [4.25, 3.25, 2.25]
    kld = [result["mean_kld"] for result in results]
    assert 0 < kld[0] < kld[1] < kld[2]


@pytest.mark.parametrize(("name", "least"), [("q3_k", 4), ("q4_k", 5)])
def test_stock_types_of_256_wide_blocks_fall_back_there(narrow_f16, runtime_library, tmp_path, name, least):
    assert linear_bpw(convert(narrow_f16, name, tmp_path / "stock.gguf")) > least
