"""Sparklines, progress bars and durations as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 12) -> str:
    """Draw values as a sparkline of at most `width` characters; non-finite values are shown as `!`."""
    if not values:
        return ""
    picked = _downsample(values, width)
    finite = [v for v in picked if math.isfinite(v)]
    if not finite:
        return "!" * len(picked)
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0
    level = len(_BARS) - 1
    return "".join(_BARS[round((v - low) / span * level)] if math.isfinite(v) else "!" for v in picked)


def _downsample(values: Sequence[float], width: int) -> list[float]:
    if len(values) <= width:
        return list(values)
    last = len(values) - 1
    return [values[round(i * last / (width - 1))] for i in range(width)]


def progress_bar(share: float, width: int) -> str:
    """Draw a progress bar of `width` characters; `share` in [0, 1]."""
    filled = round(max(0.0, min(1.0, share)) * width)
    return "━" * filled + "─" * (width - filled)


def format_duration(seconds: float | None) -> str:
    """Format seconds as 42 s, 3 min 10 s or 2 h 05 min; "–" for None."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    total = max(0, round(seconds))
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"
