"""`session_factory`: opens a worker's session with whole GPUs, a share of one, none, or in several processes."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from orchestrator.execution.slots import Slots
from orchestrator.execution.workers.attempt_runner import Session, SessionFactory
from orchestrator.execution.workers.multi_process_trial import MultiProcessSession
from orchestrator.gpu_locks import use_own_gpus
from trainer.results import TrialError


def session_factory(open_session: SessionFactory, slots: Slots) -> SessionFactory:
    """Return the function with which a worker of these slots opens its session.

    Raises GpuMissing if the trial was promised a GPU and the process has none.
    """
    if slots.gpus:
        open_session = functools.partial(_open_on_gpu, open_session=open_session, gpus=slots.gpus)
    if slots.processes > 1:
        return functools.partial(
            MultiProcessSession,
            open_session=open_session,
            size=slots.processes,
            process_resources=slots.process_resources,
        )
    if slots.gpu_fraction is not None:
        return functools.partial(_open_with_gpu_fraction, open_session=open_session, gpu_fraction=slots.gpu_fraction)
    return open_session


class GpuMissing(TrialError):
    """A trial was promised a GPU, but torch finds none: it would train on the CPU."""


def _open_on_gpu(cache: Path, *, open_session: SessionFactory, gpus: float) -> Session:
    use_own_gpus()
    import torch

    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        raise GpuMissing(
            f"the trial was promised {gpus:g} GPU{'' if gpus == 1 else 's'}, but torch {torch.__version__} ({build}) "
            f"finds none (CUDA_VISIBLE_DEVICES {'is not set' if allowed is None else f'is {allowed!r}'}); `orchestrate "
            "doctor` checks the driver, and resources.gpus_per_trial=0 trains on the CPU"
        )
    return open_session(cache)


def _open_with_gpu_fraction(cache: Path, *, open_session: SessionFactory, gpu_fraction: float) -> Session:
    from trainer.distributed.processes import limit_gpu_memory

    limit_gpu_memory(gpu_fraction)
    return open_session(cache)
