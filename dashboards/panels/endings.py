"""Every trial in a table, and why those that did not complete stopped."""

from __future__ import annotations

from collections import Counter

from dashboards.blocks import Block, Code, Panel, Table, Words
from dashboards.frame import show
from dashboards.insight import Insight
from dashboards.sweep_frame import SweepFrame
from orchestrator.study.state import TrialState

_LONGEST = 300
_TRACEBACKS = 5


def panel(seen: Insight) -> Panel | None:
    """Reasons first, tracebacks on demand, then all trials on demand."""
    frame = seen.frame
    if not frame.trials:
        return None
    stopped = frame.in_state(TrialState.PRUNED, TrialState.FAILED)
    blocks: list[Block] = []
    if stopped:
        rows = tuple(
            (case.label, case.end_word.lower(), frame.words(case), str(case.view.step), _cut(case.record.reason))
            for case in stopped
        )
        many = len(rows) > 12
        if many:
            common = Counter((c.end_word.lower(), _cut(c.record.reason)) for c in stopped).most_common(8)
            rows_by_reason = tuple((str(n), word, reason) for (word, reason), n in common)
            blocks.append(Table(("trials", "ended", "reason"), rows_by_reason, frozenset({0})))
        fold = f"All {len(rows)} trials that stopped early" if many else ""
        head = ("trial", "ended", "configuration", "update", "reason")
        blocks.append(Table(head, rows, frozenset({3}), folded=fold))
    seen_before: set[str] = set()
    for case in stopped:
        if case.failure and case.failure not in seen_before and len(seen_before) < _TRACEBACKS:
            seen_before.add(case.failure)
            blocks.append(Code(f"Trial {case.label}: the end of its traceback", case.failure, folded=True))
    blocks.append(_all(frame))
    lead = f"{len(stopped)} of {len(frame.trials)} trials did not run to their end." if stopped else ""
    if not stopped:
        blocks.insert(0, Words("No trial failed and none was stopped early."))
    return Panel("trials", "What stopped, and why" if stopped else "All trials", lead, blocks)


def _all(frame: SweepFrame) -> Table:
    metrics = (frame.goal.metric, "eval_margins/logp", "eval_logps_per_token/chosen", "eval_loss")
    names = list(dict.fromkeys(m for m in metrics if any(c.last(m) is not None for c in frame.trials)))
    head = ("trial", "ended", *(frame.short.get(p, p) for p in frame.paths), "update", "attempts", *names)
    rows = tuple(
        (
            case.label,
            case.end_word.lower(),
            *(show(case.record.params.get(p)) for p in frame.paths),
            f"{case.view.step}" + (f"/{case.steps}" if case.steps else ""),
            str(case.record.attempts),
            *(show(case.last(name)) for name in names),
        )
        for case in frame.trials
    )
    return Table(head, rows, frozenset(range(2, len(head))), folded=f"All {len(rows)} trials")


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"
