"""Seeds that depend on numbers alone."""

from __future__ import annotations

import functools
import hashlib
from typing import assert_never

from orchestrator.spec.samplers import (
    CmaEsSampler,
    GpSampler,
    GridSampler,
    NsgaIISampler,
    QmcSampler,
    RandomSampler,
    Sampler,
    StagedSampler,
    TpeSampler,
)


@functools.lru_cache(maxsize=1 << 16)
def stable_seed(*parts: int) -> int:
    """A seed that depends on these numbers alone, in every process and every version of Python."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:4], "big")


def seed_of(sampler: Sampler) -> int:
    """The sweep's seed."""
    match sampler:
        case GridSampler() | StagedSampler():
            return 0
        case (
            RandomSampler(seed=seed)
            | QmcSampler(seed=seed)
            | TpeSampler(seed=seed)
            | GpSampler(seed=seed)
            | CmaEsSampler(seed=seed)
            | NsgaIISampler(seed=seed)
        ):
            return seed
        case _:
            assert_never(sampler)
