"""The driver's figures as a table and a picture in docs/performance.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
_SHOWN = 6
"""Rows of the table, spread over the sweep."""


def table(found: dict[str, Any]) -> str:
    """What an event costs while so many trials have finished."""
    rows = found["rows"]
    picked = [rows[round(i * (len(rows) - 1) / (_SHOWN - 1))] for i in range(_SHOWN)]
    lines = [
        "| ended | report, ms | start, ms | end, ms | latency p50 / p99, ms | CPU per event, ms | memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['finished']:,} | {r['report_ms']:.1f} | {r['start_ms']:.0f} | {r['end_ms']:.0f} | "
        f"{r['latency_p50_ms']:.0f} / {r['latency_p99_ms']:.0f} | {r['cpu_ms_per_event']:.1f} | {r['memory_mb']:.0f} |"
        for r in picked
    ]
    return "\n".join(
        [
            f"{found['trials']:,} trials, {found['slots']} slots, a report per second and slot, "
            f"{found['reports_per_trial']} reports a trial, `{found['sampler']}` with a percentile pruner; "
            f"{found['machine']}; {found['measured']}.",
            "",
            *lines,
            "",
            "![What an event costs the driver as trials pile up](performance/driver.svg)",
        ]
    )


def draw(file: Path, found: dict[str, Any]) -> None:
    """Three curves over the number of finished trials."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    rows = found["rows"]
    finished = [row["finished"] for row in rows]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(11, 2.8), layout="constrained")
    left.plot(finished, [row["report_ms"] for row in rows], color=BLUE, label="a report")
    left.plot(finished, [row["cpu_ms_per_event"] for row in rows], color=ORANGE, label="CPU, all threads")
    left.set_title("per event, ms", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    middle.plot(finished, [row["latency_p50_ms"] for row in rows], color=BLUE, label="median")
    middle.plot(finished, [row["latency_p99_ms"] for row in rows], color=ORANGE, label="99 of 100")
    middle.set_title("latency of an event, ms", fontsize=10)
    middle.legend(frameon=False, fontsize=8)
    right.plot(finished, [row["memory_mb"] for row in rows], color=GREEN)
    right.set_title("memory of the driver, MB", fontsize=10)
    for axes in (left, middle, right):
        axes.set_xlabel("trials finished")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
