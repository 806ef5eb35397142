"""Fixtures made with the patched llama.cpp; it is built on first use and cached outside the checkout."""

import crafted
import pytest

from gguf_splitq import native, runtime
from gguf_splitq.convert import convert


@pytest.fixture(scope="session")
def runtime_programs():
    """Folder of the patched programs, upstream's tests included."""
    return runtime.build(tests=True)


@pytest.fixture(scope="session")
def patched_tree(runtime_programs):
    """The patched llama.cpp source tree."""
    return runtime.tree()


@pytest.fixture(scope="session")
def runtime_library(runtime_programs):
    """libggml-base of the patched build, as a ctypes library."""
    native.library.cache_clear()
    return native.library()


@pytest.fixture(scope="session")
def demo_f16(tmp_path_factory):
    """F16 file of the demo checkpoint."""
    return convert(crafted.DEMO, "f16", tmp_path_factory.mktemp("demo") / "demo-f16.gguf")
