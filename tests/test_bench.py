# SPDX-License-Identifier: MIT
"""What `make bench` gets from programs, and what it makes of their numbers."""

import sys

import pytest

from experiments import bench
from gguf_splitq.convert import convert


def test_llama_bench_gives_a_rate_for_each_number_of_threads(demo_f16, runtime_programs):
    rates = bench.llama_bench(demo_f16, "-p", 8, "-n", 4, "-t", "1,2", "--no-warmup")
    assert rates.keys() == {(threads, test) for threads in (1, 2) for test in ("tg", "pp")}
    assert all(rate > 0 for rate in rates.values())


def test_memory_is_read_in_small_and_large_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "BUILD", tmp_path)
    rates = bench.read_rates(1)
    assert rates.keys() == {"plain", "large pages"} and min(rates.values()) > 0


def test_a_conversion_is_timed_with_its_memory_and_an_old_output_is_gone(tmp_path):
    out = tmp_path / "out"
    out.write_text("old")
    seconds, peak = bench.timed([sys.executable, "-c", "x = bytearray(300_000_000)"], out)
    assert seconds > 0 and peak > 300_000_000 and not out.exists()
    with pytest.raises(SystemExit, match="exit code 3"):
        bench.timed([sys.executable, "-c", "raise SystemExit(3)"], out)


def test_a_rate_is_set_against_reading_memory_and_against_q4_k_s(demo_f16, tmp_path, capsys):
    files = {"Q4_K_S": demo_f16, "sq4": convert(demo_f16, "sq4", tmp_path / "sq4.gguf")}
    rates = {"Q4_K_S": {(1, "tg"): 50.0, (1, "pp"): 100.0}, "sq4": {(1, "tg"): 75.0}}
    reads = {"plain": 10.0, "large pages": 20.0}
    rows, claims = bench.compare("0.6B", 1, rates, reads, files, [("sq4", "Q4_K_S", 1.4)], [])
    sq4 = next(row for row in rows if row["type"] == "sq4")
    size = bench.decoded_bytes(files["sq4"])
    assert 0.3 * files["sq4"].stat().st_size < size < files["sq4"].stat().st_size  # the embeddings are not read
    assert sq4["decode / Q4_K_S"] == 1.5 and sq4["prompt / Q4_K_S"] is None
    assert sq4["/ read, plain"] == pytest.approx(75 * size / 1e10) == pytest.approx(2 * sq4["/ read, large pages"])
    assert claims[0]["measured"] == 1.5 and claims[0]["at_least"] == 1.4
    assert "0.6B, 1 thread; plain read 10.0 GB/s" in capsys.readouterr().out
