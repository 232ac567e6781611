"""Where everything lies in a mirror: <sweep>/{sweep.yaml,data.json,study}, <sweep>/trials/<number>/<attempt>/...

In an attempt's place: `checkpoints/<step>/`, `model/` and `end/`, each whole or not there, with files named as in the
attempt's folder.
"""

from __future__ import annotations

from orchestrator.mirror.store import Mirror

CHECKPOINTS, MODEL, END, TRIALS = "checkpoints", "model", "end", "trials"
SPEC = "sweep.yaml"
STUDY = "study"
"""The id of the study whose copies these are."""


def of_sweep(url: str, sweep: str) -> Mirror:
    """Everything of one sweep."""
    return Mirror(url).under(sweep)


def of_trial(url: str, sweep: str, number: int) -> Mirror:
    """Everything of one trial."""
    return of_sweep(url, sweep).under(f"{TRIALS}/{number:04d}")


def of_sft(url: str, sweep: str, key: str) -> Mirror:
    """What the SFT stage of that name made; no retention touches it."""
    return of_sweep(url, sweep).under(f"sft/{key}")
