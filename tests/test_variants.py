# SPDX-License-Identifier: MIT
"""What a build for many processors is told by its program."""

import pytest

from experiments import variants


@pytest.fixture
def program(tmp_path):
    """Function: a program that prints this and exits so."""

    def make(out: str, error: str, code: int):
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\nprintf '{out}'\nprintf '{error}' >&2\nexit {code}\n")
        path.chmod(0o755)
        return path

    return make


@pytest.mark.parametrize("name", ["zen4", "armv8.2_3", "x64"])
def test_the_variant_and_each_types_error_are_read(program, tmp_path, name):
    loaded = f"load_backend: loaded CPU backend from /some/libggml-cpu-{name}.so\\n"
    found = variants.errors(program("sq4 3.6e-05\\nq8_0 0\\n", loaded, 0), tmp_path)
    assert found == (name, {"sq4": 3.6e-5, "q8_0": 0.0})


def test_a_processor_too_old_for_a_variant_and_a_failure_are_told_apart(program, tmp_path):
    assert variants.errors(program(variants.NONE + "\\n", "", 1), tmp_path) == ("", {})
    with pytest.raises(SystemExit, match="sq4 times 33 tokens"):
        variants.errors(program("sq4 times 33 tokens in CPU: error 1 of the result\\n", "", 1), tmp_path)
