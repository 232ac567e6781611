"""Write measured figures into docs/performance.md: JSON in docs/performance/, with a table and a picture."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import driver_page

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "performance.md"
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"


def write(name: str, found: dict[str, Any]) -> None:
    """Store the figures and update the page."""
    folder = DOCS / "performance"
    folder.mkdir(exist_ok=True)
    stamped = {"measured": datetime.now(UTC).strftime("%Y-%m-%d"), "machine": machine(), **found}
    (folder / f"{name}.json").write_text(json.dumps(stamped, indent=1) + "\n")
    if name.startswith("three_ways"):
        draw_three_ways(folder / f"{name}.svg", stamped)
    if name == "driver":
        driver_page.draw(folder / f"{name}.svg", stamped)
    put(name, table(name, stamped))


def machine() -> str:
    """Return a description of the CPU, without the name of the machine."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return f"{len(names) or '?'} x {names[0] if names else platform.processor()}"


def put(name: str, text: str) -> None:
    """Replace the text between the markers of this name in the page."""
    page = PAGE.read_text()
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    if opening not in page:
        raise ValueError(f"docs/performance.md has no markers for {name}")
    before, rest = page.split(opening, 1)
    PAGE.write_text(f"{before}{opening}\n{text}\n{closing}{rest.split(closing, 1)[1]}")


def put_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two markers of a page."""
    content = page.read_text(encoding="utf-8")
    before, rest = content.split(begin, 1)
    after = rest.split(end, 1)[1]
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def table(name: str, found: dict[str, Any]) -> str:
    """Return a Markdown table of one benchmark's figures."""
    if name.startswith("three_ways"):
        return three_ways(name, found)
    return {
        "steps": steps,
        "threads": threads,
        "adapters": adapters,
        "gpu": gpu,
        "driver": driver_page.table,
        "driver_ray": driver_page.ray_table,
        "service": service,
    }[name](found)


def three_ways(name: str, found: dict[str, Any]) -> str:
    """Return seconds and ratios of a grid run in three ways."""
    seconds = found["seconds"]
    rows = [
        "| | seconds | times faster |",
        "|---|---|---|",
        *(f"| {way} | {took:.0f} | {took / seconds['orchestrate']:.2f} |" for way, took in seconds.items()),
    ]
    split = [
        f"- {way}: " + ", ".join(f"{part} {took:.0f}" for part, took in parts.items())
        for way, parts in found["parts"].items()
    ]
    return "\n".join(
        [
            f"{found['method']}, {found['trials']} trials of {found['updates']} updates of 8 pairs, vocabulary "
            f"{found['vocabulary']}, {found['data']} rows; {found['machine']}; {found['measured']}.",
            "",
            *rows,
            "",
            f"First-step gradients differ by {found['first-step gradients differ by']:.1e}, final metrics by "
            f"{found['final metrics differ by']:.1e}. Where the seconds went (summed over trials or slots):",
            "",
            *split,
            "",
            f"![Seconds of the three ways](performance/{name}.svg)",
        ]
    )


def steps(found: dict[str, Any]) -> str:
    """Return figures of one optimizer step of this product and of TRL."""
    rows = ["| loss | vocabulary | threads | TRL, ms | ours, ms | median of ratios |", "|---|---|---|---|---|---|"]
    rows += [
        f"| {r['loss']} | {r['vocabulary']} | {r['threads']} | {r['trl']:.0f} | {r['ours']:.0f} | {r['ratio']:.2f} |"
        for r in found["rows"]
    ]
    return "\n".join([f"{found['machine']}; {found['measured']}.", "", *rows])


def threads(found: dict[str, Any]) -> str:
    """Return figures of parallel processes and threads."""
    rows = ["| processes | threads of each | ms per trial's step |", "|---|---|---|"]
    rows += [f"| {r['processes']} | {r['threads']} | {r['ms']:.0f} |" for r in found["rows"]]
    return "\n".join([f"{found['machine']}; {found['measured']}.", "", *rows])


def adapters(found: dict[str, Any]) -> str:
    """Return figures of adapter trials in three arrangements."""
    rows = ["| pairs per update | trials | | ms of CPU | ms wall-clock | MB |", "|---|---|---|---|---|---|"]
    rows += [
        f"| {r['pairs']} | {r['trials']} | {r['how']} | {r['cpu_ms']:.0f} | {r['ms']:.0f} | {r['mb']:.0f} |"
        for r in found["rows"]
    ]
    return "\n".join([f"{found['machine']}; {found['measured']}.", "", *rows])


def gpu(found: dict[str, Any]) -> str:
    """Return figures of updates on one GPU."""
    rows = [
        "| model | case | loss | | checkpointing | kernels | micro-batch | ms | pairs/s | GiB | of the peak | body |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found["rows"]:
        what = [r["size"], r["case"], r["loss"], r["contestant"], r.get("checkpointing", ""), r["kernels"]]
        if "failed" in r:
            figures = [r["failed"], *[""] * 5]
        else:
            shares = ["" if r.get(name) is None else f"{100 * r[name]:.0f} %" for name in ("share", "body_share")]
            memory = "" if r["peak_gib"] is None else f"{r['peak_gib']:.1f}"
            figures = [
                str(r["micro_batch"]),
                f"{1e3 * r['seconds']:.0f}",
                f"{r['pairs_per_second']:.1f}",
                memory,
                *shares,
            ]
        rows.append(f"| {' | '.join([*what, *figures])} |")
    return "\n".join([f"{found['gpu']}, updates of {found['pairs']} pairs; {found['measured']}.", "", *rows])


def service(found: dict[str, Any]) -> str:
    """Return figures of the service while people watch a sweep."""

    def row(what: str, times: dict[str, float], digits: int = 0) -> str:
        return f"| {what} | {' | '.join(f'{times[key]:,.{digits}f}' for key in ('median', 'p95', 'max'))} |"

    curves = found["seconds_between_changes_of_curves"]
    reports = [
        row(f"report, {when}: {what}", found[key][kind], 1)
        for key, when in (("report_alone", "without viewers"), ("report_watched", "with viewers"))
        for kind, what in (("wall", "by the clock"), ("cpu", "of the driver's processor"))
    ]
    return "\n".join(
        [
            f"{found['viewers']} viewers of a sweep of {found['slots']} slots, a report per second and slot, beside "
            f"{found['sweeps']:,} finished sweeps of {found['trials_of_a_sweep']} trials, {found['seconds']:.0f} s; "
            f"{found['machine']}, with the driver and the viewers on it; {found['measured']}.",
            "",
            "| ms | median | 95 % | max |",
            "|---|---|---|---|",
            row("from a report to a viewer", found["event"]),
            *(row(what, times) for what, times in found["pages"].items()),
            row("changed panels of the running sweep", found["panels"]),
            *reports,
            "",
            f"Of {found['reports']:,} reports {found['lost']} were lost on their way to one of the viewers and "
            f"{found['doubled']} came twice. A viewer's curves grew every {curves['median']:.1f} s (95 %: "
            f"{curves['p95']:.1f}). The service used {found['cores']:.2f} of a core and {found['mb']:,} MB "
            f"({found['mb_without_viewers']:,} before the viewers came), listened after "
            f"{found['seconds_until_it_listens']:.1f} s, and had read the {found['sweeps']:,} sweeps for its first "
            f"list after {found['seconds_of_the_first_list']:.1f} s.",
        ]
    )


def draw_three_ways(file: Path, found: dict[str, Any]) -> None:
    """Draw seconds as bars, and the ends of this product's trials over time: a fixed part, then a straight line."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 2.6), layout="constrained")
    names = list(found["seconds"])[::-1]
    colors = [BLUE if name == "orchestrate" else GREY for name in names]
    bars = left.barh(names, [found["seconds"][name] for name in names], color=colors)
    left.bar_label(bars, fmt="%.0f s", padding=3)
    left.set_title(f"{found['method']}: {found['trials']} trials", fontsize=10)
    left.spines[["top", "right", "bottom"]].set_visible(False)
    left.set_xticks([])
    left.margins(x=0.15)
    right.plot(sorted(found["ended"]), range(1, len(found["ended"]) + 1), "o-", color=ORANGE)
    right.set_xlim(left=0)
    right.set_ylim(bottom=0)
    right.set_xlabel("seconds since the command")
    right.set_ylabel("trials ended")
    right.set_title("orchestrate: the fixed part is paid once", fontsize=10)
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
