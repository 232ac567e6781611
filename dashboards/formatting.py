"""Values, settings, durations, sparklines and progress bars as text; consoles of a width that breaks no line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from orchestrator.spec.objectives import Objective

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


def format_hours(seconds: float) -> str:
    """Format seconds as hours with one or two decimals."""
    hours = seconds / 3600
    return f"{hours:.2f}" if hours < 10 else f"{hours:,.1f}"


def format_count(count: float) -> str:
    """Format a count as 1.2 M, 350 k or 42."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def format_counts(found: Mapping[str, int]) -> str:
    """Format as `9 complete, 1 pruned`."""
    return ", ".join(f"{count} {word}" for word, count in found.items())


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Return the shortest unique suffix of each path: loss.beta -> beta."""
    out: dict[str, str] = {}
    for path in paths:
        parts = path.split(".")
        for k in range(1, len(parts) + 1):
            tail = ".".join(parts[-k:])
            if sum(p == tail or p.endswith("." + tail) for p in paths) == 1:
                out[path] = tail
                break
        else:
            out[path] = path
    return out


def format_value(value: Any) -> str:
    """Format a hyperparameter or metric with four significant digits: 6e-07, 0.7312, sigmoid."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


_LONGEST_FIXED = 8
"""Characters of a number without exponent in a column of settings."""


def format_settings(values: Sequence[Any]) -> list[str]:
    """Format a column of settings exactly (four significant digits) and alike: all with an exponent, or none."""
    numbers = [v for v in values if isinstance(v, float) and math.isfinite(v)]
    if not numbers or any(isinstance(v, str) for v in values):
        return [format_value(v) for v in values]
    numbers += [float(v) for v in values if isinstance(v, int) and not isinstance(v, bool)]
    fixed = max((_needed_decimals(f"{v:.3e}") for v in numbers), default=0)
    longest = max(len(f"{abs(v):.{fixed}f}") for v in numbers)
    if longest <= _LONGEST_FIXED and not any(v and abs(v) < 1e-3 for v in numbers):
        return [f"{v:.{fixed}f}" if _is_number(v) else format_value(v) for v in values]
    digits = max(len(f"{v:.3e}".split("e")[0].rstrip("0").rstrip(".").lstrip("-")) for v in numbers)
    return [_with_exponent(float(v), max(0, digits - 2)) if _is_number(v) else format_value(v) for v in values]


def format_measured(values: Sequence[Any], digits: int = 4, *, signed: bool = False) -> list[str]:
    """Format a column of measured values alike, with as many decimals as the largest one has in `digits` digits.

    All have exponents where the largest is below 0.001 or at least 100 000. `signed`: with a plus above 0, for changes.
    """
    if signed:
        return [
            f"+{text}" if _is_number(v) and v > 0 else text
            for v, text in zip(values, format_measured(values, digits), strict=True)
        ]
    numbers = [abs(v) for v in values if v is not None and math.isfinite(v)]
    largest = max(numbers, default=0.0)
    if not largest or any(v is not None and not isinstance(v, (int, float)) for v in values):
        return [format_value(v) for v in values]
    exponent = math.floor(math.log10(largest))
    if largest < 1e-3 or largest >= 1e5:
        return [_with_exponent(v, digits - 1) if _is_number(v) else format_value(v) for v in values]
    decimals = max(0, digits - 1 - exponent)
    texts = [f"{v:.{decimals}f}" for v in numbers]
    decimals = max(len(text.rstrip("0").partition(".")[2]) for text in texts)
    return [f"{v:.{decimals}f}" if _is_number(v) else format_value(v) for v in values]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _needed_decimals(text: str) -> int:
    """Return the decimals that a number like `6.250e-01` needs without exponent."""
    mantissa, exponent = text.split("e")
    return max(0, len(mantissa.rstrip("0").partition(".")[2]) - int(exponent))


def _with_exponent(value: float, decimals: int) -> str:
    mantissa, exponent = f"{value:.{decimals}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def format_about(seconds: float) -> str:
    """Format an estimated duration, no more exactly than it is known: 40 s, 5 min, 2 h 10 min."""
    step = 10 if seconds < 60 else 60 if seconds < 3600 else 600
    rounded = max(step, round(seconds / step) * step)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min"
    return f"{rounded // 3600} h" + (f" {rounded % 3600 // 60} min" if rounded % 3600 else "")


def format_brief(value: float | None) -> str:
    """Format a measured value with three significant digits; "–" for None."""
    return "–" if value is None else format_value(float(f"{value:.3g}"))


def format_signed(value: float) -> str:
    """Format a change with its sign and two significant digits."""
    return ("+" if value > 0 else "") + format_value(float(f"{value:.2g}"))


def format_half_widths(intervals: Sequence[tuple[float, float] | None]) -> list[str]:
    """Format a column of means' intervals alike as ` ± 0.012`; "" for None."""
    halves = [None if each is None else (each[1] - each[0]) / 2 for each in intervals]
    return ["" if v is None else f" ± {text}" for v, text in zip(halves, format_measured(halves, 3), strict=True)]


def format_intervals(found: Sequence[tuple[float, float, float] | None], digits: int = 3) -> list[str]:
    """Format a column of differences with their intervals alike, as `0.012 (+0.001 … +0.023)`; "–" for None.

    Args:
        found: Value, lower and upper end of each row.
        digits: Digits of the largest number.
    """
    numbers = [number for each in found if each is not None for number in each]
    plain, signed = iter(format_measured(numbers, digits)), iter(format_measured(numbers, digits, signed=True))
    out: list[str] = []
    for each in found:
        if each is None:
            out.append("–")
            continue
        value, low, high = [(next(plain), next(signed)) for _ in each]
        out.append(f"{value[0]} ({low[1]} … {high[1]})")
    return out


def format_changes(values: Sequence[float | None], changes: Sequence[float | None]) -> list[str]:
    """Format a column of values with their changes alike, as `0.54 (+0.04)`; without a known change the value alone."""
    texts, changed = format_measured(values, 3), format_measured(changes, 3, signed=True)
    return [
        text if change is None else f"{text} ({shown})"
        for text, change, shown in zip(texts, changes, changed, strict=True)
    ]


def format_params(params: Mapping[str, Any], paths: Sequence[str]) -> str:
    """Format as `beta=2 gamma=0.5 learning_rate=6e-7`, only the settings that this trial has."""
    short = short_names(paths)
    return " ".join(f"{short[p]}={format_value(params[p])}" for p in paths if p in params)


def tie_text(best: str, tied: Sequence[str]) -> str:
    """Return the sentence about trials with the same value as the best one."""
    trials = f"trial {tied[0]} has" if len(tied) == 1 else f"trials {', '.join(tied)} have"
    return f"A tie: {trials} the same value as trial {best}, which began first."


_PIPED_WIDTH = 160


def wide_console(piped_width: int = _PIPED_WIDTH, *, highlight: bool = True) -> Console:
    """Return a console on standard output; piped output has `piped_width` columns, so that lines are not wrapped."""
    console = Console(highlight=highlight)
    return console if console.is_terminal else Console(highlight=highlight, width=piped_width)


def table_width(table: Table) -> Measurement:
    """Measure the columns that a table needs, whatever the terminal's width."""
    console = Console(width=1000, height=100)  # rich ignores width alone on a dumb terminal
    return Measurement.get(console, console.options, table)


def objectives_text(objectives: Iterable[Objective]) -> str:
    """Return the objectives by direction: "maximize a, b, minimize c"."""
    by_direction = groupby(objectives, lambda each: each.direction)
    return ", ".join(f"{direction} {', '.join(each.metric for each in of)}" for direction, of in by_direction)
