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

    `prompt`: the prompt's key; `text`: the prompt as text; `expected`: the row's correct answer; `sample`: index of the
    sample, None for greedy answers.
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
        """Whether both answers are identical, so that no judge is needed."""
        return self.trial_answer == self.initial_answer

    def questions(self) -> tuple[Question, Question]:
        """Return the questions in both orders: the trial's answer first, then the initial model's."""
        return Question(self.text, self.trial_answer, self.initial_answer), Question(
            self.text, self.initial_answer, self.trial_answer
        )


@dataclass(frozen=True, slots=True)
class Preferences:
    """A judge's preferences on pairs: 1 for the trial's answer, 0.5 for a tie, 0 for the initial model's; None without.

    `score` and `initial_score` are means of correctness or reward.
    """

    preferences: tuple[float | None, ...]
    score: float | None = None
    initial_score: float | None = None
    votes: tuple[tuple[str, VotePair], ...] = ()
    """The prompt's key and both votes, for each pair sent to an endpoint."""
    usage: EndpointUsage | None = None


def checker_preferences(answer_pairs: Sequence[AnswerPair]) -> Preferences | None:
    """Return the preferences by the rows' own answers: correct beats wrong, else a tie. None if no row has one."""
    from trainer.synthetic.instructions import is_correct

    correct = [
        None
        if m.expected is None
        else (is_correct(m.trial_answer, m.expected), is_correct(m.initial_answer, m.expected))
        for m in answer_pairs
    ]
    checked = [(m.prompt, both) for m, both in zip(answer_pairs, correct, strict=True) if both is not None]
    if not checked:
        return None
    preferences = tuple(None if both is None else (1 + both[0] - both[1]) / 2 for both in correct)
    return Preferences(
        preferences,
        mean_over_prompts((prompt, float(trial)) for prompt, (trial, _) in checked),
        mean_over_prompts((prompt, float(initial)) for prompt, (_, initial) in checked),
    )


def reward_key(pair: AnswerPair, answer: str) -> str:
    """Return the key under which the reward of this answer is stored."""
    return digest_of([pair.prompt, answer])[:32]


def reward_preferences(answer_pairs: Sequence[AnswerPair], rewards: Mapping[str, float]) -> Preferences:
    """Return a reward model's preferences from its scores by `reward_key`: the higher score wins.

    A pair with a missing or non-finite score has no preference.
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
        0.5 * (1 + (trial > initial) - (trial < initial)) if math.isfinite(trial) and math.isfinite(initial) else None
        for trial, initial in both
    )
    return Preferences(
        preferences,
        mean_over_prompts((prompt, trial) for prompt, (trial, _) in finite),
        mean_over_prompts((prompt, initial) for prompt, (_, initial) in finite),
    )


def endpoint_questions(answer_pairs: Sequence[AnswerPair]) -> list[Question]:
    """Return the distinct questions to an endpoint: both orders of each pair whose answers differ."""
    return list({q.key: q for pair in answer_pairs if not pair.is_equal for q in pair.questions()}.values())


def endpoint_preferences(answer_pairs: Sequence[AnswerPair], config: Endpoint, known: Mapping[str, Any]) -> Preferences:
    """Return an endpoint's preferences from its stored replies `known`; equal answers are a tie without a request."""
    votes = [_votes(pair, known) for pair in answer_pairs]
    preferences = tuple(0.5 if both is None else both.preference for both in votes)
    usage = total_usage(config, known, endpoint_questions(answer_pairs))
    differing = tuple((pair.prompt, both) for pair, both in zip(answer_pairs, votes, strict=True) if both is not None)
    return Preferences(preferences, votes=differing, usage=usage)


def _votes(pair: AnswerPair, known: Mapping[str, Any]) -> VotePair | None:
    if pair.is_equal:
        return None
    first, second = (known_reply(known, question) for question in pair.questions())
    return VotePair(None if first is None else first.vote, None if second is None else second.vote)


_EXAMPLES = 2
"""Number of examples of the most, and of the least preferred answers."""
_MAX_EXAMPLE_LENGTH = 1500

PreferencesByTrial = Mapping[int, tuple[Sequence[AnswerPair], Preferences]]
"""Trial number -> its pairs and the judge's preferences on them."""


def make_judgements(
    judge: JudgeKind, judge_name: str, decoding: DecodingKind, by_trial: PreferencesByTrial
) -> list[Judgement]:
    """Return one judge's judgement of each trial, for one way of decoding.

    `judge_name`: the judging model. Other trials' preferences estimate each prompt's difficulty for the
    length-controlled rate.
    """
    by_prompt = {
        number: _preference_by_prompt(answer_pairs, preferences)
        for number, (answer_pairs, preferences) in by_trial.items()
    }
    judgements: list[Judgement] = []
    for number, (answer_pairs, preferences) in by_trial.items():
        pairs = by_prompt[number]
        counted = [(m, p) for m, p in zip(answer_pairs, preferences.preferences, strict=True) if p is not None]
        means = prompt_means(pairs).values()
        first_position_rate, order_agreement = first_position(preferences.votes)
        controlled, has_difficulty = _length_controlled(
            counted, [other for n, other in by_prompt.items() if n != number]
        )
        judgements.append(
            Judgement(
                trial=number,
                judge=judge,
                judge_name=judge_name,
                decoding=decoding,
                wins=sum(mean > 0.5 for mean in means),
                ties=sum(mean == 0.5 for mean in means),
                losses=sum(mean < 0.5 for mean in means),
                left_out=len(answer_pairs) - len(counted),
                prompts=len(means),
                win_rate=win_rate(pairs),
                lc_win_rate=controlled,
                difficulty=has_difficulty,
                length=mean_over_prompts((m.prompt, float(len(m.trial_answer))) for m in answer_pairs) or 0.0,
                start_length=mean_over_prompts((m.prompt, float(len(m.initial_answer))) for m in answer_pairs) or 0.0,
                score=preferences.score,
                start_score=preferences.initial_score,
                first_position_rate=first_position_rate,
                order_agreement=order_agreement,
                usage=preferences.usage,
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
    """Return the length-controlled win rate, and whether it uses the prompts' difficulty."""
    prompts = [pair.prompt for pair, _ in counted]
    difficulty = prompt_difficulty(others, prompts)
    rate = length_controlled(
        np.array([p for _, p in counted]),
        np.array([float(len(pair.trial_answer)) for pair, _ in counted]),
        np.array([float(len(pair.initial_answer)) for pair, _ in counted]),
        prompts,
        difficulty,
    )
    return rate, rate is not None and difficulty is not None


def _examples(counted: Sequence[tuple[AnswerPair, float]]) -> tuple[Example, ...]:
    """A few pairs with different answers: wins of the trial, then losses."""
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
