"""Opinions into verdicts: one for each trial, judge and way of decoding."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from orchestrator.judging.lengths import difficulty, length_controlled
from orchestrator.judging.matches import Match, Opinion
from orchestrator.judging.rates import first_position, mean_over_prompts, prompt_means, win_rate
from orchestrator.judging.verdict import Example, HowDecoded, JudgeKind, Outcome, Rate, Verdict

_EXAMPLES = 2
"""Of the most and of the least preferred answers."""
_LONGEST = 1500

Judged = Mapping[int, tuple[Sequence[Match], Opinion]]
"""By trial."""


def conclude(judge: JudgeKind, by: str, decoding: HowDecoded, judged: Judged) -> list[Verdict]:
    """What one judge's opinions on all trials' answers of one decoding come to."""
    told = {number: _preferred(matches, opinion) for number, (matches, opinion) in judged.items()}
    verdicts: list[Verdict] = []
    for number, (matches, opinion) in judged.items():
        pairs = told[number]
        counted = [(m, p) for m, p in zip(matches, opinion.preferences, strict=True) if p is not None]
        means = prompt_means(pairs).values()
        first, agree = first_position(opinion.votes)
        controlled, known = _controlled(counted, [other for n, other in told.items() if n != number])
        verdicts.append(
            Verdict(
                trial=number,
                judge=judge,
                by=by,
                decoding=decoding,
                wins=sum(mean > 0.5 for mean in means),
                ties=sum(mean == 0.5 for mean in means),
                losses=sum(mean < 0.5 for mean in means),
                left_out=len(matches) - len(counted),
                prompts=len(means),
                win_rate=win_rate(pairs),
                lc_win_rate=controlled,
                difficulty=known,
                length=mean_over_prompts((m.prompt, float(len(m.ours))) for m in matches) or 0.0,
                start_length=mean_over_prompts((m.prompt, float(len(m.theirs))) for m in matches) or 0.0,
                score=opinion.score,
                start_score=opinion.start_score,
                first=first,
                agree=agree,
                asked=opinion.asked,
                outcomes=tuple(
                    Outcome(prompt=m.prompt, sample=m.sample, preference=p)
                    for m, p in zip(matches, opinion.preferences, strict=True)
                ),
                examples=_examples(counted),
                at=time.time(),
            )
        )
    return verdicts


def _preferred(matches: Sequence[Match], opinion: Opinion) -> list[tuple[str, float]]:
    return [(m.prompt, p) for m, p in zip(matches, opinion.preferences, strict=True) if p is not None]


def _controlled(
    counted: Sequence[tuple[Match, float]], others: Sequence[Sequence[tuple[str, float]]]
) -> tuple[Rate | None, bool]:
    """The length-controlled win rate, and whether it knows how hard each prompt is."""
    prompts = [match.prompt for match, _ in counted]
    hard = difficulty(others, prompts)
    rate = length_controlled(
        np.array([p for _, p in counted]),
        np.array([float(len(match.ours)) for match, _ in counted]),
        np.array([float(len(match.theirs)) for match, _ in counted]),
        prompts,
        hard,
    )
    return rate, rate is not None and hard is not None


def _examples(counted: Sequence[tuple[Match, float]]) -> tuple[Example, ...]:
    """A few that differ: the most preferred ones, then the least."""
    told = [(m, p) for m, p in counted if not m.equal]
    wins = [(m, p) for m, p in told if p > 0.5][:_EXAMPLES]
    losses = [(m, p) for m, p in told if p < 0.5][:_EXAMPLES]
    return tuple(
        Example(prompt=_cut(m.text), ours=_cut(m.ours), theirs=_cut(m.theirs), preference=p)
        for m, p in [*wins, *losses]
    )


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … [{len(text) - _LONGEST:,} more characters]"
