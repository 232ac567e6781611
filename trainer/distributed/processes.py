"""Processes that train one trial together: `ProcessGroup`, `CancelToken` and the rendezvous.

Usually there is one process; `accelerate launch` or torchrun start several. The processes of one trial find each other
on one machine over loopback, by gloo on CPUs and NCCL on GPUs.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import cast

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import distributed, nn

from trainer.config.trial import TrainingConfig
from trainer.environment import keep_deepspeed_off_stdout, remove_foreign_settings, report_ignored
from trainer.objectives.pair_logps import MetricSums


class Interrupted(Exception):
    """Somebody asked the run to save its state and stop; not an error."""


def limit_gpu_memory(share: float) -> None:
    """Of the memory of the GPU that this process computes on; beyond it torch says out of memory."""
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


class ProcessGroup:
    """Accelerate's processes and device. Every method that communicates must be called by all of them.

    Of accelerate only this is used: its `Accelerator` would divide and scale losses by variables of the environment.
    """

    def __init__(self) -> None:
        """TrialError where the environment narrows float32 and that cannot be undone."""
        keep_deepspeed_off_stdout()
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

    def shards_model(self, training: TrainingConfig) -> bool:
        """Whether each process is to hold slices of the model only."""
        return self.size > 1 and training.distributed != "ddp"

    def all_reduce_metrics(self, sums: MetricSums) -> MetricSums:
        """Totals over all processes; all must have the same names."""
        if self.size == 1:
            return sums
        flat = torch.tensor([sums[name] for name in sorted(sums)], dtype=torch.float64, device=self.device)
        distributed.all_reduce(flat)
        return {name: (float(n), float(w)) for name, (n, w) in zip(sorted(sums), flat.tolist(), strict=True)}

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            on_device = tensor.to(self.device)
            distributed.all_reduce(on_device)
            tensor.copy_(on_device)
        return tensor

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
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

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is up in at least one process."""
        if self.size == 1:
            return flag
        return bool(self.all_reduce(torch.tensor([float(flag)]))[0] > 0)

    def broadcast(self, names: list[str]) -> list[str]:
        """The first process's names, in every process."""
        shared: list[object] = [names]
        distributed.broadcast_object_list(shared, device=self.device)
        return list(shared[0])  # pyright: ignore[reportArgumentType]

    def barrier(self) -> None:
        """Until every process is here."""
        self._processes.wait_for_everyone()

    def main_first(self) -> AbstractContextManager[None]:
        """The first process goes through the block before the others."""
        return self._processes.main_process_first()


class CancelToken:
    """Cooperative cancellation, checked between pieces of work.

    Processes that train together stop only together, at `check_all_ranks`.
    """

    def __init__(self, process_group: ProcessGroup, is_cancelled: Callable[[], bool]) -> None:
        self._process_group, self._is_cancelled = process_group, is_cancelled

    def check(self) -> None:
        """Raise Interrupted if cancelled and this is the only process.

        With several processes only `check_all_ranks` raises, so that none waits for ever.
        """
        if self._process_group.size == 1 and self._is_cancelled():
            raise Interrupted

    def check_all_ranks(self) -> None:
        """Raise Interrupted in all processes when one of them was asked to."""
        if self._process_group.any_rank(self._is_cancelled()):
            raise Interrupted


_LOOPBACK_ADDRESS = "127.0.0.1"
_LOOPBACK_INTERFACE = "lo"
_RENDEZVOUS_TIMEOUT = timedelta(hours=2)
"""For the slowest thing that one process does while the others wait: a checkpoint of a large model. Whoever started
them sees one that dies at once, and ends the others."""


def open_rendezvous() -> socket.socket:
    """Of the first process: where the others will find it. Nobody beyond this machine can."""
    listening = socket.create_server((_LOOPBACK_ADDRESS, 0), backlog=128)
    listening.setblocking(False)
    return listening


def join_rendezvous(
    rank: int, size: int, port: int, listening: socket.socket | None = None, gpus: Sequence[str] = ()
) -> None:
    """Make this process number `rank` of `size`, before its first ProcessGroup; wait for the others.

    port: of the first process's `open_rendezvous`, which also gives that socket. gpus: of all of them, in their order;
    every process sees them all, since NCCL needs to, and computes on its own.
    """
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": _LOOPBACK_ADDRESS,
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": _LOOPBACK_INTERFACE,
        "NCCL_SOCKET_IFNAME": _LOOPBACK_INTERFACE,
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
    }
    if not gpus:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    import torch  # now that it is known which GPUs there are
    from torch import distributed

    if gpus:
        torch.cuda.set_device(rank)
    store = distributed.TCPStore(
        _LOOPBACK_ADDRESS,
        port,
        size,
        is_master=listening is not None,
        timeout=_RENDEZVOUS_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=None if listening is None else listening.detach(),
    )
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_RENDEZVOUS_TIMEOUT)
