"""The processes that train one trial together: usually one; under `accelerate launch` or torchrun several."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import cast

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import distributed, nn

from trainer.config import TrainingConfig
from trainer.environment import remove_foreign_settings, report_ignored
from trainer.objectives.pair_metrics import Totals
from trainer.zero3 import keep_off_stdout


class Interrupted(Exception):
    """Somebody asked the run to save its state and stop; not an error."""


def keep_to_share(share: float) -> None:
    """Of the memory of the GPU that this process computes on; beyond it torch says out of memory."""
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


class World:
    """Accelerate's processes and device. Every method that communicates must be called by all of them.

    Of accelerate only this is used: its `Accelerator` would divide and scale losses by variables of the environment.
    """

    def __init__(self) -> None:
        """TrialError where the environment narrows float32 and that cannot be undone."""
        keep_off_stdout()
        ignored = remove_foreign_settings()
        self._processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        self.rank: int = self._processes.process_index
        self.size: int = self._processes.num_processes
        self.device = cast(torch.device, self._processes.device)
        report_ignored(ignored if self.is_main else (), self.device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and speaks for all."""
        return self.rank == 0

    @contextmanager
    def autocast(self, bf16: bool, *, keep: bool = True) -> Generator[None]:
        """Forward passes in bfloat16 while the weights keep their dtype, or as they are.

        keep: a weight in bfloat16 is made once; not for sharded weights, of which only a layer's are to be whole.
        """
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16, cache_enabled=keep):
            yield

    def cuts(self, training: TrainingConfig) -> bool:
        """Whether each process is to hold slices of the model only."""
        return self.size > 1 and training.distributed != "ddp"

    def add(self, totals: Totals) -> Totals:
        """Totals over all processes; all must have the same names."""
        if self.size == 1:
            return totals
        flat = torch.tensor([totals[name] for name in sorted(totals)], dtype=torch.float64, device=self.device)
        distributed.all_reduce(flat)
        return {name: (float(n), float(w)) for name, (n, w) in zip(sorted(totals), flat.tolist(), strict=True)}

    def add_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            on_device = tensor.to(self.device)
            distributed.all_reduce(on_device)
            tensor.copy_(on_device)
        return tensor

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum every gradient over all processes; one that a process lacks counts as zero there."""
        if self.size == 1:
            return
        waiting: list[distributed.Work] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            work = distributed.all_reduce(parameter.grad, async_op=True)
            assert work is not None
            waiting.append(work)
        for work in waiting:
            work.wait()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in at least one process."""
        if self.size == 1:
            return flag
        return bool(self.add_tensor(torch.tensor([float(flag)]))[0] > 0)

    def agree(self, names: list[str]) -> list[str]:
        """The first process's names, in every process."""
        shared: list[object] = [names]
        distributed.broadcast_object_list(shared, device=self.device)
        return list(shared[0])  # pyright: ignore[reportArgumentType]

    def wait(self) -> None:
        """Until every process is here."""
        self._processes.wait_for_everyone()

    def main_first(self) -> AbstractContextManager[None]:
        """The first process goes through the block before the others."""
        return self._processes.main_process_first()


class Patience:
    """Asks, between pieces of work, whether to stop; processes that work together only stop together, at `settle`."""

    def __init__(self, world: World, asked: Callable[[], bool]) -> None:
        self._world, self._asked = world, asked

    def pause(self) -> None:
        """Raise Interrupted when asked to; in several processes only `settle` does, so that none waits for ever."""
        if self._world.size == 1 and self._asked():
            raise Interrupted

    def settle(self) -> None:
        """Raise Interrupted in all processes when one of them was asked to."""
        if self._world.any(self._asked()):
            raise Interrupted
