"""Shared parts of all figures: color-blind-safe palette, text escaping, number rounding, conversion to plotly JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from dashboards.analysis.sweep_frame import TrialFrame

BLUE, VERMILION, GREEN, PINK, GOLD, GREY = "#0072b2", "#d55e00", "#008c66", "#b5548a", "#a07400", "#7d8590"
"""Palette of Okabe and Ito, darkened for contrast on white."""
PAPER = "#fefefe"
"""Background of labels that lie on lines."""
ON_DARK = {
    BLUE: "#56b4e9",
    VERMILION: "#ff8a4c",
    GREEN: "#3fcf9f",
    PINK: "#e79cc6",
    GOLD: "#e5c04f",
    GREY: "#9aa3ad",
    PAPER: "#191d23",
}
"""Light color -> its replacement on a dark page; replaced by charts.js."""
FAINT_COLOR = "rgba(128,134,144,0.45)"
RANK_COLORS = (BLUE, VERMILION, GREEN, PINK, GOLD)
"""Colors of the best trials, in order of rank."""
STATE_MARKERS = {
    "COMPLETE": (GREEN, "circle"),
    "PRUNED": (GOLD, "triangle-down"),
    "DIVERGED": (PINK, "x"),
    "FAILED": (VERMILION, "square"),
    "RUNNING": (BLUE, "diamond"),
}
"""Trial state -> color and marker shape, so that the state is readable without color."""
OTHER_MARKER = (GREY, "circle-open")
COLOR_SCALE = ("#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39")
"""Viridis without its darkest and brightest ends, for contrast on white and on black."""
_DIGITS = 4
"""Significant digits of numbers in figures."""


def figure(traces: Sequence[Any], **layout: Any) -> dict[str, Any]:
    """Return traces and layout as plotly JSON, validated by plotly; charts.js adds fonts, grids and theme colors.

    `traces`: of plotly, or JSON of them with longer lists, which plotly would check number by number.
    """
    # Not go.Figure, which copies and validates every trace again.
    made = go.Layout({"showlegend": False, "margin": CHART_MARGINS, **layout}).to_plotly_json()
    return {"data": _plain([_json_of(trace) for trace in traces]), "layout": _plain(made)}


def _json_of(trace: Any) -> Any:
    return trace if isinstance(trace, dict) else trace.to_plotly_json()


CHART_MARGINS = {"l": 52, "r": 14, "t": 10, "b": 42}


def _plain(value: Any) -> Any:
    """Convert to JSON types without NaN, floats rounded to _DIGITS significant digits."""
    match value:
        case bool() | int() | str() | None:
            return value
        case float():
            return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
        case dict():
            return {key: _plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_plain(inner) for inner in value]
        case _:
            return _plain(value.item() if hasattr(value, "item") else list(value))


def as_script(value: Any) -> str:
    """Return JSON for a script element, escaped so that no text can close the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def escape_text(text: object) -> str:
    """Escape a text of the user for a figure: plotly interprets some HTML tags in labels."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def state_marker(trial: TrialFrame) -> tuple[str, str]:
    """Return color and marker shape of the trial's state."""
    return STATE_MARKERS.get(trial.state_label, OTHER_MARKER)


def scale_color(share: float) -> tuple[int, int, int]:
    """Return the interpolated RGB color (0 to 255) of COLOR_SCALE at `share` in [0, 1]."""
    position = max(0.0, min(1.0, share)) * (len(COLOR_SCALE) - 1)
    low = min(int(position), len(COLOR_SCALE) - 2)
    a, b = (tuple(int(c[k : k + 2], 16) for k in (1, 3, 5)) for c in COLOR_SCALE[low : low + 2])
    rest = position - low
    red, green, blue = (round(x + (y - x) * rest) for x, y in zip(a, b, strict=True))
    return red, green, blue


def text_color_on(rgb: tuple[int, int, int]) -> str:
    """Return black or white, the one with more contrast on this color (WCAG 2.x relative luminance)."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def downsample(curve: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """Return at most `most` points at even index distances, including the first and the last."""
    if len(curve) <= most:
        return list(curve)
    last = len(curve) - 1
    return [curve[k] for k in sorted({round(i * last / (most - 1)) for i in range(most)})]


def color_scale(sign: float) -> list[list[float | str]]:
    """Return COLOR_SCALE for plotly with the bright end at better values; `sign`: SweepFrame.sign."""
    stops = COLOR_SCALE if sign > 0 else COLOR_SCALE[::-1]
    return [[k / (len(stops) - 1), color] for k, color in enumerate(stops)]
