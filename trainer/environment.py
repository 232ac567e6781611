"""Environment variables that would change the result of a run are removed and reported: only the trial file decides."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from trainer.results import TrialError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from typing_extensions import TypeIs

_log = logging.getLogger(__name__)

_PREFIX = "ACCELERATE_"
"""Prefix of the settings that `accelerate launch` passes to its processes: mixed precision, accumulation, plugins."""
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
"""Variables with this prefix that only affect devices and logging."""
_NARROWING_VARIABLES = (
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
)
"""Variables that allow float32 products in a narrower format: cuBLAS, torch, oneDNN under both of its names."""
_IGNORABLE = frozenset({"", "0", "no", "none", "false", "default", "strict"})
"""Values without effect, as `accelerate launch` sets them without options."""
_MAX_RELATIVE_ERROR = 1e-5
"""Largest accepted relative error of a float32 product; TF32 and bfloat16 exceed 1e-4."""
_PROBED_SHAPES = ((512, 256, 1024), (512, 1024, 64), (96, 64, 300))
"""Rows, summed and columns of the products that are compared before oneDNN is used."""


def has_adapters(model: object) -> TypeIs[PeftModel]:
    """Return whether this is a model with peft's adapters; peft takes a second to load, and is not loaded for that."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def collect_garbage_rarely() -> None:
    """Look for unreachable cycles after every 100,000 new objects instead of 700.

    While modules are loaded, nothing becomes unreachable, and each pass over all that they hold is for nothing: a
    quarter of the time that torch, transformers and Ray take to load.
    """
    gc.set_threshold(100_000, *gc.get_threshold()[1:])


@contextmanager
def collecting_rarely() -> Generator[None]:
    """Do so within the context."""
    threshold = gc.get_threshold()
    collect_garbage_rarely()
    try:
        yield
    finally:
        gc.set_threshold(*threshold)


def foreign_settings() -> list[str]:
    """Return `NAME=value` of each variable that has an effect and will be removed. Imports nothing heavy."""
    return sorted(f"{name}={os.environ[name]}" for name in _names() if _has_effect(name, os.environ[name]))


def ignored_message(settings: Sequence[str]) -> str:
    """Return the message that lists these settings."""
    return (
        "ignored in the environment, because the trial file decides (training.bf16, training.pairs_per_update, "
        f"training.distributed): {', '.join(settings)}"
    )


def remove_foreign_settings() -> list[str]:
    """Remove these variables from this process, and have float32 products computed in float32.

    Returns those that had an effect. They stay removed, since transformers, peft and TRL read them whenever a model is
    loaded or a trainer created.
    """
    import torch

    found = foreign_settings()
    for name in _names():
        del os.environ[name]
    torch.set_float32_matmul_precision("highest")
    return found


def keep_deepspeed_off_stdout() -> None:
    """Keep DeepSpeed's import from printing to stdout; called before a model is saved.

    accelerate then imports DeepSpeed if it is installed, which prints to stdout without a GPU.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def report_ignored(settings: Sequence[str], device: torch.device) -> None:
    """Log the removed variables. Raises TrialError if a library had read one of `_NARROW` before."""
    if not settings:
        return
    _log.warning(ignored_message(settings))
    narrow = [setting for setting in settings if setting.partition("=")[0] in _NARROWING_VARIABLES]
    if narrow and not computes_float32(device):
        raise TrialError(f"{', '.join(narrow)} narrows float32 products on {device}; unset it and start again")


def computes_float32(device: torch.device) -> bool:
    """Return whether a product of float32 matrices on `device` has float32 precision."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand(256, 256, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    found = (left.to(device) @ right.to(device)).cpu().double()
    return bool(((found - exact).abs() / exact).max() < _MAX_RELATIVE_ERROR)


def choose_float32_products(device: torch.device) -> bool:
    """Have oneDNN multiply float32 matrices on a CPU, if that has float32's precision there; return whether it does.

    torch uses oneDNN for them only where bfloat16 is allowed too. Of x86 processors those with AMX then round to
    bfloat16, and keep torch's own products; others compute in float32, on AMD's about twice as fast as MKL. What they
    do is measured, not looked up.
    """
    import torch

    if device.type != "cpu":
        return False
    torch.set_float32_matmul_precision("medium")
    if all(map(_is_float32_product, _PROBED_SHAPES)):
        return True
    torch.set_float32_matmul_precision("highest")
    return False


def _is_float32_product(shape: tuple[int, int, int]) -> bool:
    """Return whether products of these sizes, with both operands as they are and transposed, are those of float32."""
    import torch

    rows, summed, columns = shape
    generator = torch.Generator().manual_seed(0)
    left, right = torch.rand(rows, summed, generator=generator), torch.rand(summed, columns, generator=generator)
    exact = left.double() @ right.double()
    by_rows, by_columns = left.t().contiguous().t(), right.t().contiguous().t()
    return all(
        float(((a @ b - exact).abs() / exact).max()) < _MAX_RELATIVE_ERROR
        for a in (left, by_rows)
        for b in (right, by_columns)
    )


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums over tokens and pairs: float64, but float32 on Apple's GPU, which has no other."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def _names() -> list[str]:
    return [n for n in os.environ if n in _NARROWING_VARIABLES or (n.startswith(_PREFIX) and n not in HARMLESS)]


def _has_effect(name: str, value: str) -> bool:
    return value.strip().lower() not in _IGNORABLE and not (name.endswith("_STEPS") and value.strip() == "1")
