"""Write docs/sweeps.md from the files of sweeps/ and `orchestrate plan --on`: `make docs`.

Every cell of the first table is a plan; a file that does not fit a machine names another one that does.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import sweeps
from orchestrator.commands.local_plan import plan_machines
from orchestrator.spec.estimates.cost_estimate import EFFICIENCY, GpuAssumptions
from orchestrator.spec.estimates.gpu_table import parse_machine
from orchestrator.spec.estimates.machine_plans import MachinePlan
from orchestrator.spec.loading.loader import load_spec
from orchestrator.spec.sweep_spec import SweepSpec

PAGE = Path(__file__).parent / "sweeps.md"
FILES = sorted(Path(sweeps.__file__).parent.glob("*.yaml"))
MACHINES = {"1xRTX4090": "1 x 24 GB", "1xH100": "1 x 80 GB", "4xH100": "4 x 80 GB", "8xH100": "8 x 80 GB"}
"""Machine of the GPU table -> its column."""
SMALLER = {"learning-rates-70b": "learning-rates-13b-30b-lora"}
"""File -> one of a smaller model, for machines that no file of its own model fits."""
_PAPER = "SimPO, paper and training_configs"
_README = "SimPO, README's best DPO settings"
_ADAPTERS = "the same at ten times the rates (LoRA Without Regret; the alignment handbook)"
_HANDBOOK = "the alignment handbook's SmolLM2"
SOURCES: Mapping[str, str] = {
    "gemma2-9b": "SimPO, training_configs and README",
    "gemma2-9b-dpo": _README,
    "gemma2-9b-lora": _ADAPTERS,
    "gemma3-1b": _HANDBOOK,
    "gemma3-4b": f"{_HANDBOOK}, at ten times its rate",
    "learning-rates-13b-30b": "a public guide (unmeasured)",
    "learning-rates-13b-30b-lora": "a public guide (unmeasured), at ten times the rates (LoRA Without Regret)",
    "learning-rates-1b-3b": "a public guide (unmeasured)",
    "learning-rates-70b": "a public guide (unmeasured), Tulu 3",
    "learning-rates-7b-8b": "a public guide (unmeasured), SimPO's configs",
    "llama3-8b": _PAPER,
    "llama3-8b-cpo": "CPO paper by TRL's index, fairseq2",
    "llama3-8b-dpo": _README,
    "llama3-8b-dpo-losses": "TRL's paper index, SimPO's README, Tulu 3, the losses' papers",
    "llama3-8b-instruct": _PAPER,
    "llama3-8b-instruct-dpo": _README,
    "llama3-8b-instruct-lora": _ADAPTERS,
    "llama3-8b-instruct-v0.2": _PAPER,
    "llama3-8b-instruct-v0.2-dpo": _README,
    "llama3-8b-lora": _ADAPTERS,
    "llama3-8b-methods": "the sweeps of the first four, SimPER's authors, TRL's KTOConfig",
    "llama3-8b-orpo": "ORPO paper by TRL's index, fairseq2",
    "llama3-8b-staged": "SimPO, issues 50 and 69, README",
    "llama3.2-1b": _HANDBOOK,
    "llama3.2-3b": f"{_HANDBOOK}, at ten times its rate",
    "mistral-7b-base": _PAPER,
    "mistral-7b-base-dpo": _README,
    "mistral-7b-base-lora": _ADAPTERS,
    "mistral-7b-instruct": _PAPER,
    "mistral-7b-instruct-dpo": _README,
    "mistral-7b-instruct-lora": _ADAPTERS,
    "quickstart": "a generated task, for a CPU",
    "quickstart-cpo": "a generated task, for a CPU",
    "quickstart-dpo": "a generated task, for a CPU",
    "quickstart-orpo": "a generated task, for a CPU",
    "qwen3-0.6b": _HANDBOOK,
    "qwen3-1.7b": f"{_HANDBOOK}, at ten times its rate",
    "qwen3-4b": f"{_HANDBOOK}, at ten times its rate",
    "smollm3-3b": "the alignment handbook's SmolLM3, at ten times its rate",
}
"""File -> where its numbers come from; each file says it line by line."""

_HEAD = """\
# The sweeps

<!-- Written by `make docs` from sweeps/ and `orchestrate plan --on`. Change docs/make_sweeps.py instead. -->

`sweeps/quickstart.yaml` runs on a CPU in minutes. The others are the papers', adapters for the same models, and current
small models: each begins with the published best point (`enqueue`) and continues with the grid around it; a comment in
each file says where every number comes from. `orchestrate sweep FILE --rehearse` runs any of them in small on any
machine. `make rehearse` does so with all of them ([last result](rehearsals.md)). None of them has been run here at full
size.

## Which file for my machine

"""
_BETWEEN = (
    """Hours of the whole sweep if no trial is stopped early, and the GPUs of a trial where it takes several. A name is
    a file for the same model that fits where this one does not (SimPO and DPO with adapters, whichever loss this one
    has); for 70 billion parameters it has a smaller model. By formula, not measured: `orchestrate plan --on`, at
    {share} of the GPUs' peak in bfloat16, with the published sizes of the data sets. Machines: {machines}.""",
    """GPUs per trial, sharding, gradient checkpointing and micro-batch are left to `auto` in these files; `plan` says
    what it chooses and why. For other machines, `--on 8xMI300X --on 1xL4 --price 2` prints a table. For scale: a
    reading-note of the SimPO paper gives 60 minutes on 8 H100 for one trial of Llama-3-Base with the authors'
    program; the formula gives {minutes:.0f} minutes of all 8.""",
    """The papers' files train all weights in float32, which takes several GPUs of 80 GB from 7 billion parameters on.
    The `-lora` files train adapters over a base in 4 bits, which one GPU of 24 GB holds; with 48 GB and more,
    `model.load_in_4bit=false` by `--set` keeps the base in bfloat16. Learning rates do not carry over between float32
    and bfloat16 weights, nor to adapters, whose best rates are about ten times higher.""",
)
_WHAT = """\
## What they sweep

| file | what | from | trials |
|---|---|---|---|
"""


@cache
def plans(file: Path) -> tuple[SweepSpec, dict[str, MachinePlan]]:
    """Return the sweep and its plan on each of MACHINES."""
    spec = load_spec(file)
    made = plan_machines(spec, Path("runs"), [parse_machine(name) for name in MACHINES], (), GpuAssumptions())
    return spec, dict(zip(MACHINES, made, strict=True))


def sibling(spec: SweepSpec, machine: str) -> str | None:
    """Return another file that fits this machine: of the same model, adapters first, else SMALLER's; None if none."""
    same = [file for file in FILES if plans(file)[0].base.model.name_or_path == spec.base.model.name_or_path]
    smaller = [file for file in FILES if file.stem == SMALLER.get(spec.name)]
    for file in [*sorted(same, key=lambda file: not file.stem.endswith("-lora")), *smaller]:
        if plans(file)[1][machine].plan is not None:
            return file.stem
    return None


def cell(spec: SweepSpec, machine: str, plan: MachinePlan) -> str:
    """Return hours and GPUs per trial, or the name of a file that fits."""
    if plan.arrangement is None:
        return f"`{sibling(spec, machine)}`"
    if plan.hours is None:
        return "fits"
    each = plan.arrangement.gpus_per_trial
    hours = f"{plan.hours:.1f} h" if plan.hours < 10 else f"{plan.hours:.0f} h"
    return f"{hours}, {each:g} GPUs a trial" if each > 1 else hours


def make_page() -> str:
    """Return the whole page."""
    chosen = sorted((file for file in FILES if not file.stem.startswith("quickstart")), key=_smallest_first)
    rows = [f"| file | {' | '.join(MACHINES.values())} |", f"|---|{'---|' * len(MACHINES)}"]
    for file in chosen:
        spec, found = plans(file)
        rows.append(f"| `{file.name}` | {' | '.join(cell(spec, name, plan) for name, plan in found.items())} |")
    llama = plans(Path(sweeps.__file__).parent / "llama3-8b.yaml")[1]["8xH100"].plan
    assert llama is not None
    assert llama.estimate is not None
    each = llama.estimate.gpu_hours_per_trial
    assert each is not None
    machines = ", ".join(f"{column} is {name}" for name, column in MACHINES.items())
    values = {"share": f"{EFFICIENCY:.0%}", "machines": machines, "minutes": 60 * each / 8}
    between = "".join(f"{_wrapped(text.format(**values))}\n\n" for text in _BETWEEN)
    what = []
    for file in FILES:
        spec, found = plans(file)
        trials = next((plan.plan.trials for plan in found.values() if plan.plan is not None), None)
        what.append(f"| `{file.name}` | {spec.description} | {SOURCES[file.stem]} | {trials} |")
    return f"{_HEAD}{chr(10).join(rows)}\n\n{between}{_WHAT}{chr(10).join(what)}\n"


def _smallest_first(file: Path) -> int:
    """Files that fit every machine first, then those that need more."""
    return sum(plan.arrangement is None for plan in plans(file)[1].values())


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
