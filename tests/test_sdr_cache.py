# SPDX-License-Identifier: MIT
"""The KV cache in sdr4: error beside q4_0, head sizes, flash attention off, state files, context shift, 4 k tokens."""

import subprocess
from pathlib import Path

import pytest

from experiments import models
from gguf_splitq.convert import convert
from gguf_splitq.measure.validate import Baseline

TEXT = Path(__file__).parents[1] / "examples/demo/eval.txt"
BOTH = ("--cache-type-k", "sdr4", "--cache-type-v", "sdr4")
UNROTATED = {"LLAMA_ATTN_ROT_DISABLE": "1"}


@pytest.fixture(scope="module")
def base(demo_f16, runtime_programs):
    with Baseline(demo_f16, TEXT, chunks=4) as base:
        yield base


@pytest.fixture(scope="module")
def random_f16(tmp_path_factory, runtime_programs):
    """head size -> F16 file of a random one-layer Llama with two heads of that size."""

    def make(head: int, context: int = 1024) -> Path:
        folder = tmp_path_factory.mktemp("random")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(TEXT.parents[2])
            patch.setattr(models, "BUILD", folder)
            checkpoint = models.random_llama("random", 2 * head, 256, layers=1, heads=2, kv_heads=1)
            config = checkpoint / "config.json"
            config.write_text(config.read_text().replace('embeddings": 1024', f'embeddings": {context}'))
            return convert(checkpoint, "f16", folder / "random-f16.gguf")

    return make


def kld(base: Baseline, *options, environment=None) -> float:
    return base.compare(base.file, options=options, environment=environment)["mean_kld"]


@pytest.mark.parametrize("environment", [None, UNROTATED], ids=["rotated", "not rotated"])
def test_its_error_is_near_that_of_a_q4_0_cache_of_4_5_bits(base, environment):
    ours = kld(base, *BOTH, environment=environment)
    assert 0 < ours < 1.25 * kld(base, *(word.replace("sdr4", "q4_0") for word in BOTH), environment=environment)


def test_keys_alone_without_flash_attention(base):
    assert 0 < kld(base, "--cache-type-k", "sdr4", "--flash-attn", "off") < kld(base, *BOTH)


@pytest.mark.parametrize("head", [96, 128])
def test_head_sizes(random_f16, head):
    with Baseline(random_f16(head), TEXT, chunks=1) as base:
        assert 0 < kld(base, *BOTH) < 0.02


@pytest.mark.parametrize("cache", ["sdr4", "q4_0"])
def test_a_head_size_that_blocks_do_not_divide_is_refused_as_for_q4_0(random_f16, runtime_programs, cache):
    command = [runtime_programs / "llama-completion", "-m", random_f16(80), "-p", "It", "-n", "1", "-no-cnv"]
    done = subprocess.run([*command, "--cache-type-k", cache, "--cache-type-v", cache], capture_output=True, text=True)
    assert done.returncode == 1 and f"{cache} with block size 32 does not divide n_embd_head_k=80" in done.stderr


def test_four_thousand_tokens(random_f16):
    with Baseline(random_f16(64, context=4096), TEXT, ctx=4096, chunks=1) as base:
        assert 0 < kld(base, *BOTH) < 0.02


def complete(runtime_programs, model: Path, *options) -> str:
    """Greedy text after the prompt, with an sdr4 cache."""
    command = [runtime_programs / "llama-completion", "-m", model, "-no-cnv", "--temp", "0", "--no-display-prompt"]
    command += ["--ignore-eos", *BOTH, *map(str, options)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_state_saved_and_restored(demo_f16, runtime_programs, tmp_path):
    """A prompt evaluated in one process is continued in another as it would have been in one."""
    prompt, state = TEXT.read_text()[:2000], tmp_path / "state"
    whole = complete(runtime_programs, demo_f16, "-p", prompt, "-n", 64)
    complete(runtime_programs, demo_f16, "-p", prompt, "-n", 1, "--prompt-cache", state)
    again = complete(runtime_programs, demo_f16, "-p", prompt, "-n", 64, "--prompt-cache", state, "--prompt-cache-ro")
    assert state.stat().st_size > 10_000
    assert len(whole) > 100 and again == whole


def test_context_shift(demo_f16, runtime_programs):
    """Keys are turned to their new positions in the cache: read as floats, turned, encoded again."""
    words = complete(runtime_programs, demo_f16, "-p", "It was", "-c", 256, "-n", 400, "--context-shift").split()
    assert len(words) > 150
