# SPDX-License-Identifier: MIT
"""What `make bench` gets from programs, and what it makes of their numbers."""

import sys

import pytest

from experiments import bench
from gguf_splitq.convert import convert
from gguf_splitq.files import gguf_file


def test_llama_bench_gives_a_rate_for_each_number_of_threads(demo_f16, runtime_programs):
    rates = bench.llama_bench(demo_f16, "-p", "8,16", "-n", 4, "-t", "1,2", "--no-warmup")
    assert rates.keys() == {(threads, tokens) for threads in (1, 2) for tokens in (0, 8, 16)}
    assert all(rate > 0 for rate in rates.values())


def test_memory_is_read_in_small_and_large_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "BUILD", tmp_path)
    rates = bench.read_rates(1)
    assert rates.keys() == {"plain", "large pages"} and min(rates.values()) > 0


def test_what_multiplies_is_measured_and_said_of_a_type(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "BUILD", tmp_path)
    peaks = bench.multiply_rates(1)
    assert all(rate > 0 for rate in peaks.values())
    tiles = {"vpdpbusd": 1.0, "tdpbf16ps": 8.0, "tdpbssd": 16.0}
    used = [bench.instruction(type, tiles) for type in ("sq4w", "Q4_K_S", "cq4", "Q2_K_S")]
    assert used == ["tdpbf16ps", "tdpbssd", "tdpbf16ps", "vpdpbusd"]
    assert bench.instruction("sq4w", {"sdot": 1.0}) == "sdot" and bench.instruction("sq4w", {}) is None


def test_the_weights_that_a_prompt_multiplies(demo_f16, tmp_path):
    with gguf_file.read(demo_f16) as file:
        ends = sum(t.n_weights for t in file.tensors if t.name in ("token_embd.weight", "output.weight"))
        vectors = sum(t.n_weights for t in file.tensors if len(t.shape) == 1)
        assert bench.multiplied(demo_f16) == sum(t.n_weights for t in file.tensors) - ends - vectors
    columns = convert(demo_f16, "sq3c", tmp_path / "columns.gguf")
    assert bench.multiplied(columns) == bench.multiplied(demo_f16)  # not their side tensors


def test_a_conversion_is_timed_with_its_memory_and_an_old_output_is_gone(tmp_path):
    out = tmp_path / "out"
    out.write_text("old")
    seconds, busy, peak = bench.timed([sys.executable, "-c", "x = bytearray(300_000_000)"], out)
    assert seconds > 0 and busy > 0 and peak > 300_000_000 and not out.exists()
    with pytest.raises(SystemExit, match="exit code 3"):
        bench.timed([sys.executable, "-c", "raise SystemExit(3)"], out)


def test_long_prompts_are_for_the_small_model_and_types_with_a_claim():
    short, long = bench.PROMPTS
    _, prompts = bench.claimed("0.6B", bench.PROMPTS)
    types = {n: {type for claim in ratios for type in claim[:2]} for n, ratios in prompts.items()}
    assert types[long] == {"sq4", "sq3", "sq2", "sq4w", "sq3w", "sq2w", "Q4_K_S", "Q4_0"} < types[short]
    assert [least for ours, _, least in prompts[long] if ours in ("sq4w", "sq3w")] == [1.5, 1.5, 1.3, 1.3]
    assert list(bench.claimed("3B", bench.PROMPTS)[1]) == [short]


def test_a_rate_is_set_against_reading_memory_and_against_q4_k_s(demo_f16, tmp_path, capsys):
    files = {"Q4_K_S": demo_f16, "sq4": convert(demo_f16, "sq4", tmp_path / "sq4.gguf")}
    rates = {"Q4_K_S": {(1, 0): 50.0, (1, 8): 100.0, (1, 16): 80.0}, "sq4": {(1, 0): 75.0, (1, 16): 160.0}}
    reads, peaks = {"plain": 10.0, "large pages": 20.0}, {"vpdpbusd": 100.0, "tdpbssd": 1000.0}
    ratios = [("sq4", "Q4_K_S", 1.4)], {8: [], 16: [("sq4", "Q4_K_S", 1.5)]}
    rows, claims = bench.compare("0.6B", 1, rates, reads, peaks, files, *ratios)
    sq4 = next(row for row in rows if row["type"] == "sq4")
    size = bench.decoded_bytes(files["sq4"])
    assert 0.3 * files["sq4"].stat().st_size < size < files["sq4"].stat().st_size  # the embeddings are not read
    assert sq4["decode / Q4_K_S"] == 1.5 and sq4["prompt / Q4_K_S"] is None
    assert sq4["/ read, plain"] == pytest.approx(75 * size / 1e10) == pytest.approx(2 * sq4["/ read, large pages"])
    assert [(c["claim"], c["measured"], c["at_least"]) for c in claims[:2]] == [
        ("0.6B, 1 thread: decode of sq4 / Q4_K_S", 1.5, 1.4),
        ("0.6B, 1 thread: prompt (16) of sq4 / Q4_K_S", 2.0, 1.5),
    ]
    assert [row["prompt 16 t/s"] for row in rows] == [80.0, 160.0]
    products = 100 * bench.multiplied(demo_f16) / 1e9
    assert rows[0]["instruction"] == "tdpbssd" and rows[0]["/ peak"] == pytest.approx(products / 1000)
    assert sq4["prompt GMAC/s"] is sq4["/ peak"] is sq4["instruction"] is None
    assert "0.6B, 1 thread; plain read 10.0 GB/s" in capsys.readouterr().out
