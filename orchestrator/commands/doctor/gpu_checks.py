"""Checks of the GPUs, who uses them, their driver, CUDA in torch, flash attention and quantization."""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.commands.doctor.machine_checks import Check, CheckLevel, package_version
from orchestrator.errors import StorageRefused
from orchestrator.gpu_locks import gpu_holders
from orchestrator.gpus import (
    HANGS,
    REMEDY,
    amd_gpus,
    driver_hangs,
    hidden_gpus,
    installed_gpus,
    torch_uses_rocm,
    visibility_variable,
    visible_devices,
    visible_gpus,
)
from orchestrator.spec.sweep_spec import SweepSpec

NEEDS_DRIVER = {"11": 450, "12": 525, "13": 580}
"""CUDA major version -> oldest compatible driver (NVIDIA's table of minor version compatibility)."""
_AMPERE = (8, 0)


def gpu_checks(spec: SweepSpec | None) -> Iterator[Check]:
    """Yield the checks of the GPUs that trials would run on."""
    cards = visible_gpus()
    try:
        import torch
    except ImportError:
        yield Check("gpu", CheckLevel.WARN, f"{cards} found by the driver", "torch is not installed: make install")
        return
    if driver_hangs():
        # torch may hang on such a driver as well, so that the GPUs are not checked further.
        yield Check("driver", CheckLevel.FAIL, HANGS, REMEDY)
        return
    gpus = installed_gpus()
    if not gpus or gpus[0].vendor == "nvidia":
        yield from check_driver(cards, driver_version(), str(torch.version.cuda) if torch.version.cuda else None)
    elif gpus[0].driver:
        yield Check("driver", CheckLevel.OK, f"amdgpu {gpus[0].driver}")
    yield _cuda(torch, cards, spec)
    yield from each_gpu()
    yield _flash(torch, cards)
    yield _quantization(cards, spec)
    yield _kernels(cards, spec)


def each_gpu() -> Iterator[Check]:
    """Yield what is known of each GPU and MIG instance, who uses it, and what hides it from this process."""
    devices = visible_devices(environment={})
    visible = {gpu.key for gpu in visible_devices()}
    try:
        holders = {gpu.key: holder for gpu, holder in gpu_holders(devices).items()}
    except StorageRefused as error:
        found, _, fix = str(error).rpartition("; ")
        yield Check("gpu locks", CheckLevel.FAIL, found, fix)
        holders = None
    for gpu in devices:
        memory = "" if gpu.memory is None else f"{gpu.memory / 2**30:.1f} GiB"
        known = [text for text in (gpu.name or "of unknown name", memory, gpu.uuid) if text]
        holder = None if holders is None else holders.get(gpu.key)
        if holders is not None:
            known.append("free" if holder is None else f"in use by {holder}")
        if gpu.key not in visible:
            known.append(f"hidden by {_hidden_by(gpu.vendor)}")
        if holder is not None and holder.problem:
            yield Check(f"gpu {gpu.index}", CheckLevel.WARN, ", ".join(known), "have its owner or root remove the file")
        else:
            yield Check(f"gpu {gpu.index}", CheckLevel.OK, ", ".join(known))
    unused = [] if devices or torch_uses_rocm() else list(amd_gpus())
    if unused:
        fix = "to use them install torch's build for ROCm (README, GPU)"
        names = ", ".join(dict.fromkeys(gpu.name for gpu in unused))
        yield Check("gpu of AMD", CheckLevel.WARN, f"{len(unused)}: {names}; torch is no build for ROCm", fix)


def _hidden_by(vendor: str) -> str:
    names = [visibility_variable(vendor), *(["ROCR_VISIBLE_DEVICES"] if vendor == "amd" else [])]
    return " and ".join(f"{name}={os.environ[name]!r}" for name in names if name in os.environ)


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Return the version of the loaded driver of the GPUs; None without one."""
    if file.is_file() and (match := re.search(r"Module\b.*?\s(\d+\.\d[\d.]*)\s", file.read_text(errors="replace"))):
        return match[1]
    gpus = installed_gpus()
    return gpus[0].driver or None if gpus else None


def check_driver(cards: int, found: str | None, cuda: str | None) -> Iterator[Check]:
    """Check that the driver supports the CUDA version of torch."""
    if found is None:
        if cards:
            fix = "install NVIDIA's driver; in a container start it with the GPUs (`docker run --gpus all`)"
            yield Check("driver", CheckLevel.FAIL, f"{cards} GPUs, but no driver", fix)
        return
    minimum = NEEDS_DRIVER.get(cuda.partition(".")[0]) if cuda else None
    if minimum is not None and int(found.partition(".")[0]) < minimum:
        fix = f"update the driver to {minimum} or later, or install torch for an older CUDA"
        yield Check("driver", CheckLevel.FAIL, f"{found}; torch's CUDA {cuda} needs {minimum} or later", fix)
        return
    yield Check("driver", CheckLevel.OK, found)


def _cuda(torch: Any, cards: int, spec: SweepSpec | None) -> Check:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        works = torch.cuda.is_available()
    if works and not cards:
        fix = "make nvidia-smi available to this process, as in the same container or job"
        message = f"{torch.cuda.device_count()} found by torch, none by the driver: trials would run on the CPU"
        return Check("gpu", CheckLevel.FAIL, message, fix)
    if not works and cards and torch.backends.mps.is_available():
        return Check("gpu", CheckLevel.OK, "Apple's, used by one trial at a time (MPS)")
    if works:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Check("gpu", CheckLevel.OK, f"{len(names)}: {', '.join(dict.fromkeys(names))}; {_toolkit(torch)}")
    if cards:
        reason = f": {str(caught[-1].message).splitlines()[0]}" if caught else ""
        if torch.version.cuda is None:
            reason = ": it was built without CUDA"
        fix = "install a CUDA build of torch that matches the driver (README, GPU)"
        message = f"{cards} found by the driver, none by torch {torch.__version__}{reason}: trials would fail"
        return Check("gpu", CheckLevel.FAIL, message, fix)
    if spec is not None and (spec.resources.gpus_per_trial or 0) > 0:
        message = f"{hidden_gpus() or 'none'}; a trial needs {spec.resources.gpus_per_trial:g}"
        return Check(
            "gpu", CheckLevel.FAIL, message, "run it on a machine with GPUs, or --set resources.gpus_per_trial=0"
        )
    fix = "not needed for the quickstart; models with billions of parameters need one"
    return Check("gpu", CheckLevel.WARN, hidden_gpus() or "none; trials run on the CPU", fix)


def _toolkit(torch: Any) -> str:
    return f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"


def _flash(torch: Any, cards: int) -> Check:
    """Check torch's own flash attention, which packed pairs use; no other package is needed."""
    if not cards or not torch.cuda.is_available():
        return Check("flash-attention", CheckLevel.OK, "not used without a GPU")
    slow = [
        torch.cuda.get_device_name(i)
        for i in range(torch.cuda.device_count())
        if torch.cuda.get_device_capability(i) < _AMPERE
    ]
    if slow:
        fix = "none; trials use a slower attention. Flash attention needs Ampere (A100) or later, and 16 bits"
        return Check("flash-attention", CheckLevel.WARN, f"not on {', '.join(dict.fromkeys(slow))}", fix)
    if not torch.backends.cuda.is_flash_attention_available():
        fix = "install a build of torch with it, such as the official CUDA builds"
        return Check("flash-attention", CheckLevel.WARN, f"torch {torch.__version__} was built without it", fix)
    return Check("flash-attention", CheckLevel.OK, f"torch's own, used in 16 bits (torch {torch.__version__})")


def _quantization(cards: int, spec: SweepSpec | None) -> Check:
    required = spec is not None and spec.base.model.load_in_4bit
    if importlib.util.find_spec("bitsandbytes") is not None:
        return Check("bitsandbytes", CheckLevel.OK, package_version("bitsandbytes") or "installed")
    if required:
        fix = "pip install 'prefsweep[quantisation]'"
        return Check("bitsandbytes", CheckLevel.FAIL, "not installed; the sweep has model.load_in_4bit", fix)
    if cards:
        fix = "pip install 'prefsweep[quantisation]' for model.load_in_4bit"
        return Check("bitsandbytes", CheckLevel.OK, "not installed; optional", fix)
    return Check("bitsandbytes", CheckLevel.OK, "not installed; not used without a GPU")


def _kernels(cards: int, spec: SweepSpec | None) -> Check:
    if importlib.util.find_spec("liger_kernel") is not None:
        return Check("liger-kernel", CheckLevel.OK, package_version("liger-kernel") or "installed")
    fix = "pip install 'prefsweep[liger]'"
    if spec is not None and spec.base.model.kernels == "liger":
        return Check("liger-kernel", CheckLevel.FAIL, "not installed; the sweep has model.kernels: liger", fix)
    if cards:
        return Check("liger-kernel", CheckLevel.OK, "not installed; optional", f"{fix} for fused layers on a GPU")
    return Check("liger-kernel", CheckLevel.OK, "not installed; not used without a GPU")
