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
from gguf_splitq.gguf_file import Tensor

HIDDEN, FFN, BLOCKS, VOCAB = 2048, 5632, 11, 4096
GIB = 1 << 30

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
