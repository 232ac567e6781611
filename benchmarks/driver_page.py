"""The driver's figures as tables and a picture in docs/performance.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
_SHOWN = 6
"""Rows of the table, spread over the sweep."""


def table(found: dict[str, Any]) -> str:
    """Return the table of event costs by number of finished trials."""
    rows = found["rows"]
    picked = [rows[round(i * (len(rows) - 1) / (_SHOWN - 1))] for i in range(_SHOWN)]
    lines = [
        "| ended | report, ms | start, ms | end, ms | latency p50 / p99, ms | cores, MLflow's | behind | MB | load |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['finished']:,} | {_both(r, 'report')} | {_both(r, 'start')} | {_both(r, 'end')} | "
        f"{r['latency_p50_ms']:.0f} / {r['latency_p99_ms']:.0f} | {r['cores']:.2f}, {r['delivery_cores']:.2f} | "
        f"{r['pending']:,} | {r['memory_mb']:.0f} | {r['load']:.0f} |"
        for r in picked
    ]
    return "\n".join(
        [
            f"{found['trials']:,} trials ({found['pruned']} pruned), {found['slots']} slots, a report per second and "
            f"slot, {found['reports_per_trial']} reports a trial, `{found['sampler']}` with a percentile pruner; "
            f"{found['machine']}; {found['measured']}. Report, start and end: the driver's processor time, then "
            "the time it took by the clock (medians). `cores`: processor time of the whole process by the clock's, and "
            "what of it is delivery to MLflow. `behind`: messages on their way to MLflow. `load`: of the machine, "
            "everybody's.",
            "",
            *lines,
            "",
            f"All in {found['seconds']:.0f} s; then {found['pending_at_end']:,} messages were behind, and "
            f"{found['catching_up']:.0f} s later none.",
            "",
            "![What an event costs the driver as trials pile up](performance/driver.svg)",
        ]
    )


def _both(row: dict[str, Any], kind: str) -> str:
    digits = 1 if kind == "report" else 0
    cpu, wall = row.get(f"{kind}_cpu_ms"), row[f"{kind}_ms"]
    return "none" if cpu is None else f"{cpu:.{digits}f}, {wall:.{digits}f}"


def ray_table(found: dict[str, Any]) -> str:
    """Return the table of Ray Tune alone and with this product."""
    lines = [
        "| | slots | reports a second | processor time per report, ms | cores | latency p50 / p99, ms | load |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['way']} | {r['slots']} | {r['reports_per_second']:.0f} | {r['cpu_ms_per_report']:.1f} | "
        f"{r['cores']:.2f} | {r['latency_p50_ms']:.0f} / {r['latency_p99_ms']:.0f} | {r['load']:.0f} |"
        for r in found["rows"]
    ]
    return "\n".join([f"{found['trials']} trials; {found['machine']}; {found['measured']}.", "", *lines])


def draw(file: Path, found: dict[str, Any]) -> None:
    """Draw curves over the number of finished trials."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    rows = found["rows"]
    finished = [row["finished"] for row in rows]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(11, 2.8), layout="constrained")
    for kind, color in (("report", BLUE), ("start", ORANGE), ("end", GREEN)):
        shown = [(row["finished"], row[f"{kind}_cpu_ms"]) for row in rows if f"{kind}_cpu_ms" in row]
        left.plot(*zip(*shown, strict=True), color=color, label=kind)
    left.set_title("processor time of the driver per event, ms", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    middle.plot(finished, [row["cores"] for row in rows], color=BLUE, label="all")
    middle.plot(finished, [row["delivery_cores"] for row in rows], color=ORANGE, label="delivery to MLflow")
    middle.set_title("cores", fontsize=10)
    middle.legend(frameon=False, fontsize=8)
    right.plot(finished, [row["memory_mb"] for row in rows], color=GREEN)
    right.set_title("memory of the driver, MB", fontsize=10)
    for axes in (left, middle, right):
        axes.set_xlabel("trials finished")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
