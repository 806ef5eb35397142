# SPDX-License-Identifier: MIT
"""Fixtures made with the patched llama.cpp; it is built on first use and cached outside the checkout."""

import shutil

import crafted
import pytest

from gguf_splitq.convert import convert
from gguf_splitq.runtime import building, fetching, native


@pytest.fixture(scope="session")
def runtime_programs():
    """Folder of the patched programs, upstream's tests included."""
    return building.build(tests=True)


@pytest.fixture(scope="session")
def patched_tree(runtime_programs):
    """The patched llama.cpp source tree."""
    return fetching.tree()


@pytest.fixture(scope="session")
def runtime_library(runtime_programs):
    """libggml-base of the patched build, as a ctypes library."""
    native.library.cache_clear()
    return native.library()


@pytest.fixture(scope="session")
def demo_f16(tmp_path_factory):
    """F16 file of the demo checkpoint."""
    return convert(crafted.DEMO, "f16", tmp_path_factory.mktemp("demo") / "demo-f16.gguf")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """(a random two-layer Llama with the demo's vocabulary, a text)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in crafted.TOKENIZER:
        shutil.copy(crafted.DEMO / name, folder)
    return folder, crafted.DEMO / "calib.txt"
