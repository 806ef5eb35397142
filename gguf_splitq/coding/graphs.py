# SPDX-License-Identifier: MIT
"""Work of a GPU that is the same again and again, launched as one: a CUDA graph.

Python takes several times as long to launch what a group of columns needs as a GPU takes to do it. A graph is recorded
once for each matrix, and then costs one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Repeated:
    """Calls of one function of tensors, which launches the same each time and waits for nothing.

    What it changes besides its arguments it changes in place, in the same tensors each time. A first call is an
    ordinary one, in which kernels are compiled and loaded. The second one is recorded: arguments are copied, then and
    later, and results are overwritten by the next call. On a CPU all calls are ordinary.
    """

    def __init__(self) -> None:
        self.called = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.given: list[torch.Tensor] = []
        self.result: Any = None

    def __call__(self, work: Callable[..., Any], *given: torch.Tensor) -> Any:
        """What `work`, the same one each time, makes of `given`, of the same shapes each time."""
        if not given[0].is_cuda or not self.called:
            self.called = True
            return work(*given)
        with torch.cuda.device_of(given[0]):
            if self.graph is None:
                self.given = [part.clone() for part in given]
                self.graph = self._recorded(work)
            else:
                for own, part in zip(self.given, given, strict=True):
                    own.copy_(part)
            self.graph.replay()
        return self.result

    def _recorded(self, work: Callable[..., Any]) -> torch.cuda.CUDAGraph:
        """Not by `torch.cuda.graph`, which gives all free memory back first; other threads may go on."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.result = work(*self.given)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph
