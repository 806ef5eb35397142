# SPDX-License-Identifier: MIT
"""The pure parts of `make quality`: which rows are kept, what is claimed of them."""

import pytest

from experiments import common, quality


def row(type: str, data: str, bpw: float, kld: float, **more) -> dict:
    return {"type": type, "data": data, "bpw": bpw, "mean_kld": kld, **more}


ROWS = [
    row("sq4", "feedback", 4.25, 0.006),
    row("sq4", "self", 4.25, 0.009),
    row("IQ4_XS", "imatrix", 4.25, 0.01),
    row("IQ4_XS", "feedback", 4.25, 0.007, unpatched_kld=0.00701),
    row("IQ3_S", "imatrix", 3.44, 0.036),
    row("Q3_K", "imatrix", 3.44, 0.041),
    row("3.5 bpw", "bpw", 3.49, 0.03),
    row("3.0 bpw", "bpw", 3.01, 0.05),
]


def test_claims_are_made_of_what_was_measured(capsys):
    claims = {claim.pop("claim"): claim for claim in quality.claims_of(ROWS)}
    assert claims["KLD of sq4 (feedback) / IQ4_XS (imatrix)"] == {"measured": pytest.approx(0.6), "at_most": 0.65}
    assert claims["KLD of IQ4_XS (feedback) / IQ4_XS (imatrix)"] == {"measured": pytest.approx(0.7), "at_most": 0.8}
    assert claims["KLD of sq4 (self) / sq4 (feedback)"] == {"measured": pytest.approx(1.5), "at_most": 1.1}
    unpatched = claims["KLD of IQ4_XS (feedback) by unpatched llama.cpp / by ours"]
    assert unpatched["at_least"] < unpatched["measured"] < unpatched["at_most"]
    for peer in ("IQ3_S", "Q3_K"):
        assert claims[f"KLD of 3.5 bpw (bpw) / {peer} (imatrix)"]["at_most"] == 1.0
    assert "at_most" not in claims["KLD of 3.5 bpw (bpw) / IQ4_XS (imatrix)"]  # the next larger, not of its size
    assert claims["stored bits per weight of 3.0 bpw"] == {"measured": 3.01, "at_most": 3.0}
    assert not any("sq3" in claim for claim in claims)
    missed = [{"claim": name, **claim} for name, claim in claims.items()]
    with pytest.raises(SystemExit):
        common.judge(missed)
    printed = capsys.readouterr().out
    assert printed.count("MISSED") == 2 and "at least 0.99, at most 1.01  kept" in printed


def test_the_line_between_single_types():
    points = [(2.0, 1.0), (4.0, 0.01), (3.0, 0.5)]
    assert quality.between(points, 3.0) == pytest.approx(0.1)  # below the point that lies there
    assert quality.between(points, 4.0) == pytest.approx(0.01)
    assert quality.between(points, 4.5) == quality.between([], 3.0) == float("inf")


def test_rows_are_measured_once_for_the_same_settings(tmp_path):
    calls = []

    def measure():
        calls.append(1)
        return {"mean_kld": 0.1}

    for settings in ({"text": "a"}, {"text": "a"}, {"text": "b"}):
        rows = quality.Rows(tmp_path / "rows.json")
        assert rows.get(quality.Run("Q4_K", "none"), settings, measure)["type"] == "Q4_K"
    assert len(calls) == 2


def test_the_plot_shows_every_row(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        quality.plot(ROWS, "a title", tmp_path / name)
    picture = (tmp_path / "one.svg").read_text()
    assert picture == (tmp_path / "two.svg").read_text()
    for row in ROWS:
        assert f">{row['type']}<" in picture or row["data"] == "self"
