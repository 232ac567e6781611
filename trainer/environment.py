"""Environment variables that would change what a run computes: its file decides, so they are removed and named."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.results import TrialError

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

_PREFIX = "ACCELERATE_"
"""Of what `accelerate launch` hands to its processes: mixed precision, accumulation, plugins, compilation."""
HARMLESS = frozenset(
    {
        "ACCELERATE_USE_CPU",
        "ACCELERATE_TORCH_DEVICE",
        "ACCELERATE_CPU_AFFINITY",
        "ACCELERATE_DEBUG_MODE",
        "ACCELERATE_LOG_LEVEL",
        "ACCELERATE_ENABLE_RICH",
    }
)
"""Where a process computes and what it logs."""
_NARROW = (
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
)
"""Products of float32 in a narrower format: cuBLAS, torch, oneDNN under both of its names."""
_IGNORABLE = frozenset({"", "0", "no", "none", "false", "default", "strict"})
"""Values that ask for nothing, as `accelerate launch` sets them without options."""
_EXACT = 1e-5
"""Largest relative error of a float32 product; TF32 and bfloat16 are beyond 1e-4."""


def foreign_settings() -> list[str]:
    """Return `NAME=value` of each variable that asks for something and will be removed. Nothing heavy is imported."""
    return sorted(f"{name}={os.environ[name]}" for name in _names() if _asks(name, os.environ[name]))


def ignored(settings: Sequence[str]) -> str:
    """The sentence that names these settings."""
    return (
        "ignored in the environment, since a run is what its file says (training.bf16, training.pairs_per_update, "
        f"training.distributed): {', '.join(settings)}"
    )


def remove_foreign_settings() -> list[str]:
    """Remove these variables from this process, and let float32 products be computed in float32.

    Return those that asked for something. For as long as the process lives: transformers, peft and TRL read them too,
    whenever a model is loaded or a trainer made.
    """
    import torch

    found = foreign_settings()
    for name in _names():
        del os.environ[name]
    torch.set_float32_matmul_precision("highest")
    return found


def keep_deepspeed_off_stdout() -> None:
    """To be called before a model is saved.

    accelerate then imports DeepSpeed where somebody has installed it, and without a GPU that prints to stdout.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def report_ignored(settings: Sequence[str], device: torch.device) -> None:
    """Name the removed variables. TrialError where a library had read one of `_NARROW` before."""
    if not settings:
        return
    _log.warning(ignored(settings))
    narrow = [setting for setting in settings if setting.partition("=")[0] in _NARROW]
    if narrow and not computes_float32(device):
        raise TrialError(f"{', '.join(narrow)} narrows float32 products on {device}; unset it and start again")


def computes_float32(device: torch.device) -> bool:
    """Whether a product of float32 matrices on `device` is as exact as float32."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand(256, 256, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    found = (left.to(device) @ right.to(device)).cpu().double()
    return bool(((found - exact).abs() / exact).max() < _EXACT)


def _names() -> list[str]:
    return [n for n in os.environ if n in _NARROW or (n.startswith(_PREFIX) and n not in HARMLESS)]


def _asks(name: str, value: str) -> bool:
    return value.strip().lower() not in _IGNORABLE and not (name.endswith("_STEPS") and value.strip() == "1")
