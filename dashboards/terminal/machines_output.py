"""`plan --on`: one row per machine, and what each row rests on."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from dashboards.formatting import wide_console

if TYPE_CHECKING:
    from orchestrator.spec.estimates.gpu_layouts import Arrangement
    from orchestrator.spec.estimates.machine_plans import MachinePlan

_WIDTH = 120
"""Characters per line of piped output; the table itself takes at most 80."""
_HEADERS = (
    "GPUs per\ntrial",
    "trials\nat once",
    "GB per\nGPU",
    "check-\npoints",
    "micro-\nbatch",
    "hours",
    "GPU-\nhours",
)
_SMALLEST_PART = 64


def print_machines(name: str, plans: Sequence[MachinePlan], command: str, *, notices: bool = True) -> None:
    """Print the table of `plan --on`, and with `notices` what the plans note.

    `command` starts the sweep; to it changes are added that make it fit.
    """
    console = wide_console(_WIDTH, highlight=False)
    has_cost = any(plan.cost is not None for plan in plans)
    table = Table(
        title=f"{name} by formula, not measured", title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    table.add_column("machine", header_style="bold")
    for header in (*_HEADERS, *(["cost"] if has_cost else [])):
        table.add_column(header, justify="right", header_style="bold", no_wrap=True)
    for plan in plans:
        table.add_row(str(plan.machine), *_cells(plan), *([_number(plan.cost)] if has_cost else []))
    console.print(table)
    for plan in plans:
        if plan.refusal is not None:
            text = f"{plan.machine}: {plan.refusal.problem}: {plan.refusal.hint(command)}"
            console.print(text, markup=False)
    console.print(f"assumed: {plans[0].assumed}", markup=False)
    for gpu in dict.fromkeys(plan.machine.gpu for plan in plans):
        figures = f"{gpu.memory_gb:g} GB, {gpu.tflops:,g} TFLOP/s in bfloat16, {gpu.bandwidth:,g} GB/s"
        console.print(f"{gpu.name}: {figures} ({escape(gpu.source)})")
    noted = (notice for plan in plans if plan.plan is not None for notice in plan.plan.notices)
    for notice in dict.fromkeys(noted) if notices else ():
        console.print(f"note: {notice}", markup=False)


def _cells(plan: MachinePlan) -> list[str]:
    found = plan.arrangement
    if found is None:
        return ["no", *["-"] * (len(_HEADERS) - 1)]
    at_once = "" if plan.plan is None or plan.plan.concurrency is None else str(plan.plan.concurrency)
    return [
        _gpus(found.gpus_per_trial),
        at_once,
        "?" if found.memory is None else f"{found.memory * _processes_per_gpu(found) / 1e9:.0f}",
        "on" if found.trials.gradient_checkpointing else "off",
        f"{found.trials.tokens_per_micro_batch:,}",
        _number(plan.hours),
        _number(plan.gpu_hours),
    ]


def _gpus(number: float) -> str:
    """Format GPUs per trial as 4, or as 1/6 where six trials share one."""
    return str(Fraction(number).limit_denominator(_SMALLEST_PART)) if number < 1 else f"{number:g}"


def _processes_per_gpu(found: Arrangement) -> int:
    return max(1, round(1 / (found.gpus_per_trial * found.trials_per_process))) if found.gpus_per_trial < 1 else 1


def _number(value: float | None) -> str:
    """Format hours or a price with one decimal below 10."""
    return "?" if value is None else f"{value:,.1f}" if value < 10 else f"{value:,.0f}"
