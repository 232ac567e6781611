"""Published memory, bfloat16 peak and bandwidth of GPUs, for plans of machines that are not at hand."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

_MIB = 2.0**20


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A GPU by its data sheet.

    `reported_mib` is `memory.total` of nvidia-smi, which a sweep on such a GPU reads too; `tflops` are dense products
    of bfloat16 that are added in float32, without sparsity.
    """

    name: str
    memory_gb: float
    """GB by the data sheet."""
    reported_mib: int
    tflops: float
    bandwidth: float
    """GB/s."""
    source: str
    names: tuple[str, ...] = ()
    """Further names, in lower case, without spaces, dashes and the words of `_LEFT_OUT`."""

    @property
    def memory(self) -> float:
        """Bytes that the driver reports; the formulas leave a tenth of it free."""
        return self.reported_mib * _MIB


_HALVED = "halved, as it counts sparsity"
_HOPPER = f"NVIDIA H100 data sheet ({_HALVED}), as archive-lib.hpctech.co.jp has it"

GPUS: tuple[GpuModel, ...] = (
    GpuModel("RTX3090", 24, 24576, 71, 936, "NVIDIA GA102 white paper; bandwidth: pcguide.com; peak not confirmed"),
    GpuModel("RTX4090", 24, 24564, 165.2, 1008, "NVIDIA Ada white paper, as hmc-tech.com has it"),
    GpuModel(
        "RTX5090",
        32,
        32607,
        209.5,
        1792,
        "NVIDIA RTX Blackwell white paper; peak: a quarter of 838 TFLOP/s with sparsity and sums in float16, "
        "spheron.network",
    ),
    GpuModel(
        "RTX6000-Ada",
        48,
        49140,
        364,
        960,
        "NVIDIA RTX 6000 Ada data sheet, as grafikkarten.com has it; peak: four times its 91.1 TFLOP/s in float32",
        ("6000ada",),
    ),
    GpuModel(
        "RTX-PRO-6000",
        96,
        97887,
        500,
        1792,
        "NVIDIA RTX PRO 6000 Blackwell Workstation data sheet, as hardware-corner.net has it; peak: four times its 125 "
        "TFLOP/s in float32",
        ("pro6000blackwell", "6000pro", "6000blackwell"),
    ),
    GpuModel("L4", 24, 23034, 121, 300, f"NVIDIA L4 data sheet ({_HALVED}), not confirmed; hmc-tech.com: 125 TFLOP/s"),
    GpuModel("L40S", 48, 46068, 362, 864, "NVIDIA L40S data sheet, as mullet.se has it"),
    GpuModel("A10", 24, 23028, 125, 600, f"NVIDIA A10 data sheet ({_HALVED}), not confirmed"),
    GpuModel(
        "A100-40GB",
        40,
        40960,
        312,
        1555,
        "NVIDIA A100 data sheet; peak: hmc-tech.com; bandwidth not confirmed",
        ("a10040", "a100sxm440", "a100pcie40"),
    ),
    GpuModel(
        "A100-80GB",
        80,
        81920,
        312,
        2039,
        "NVIDIA A100 data sheet (SXM); peak: hmc-tech.com; bandwidth not confirmed",
        ("a10080", "a100sxm480", "a100pcie80"),
    ),
    GpuModel("H100", 80, 81559, 989, 3350, f"{_HOPPER}: SXM", ("h10080", "h100sxm", "h100sxm5", "h10080hbm3")),
    GpuModel("H100-PCIe", 80, 81559, 756, 2000, f"{_HOPPER}: PCIe"),
    GpuModel(
        "H100-NVL", 94, 95830, 835, 3900, f"NVIDIA H100 data sheet ({_HALVED}): NVL, peak not confirmed", ("h10094",)
    ),
    GpuModel("H200", 141, 143771, 989, 4800, "NVIDIA H200 data sheet, as itkb.uw.cz has it", ("h200141", "h200sxm")),
    GpuModel(
        "B200",
        180,
        183359,
        2250,
        8000,
        "NVIDIA HGX B200 at 1,000 W, as glennklockwood.com/garden/processors/B200 has it",
        ("b200180", "b200192"),
    ),
    GpuModel(
        "MI300X",
        192,
        196592,
        1307,
        5300,
        "AMD Instinct MI300X data sheet, as codesota.com has it (halved); 192 GiB less 16 MiB, not confirmed",
    ),
    GpuModel(
        "DGX-Spark",
        128,
        106496,
        62,
        273,
        "NVIDIA DGX Spark product page, as ai-infrastructure.net has it; its memory is also the CPU's, to which 24 GiB "
        "are left here; no peak in bfloat16 is published: 62 by GeForce's rate per core, not confirmed",
        ("gb10", "spark", "dgxsparkgb10"),
    ),
)
"""Peaks are dense. `reported_mib` of NVIDIA's cards was compared with public outputs of nvidia-smi."""

_LEFT_OUT = re.compile(r"nvidia|geforce|amd|instinct|tesla|generation|edition|workstation|memory")


@dataclass(frozen=True, slots=True)
class PlannedMachine:
    """A machine with several GPUs of one model, such as 8xH100."""

    count: int
    gpu: GpuModel

    def __str__(self) -> str:
        return f"{self.count}x{self.gpu.name}"


class UnknownMachine(ValueError):
    """The text is no machine of the table; the message has the nearest names."""


def parse_machine(text: str) -> PlannedMachine:
    """Return the machine that `text` names: `8xH100`, `H100` for one, `4xa100-80gb`, `2xA100:40`.

    Raises:
        UnknownMachine: the number, or the GPU's name, is none of the table.
    """
    matched = re.fullmatch(r"\s*(?:(\d+)\s*[x*×]\s*)?(.*?)\s*", text, re.IGNORECASE)
    assert matched is not None, "every part of it may be empty"
    count = int(matched[1] or 1)
    if not count:
        raise UnknownMachine(f"{text!r}: a machine has at least one GPU")
    return PlannedMachine(count, _find(matched[2], text))


def _find(name: str, text: str) -> GpuModel:
    wanted = _plain(name)
    by_name = {alias: gpu for gpu in GPUS for alias in _aliases(gpu)}
    if wanted in by_name:
        return by_name[wanted]
    within = [gpu.name for gpu in GPUS if wanted and any(alias.startswith(wanted) for alias in _aliases(gpu))]
    near = [by_name[alias].name for alias in get_close_matches(wanted, by_name, n=6, cutoff=0.6)]
    names = within or list(dict.fromkeys(near))[:3]
    hint = f"did you mean {' or '.join(names)}?" if names else f"it has {', '.join(gpu.name for gpu in GPUS)}"
    raise UnknownMachine(f"{text!r} is no GPU of the table: {hint}")


def _aliases(gpu: GpuModel) -> tuple[str, ...]:
    """The name and the further names, each with and without RTX."""
    names = (_plain(gpu.name), *gpu.names)
    return tuple(dict.fromkeys(form for name in names for form in (name, name.removeprefix("rtx"), f"rtx{name}")))


def _plain(name: str) -> str:
    """Lower case without makers, spaces, dashes and the unit GB."""
    return re.sub(r"(?<=\d)gi?b", "", re.sub(r"[\s_:.\-]", "", _LEFT_OUT.sub("", name.lower())))
