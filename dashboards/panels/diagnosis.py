"""What is wrong or noteworthy, and what to do next."""

from __future__ import annotations

from dashboards.blocks import Findings, Panel, Words
from dashboards.insight import Insight


def panel(seen: Insight) -> Panel | None:
    """The findings, the weightiest first."""
    if not seen.frame.trials:
        return None
    if not seen.findings:
        over = all(case.record.state.finished for case in seen.frame.trials)
        nothing = "No trial completed, so there is nothing to diagnose." if over else "Too early to say."
        what = "No rule found anything to object to." if seen.frame.ranked else nothing
        return Panel("diagnosis", "Diagnosis", "", (Words(what),))
    name = seen.frame.name
    lead = "" if seen.frame.sweeps else f"orchestrate suggest {name} writes a follow-up sweep that acts on it."
    return Panel("diagnosis", "Diagnosis", lead, (Findings(seen.findings),))
