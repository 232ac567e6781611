"""`session_factory`: opens a worker's session with whole GPUs, a share of one, none, or in several processes."""

from __future__ import annotations

import functools
from pathlib import Path

from orchestrator.execution.slots import Slots
from orchestrator.execution.workers.attempt_runner import Session, SessionFactory
from orchestrator.execution.workers.multi_process_trial import MultiProcessSession


def session_factory(open_session: SessionFactory, slots: Slots) -> SessionFactory:
    """Return the function with which a worker of these slots opens its session."""
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


def _open_with_gpu_fraction(cache: Path, *, open_session: SessionFactory, gpu_fraction: float) -> Session:
    from trainer.distributed.processes import limit_gpu_memory

    limit_gpu_memory(gpu_fraction)
    return open_session(cache)
