"""A sweep on the terminal: a live table where there is one, plain lines where output is piped."""

from __future__ import annotations

from rich.console import Console

from dashboards.lines import PlainView
from dashboards.live import LiveView
from orchestrator.engine.view import StepsOf
from orchestrator.spec.sweep import SweepSpec

_PIPED = 160


def wide_console() -> Console:
    """Standard output; piped, no line is broken to fit a terminal that is not there."""
    console = Console()
    return console if console.is_terminal else Console(width=_PIPED)


def open_view(
    spec: SweepSpec, console: Console, *, total: int | None = None, steps: StepsOf | None = None, before: float = 0.0
) -> LiveView | PlainView:
    """The view that fits where the output goes. `before`: seconds that the sweep had run when it is opened."""
    kind = LiveView if console.is_terminal and not console.is_dumb_terminal else PlainView
    return kind(spec, console, total=total, steps=steps, before=before)
