"""Bounds on short-lived memory of a run, shared with the plan's formula (orchestrator/spec/estimates/gpu_memory.py)."""

from __future__ import annotations

LOGITS_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30}
"""Bytes of float32 logits made at once, by device, for several pairs together."""
LONG_LOGITS_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
"""Bytes of float32 logits made at once, by device, for one long pair."""
_FEWEST_ROWS = 64
PRODUCT_ELEMENTS = 1 << 24
"""Elements of the output layer's gradient that one product in bfloat16 makes before they are added in float32."""
STEP_ELEMENTS = 1 << 26
"""Weights that stochastic rounding has float32 copies of at the same time."""


def rows_within(size: int, vocabulary: int) -> int:
    """Scored tokens whose float32 logits take at most `size` bytes; never so few that the product would be slow."""
    return max(_FEWEST_ROWS, size // (4 * vocabulary))
