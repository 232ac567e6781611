"""`AnswerPair` and the preferences of each kind of judge (checker, reward model, endpoint), aggregated to judgements.

There is one judgement for each trial, judge and way of decoding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.judge.endpoint_batch import known_reply, total_usage
from orchestrator.judge.endpoint_client import Question
from orchestrator.judge.judgements import DecodingKind, EndpointUsage, Example, JudgeKind, Judgement, PairOutcome, Rate
from orchestrator.judge.win_rates import (
    VotePair,
    first_position,
    length_controlled,
    mean_over_prompts,
    prompt_difficulty,
    prompt_means,
    win_rate,
)
from orchestrator.spec.judge_config import Endpoint
from trainer.storage.atomic_files import digest_of

Dialogue = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """A trial's answer and the initial model's to one prompt.

    `prompt` is the prompt's key; `sample` is None for the greedy answers.
    """

    trial: int
    prompt: str
    text: str
    messages: Dialogue | None
    expected: str | None
    sample: int | None
    trial_answer: str
    initial_answer: str

    @property
    def is_equal(self) -> bool:
        """Whether nobody needs to be asked: word for word the same."""
        return self.trial_answer == self.initial_answer

    def questions(self) -> tuple[Question, Question]:
        """Both orders: the trial's answer first, then the initial model's."""
        return Question(self.text, self.trial_answer, self.initial_answer), Question(
            self.text, self.initial_answer, self.trial_answer
        )


@dataclass(frozen=True, slots=True)
class Preferences:
    """What a judge says of some matches: of each, how far the trial's answer is preferred (None: no judgement)."""

    preferences: tuple[float | None, ...]
    score: float | None = None
    initial_score: float | None = None
    votes: tuple[tuple[str, VotePair], ...] = ()
    """With the key of its prompt, for each pair that an endpoint was asked about."""
    usage: EndpointUsage | None = None


def checker_preferences(answer_pairs: Sequence[AnswerPair]) -> Preferences | None:
    """The rows' own answers: right beats wrong, else a tie. None where no row carries one."""
    from trainer.synthetic.instructions import is_correct

    right = [
        None
        if m.expected is None
        else (is_correct(m.trial_answer, m.expected), is_correct(m.initial_answer, m.expected))
        for m in answer_pairs
    ]
    known = [(m.prompt, both) for m, both in zip(answer_pairs, right, strict=True) if both is not None]
    if not known:
        return None
    preferences = tuple(None if both is None else (1 + both[0] - both[1]) / 2 for both in right)
    return Preferences(
        preferences,
        mean_over_prompts((prompt, float(ours)) for prompt, (ours, _) in known),
        mean_over_prompts((prompt, float(theirs)) for prompt, (_, theirs) in known),
    )


def reward_key(pair: AnswerPair, answer: str) -> str:
    """Under which key a reward of this answer is kept."""
    return digest_of([pair.prompt, answer])[:32]


def reward_preferences(answer_pairs: Sequence[AnswerPair], rewards: Mapping[str, float]) -> Preferences:
    """Return a reward model's preferences from its scores by `reward_key`: the higher one wins.

    A score that is missing or not finite is no judgement.
    """
    both = [
        (rewards.get(reward_key(m, m.trial_answer), math.nan), rewards.get(reward_key(m, m.initial_answer), math.nan))
        for m in answer_pairs
    ]
    finite = [
        (m.prompt, each)
        for m, each in zip(answer_pairs, both, strict=True)
        if math.isfinite(each[0]) and math.isfinite(each[1])
    ]
    preferences = tuple(
        0.5 * (1 + (ours > theirs) - (ours < theirs)) if math.isfinite(ours) and math.isfinite(theirs) else None
        for ours, theirs in both
    )
    return Preferences(
        preferences,
        mean_over_prompts((prompt, ours) for prompt, (ours, _) in finite),
        mean_over_prompts((prompt, theirs) for prompt, (_, theirs) in finite),
    )


def open_questions(answer_pairs: Sequence[AnswerPair]) -> list[Question]:
    """Every question that an endpoint has to answer, both orders of each match whose answers differ, each once."""
    return list({q.key: q for pair in answer_pairs if not pair.is_equal for q in pair.questions()}.values())


def endpoint_preferences(answer_pairs: Sequence[AnswerPair], config: Endpoint, known: Mapping[str, Any]) -> Preferences:
    """An endpoint's votes from what is kept of them; equal answers are a tie that nobody was asked about."""
    votes = [_votes(pair, known) for pair in answer_pairs]
    preferences = tuple(0.5 if both is None else both.preference for both in votes)
    usage = total_usage(config, known, open_questions(answer_pairs))
    differing = tuple((pair.prompt, both) for pair, both in zip(answer_pairs, votes, strict=True) if both is not None)
    return Preferences(preferences, votes=differing, usage=usage)


def _votes(pair: AnswerPair, known: Mapping[str, Any]) -> VotePair | None:
    if pair.is_equal:
        return None
    first, second = (known_reply(known, question) for question in pair.questions())
    return VotePair(None if first is None else first.vote, None if second is None else second.vote)


_EXAMPLES = 2
"""Of the most and of the least preferred answers."""
_MAX_EXAMPLE_LENGTH = 1500

PreferencesByTrial = Mapping[int, tuple[Sequence[AnswerPair], Preferences]]
"""By trial."""


def make_judgements(judge: JudgeKind, by: str, decoding: DecodingKind, by_trial: PreferencesByTrial) -> list[Judgement]:
    """What one judge's opinions on all trials' answers of one decoding come to."""
    differing = {
        number: _preference_by_prompt(answer_pairs, preferences)
        for number, (answer_pairs, preferences) in by_trial.items()
    }
    judgements: list[Judgement] = []
    for number, (answer_pairs, preferences) in by_trial.items():
        pairs = differing[number]
        counted = [(m, p) for m, p in zip(answer_pairs, preferences.preferences, strict=True) if p is not None]
        means = prompt_means(pairs).values()
        first, agree = first_position(preferences.votes)
        controlled, known = _length_controlled(counted, [other for n, other in differing.items() if n != number])
        judgements.append(
            Judgement(
                trial=number,
                judge=judge,
                by=by,
                decoding=decoding,
                wins=sum(mean > 0.5 for mean in means),
                ties=sum(mean == 0.5 for mean in means),
                losses=sum(mean < 0.5 for mean in means),
                left_out=len(answer_pairs) - len(counted),
                prompts=len(means),
                win_rate=win_rate(pairs),
                lc_win_rate=controlled,
                difficulty=known,
                length=mean_over_prompts((m.prompt, float(len(m.trial_answer))) for m in answer_pairs) or 0.0,
                start_length=mean_over_prompts((m.prompt, float(len(m.initial_answer))) for m in answer_pairs) or 0.0,
                score=preferences.score,
                start_score=preferences.initial_score,
                first=first,
                agree=agree,
                asked=preferences.usage,
                outcomes=tuple(
                    PairOutcome(prompt=m.prompt, sample=m.sample, preference=p)
                    for m, p in zip(answer_pairs, preferences.preferences, strict=True)
                ),
                examples=_examples(counted),
                at=time.time(),
            )
        )
    return judgements


def _preference_by_prompt(answer_pairs: Sequence[AnswerPair], preferences: Preferences) -> list[tuple[str, float]]:
    return [(m.prompt, p) for m, p in zip(answer_pairs, preferences.preferences, strict=True) if p is not None]


def _length_controlled(
    counted: Sequence[tuple[AnswerPair, float]], others: Sequence[Sequence[tuple[str, float]]]
) -> tuple[Rate | None, bool]:
    """The length-controlled win rate, and whether it knows how hard each prompt is."""
    prompts = [pair.prompt for pair, _ in counted]
    hard = prompt_difficulty(others, prompts)
    rate = length_controlled(
        np.array([p for _, p in counted]),
        np.array([float(len(pair.trial_answer)) for pair, _ in counted]),
        np.array([float(len(pair.initial_answer)) for pair, _ in counted]),
        prompts,
        hard,
    )
    return rate, rate is not None and hard is not None


def _examples(counted: Sequence[tuple[AnswerPair, float]]) -> tuple[Example, ...]:
    """A few that differ: the most preferred ones, then the least."""
    differing = [(m, p) for m, p in counted if not m.is_equal]
    wins = [(m, p) for m, p in differing if p > 0.5][:_EXAMPLES]
    losses = [(m, p) for m, p in differing if p < 0.5][:_EXAMPLES]
    return tuple(
        Example(
            prompt=_truncate(m.text), ours=_truncate(m.trial_answer), theirs=_truncate(m.initial_answer), preference=p
        )
        for m, p in [*wins, *losses]
    )


def _truncate(text: str) -> str:
    return (
        text
        if len(text) <= _MAX_EXAMPLE_LENGTH
        else f"{text[:_MAX_EXAMPLE_LENGTH]} … [{len(text) - _MAX_EXAMPLE_LENGTH:,} more characters]"
    )
