"""Limits of temporary memory of a run, and the out-of-memory errors of a run that has too little.

The limits are also used by the estimates (orchestrator/spec/estimates/gpu_memory.py).
"""

from __future__ import annotations

import re

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


_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|STATUS_\w*ALLOC\w*_FAILED|MemoryAllocation"
)
"""Out-of-memory messages of torch on a CPU, the CUDA runtime, cuBLAS, cuDNN and similar libraries."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error says that memory of the machine or of the GPU could not be allocated."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
