# SPDX-License-Identifier: MIT
"""Upstream's own tests, with this project's types in their lists, pass on the patched tree."""

import re
import subprocess

import pytest

from gguf_splitq import plan, types
from gguf_splitq.files.gguf_file import Tensor
from gguf_splitq.runtime import patching


def run(runtime_programs, *command: str) -> str:
    command = [runtime_programs / command[0], *command[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = done.stdout.decode(errors="replace")
    assert done.returncode == 0, output[-3000:]
    return output


def test_upstreams_files_change_little_and_each_place_in_one_patch(patched_tree):
    series = patching.series()
    assert sum(map(patching.changed_lines, series)) < 200
    for patch in series:  # each could be taken out alone
        undone = patching.git("apply", "--check", "--reverse", str(patch.resolve()), cwd=patched_tree)
        assert undone.returncode == 0, undone.stderr


def test_quantize_fns(runtime_programs):
    output = run(runtime_programs, "test-quantize-fns", "-v")
    for tensor_type in types.CUSTOM:
        assert f"Testing {tensor_type.name}\n" in output


@pytest.mark.parametrize("operation", ["MUL_MAT", "MUL_MAT_ID", "GET_ROWS"])
def test_backend_ops(runtime_programs, operation):
    """The CPU back end against its reference path; only this project's types, the stock ones take half an hour."""
    output = run(runtime_programs, "test-backend-ops", "test", "-b", "CPU", "-o", operation, "-p", "type(_a)?=s[qd]")
    for tensor_type in types.CUSTOM:
        key = "type" if operation == "GET_ROWS" else "type_a"
        assert re.search(rf"{operation}\({key}={tensor_type.name},.*OK", output)


@pytest.mark.parametrize("operation", ["SET_ROWS", "CPY", "FLASH_ATTN_EXT"])
def test_the_cache_type(runtime_programs, operation):
    output = run(runtime_programs, "test-backend-ops", "test", "-b", "CPU", "-o", operation, "-p", "sdr4")
    assert re.search(r"[1-9]\d*/\d+ tests passed", output)


def test_only_matrices_that_are_multiplied_with_can_have_side_tensors(patched_tree):
    source = (patched_tree / "src" / "llama-arch.cpp").read_text()
    names = dict(re.findall(r'\{ *(LLM_TENSOR_\w+), *"([^"]+)" *\}', source))
    looked_up = re.findall(r"\{ *(LLM_TENSOR_\w+), *\{ *LLM_TENSOR_LAYER_\w+, *GGML_OP_GET_ROWS *\} *\}", source)
    models = "".join(path.read_text() for path in (patched_tree / "src" / "models").glob("*.cpp"))
    reshaped = re.findall(r"tn\((LLM_TENSOR_\w+)[^;]*TENSOR_ALLOW_RESHAPE", models)
    found = {names[key].replace("%d", "0") for key in (*looked_up, *reshaped)} - {"d2t"}  # integers
    assert {"token_embd", "markov_w1", "blk.0.attn_output_a"} < found
    for name in (f"{stem}.weight" for stem in found if "_norm" not in stem):
        tensor = Tensor(name, (4096, 4096), 1, 0, 2 << 24, None)
        assert not plan.is_linear(tensor) or types.get("cq3").unfit(name, tensor.shape), name


def test_gguf(runtime_programs):
    run(runtime_programs, "test-gguf")
