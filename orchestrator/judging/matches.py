"""Pairs of answers to judge, and what each kind of judge makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.judging.asking import answered, taken
from orchestrator.judging.question import Question
from orchestrator.judging.rates import BothOrders, mean_over_prompts
from orchestrator.judging.verdict import Asked
from orchestrator.spec.judge import Endpoint
from trainer.storage.durable import digest_of

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
    from trainer.generate.task import is_right

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
