"""Output of the commands about the runs folder: the table of sweeps, and what cleaning would remove."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from dashboards.formatting import format_about, wide_console
from orchestrator.spec.estimates.disk_space import format_bytes

if TYPE_CHECKING:
    from orchestrator.commands.runs_folder.cache_cleaning import CacheEntry, Cleaning

_HOURS_AS_DAYS = 48
"""Hours. Longer ages are in days."""
_PIPED_WIDTH = 200
"""Characters per line of piped output."""


def print_sweeps(found: Mapping[str, Any]) -> None:
    """Print one row per sweep, the newest first; with its disk where that was measured, and its owner in a service."""
    console = wide_console(_PIPED_WIDTH, highlight=False)
    sweeps: Sequence[Mapping[str, Any]] = found["sweeps"]
    disk = "" if "cache" not in found else _disk_text(found)
    console.print(
        f"sweeps in {found['runs_folder']}: {len(sweeps)}{disk}", markup=False, soft_wrap=not console.is_terminal
    )
    if not sweeps:
        return
    table = Table(box=None, header_style="bold")
    is_queue = any("queue" in sweep for sweep in sweeps)
    owner = ["owner"] if is_queue else []
    for column in ("sweep", "state", *owner, "trials", "best so far", "begun", *(["disk"] if disk else [])):
        table.add_column(column, overflow="fold", justify="right" if column in ("trials", "disk") else "left")
    for sweep in sweeps:
        trials, value = "", sweep["why"]
        if "goal" in sweep:
            best = sweep["best"]
            value = "" if best is None else f"{sweep['goal']['metric']} {_short(best['value'])}, trial {best['trial']}"
            trials = f"{sweep['finished']}/{sweep['planned'] or '?'}"
        size = [format_bytes(sweep["disk"])] if disk else []
        owner = [escape((sweep.get("queue") or {}).get("owner", "–"))] if is_queue else []
        row = (escape(sweep["name"]), sweep["state"], *owner, trials, escape(value), _ago(sweep["began"]), *size)
        table.add_row(*row)
    console.print(table)


def _disk_text(found: Mapping[str, Any]) -> str:
    total = sum(sweep["disk"] for sweep in found["sweeps"])
    return f", {format_bytes(total)}; their cache {format_bytes(found['cache'])} (`orchestrate clean`)"


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _ago(began: float) -> str:
    return f"{format_age(time.time() - began)} ago"


def format_age(seconds: float) -> str:
    """Return an age in days, or less where it is under two days."""
    return f"{round(seconds / 86400)} days" if seconds > _HOURS_AS_DAYS * 3600 else format_about(seconds)


def cleaning_as_json(cleaning: Cleaning, *, is_removed: bool) -> dict[str, Any]:
    """Return a cleaning as printed by `clean --json`; sizes in bytes, times in seconds since 1970."""

    def entries(given: Sequence[CacheEntry]) -> list[dict[str, Any]]:
        return [asdict(entry) | {"path": str(entry.path)} for entry in given]

    return {
        "removed": is_removed,
        "frees": cleaning.frees,
        "unneeded": entries(cleaning.removed),
        "recent": entries(cleaning.recent),
        "needed": entries(cleaning.needed),
    }


def print_cleaning(cleaning: Cleaning, *, is_removed: bool, root: Path, command: str) -> None:
    """Print one row per entry to remove, and counts of what stays with the reason.

    `root`: the runs folder; `command`: the one that removes what is shown.
    """
    console = wide_console(_PIPED_WIDTH, highlight=False)
    if cleaning.removed:
        table = Table(box=None, header_style="bold")
        shown = "removed" if is_removed else "would be removed"
        console.print(f"in {root}", markup=False, soft_wrap=not console.is_terminal)
        for column in (shown, "kind", "size", "last used"):
            table.add_column(column, overflow="fold", justify="right" if column == "size" else "left")
        for entry in cleaning.removed:
            used = _ago(entry.used) if entry.used else "half removed"
            table.add_row(escape(_below(entry.path, root)), entry.kind, format_bytes(entry.bytes), used)
        console.print(table)
    count = f"{len(cleaning.removed)} {'entry' if len(cleaning.removed) == 1 else 'entries'}"
    verb = "freed" if is_removed else f"would be freed; `{command}` removes them"
    lines = [f"{count}, {format_bytes(cleaning.frees)} {verb}" if cleaning.removed else "nothing to remove"]
    if cleaning.recent:
        lines.append(f"stay as they were used lately, or the cache is small enough: {_counted(cleaning.recent)}")
    for reason in sorted({entry.needed_by for entry in cleaning.needed}):
        kept = [entry for entry in cleaning.needed if entry.needed_by == reason]
        lines.append(f"stay as {reason} may need them: {_counted(kept)}")
    for line in lines:
        console.print(line, markup=False, soft_wrap=not console.is_terminal)


def _below(path: Path, root: Path) -> str:
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _counted(entries: Sequence[CacheEntry]) -> str:
    kinds = sorted({entry.kind for entry in entries})
    return f"{len(entries)} of {', '.join(kinds)}, {format_bytes(sum(entry.bytes for entry in entries))}"
