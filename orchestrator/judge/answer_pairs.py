"""Pairs of answers to judge, and what each kind of judge makes of them.

Opinions into verdicts: one for each trial, judge and way of decoding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.judge.endpoint_batch import answered, taken
from orchestrator.judge.endpoint_client import Question
from orchestrator.judge.judgements import Asked, Example, HowDecoded, JudgeKind, Outcome, Rate, Verdict
from orchestrator.judge.win_rates import (
    BothOrders,
    difficulty,
    first_position,
    length_controlled,
    mean_over_prompts,
    prompt_means,
    win_rate,
)
from orchestrator.spec.judge_config import Endpoint
from trainer.storage.atomic_files import digest_of

Dialogue = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Match:
    """A trial's answer and the start model's to one prompt. `prompt` is its key; `sample` None: the greedy answers."""

    trial: int
    prompt: str
    text: str
    messages: Dialogue | None
    expected: str | None
    sample: int | None
    ours: str
    theirs: str

    @property
    def equal(self) -> bool:
        """Whether nobody needs to be asked: word for word the same."""
        return self.ours == self.theirs

    def questions(self) -> tuple[Question, Question]:
        """Both orders: the trial's answer first, then the start model's."""
        return Question(self.text, self.ours, self.theirs), Question(self.text, self.theirs, self.ours)


@dataclass(frozen=True, slots=True)
class Opinion:
    """What a judge says of some matches: of each, how far the trial's answer is preferred (None: no verdict)."""

    preferences: tuple[float | None, ...]
    score: float | None = None
    start_score: float | None = None
    votes: tuple[tuple[str, BothOrders], ...] = ()
    """With the key of its prompt, for each pair that an endpoint was asked about."""
    asked: Asked | None = None


def by_checker(matches: Sequence[Match]) -> Opinion | None:
    """The rows' own answers: right beats wrong, else a tie. None where no row carries one."""
    from trainer.synthetic.instructions import is_right

    right = [
        None if m.expected is None else (is_right(m.ours, m.expected), is_right(m.theirs, m.expected)) for m in matches
    ]
    known = [(m.prompt, both) for m, both in zip(matches, right, strict=True) if both is not None]
    if not known:
        return None
    preferences = tuple(None if both is None else (1 + both[0] - both[1]) / 2 for both in right)
    return Opinion(
        preferences,
        mean_over_prompts((prompt, float(ours)) for prompt, (ours, _) in known),
        mean_over_prompts((prompt, float(theirs)) for prompt, (_, theirs) in known),
    )


def scored(match: Match, answer: str) -> str:
    """Under which key a reward of this answer is kept."""
    return digest_of([match.prompt, answer])[:32]


def by_reward(matches: Sequence[Match], rewards: Mapping[str, float]) -> Opinion:
    """A reward model's scores by `scored`: the higher one wins. A score that is missing or not finite is no verdict."""
    both = [(rewards.get(scored(m, m.ours), math.nan), rewards.get(scored(m, m.theirs), math.nan)) for m in matches]
    finite = [
        (m.prompt, each)
        for m, each in zip(matches, both, strict=True)
        if math.isfinite(each[0]) and math.isfinite(each[1])
    ]
    preferences = tuple(
        0.5 * (1 + (ours > theirs) - (ours < theirs)) if math.isfinite(ours) and math.isfinite(theirs) else None
        for ours, theirs in both
    )
    return Opinion(
        preferences,
        mean_over_prompts((prompt, ours) for prompt, (ours, _) in finite),
        mean_over_prompts((prompt, theirs) for prompt, (_, theirs) in finite),
    )


def to_ask(matches: Sequence[Match]) -> list[Question]:
    """Every question that an endpoint has to answer, both orders of each match whose answers differ, each once."""
    return list({q.key: q for match in matches if not match.equal for q in match.questions()}.values())


def by_endpoint(matches: Sequence[Match], config: Endpoint, known: Mapping[str, Any]) -> Opinion:
    """An endpoint's votes from what is kept of them; equal answers are a tie that nobody was asked about."""
    votes = [_votes(match, known) for match in matches]
    preferences = tuple(0.5 if both is None else both.preference for both in votes)
    asked = taken(config, known, to_ask(matches))
    told = tuple((match.prompt, both) for match, both in zip(matches, votes, strict=True) if both is not None)
    return Opinion(preferences, votes=told, asked=asked)


def _votes(match: Match, known: Mapping[str, Any]) -> BothOrders | None:
    if match.equal:
        return None
    first, second = (answered(known, question) for question in match.questions())
    return BothOrders(None if first is None else first.vote, None if second is None else second.vote)


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
