# SPDX-License-Identifier: MIT
"""What `make embeddings` compares."""

import numpy as np
import pytest

from experiments import embeddings


def test_turned_vectors_have_a_cosine_and_other_neighbours():
    angles = np.radians([0, 10, 60, 75])
    exact = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert embeddings.nearest(exact).tolist() == [1, 0, 3, 2]
    angles[1] = np.radians(40)
    found = embeddings.compared(exact, np.stack([np.cos(angles), np.sin(angles)], 1))
    assert found["lowest"] == pytest.approx(np.cos(np.radians(30)))
    assert found["cosine"] == pytest.approx((3 + np.cos(np.radians(30))) / 4)
    assert found["neighbour"] == 0.75  # of the four only the second has another one now


def test_paragraphs_are_whole_and_from_all_of_the_text():
    long, short = ["\n".join(["word"] * n) for n in (60, 10)]
    text = "\n\n".join([long, short, long.replace("word", "next"), long.replace("word", "last")])
    found = embeddings.paragraphs(text, 2)
    assert [part[:4] for part in found] == ["word", "last"] and all("\n" not in part for part in found)
    assert len(embeddings.paragraphs(text, 9)) == 3
