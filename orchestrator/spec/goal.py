"""What a sweep is ranked by."""

from __future__ import annotations

from typing import Literal

from trainer.frozen import Frozen, Name


class Goal(Frozen):
    """What the sweep is ranked by: a held-out metric that the search does not scale (objective.py refuses others)."""

    metric: Name
    direction: Literal["maximize", "minimize"]
