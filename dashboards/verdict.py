"""The diagnosis on a terminal: the weightiest findings, short."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from dashboards.diagnosis.finding import Finding, Level

_STYLE = {Level.SERIOUS: "bold red", Level.WARNING: "yellow", Level.NOTE: "cyan"}
_MOST = 4


def tell_findings(findings: Sequence[Finding], name: str, console: Console, *, most: int = _MOST) -> None:
    """At most `most` findings, each with its next step, and how to act on them."""
    for finding in findings[:most]:
        head = Text(f"{finding.level}: ", style=_STYLE[finding.level]).append(finding.title, style="bold not dim")
        if console.is_terminal:
            console.print(head)
            console.print(Padding(Text(finding.next_step, style="dim"), (0, 0, 0, 2), expand=False))
        else:  # a line is a line
            console.print(head, soft_wrap=True)
            console.print(Text(f"  {finding.next_step}"), soft_wrap=True)
    if len(findings) > most:
        console.print(Text(f"and {len(findings) - most} more in the report", style="dim"))
    if findings:
        console.print(Text(f"A follow-up sweep that acts on this: orchestrate suggest {name}"))
