# SPDX-License-Identifier: MIT
"""AutoRound beside ours, without AutoRound: how it is called, which types ours get, what is compared."""

import argparse
import json
import os

import crafted
import pytest
import torch

from experiments import peers
from gguf_splitq.convert import convert
from gguf_splitq.errors import EnvironmentFailed

STAND_IN = """
import json, pathlib

class AutoRound:
    def __init__(self, model, **given):
        shapes = [list(part.shape) for part in given.pop("dataset")]
        self.given = given | {"model": model, "dataset": shapes}

    def quantize_and_save(self, folder, format):
        folder = pathlib.Path(folder) / "below"
        folder.mkdir()
        (folder / "named-by-it.gguf").write_text(json.dumps(self.given | {"format": format}))
"""


def test_without_autoround_there_is_a_sentence(monkeypatch):
    def missing(name):
        raise peers.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(peers.importlib.metadata, "version", missing)
    with pytest.raises(EnvironmentFailed, match=r"AutoRound is not installed: pip install auto-round=="):
        peers.installed()


def test_autoround_is_given_our_tokens_and_its_file_is_taken(tmp_path, monkeypatch):
    (tmp_path / "auto_round.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    torch.save(torch.zeros(20, 512, dtype=torch.long), tmp_path / "tokens.pt")
    args = argparse.Namespace(model=crafted.DEMO, folder=tmp_path, device="cpu")
    file = tmp_path / "taken.gguf"
    assert peers.theirs("q2_k_s", ["7", "--extended"], tmp_path / "tokens.pt", file, args) > 0
    given = json.loads(file.read_text())
    assert given["dataset"] == [[8, 512], [8, 512], [4, 512]] and given["nsamples"] == 20
    assert given["seqlen"] * given["batch_size"] == 8 * 2048 and given["iters"] == 7 and given["enable_alg_ext"]
    assert given["layer_config"] == {"model.embed_tokens": "GGUF:Q8_0", "lm_head": "GGUF:Q8_0"}
    assert given["scheme"] == "GGUF:Q2_K_S" and given["format"] == "gguf:q2_k_s"


def test_ours_get_the_types_of_a_file(tmp_path, demo_f16):
    given = {"token_embedding_type": "q8_0", "tensor_type": ["attn_v=f16", r"blk\.1\.ffn_down=sq4"]}
    rules = peers.mixed(convert(demo_f16, "q8_0", tmp_path / "theirs.gguf", **given), "q8_0")
    assert len(rules) == 5 and r"^blk\.1\.ffn_down\.weight$=sq4" in rules
    same = convert(demo_f16, "q8_0", tmp_path / "ours.gguf", token_embedding_type="q8_0", tensor_type=rules)
    assert peers.mixed(same, "q8_0") == rules


def test_ours_are_compared_with_the_closest_of_theirs():
    found = {"AutoRound, 0": (0.2, 9.0), "AutoRound, 200": (0.1, 30.0), "feedback": (0.05, 15.0)}
    rows = [
        {"type": "q2_k_s", "method": method, "mean_kld": kld, "seconds": seconds}
        for method, (kld, seconds) in found.items()
    ]
    assert [claim["measured"] for claim in peers.claims_of(rows)] == pytest.approx([0.5, 0.5])
    assert all(claim["claim"].endswith("feedback / AutoRound, 200") for claim in peers.claims_of(rows))


def test_types_come_from_a_method_that_is_never_left_out():
    every = peers.methods(200, "cuda", None)
    assert list(every) == [
        "AutoRound, 0", "AutoRound, 200", "AutoRound, 200, extended", "ours, feedback", "ours, codes trained"
    ]  # fmt: skip
    assert list(peers.methods(200, "cuda", "extended,trained")) == [list(every)[i] for i in (0, 2, 4)]
    assert list(peers.methods(1000, "cpu", "feedback")) == ["AutoRound, 0", "ours, feedback"]
