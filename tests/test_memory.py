# SPDX-License-Identifier: MIT
"""The peak resident memory of a conversion, the converter process included, on a checkpoint larger than the peak."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import crafted
import numpy as np
import pytest

from gguf_splitq import plan, rewrite, types
from gguf_splitq.convert import PROMISED_RAM
from gguf_splitq.files.gguf_file import Tensor

HIDDEN, FFN, BLOCKS, VOCAB = 2048, 5632, 11, 4096
GIB = 1 << 30
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc: memory of freed arrays, at once

# Prints the peaks of the converter process and of the encoding one. The latter's is VmHWM, because its ru_maxrss would
# begin at that of the process that started it: pytest, with PyTorch loaded by other tests.
CHILD = """
import re, resource, sys
from gguf_splitq import cli
code = cli.main(sys.argv[1:])
own = int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
print("PEAK", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, own * 1024)
sys.exit(code)
"""


def checkpoint(folder):
    """A llama checkpoint of random bfloat16 weights; returns its size and the largest tensor's in bytes."""
    for name in ("config.json", *crafted.TOKENIZER):
        shutil.copy(crafted.DEMO / name, folder)
    config = json.loads((folder / "config.json").read_text())
    sizes = dict(hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=BLOCKS, num_attention_heads=32)
    config |= sizes | dict(num_key_value_heads=32, head_dim=64, tie_word_embeddings=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(BLOCKS):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in "qkvo"}
        shapes |= {f"{layer}mlp.{n}_proj.weight": (FFN, HIDDEN) for n in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (HIDDEN, FFN)}
        shapes |= {f"{layer}{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    pool = (crafted.weights(FFN * HIDDEN).view(np.uint32) >> 16).astype("<u2")
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            file.write(pool[: int(np.prod(shape))])
    return end, pool.nbytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc")
def test_peak_memory_on_a_checkpoint_of_one_gigabyte(tmp_path):
    folder = tmp_path / "big"
    folder.mkdir()
    size, largest = checkpoint(folder)
    assert size > GIB
    command = [
        sys.executable,
        "-c",
        CHILD,
        "convert",
        folder,
        "--type",
        "q8_0",
        "--outfile",
        tmp_path,
        "--threads",
        "2",
    ]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    reading, encoding = map(int, done.stdout.split("PEAK")[1].split())
    print(f"reading {reading >> 20} MiB, encoding {encoding >> 20} MiB, checkpoint {size >> 20} MiB")
    stated = float(re.search(r"in at most about ([\d,.]+) MiB", done.stderr)[1].replace(",", "")) * 2**20
    assert reading + encoding < stated <= PROMISED_RAM + 3 * largest  # both at once: one reads what the other writes
    assert reading < size  # and nothing keeps the checkpoint: a mapped or cached one would show
    assert encoding < 0.5 * GIB


def test_the_encoder_needs_no_more_for_a_larger_model(tmp_path):
    """What `rewrite` may keep depends on threads and the length of rows, not on how many rows or tensors there are."""
    peaks = []
    for rows, copies in ((64, 1), (1 << 14, 1), (1 << 14, 40)):
        tensors = [Tensor(f"{i}.weight", (rows, 4096), 1, 0, 8192 * rows, tmp_path) for i in range(copies)]
        entries = [plan.Entry(t, types.get("sq4"), "") for t in tensors]
        peaks.append(rewrite.peak_ram(entries, 2, rewrite.window_size(entries, 2, None)))
    assert peaks[0] == peaks[1] == peaks[2] < 0.5 * GIB


@pytest.mark.parametrize("name", ["cq4", "cq2.9", "sq3c", "sq2.9"])
def test_the_promise_holds_for_a_matrix_that_is_coded_as_a_whole(tmp_path, name):
    """Such as the largest of dense models; of experts one matrix at a time is."""
    for shape in ((28672, 8192), (53248, 16384), (512, 7168, 2048)):
        tensor = Tensor("blk.0.ffn_up_exps.weight", shape, 30, 0, 2 * int(np.prod(shape)), tmp_path)
        entries = plan.make([tensor], name)
        stated = rewrite.peak_ram(entries, 2, rewrite.window_size(entries, 2, None))
        assert stated < PROMISED_RAM + 3 * tensor.n_bytes


# Codes a matrix, once it has coded a small one, and prints by how much the peak was above what was there before.
CODER = """
import re, sys
import numpy as np, torch
from gguf_splitq import types
from gguf_splitq.coding import free
from gguf_splitq.types.columns import PLAIN, Layout
free.PIECE = 1 << 16
def even(values, weights, k, *_):
    return np.linspace(values.min(), values.max(), k)
name, (rows, columns, wide, outliers) = sys.argv[1], map(int, sys.argv[2:])
kind = types.get(name)
weight = torch.randn(rows, columns, dtype=torch.bfloat16)
def status(key):
    return int(re.search(key + r":\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
for part in (weight[:128], weight):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    layout = Layout(wide, outliers) if part is weight else PLAIN
    if name.startswith("cq"):
        free.with_codebooks(part, kind, layout, passes=1, cluster=even)
    else:
        free.in_blocks(part, kind, layout)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize("name", ["cq2.9", "sq2.9"])
def test_coding_a_matrix_takes_what_is_stated(tmp_path, name):
    """But for what does not grow with it, which is made small; even levels instead of k-means save time."""
    tensor = Tensor("blk.0.ffn_up.weight", (1024, 8192), 30, 0, 1 << 24, tmp_path)
    entry = plan.make([tensor], name)[0]
    env = os.environ | GIVEN_BACK | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CODER, name, *map(str, (*tensor.shape, entry.layout.wide, entry.layout.outliers))]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    taken, stated = int(done.stdout), rewrite.peak_ram([entry], 1, 0) - rewrite.BASE_RAM - rewrite.CODER_RAM
    print(f"{taken / tensor.n_weights:.2f} bytes per weight, {stated / tensor.n_weights:.2f} stated")
    assert taken < stated - tensor.n_bytes + (8 << 20)  # the matrix itself was there before
