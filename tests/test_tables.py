# SPDX-License-Identifier: MIT
"""Tables of figures in README.md and docs/ are what docs/results/*.json keep, and nothing else."""

import re

import pytest

from experiments import files, tables

KEPT = tables.results()
TEXTS = {path: path.read_text() for path in tables.DOCS}


@pytest.mark.parametrize("path", tables.DOCS, ids=str)
def test_a_document_shows_the_kept_figures(path):
    found = tables.tables(KEPT)
    assert tables.filled(TEXTS[path], found) == TEXTS[path], f"{path} differs from docs/results: run make tables"


def test_every_kept_table_is_shown_once():
    shown = [match[2] for text in TEXTS.values() for match in tables.MARKED.finditer(text)]
    assert sorted(shown) == sorted(tables.tables(KEPT))


@pytest.mark.parametrize("path", [path for path in tables.DOCS if tables.MARKED.search(TEXTS[path])], ids=str)
def test_no_measured_figure_stands_in_a_table_typed_by_hand(path):
    cells = re.findall(r"(?<=\|)[^|\n]*(?=\|)", tables.MARKED.sub("", TEXTS[path]))
    assert not [cell for cell in cells if re.fullmatch(r"\s*\d*\.\d{2,}( %)?\s*", cell)]


def test_readmes_first_sentences_are_measured():
    at = {(row["type"], row["data"]): row["mean_kld"] for row in KEPT["quality.ref-a"]["rows"]}
    less = 1 - at["sq4w", "feedback"] / at["IQ4_XS", "imatrix"]
    rows = KEPT["bench.epyc"]["0.6B"]["rows"]
    rate = {(row["type"], row["threads"]): row["decode t/s"] for row in rows}
    faster = sorted(rate["sq4", n] / rate["Q4_K_S", n] for n in (1, 2))
    first = " ".join(TEXTS[tables.DOCS[0]].split())
    assert f"`sq4w` has {less:.0%} less KL divergence than llama.cpp's IQ4_XS".replace("%", " %") in first
    assert f"`sq4` decodes {faster[0]:.1f} to {faster[1]:.1f} times as fast as Q4_K_S" in first
    at = {(row["type"], row["data"]): row["mean_kld"] for row in KEPT["files.ref-a"]["rows"]}
    shares = sorted(at[size, "ours"] / at[size, "imatrix"] for size in files.SIZES)
    assert f"{shares[0]:.2f} to {shares[-1]:.2f} of the divergence of llama-quantize's" in first and len(shares) == 7


def test_all_that_is_kept_says_where_it_is_from():
    measured = [part["measured"] for part in KEPT.values() if "measured" in part]
    measured += [table["measured"] for part in KEPT.values() for table in part.get("tables", {}).values()]
    for source in measured:
        assert re.fullmatch("[0-9a-f]{7,9}", source["commit"]), "from a changed checkout"
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", source["date"]) and source["machine"]


def test_a_changed_figure_and_an_unknown_table_are_seen():
    rows = [{"type": "sq4", "data": data, "bpw": 4.25, "mean_kld": 0.0123, "ppl_ratio": 1.01, "top1": 0.95}
            for data in ("none", "feedback")]  # fmt: skip
    result = {"measured": {"commit": "0" * 9, "machine": "one", "date": "2026-01-01", "command": "a b"}, "rows": rows}
    page = tables.filled("<!-- table: quality.x -->\n<!-- end of table -->", tables.tables({"quality.x": result}))
    assert "| `sq4` | 4.25 | 0.0123 | 0.0123 | 1.0100 | 95.0% |" in page and "`a b`, 2026-01-01, one" in page
    rows[0]["mean_kld"] = 0.0124
    assert tables.filled(page, tables.tables({"quality.x": result})) != page
    with pytest.raises(KeyError):
        tables.filled(page, {})


def test_a_roofline_is_a_share_of_the_limits_where_they_were_measured():
    rows = [{"type": type, "threads": n, "decode t/s": 1.0, "decode GB/s": 20.0 * n, "/ read, plain": 0.5,
             "/ read, large pages": 0.4 * n} for n in (2, 1) for type in ("sq4", "Q4_0")]  # fmt: skip
    kept = {"bench.x": {"measured": {"commit": "", "machine": "", "date": ""}, "0.6B": {"rows": rows}}}
    headings, table = tables.roofline(kept["bench.x"])
    assert headings[1:] == [f"{what}, {n}" for n in (1, 2) for what in ("decode, GB/s", "of a plain read")]
    assert table == [[name, "20.0", "40%", "40.0", "80%"] for name in ("`sq4`", "Q4_0")]
    rows[0] |= {"prompt GMAC/s": 123.4, "/ peak": 0.75}
    assert tables.roofline(kept["bench.x"])[1][0][-2:] == ["123", "75%"]
    assert "bench.x.roofline" in tables.tables(kept)
    for row in rows:
        del row["/ read, plain"]
    assert "bench.x.roofline" not in tables.tables(kept)


def test_prompts_of_another_length_are_rows_of_their_own():
    rows = [{"type": type, "threads": 1, "decode t/s": 10.0, "prompt t/s": rate, "prompt 2048 t/s": long}
            for type, rate, long in (("Q4_K_S", 100.0, 80.0), ("sq4", 150.0, 160.0), ("cq3", 90.0, None))]  # fmt: skip
    _, table = tables.bench({"0.6B": {"rows": rows}})
    assert [line[0] for line in table[2:]] == [
        f"prompt{n}, 1 thread{by}" for n in ("", " 2048") for by in ("", " / Q4_K_S")
    ]
    assert table[-1][1:] == ["1.00", "2.00", ""]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123456, "0.0123"), (1.61, "1.61"), (0.00012, "0.000120"), (-1e-9, "0")]
)
def test_three_digits_count(value, text):
    assert tables.significant(value) == text


def test_the_pictures_are_of_the_kept_figures(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    pictures = [tables.PICTURE, *(tables.RESULTS / f"{name}.svg" for name in KEPT if tables.kind(name) == "files")]
    if any(f"Matplotlib v{matplotlib.__version__}," not in picture.read_text() for picture in pictures):
        pytest.skip("drawn by another version of matplotlib")
    tables.draw(KEPT, tmp_path)
    for picture in pictures:
        assert (tmp_path / picture.name).read_text() == picture.read_text(), f"{picture} is old: run make tables"
        rows = KEPT[tables.PICTURED if picture == tables.PICTURE else picture.stem]["rows"]
        shown = [row["type"] for row in rows if row["data"] in ("bpw", "feedback", "ours")]
        assert shown and all(f">{type}</text>" in picture.read_text() for type in shown)


def whole(type, data, bits, kld, **more):
    return {"type": type, "data": data, "file_bpw": bits, "mean_kld": kld, **more}


def test_whole_files_of_all_models_are_one_block():
    measured = {"commit": "0" * 9, "machine": "one", "date": "2026-01-01", "command": "a b"}
    rows = [
        whole("Q4_K_M", "imatrix", 5.1, 0.01, tg=50), whole("Q4_K_M", "ours", 5.09, 0.0061, tg=49.6),
        whole("IQ4_XS", "imatrix", 4.6, 0.02), whole("IQ4_XS", "ours", 4.59, 0.0098),
        whole("Q2_K", "imatrix", 3.0, 0.1), whole("Q2_K", "ours", 2.99, 0.07), whole("IQ2_M", "imatrix", 2.9, 0.2),
    ]  # fmt: skip
    result = {"measured": measured, "model": "m", "text": "t", "chunks": 2, "tokens": 512, "rows": rows}
    found = tables.tables({"files.m": result, "files.n": result | {"model": "n"}})
    assert list(found) == ["files", "ends"] and found["files"].count("| Q2_K | 3.00 | 0.100 | 0.0700 | 0.70 |  |") == 2
    assert "| Q4_K_M | 5.10 | 0.0100 | 0.00610 | 0.61 | 0.98 | 50 | 50 |" in found["files"]
    assert "missed at the size of Q2_K (0.70)." in found["files"] and "files.n.svg" in found["files"]
    assert "IQ2_M" not in found["files"]
    assert "kept at 2 of 2 sizes" in tables.tables({"files.m": result | {"rows": rows[:4]}})["files"]
    assert tables.tables({}) == {"files": "", "ends": ""}  # nothing is kept yet


def test_ends_are_shown_beside_q8_0():
    measured = {"commit": "0" * 9, "machine": "one", "date": "2026-01-01", "command": "a b"}
    rows = [whole("sq4w", "q8_0", 5.0, 0.01), whole("sq4w", "sq4w+q6_k", 4.5, 0.0105)]
    result = {"measured": measured, "model": "m", "text": "t", "chunks": 2, "tokens": 512, "rows": rows}
    found = tables.tables({"ends.m": result})["ends"]
    assert "| `sq4w` | `sq4w` and `q6_k` | 4.50 | 0.0105 | 0.90 | 1.05 |" in found and "`a b`" in found
