"""How a worker opens its workshop: with a share of a GPU, with one or none, or in several processes."""

from __future__ import annotations

import functools
from pathlib import Path

from orchestrator.execution.local_cluster import Slots
from orchestrator.execution.workers.attempt_runner import OpenWorkshop, Workshop
from orchestrator.execution.workers.multi_process_trial import Ranks


def for_slots(opened: OpenWorkshop, slots: Slots) -> OpenWorkshop:
    """What a worker of these slots calls to begin."""
    if slots.processes > 1:
        return functools.partial(Ranks, opened=opened, size=slots.processes, each=slots.of_process)
    if slots.share is not None:
        return functools.partial(_in_a_share, opened=opened, share=slots.share)
    return opened


def _in_a_share(cache: Path, *, opened: OpenWorkshop, share: float) -> Workshop:
    from trainer.distributed.processes import keep_to_share

    keep_to_share(share)
    return opened(cache)
