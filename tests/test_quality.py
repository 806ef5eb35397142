# SPDX-License-Identifier: MIT
"""The pure parts of `make quality`: which rows are kept, what is claimed of them."""

import pytest

from experiments import common, ends, files, quality


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


def test_claims_of_whole_files(capsys):
    """Half of their divergence, or no more of it at the next smaller size, whatever the order of the sizes is."""
    bits = {"Q4_K_M": 5.0, "Q3_K_M": 4.0, "IQ3_M": 4.1, "Q2_K": 3.0}
    theirs = {"Q4_K_M": 0.02, "Q3_K_M": 0.1, "IQ3_M": 0.09, "Q2_K": 0.4}
    ours = {"Q4_K_M": 0.012, "Q3_K_M": 0.06, "IQ3_M": 0.045, "Q2_K": 0.11}
    kinds = {"imatrix": theirs, "ours": ours}
    rows = [row(size, kind, 0, klds[size], file_bpw=bits[size]) for kind, klds in kinds.items() for size in bits]
    claims = {claim["claim"]: claim for claim in files.claims_of(rows)}
    assert "at_most" in claims["KLD at the size of Q4_K_M, 5.00 bits per weight"]  # IQ3_M has more than 0.02
    assert claims["KLD of ours at the next smaller size, Q3_K_M, / IQ3_M"]["measured"] == pytest.approx(0.06 / 0.09)
    assert "at_most" not in claims["KLD at the size of IQ3_M, 4.10 bits per weight"]
    assert claims["KLD at the size of Q3_K_M, 4.00 bits per weight"]["at_most"] == 0.5
    with pytest.raises(SystemExit):
        common.judge(list(claims.values()))
    assert capsys.readouterr().out.count("MISSED") == 2


def test_decoding_takes_turns(tmp_path, monkeypatch):
    """Both files of a size are timed in every round, and the median counts."""
    source, place = files.File("Q2_K", "ours"), tmp_path / "a.json"
    rows = [row("Q2_K", data, 0, 0.1) for data in ("imatrix", "ours")]
    files.add_speed(rows, {source: place}, 1)
    assert not any("tg" in row for row in rows)  # no files
    for file in (place.with_suffix(".gguf"), files.beside(place)):
        file.touch()
    calls = []

    def speed(pair, threads, generate, repetitions):
        calls.append(pair)
        return {file: {"tg": len(calls) * (1 + index)} for index, file in enumerate(pair)}

    monkeypatch.setattr(files, "speed", speed)
    files.add_speed(rows, {source: place}, 1)
    assert [row["tg"] for row in rows] == [3, 6] and len(calls) == files.ROUNDS


def test_ends_are_set_beside_q8_0(demo_f16):
    assert {run.data for run in ends.runs(demo_f16)} == {"q8_0", "q6_k", "q5_1", "sq4w"}  # one matrix, one type
    rows = [row("sq4w", "q8_0", 0, 0.01, file_bpw=5.0), row("sq4w", "q6_k", 0, 0.011, file_bpw=4.5)]
    assert [claim["measured"] for claim in ends.claims_of(rows)] == pytest.approx([1.1, 0.9])


def test_the_line_between_single_types():
    points = [(2.0, 1.0), (4.0, 0.01), (3.0, 0.5)]
    assert quality.between(points, 3.0) == pytest.approx(0.1)  # below the point that lies there
    assert quality.between(points, 4.0) == pytest.approx(0.01)
    assert quality.between(points, 4.5) == quality.between([], 3.0) == float("inf")


def test_rows_are_measured_once_for_the_same_settings(tmp_path):
    calls = []

    def measure(file):
        calls.append(file)
        return {"mean_kld": 0.1}

    for settings in ({"text": "a"}, {"text": "a"}, {"text": "b"}):
        rows = quality.Rows(tmp_path)  # as another process would
        source = quality.Run("Q4_K", "none")
        assert rows.get(source, settings, measure) == {"type": "Q4_K", "data": "none", "mean_kld": 0.1}
        assert rows.found[source].with_suffix(".gguf") in calls
    assert len(calls) == len(set(calls)) == 2
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}


def test_what_several_processes_may_make_appears_once_it_is_made(tmp_path):
    path, own = tmp_path / "all.gguf", tmp_path / "mine.gguf"
    with quality.shared(path, own) as made:
        made.write_text("one")
        assert made == own and not path.exists()
    with quality.shared(path, own) as made:
        assert made == path and made.read_text() == "one" and not own.exists()


def test_the_plot_shows_every_row(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        quality.plot(ROWS, "a title", tmp_path / name)
    picture = (tmp_path / "one.svg").read_text()
    assert picture == (tmp_path / "two.svg").read_text()
    for row in ROWS:
        assert f">{row['type']}<" in picture or row["data"] == "self"
