# SPDX-License-Identifier: MIT
"""The sweep on a GPU against the reference in PyTorch; with TRITON_INTERPRET=1, where Triton is, on CPUs in minutes."""

import itertools
import os
from dataclasses import replace

import pytest
import torch
from test_solve_windows import NAMES, OPEN, block, errors

from gguf_splitq.coding import windows

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not torch.cuda.is_available() and not INTERPRETED:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from gguf_splitq.coding import windows_triton  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"


def moved(given: tuple) -> list:
    """To the device; a sweep's arguments."""
    *tensors, trellis = given
    device = [each.to(DEVICE) for each in tensors]
    parts = {name: getattr(trellis, name).to(DEVICE) for name in ("walk", "windows", "levels")}
    return [*device, replace(trellis, **parts)]


@pytest.mark.parametrize("name, held", [*itertools.product(NAMES, [False, True]), *((name, False) for name in OPEN)])
def test_as_good_as_the_reference(name, held):
    n_rows = 37  # no multiple of what a program takes
    given = block(name, n_rows, 4)
    trellis = given[5]
    length = trellis.walk.shape[1]
    states = torch.randint(trellis.n_states, (len(trellis.walk), n_rows), dtype=torch.uint8) if held else None
    held = states if states is None else states.to(DEVICE)
    edges, choice = (part.cpu() for part in windows_triton.sweep(*moved(given), held, windows.CLOSED))
    chains = edges.view(len(trellis.walk), length, -1).int()
    follows = chains >> trellis.bits == chains.roll(1, 1) % trellis.n_states
    assert follows[:, int(trellis.open) :].all()  # they are closed, if they are to be
    if states is not None:
        assert torch.equal(chains[:, 0] >> trellis.bits, states.int())
    expected = windows.in_torch(*given, states)
    same = (edges == expected[0]).all(0) & (choice == expected[1])
    assert same.double().mean() > 0.9  # the others differ by what is rounded
    found, least = (errors(e, given[2].gather(0, c[None])[0], given).sum() for e, c in ((edges, choice), expected))
    assert float(found) == pytest.approx(float(least), rel=1e-3)


@pytest.mark.parametrize("name", [*NAMES, *OPEN])
def test_the_same_paths_where_nothing_is_rounded(name):
    """Whole numbers and pushes of halves: every sum is exact, so ties too are decided alike."""
    trellis, rng = block(name, 1, 1)[5], torch.Generator().manual_seed(1)
    aims, base = (torch.randint(-100, 100, (32, 20), generator=rng).float() for _ in range(2))
    scales = torch.tensor([[1.0], [-1.0], [2.0]]).repeat(1, 20)
    push = torch.zeros(32, 32)
    push[torch.arange(31), torch.arange(1, 32)] = 0.5
    given = aims, base, scales, push, torch.ones(32), trellis
    found = windows_triton.sweep(*moved(given), None, windows.CLOSED)
    for a, b in zip(found, windows.in_torch(*given, None), strict=True):
        assert torch.equal(a.cpu(), b)
