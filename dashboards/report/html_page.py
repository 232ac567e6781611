"""Render panels into one self-contained HTML file without network access. The template escapes every text."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import re
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dashboards.diagnosis.diagnose import SweepAnalysis
from dashboards.report.blocks import Chart, Charts, Panel
from dashboards.report.figures import ON_DARK, as_script
from dashboards.report.panels import PANELS
from orchestrator.errors import StorageRefused
from trainer.storage.atomic_files import write_text

TEMPLATES = Path(__file__).parent / "templates"
_AFTER_SEPARATOR = re.compile(r"(?<=[_/])(?![_/])")
_POLICY = re.compile(r'http-equiv="Content-Security-Policy" content="([^"]*)"')
_BRACKETS = re.compile(r"(\([^()]*\))")


def draw_panels(analysis: SweepAnalysis) -> list[Panel]:
    """Return the panels that have content for this sweep."""
    return [panel for draw in PANELS if (panel := draw(analysis)) is not None]


def report_page(analysis: SweepAnalysis, panels: Sequence[Panel] | None = None) -> str:
    """Return the report of one sweep as HTML. `panels`: the result of `draw_panels` if already computed."""
    frame = analysis.frame
    drawn_panels = draw_panels(analysis) if panels is None else panels
    return render_page(
        drawn_panels, kind="sweep", title=frame.name, description=frame.description, state=frame.state, at=frame.at
    )


def render_page(panels: Sequence[Panel], *, kind: str, title: str, description: str, state: str, at: float) -> str:
    """Return an HTML page with these panels. `at`: time of the data in epoch seconds."""
    charts: list[Chart] = [
        chart for panel in panels for block in panel.blocks if isinstance(block, Charts) for chart in block.charts
    ]
    positions = {id(chart): position for position, chart in enumerate(charts)}
    script = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("charts.js", "page.js"))
    code, packed = plotly_js() if charts else ("", "")
    return (
        template_environment(TEMPLATES)
        .get_template("page.html.j2")
        .render(
            kind=kind,
            title=title,
            description=description,
            state=state,
            when=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at)),
            panels=panels,
            chart_index=lambda chart: positions[id(chart)],  # pyright: ignore[reportUnknownLambdaType]
            style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
            script=Markup(script),
            figures=Markup(as_script([chart.figure for chart in charts])),
            dark=Markup(as_script(ON_DARK)),
            plotly=Markup(packed),
            policy=content_security_policy([script, code]),
        )
    )


def template_environment(*folders: Path) -> Environment:
    """Return an environment with the templates of these folders; it escapes every text."""
    environment = Environment(
        loader=FileSystemLoader(folders), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"breakable": breakable, "breakable_cell": breakable_cell}
    return environment


def breakable(name: str) -> Markup:
    """Return a heading as HTML that breaks at spaces and after `_` and `/` only."""
    words = [_AFTER_SEPARATOR.split(word) for word in name.split(" ")]
    return Markup(" ").join(
        Markup("<wbr>").join(Markup("<span>{}</span>").format(part) for part in parts if part) for parts in words
    )


def breakable_cell(cell: str) -> Markup:
    """Return a cell of a numeric column as HTML that breaks before a bracket rather than within it."""
    parts = _BRACKETS.split(cell.replace("≈ ", "≈\u00a0"))
    return Markup("").join(
        Markup('<span class="bracket">{}</span>').format(part) if k % 2 else breakable(part)
        for k, part in enumerate(parts)
        if part
    )


def content_security_policy(scripts: Sequence[str]) -> str:
    """Return a Content-Security-Policy that allows exactly these scripts and no network access."""
    digests = " ".join(f"'sha256-{_digest(script)}'" for script in scripts if script)
    return f"default-src 'none'; script-src {digests}; style-src 'unsafe-inline'; img-src data: blob:"


def page_policy(page: str) -> str:
    """Return the Content-Security-Policy that a page of `render_page` has in its head, for a server's header.

    The page gets an origin of its own, so that its scripts have no rights at the server.
    """
    found = _POLICY.search(page)
    assert found is not None
    return f"{html.unescape(found[1])}; sandbox allow-scripts allow-popups allow-downloads"


@cache
def plotly_js() -> tuple[str, str]:
    """Return plotly.js of the installed plotly, and the same gzipped and base64-encoded for the page."""
    from plotly.offline import get_plotlyjs

    code: str = get_plotlyjs()
    return code, base64.b64encode(gzip.compress(code.encode(), compresslevel=9, mtime=0)).decode()


def write_report(analysis: SweepAnalysis, to: Path, panels: Sequence[Panel] | None = None) -> Path:
    """Write the report atomically.

    Raises:
        StorageRefused: the file cannot be written.
    """
    return write_page(to, report_page(analysis, panels))


def write_figures(analysis: SweepAnalysis, to: Path, panels: Sequence[Panel] | None = None) -> Path:
    """Write each panel with charts as a separate page into this folder, for viewers of single artifacts (MLflow)."""
    frame = analysis.frame
    to.mkdir(parents=True, exist_ok=True)
    for panel in draw_panels(analysis) if panels is None else panels:
        if any(isinstance(block, Charts) for block in panel.blocks):
            title = f"{frame.name}: {panel.title}"
            text = render_page([panel], kind="sweep", title=title, description="", state=frame.state, at=frame.at)
            write_page(to / f"{panel.key}.html", text)
    return to


def write_page(to: Path, text: str) -> Path:
    """Write a page atomically.

    Raises:
        StorageRefused: the file cannot be written.
    """
    try:
        write_text(to, text)
    except OSError as error:
        raise StorageRefused(f"{to} cannot be written: {error}") from error
    return to


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
