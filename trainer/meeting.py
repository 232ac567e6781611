"""How the processes of one trial find each other, on one machine: over loopback, by gloo on CPUs and NCCL on GPUs."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta

_HERE = "127.0.0.1"
_LOOPBACK = "lo"
_PATIENCE = timedelta(hours=2)
"""For the slowest thing that one process does while the others wait: a checkpoint of a large model. Whoever started
them sees one that dies at once, and ends the others."""


def listen() -> socket.socket:
    """Of the first process: where the others will find it. Nobody beyond this machine can."""
    listening = socket.create_server((_HERE, 0), backlog=128)
    listening.setblocking(False)
    return listening


def join(rank: int, size: int, port: int, listening: socket.socket | None = None, gpus: Sequence[str] = ()) -> None:
    """Make this process number `rank` of `size`, before its first World; waits for the others.

    port: of the first process's `listen`, which also gives that socket. gpus: of all of them, in their order; every
    process sees them all, since NCCL wants to, and computes on its own.
    """
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": _HERE,
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": _LOOPBACK,
        "NCCL_SOCKET_IFNAME": _LOOPBACK,
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
    }
    if not gpus:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    import torch  # now that it is known which GPUs there are
    from torch import distributed

    if gpus:
        torch.cuda.set_device(rank)
    store = distributed.TCPStore(
        _HERE,
        port,
        size,
        is_master=listening is not None,
        timeout=_PATIENCE,
        wait_for_workers=False,
        master_listen_fd=None if listening is None else listening.detach(),
    )
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
