"""Whether sweeps may be compared: the same data, start model, tokens and pairs per update, each told where not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from dashboards.frame import show
from dashboards.sweep_frame import SweepFrame, TrialCase
from trainer.metrics import EVAL

_TOKENS = 1.05
"""Tokens of the compared trials may differ by this factor: lengths of the drawn pairs vary."""
_EFFORT = 1.5
_START = f"{EVAL}logps_per_token/chosen"

Entry = tuple[SweepFrame, TrialCase | None]


def mismatches(entries: Sequence[Entry]) -> list[str]:
    """What is not matched between these sweeps and their best trials, in words with the numbers."""
    told = [
        _differ("the data differs", entries, lambda f, _: None if f.data is None else f.data.fingerprint[:12]),
        _held_out(entries),
        _differ("the start models differ", entries, lambda f, _: _model(f)),
        _starts(entries),
        _differ("pairs per update differ", entries, lambda _, c: None if c is None else str(_pairs(c))),
        _differ("updates differ", entries, lambda _, c: None if c is None else f"{c.view.step:,}"),
        _tokens(entries),
        _differ("precision differs", entries, lambda f, _: _precision(f)),
        _differ("what is trained differs", entries, lambda f, _: "LoRA" if f.spec.base.lora else "all weights"),
        _effort(entries),
    ]
    unfinished = [f"{frame.name} is {frame.state}" for frame, _ in entries if frame.state != "finished"]
    return [line for line in told if line] + [f"{words}: this is how it stands now." for words in unfinished]


def _differ(what: str, entries: Sequence[Entry], of: Callable[[SweepFrame, TrialCase | None], str | None]) -> str:
    known = [(frame.name, value) for frame, case in entries if (value := of(frame, case)) is not None]
    if len({value for _, value in known}) < 2:
        return ""
    return f"Not matched: {what} (" + "; ".join(f"{name}: {value}" for name, value in known) + ")."


def _pairs(case: TrialCase) -> int:
    return case.config.training.pairs_per_update


def _model(frame: SweepFrame) -> str:
    base, sft = frame.spec.base, frame.spec.sft
    name = base.model.name_or_path or "generated"
    after = "" if sft is None else f" after {sft.training.max_steps or 'some'} updates of sft"
    return f"{name}{after}"


def _precision(frame: SweepFrame) -> str:
    base = frame.spec.base
    return f"{base.model.dtype}{' with bf16 autocast' if base.training.bf16 else ''}"


def _starts(entries: Sequence[Entry]) -> str:
    """Measured, where names say nothing: the start's log-prob of the held-out pairs."""
    known = [(frame.name, value) for frame, _ in entries if (value := frame.start(_START)) is not None]
    if len(known) < 2 or all(math.isclose(value, known[0][1], rel_tol=1e-4) for _, value in known):
        return ""
    listed = "; ".join(f"{name}: {show(value)}" for name, value in known)
    return f"Not matched: the start models see the held-out pairs differently (log-prob per chosen token {listed})."


def _held_out(entries: Sequence[Entry]) -> str:
    known = [(frame.name, case.pairs) for frame, case in entries if case is not None and case.pairs is not None]
    if len(known) < len([case for _, case in entries if case is not None]):
        return "Some trials left no held-out pairs: differences to them have no interval."
    if not known or all(pairs.same_pairs(known[0][1]) for _, pairs in known):
        return ""
    listed = "; ".join(f"{name}: {len(pairs)}" for name, pairs in known)
    return f"Not matched: the held-out pairs are not the same ({listed}), so differences have no interval."


def _tokens(entries: Sequence[Entry]) -> str:
    known = [(frame.name, case.tokens) for frame, case in entries if case is not None]
    counted = [(name, tokens) for name, tokens in known if tokens is not None]
    if len(counted) < len(known):
        return "The tokens of some trials are not known, so whether they are matched is not either."
    if len(counted) < 2 or max(t for _, t in counted) <= _TOKENS * min(t for _, t in counted):
        return ""
    return "Not matched: tokens of training (" + "; ".join(f"{name}: {tokens:,.0f}" for name, tokens in counted) + ")."


def _effort(entries: Sequence[Entry]) -> str:
    counts = [(frame.name, len(frame.ranked)) for frame, _ in entries if frame.ranked]
    if len(counts) < 2 or max(n for _, n in counts) <= _EFFORT * min(n for _, n in counts):
        return ""
    listed = "; ".join(f"{name}: {n}" for name, n in counts)
    return f"Not matched: the best of many trials looks better than the best of few (complete trials {listed})."
