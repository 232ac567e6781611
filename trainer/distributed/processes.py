"""Processes that train one trial together: `ProcessGroup`, `CancelToken` and the rendezvous.

There is usually one process; `accelerate launch` or torchrun start several. Processes of one trial on one machine
connect over loopback, by gloo on CPUs and NCCL on GPUs.
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
from trainer.environment import (
    choose_float32_products,
    keep_deepspeed_off_stdout,
    remove_foreign_settings,
    report_ignored,
)


class RunInterrupted(Exception):
    """The run was asked to save its state and stop; not an error."""


def limit_gpu_memory(share: float) -> None:
    """Limit this process to a share of its GPU's memory; torch raises an out-of-memory error beyond it."""
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


class ProcessGroup:
    """The processes and devices of accelerate. Every method that communicates must be called by all processes.

    accelerate's `Accelerator` is not used: environment variables would make it divide and scale losses.
    """

    def __init__(self) -> None:
        """Raises TrialError if the environment narrows float32 and that cannot be undone."""
        keep_deepspeed_off_stdout()
        ignored = remove_foreign_settings()
        self._processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        self.rank: int = self._processes.process_index
        self.size: int = self._processes.num_processes
        self.device = cast(torch.device, self._processes.device)
        report_ignored(ignored if self.is_main else (), self.device)
        self.onednn_products: bool = choose_float32_products(self.device)
        """Whether oneDNN multiplies float32 matrices, which rounds in another order than torch's own products."""

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which writes files and logs."""
        return self.rank == 0

    @contextmanager
    def autocast(self, bf16: bool, *, cache_weights: bool = True) -> Generator[None]:
        """Run forward passes in bfloat16 while the weights keep their dtype; without `bf16` do nothing.

        `cache_weights`: cache weights cast to bfloat16; off for sharded weights, which are gathered by layer.
        """
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16, cache_enabled=cache_weights):
            yield

    def shards_model(self, training: TrainingConfig) -> bool:
        """Return whether each process holds only shards of the model."""
        return self.size > 1 and training.distributed != "ddp"

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            on_device = tensor.to(self.device)
            distributed.all_reduce(on_device)
            tensor.copy_(on_device)
        return tensor

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum every gradient over all processes; a missing gradient counts as zero."""
        if self.size == 1:
            return
        pending: list[distributed.Work] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            work = distributed.all_reduce(parameter.grad, async_op=True)
            assert work is not None
            pending.append(work)
        for work in pending:
            work.wait()

    def any_rank(self, flag: bool) -> bool:
        """Return whether the flag is true in at least one process."""
        if self.size == 1:
            return flag
        return bool(self.all_reduce(torch.tensor([float(flag)]))[0] > 0)

    def broadcast(self, names: list[str]) -> list[str]:
        """Return the first process's list, in every process."""
        shared: list[object] = [names]
        distributed.broadcast_object_list(shared, device=self.device)
        return list(shared[0])  # pyright: ignore[reportArgumentType]

    def barrier(self) -> None:
        """Wait until every process has reached this call."""
        self._processes.wait_for_everyone()

    def main_first(self) -> AbstractContextManager[None]:
        """Run the block in the first process before the others."""
        return self._processes.main_process_first()


class CancelToken:
    """Cooperative cancellation, checked between micro-batches.

    Processes that train together stop only together, at `check_all_ranks`.
    """

    def __init__(
        self,
        process_group: ProcessGroup,
        is_cancelled: Callable[[], bool],
        is_discarded: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_discarded`: whether the cancelled run is not continued and needs no checkpoint."""
        self._process_group, self._is_cancelled, self._is_discarded = process_group, is_cancelled, is_discarded

    @property
    def wants_checkpoint(self) -> bool:
        """Whether a cancelled run is to be saved; called in all processes, which get the same answer."""
        return not self._process_group.any_rank(self._is_discarded())

    def check(self) -> None:
        """Raise Interrupted if cancelled and this is the only process.

        With several processes only `check_all_ranks` raises, so that no process waits forever.
        """
        if self._process_group.size == 1 and self._is_cancelled():
            raise RunInterrupted

    def check_all_ranks(self) -> None:
        """Raise Interrupted in all processes if one of them was cancelled."""
        if self._process_group.any_rank(self._is_cancelled()):
            raise RunInterrupted


_LOOPBACK_ADDRESS = "127.0.0.1"
_LOOPBACK_INTERFACE = "lo"
_RENDEZVOUS_TIMEOUT = timedelta(hours=2)
"""Longest wait for another process, such as one that writes a checkpoint of a large model. A process that dies is
detected at once by its parent process, which ends the others.
"""


def open_rendezvous() -> socket.socket:
    """Return the listening socket of the first process, reachable from this machine only."""
    listening = socket.create_server((_LOOPBACK_ADDRESS, 0), backlog=128)
    listening.setblocking(False)
    return listening


def join_rendezvous(
    rank: int, size: int, port: int, listening: socket.socket | None = None, gpus: Sequence[str] = ()
) -> None:
    """Make this process rank `rank` of `size`, before its first ProcessGroup, and wait for the others.

    Args:
        rank: Number of this process.
        size: Number of processes.
        port: Port of the first process's `open_rendezvous`.
        listening: That socket, in the first process.
        gpus: GPUs of all processes, in their order; every process sees all of them, since NCCL requires it.
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
        # Under ROCm Ray gives this process its GPU by HIP's variable, which has precedence.
        "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in os.environ else "CUDA_VISIBLE_DEVICES": ",".join(gpus),
    }
    if not gpus:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    import torch  # after CUDA_VISIBLE_DEVICES is set
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
