"""Limits of temporary memory of a run, also used by the estimates (orchestrator/spec/estimates/gpu_memory.py)."""

from __future__ import annotations

LOGITS_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30}
"""Bytes of float32 logits per chunk of several pairs, by device."""
LONG_LOGITS_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
"""Bytes of float32 logits per chunk of one long pair, by device."""
_MIN_ROWS = 64
GRADIENT_CHUNK_ELEMENTS = 1 << 24
"""Elements of the output layer's gradient per bfloat16 product, before they are added in float32."""
ROUNDING_CHUNK_ELEMENTS = 1 << 26
"""Number of weights of which stochastic rounding holds float32 copies at a time."""


def rows_within(size: int, vocabulary: int) -> int:
    """Return how many scored tokens' float32 logits fit in `size` bytes, at least 64."""
    return max(_MIN_ROWS, size // (4 * vocabulary))
