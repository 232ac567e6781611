"""Panel of the finalists: the search's value of each configuration beside its value on rows the search has not seen."""

from __future__ import annotations

from statistics import fmean

from dashboards.analysis.sweep_frame import SweepFrame, TrialFrame
from dashboards.diagnosis.diagnose import SweepAnalysis
from dashboards.formatting import format_brief, format_measured, format_signed
from dashboards.report.blocks import Block, KeyFigure, Panel, Paragraph, Table
from orchestrator.study.confirmation import ConfirmedValue, Interval


def finalists_panel(analysis: SweepAnalysis) -> Panel | None:
    """Return the finalists with their intervals and which one is recommended; None in a sweep without."""
    frame = analysis.frame
    if not frame.finalists:
        return None
    blocks: list[Block] = []
    if frame.confirmation is not None:
        blocks.append(Paragraph(f"{_capital(frame.confirmation.text)}", strong=True))
    elif frame.state == "finished":
        blocks.append(Paragraph("The finalists could not be compared: none has two complete seeds.", strong=True))
    else:
        blocks.append(Paragraph("The finalists have not been compared yet: some of their trials are to come."))
    if curse := _selection_text(frame):
        blocks.append(Paragraph(curse))
    blocks.append(_table(frame))
    share = frame.spec.base.data.confirm_share or 0.0
    lead = (
        f"The best configurations of the search, trained again with fresh seeds and evaluated on {share:.0%} of the "
        "held-out prompts, which the search has not seen. All other panels show the search."
    )
    return Panel("finalists", "Finalists", lead, blocks)


def confirmed_figures(frame: SweepFrame) -> list[KeyFigure]:
    """Return the recommended configuration's mean and its gain over the initial model; empty before they are known."""
    found = frame.confirmation
    if found is None:
        return []
    mean = next(value.mean for value in found.values if value.of == found.recommended)
    interval = f"95 % interval {format_brief(mean.low)} … {format_brief(mean.high)}"
    figures = [KeyFigure("confirmed by finalists", format_brief(mean.value), interval)]
    if (gain := found.gain) is not None:
        interval = f"95 % interval {format_signed(gain.low)} … {format_signed(gain.high)}"
        figures.append(KeyFigure("better than the initial model by", format_signed(gain.value), interval))
    return figures


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _selection_text(frame: SweepFrame) -> str:
    """Return by how much the search's values of the finalists are better than their confirmed ones."""
    gaps = [
        frame.sign * (before - after)
        for trial in frame.finalists
        if (before := _search_value(frame, trial)) is not None and (after := trial.record.value) is not None
    ]
    if not gaps:
        return ""
    return (
        f"On average the search's value is {format_signed(fmean(gaps))} better than the confirmed one: being chosen as "
        "the best favors values that were lucky, on these rows and with this seed. Other rows may be easier or harder "
        "for all."
    )


def _search_value(frame: SweepFrame, trial: TrialFrame) -> float | None:
    of = trial.record.finalist_of
    found = None if of is None else frame.in_search(of)
    return None if found is None else found.record.value


def _table(frame: SweepFrame) -> Table:
    """Return one row a finalist, the best mean first, the recommended one marked."""
    found = frame.confirmation
    by_of: dict[int | None, ConfirmedValue] = {} if found is None else {value.of: value for value in found.values}
    place = {value.of: k for k, value in enumerate(() if found is None else found.values)}
    trials = sorted(frame.finalists, key=lambda trial: place.get(trial.record.finalist_of or 0, len(place)))
    before, after = (format_measured(values) for values in ([_search_value(frame, t) for t in trials], _means(trials)))
    rows = tuple(
        (
            f"{trial.record.finalist_of}",
            trial.label,
            frame.describe_params(trial) or "the only configuration",
            before[k],
            after[k],
            _interval_text(value.mean) if value else "–",
            "–" if value is None or value.gain is None else _signed_text(value.gain),
            "–" if value is None or value.behind is None else _signed_text(value.behind),
            f"{trial.record.complete_seeds} of {len(trial.record.seeds)}",
            _remark(frame, trial),
        )
        for k, trial in enumerate(trials)
        for value in (by_of.get(trial.record.finalist_of),)
    )
    marked = frozenset(k for k, trial in enumerate(trials) if trial.record.is_recommended)
    metric = frame.objective.metric
    head = ("trial of the search", "trials", "configuration", f"{metric} in the search", f"{metric} confirmed")
    head = (*head, "95 % interval", "better than the initial model by", "behind the best mean", "seeds", "")
    return Table(head, rows, frozenset({3, 4, 5, 6, 7, 8}), marked)


def _means(trials: list[TrialFrame]) -> list[float | None]:
    return [trial.record.value for trial in trials]


def _interval_text(interval: Interval) -> str:
    low, high = format_measured([interval.low, interval.high])
    return f"{low} … {high}"


def _signed_text(found: Interval) -> str:
    return f"{format_signed(found.value)} ({format_signed(found.low)} … {format_signed(found.high)})"


def _remark(frame: SweepFrame, trial: TrialFrame) -> str:
    if trial.record.breaks:
        return f"breaks: {'; '.join(trial.record.breaks)}"
    words = ["recommended"] if trial.record.is_recommended else []
    if frame.confirmation is not None and len(frame.confirmation.tied) > 1:
        words += ["tied"] if trial.record.finalist_of in frame.confirmation.tied else []
    return ", ".join(words)
