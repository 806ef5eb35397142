# SPDX-License-Identifier: MIT
"""What `make paper-claq` compares: the encoder as published, linear grids, a model with outlier channels."""

import crafted
import numpy as np
import pytest
import torch
from test_solve import problem

from experiments import paper_claq
from gguf_splitq import types
from gguf_splitq.coding import codebooks, free
from gguf_splitq.files import gguf_file


def test_a_grid_is_even_between_the_extremes():
    assert paper_claq.grid(np.float32([1, 9, 2, -3]), np.ones(4), 4).tolist() == [-3, 1, 5, 9]


def test_what_is_ours_lowers_the_error_and_clusters_beat_grids():
    weight, hessian = problem(128, 64)
    kind = types.get("cq3")
    published = paper_claq.PUBLISHED
    grid = codebooks.solve(weight, hessian, kind, cluster=paper_claq.grid, **published)
    claq = codebooks.solve(weight, hessian, kind, **published)
    ours = codebooks.solve(weight, hessian, kind)
    assert ours.errors["polish"] < claq.errors["polish"] < grid.errors["polish"]
    assert claq.errors["polish"] == pytest.approx(claq.errors["feedback"], rel=1e-3)
    _, nearest = free.with_codebooks(weight, kind, cluster=paper_claq.grid, **published)
    for side in (claq.side, nearest):
        row = kind.read_side(side, 128, 64, "x").row
        assert (row == row[0]).all()


def test_outlier_channels_change_nothing_that_is_computed(tmp_path):
    tensors = crafted.llama_tensors(256, 512, blocks=2)
    for name in tensors:
        if "norm" in name:
            tensors[name] = 1 + tensors[name]
    with gguf_file.read(crafted.write_gguf(tmp_path / "plain.gguf", tensors)) as source:
        path = paper_claq.with_outliers(source, tmp_path / "outliers.gguf")
    _, before = crafted.read_gguf(tmp_path / "plain.gguf")
    _, after = crafted.read_gguf(path)
    x = torch.randn(256, generator=torch.Generator().manual_seed(0)).numpy()
    for norm, followers in paper_claq.FOLLOWED.items():
        gain = after[f"blk.1.{norm}.weight"][1] / before[f"blk.1.{norm}.weight"][1]
        assert (gain > 1.01).sum() == 3 and (gain[gain > 1.01] >= 19.9).all() and gain.max() <= 50.1
        for follower in followers:
            old, new = (t[f"blk.1.{follower}.weight"][1].astype(np.float32) for t in (before, after))
            scale, changed = (t[f"blk.1.{norm}.weight"][1] for t in (before, after))
            np.testing.assert_allclose(new @ (x * changed), old @ (x * scale), atol=1e-5)
    for name in ("blk.0.ffn_down.weight", "output_norm.weight", "token_embd.weight"):
        np.testing.assert_array_equal(after[name][1], before[name][1].astype(np.float32))
