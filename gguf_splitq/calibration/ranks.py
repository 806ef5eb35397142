# SPDX-License-Identifier: MIT
"""The processes that calibrate one model: one alone, or several under torchrun --nproc-per-node N -m gguf_splitq.

The first has the conversion: it reads, keeps, writes and speaks. The others join it for the calibration (helping.py).
All of them call the methods of `Several` in the same order, from one thread. Objects and tensors of a CPU go through
gloo, tensors of a GPU through NCCL.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import EnvironmentFailed, UsageError, one_line

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
WAIT = timedelta(hours=6)  # for another process; one that dies is noticed at once, by gloo and by torchrun


class Alone:
    """One process. rank: its number, count: how many there are."""

    rank, count = 0, 1

    def use(self, device: str) -> None:
        """The tensors that come are on this device."""

    def share(self, items: Sequence[T]) -> tuple[int, Sequence[T]]:
        """This process' part of them, one after another, and the number of its first; the first process' is largest."""
        each, more = divmod(len(items), self.count)
        start = self.rank * each + min(self.rank, more)
        return start, items[start : start + each + (self.rank < more)]

    def first(self, make: Callable[[], T]) -> T:
        """What the first process makes. On the CPU, as of all methods that take objects."""
        return make()

    def gathered(self, value: T) -> list[T]:
        """At the first process: those of all, in order; elsewhere nothing."""
        return [value]

    def dealt(self, make: Callable[[], Sequence[T]]) -> T:
        """What the first process makes for each."""
        return make()[0]

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' tensors, which are alike, in place of this one."""
        return tensor

    def same(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first process' tensor, in place of this one, which is alike."""
        return tensor


ALONE = Alone()


class Several(Alone):
    """As torchrun has started them.

    Where one has ended the others raise EnvironmentFailed, all but the first without a word.
    """

    def __init__(self) -> None:
        import torch.distributed as dist
        import torch.distributed.nn  # noqa: F401  (its defaults would hold the group, and its threads, if it came later)

        self.dist, self.rank, self.count = dist, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.tensors: Any = None  # the group that tensors go through: the default one
        self._meet(dist.init_process_group, "gloo", timeout=WAIT)

    def use(self, device: str) -> None:
        """See `Alone`, as of all methods."""
        if device != "cpu" and self.tensors is None:
            import torch

            torch.cuda.set_device(device)
            self.tensors = self._meet(self.dist.new_group, backend="nccl", timeout=WAIT)

    def first(self, make: Callable[[], T]) -> T:
        """See `Alone`."""
        found: list[Any] = [None if self.rank else make()]
        self._meet(self.dist.broadcast_object_list, found)
        return found[0]

    def gathered(self, value: T) -> list[T]:
        """See `Alone`."""
        found: list[Any] = [] if self.rank else [None] * self.count
        self._meet(self.dist.gather_object, value, None if self.rank else found)
        return found

    def dealt(self, make: Callable[[], Sequence[T]]) -> T:
        """See `Alone`."""
        found: list[Any] = [None]
        self._meet(self.dist.scatter_object_list, found, None if self.rank else list(make()))
        return found[0]

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Alone`."""
        self._meet(self.dist.all_reduce, tensor, group=self.tensors)
        return tensor

    def same(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Alone`."""
        import torch

        self._meet(self.dist.broadcast, tensor.view(torch.uint8), 0, group=self.tensors)
        return tensor

    def _meet(self, call: Callable, *args: Any, **options: Any) -> Any:
        import torch

        try:
            return call(*args, **options)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = (
                f"another process of this run has ended ({one_line(error)}): see what it says; the same command goes "
                "on from what is finished"
            )
            raise EnvironmentFailed("" if self.rank else cause) from error


def launched() -> bool:
    """Whether torchrun has started several processes."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def speaks() -> bool:
    """Whether this process is the first, which tells what happens."""
    return not launched() or os.environ["RANK"] == "0"


def local() -> int:
    """How many of them are on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else 1


def own(device: str) -> str:
    """This process' own one of such devices, as PyTorch names them. UsageError where there are not enough."""
    if not launched() or device == "cpu":
        return device
    if ":" in device:
        raise UsageError(f"--device {device}: under torchrun each process has a GPU of its own: give cuda")
    import torch

    count = torch.cuda.device_count()
    if local() > count:
        raise UsageError(
            f"torchrun has started {local()} processes and PyTorch sees {count} GPUs here: give --nproc-per-node "
            f"{count}, or --device cpu"
        )
    return f"cuda:{os.environ['LOCAL_RANK']}"


@contextlib.contextmanager
def together() -> Iterator[Alone]:
    """The processes of this run. When the first one leaves, the others are told that nothing is left to be done."""
    if not launched():
        yield Alone()
        return
    processes = Several()
    yield processes
    if not processes.rank:
        processes.first(lambda: None)
    processes.dist.destroy_process_group()
