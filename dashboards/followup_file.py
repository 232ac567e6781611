"""A follow-up sweep as a file: each searched leaf under a comment that says why."""

from __future__ import annotations

import re
from textwrap import wrap

from dashboards.followup import FollowUp
from orchestrator.spec.dump import dump

_COLUMNS = 110


def as_yaml(made: FollowUp) -> str:
    """The sweep's file, each searched leaf under a comment that says why."""
    head = [f"# {line}" for text in made.head for line in wrap(text, _COLUMNS)]
    body: list[str] = []
    inside = False
    for line in dump(made.spec, brief=True).splitlines():
        inside = line == "search:" or (inside and line.startswith("  "))
        path = line.strip().split(":")[0] if inside and re.match(r"  \S", line) else ""
        body += [f"  # {part}" for part in wrap(made.why.get(path, ""), _COLUMNS)] if path else []
        body.append(line)
    return "\n".join([*head, *body]) + "\n"
