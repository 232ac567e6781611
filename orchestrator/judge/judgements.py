"""`Judgement`: one judge's result for one trial."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from orchestrator.study.study import Study
from trainer.config.base import FrozenModel

JudgeKind = Literal["checker", "reward", "endpoint"]
DecodingKind = Literal["greedy", "sampled"]


class Rate(FrozenModel):
    """A rate with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes one half."""
        return self.low > 0.5 or self.high < 0.5


class EndpointUsage(FrozenModel):
    """Usage of an endpoint. `calls`: all requests; `failures`: those without a vote; `cost`: None without prices."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    failures: dict[str, int] = Field(default_factory=dict[str, int])
    unanswered: int = 0
    """Unanswered questions, which the next run sends again."""


class PairOutcome(FrozenModel):
    """The outcome of one pair of answers.

    `prompt`: the prompt's key; `sample`: index of the sample, None: greedy; `preference`: 1 for the trial's answer, 0.5
    for a tie, 0 for the initial model's, None without a judgement.
    """

    prompt: str
    sample: int | None
    preference: float | None


def _stored_as(key: str) -> Any:
    """Return a field's declaration that names its key in JSON, of the study and of `judge.json`."""
    return Field(validation_alias=key, serialization_alias=key)


class Example(FrozenModel):
    """A pair of answers for the report: the trial's and the initial model's."""

    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    prompt: str
    trial_answer: Annotated[str, _stored_as("ours")]
    initial_answer: Annotated[str, _stored_as("theirs")]
    preference: float


class Judgement(FrozenModel):
    """One judge's comparison of a trial's answers with the initial model's."""

    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    trial: int
    judge: JudgeKind
    judge_name: Annotated[str, _stored_as("by")]
    """The judging model."""
    decoding: DecodingKind
    wins: int
    """Prompts whose mean preference over samples is above one half; ties: exactly one half."""
    ties: int
    losses: int
    left_out: int
    """Pairs without a judgement."""
    prompts: int
    """Prompts with at least one judgement."""
    win_rate: Rate | None
    """Ties count half; None without any judged pair."""
    lc_win_rate: Rate | None
    """Length-controlled win rate of AlpacaEval 2; None if it cannot be fitted."""
    difficulty: bool
    """Whether the length-controlled win rate uses the prompts' difficulty."""
    length: float
    initial_length: Annotated[float, _stored_as("start_length")]
    """Mean characters of the trial's and of the initial model's answers, averaged over samples, then over prompts."""
    score: float | None
    initial_score: Annotated[float | None, _stored_as("start_score")]
    """Share of correct answers (checker) or mean reward (reward) of trial and initial model; None for an endpoint."""
    first_position_rate: Annotated[Rate | None, _stored_as("first")]
    """Share of decided votes for the answer shown first (0.5: no position bias); the two orders of a pair are one
    observation. None for judges that do not depend on the order."""
    order_agreement: Annotated[float | None, _stored_as("agree")]
    """Share of pairs with the same vote in both orders."""
    usage: Annotated[EndpointUsage | None, _stored_as("asked")]
    outcomes: tuple[PairOutcome, ...]
    examples: tuple[Example, ...]
    at: float

    @property
    def key(self) -> str:
        """Key among the trial's judgements and part of the metric's name in MLflow, such as "endpoint_greedy"."""
        return f"{self.judge}_{self.decoding}"

    @property
    def judge_label(self) -> str:
        """The judge's name for reports."""
        return {"checker": "the rows' own answers", "reward": f"reward model {self.judge_name}"}.get(
            self.judge, self.judge_name
        )

    @property
    def summary(self) -> str:
        """The judgement as a sentence whose subject is the trial, such as "wins 60% ... of 128 prompts"."""
        how = f"by {self.judge_label}, {self.decoding} answers"
        if self.win_rate is None:
            return f"has no judgement {how}"
        rate = f"{self.win_rate.value:.0%} (95 % interval {self.win_rate.low:.0%} … {self.win_rate.high:.0%})"
        at_equal_length = "" if self.lc_win_rate is None else f", {self.lc_win_rate.value:.0%} at equal length"
        return f"wins {rate} of {self.prompts} prompts against the initial model{at_equal_length}; {how}"

    def metrics(self) -> dict[str, float]:
        """Return the metrics for tracking, by name."""
        rates = {"win_rate": self.win_rate, "lc_win_rate": self.lc_win_rate}
        found = {f"judge/{self.key}_{name}": rate.value for name, rate in rates.items() if rate is not None}
        if self.first_position_rate is not None:
            found[f"judge/{self.key}_first_position"] = self.first_position_rate.value
        return found


_ORDER: tuple[str, ...] = ("endpoint_greedy", "endpoint_sampled", "reward_greedy", "reward_sampled")
"""Order of preference among several judgements; a checker is last, as it only tells correct from wrong."""


def most_important(judgements: Iterable[Judgement]) -> Judgement | None:
    """Return the most important judgement with a win rate; None without one."""
    by_key = {judgement.key: judgement for judgement in judgements if judgement.win_rate is not None}
    return next((by_key[key] for key in (*_ORDER, *sorted(by_key)) if key in by_key), None)


def parse_judgements(texts: Iterable[str]) -> list[Judgement]:
    """Parse judgements from the study's JSON. Raises ValueError for one that this version cannot read."""
    return [Judgement.model_validate_json(text) for text in texts]


def as_json(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Return judgements as JSON values: by trial number, then by judge and decoding."""
    ordered = sorted(judgements, key=lambda judgement: (judgement.trial, judgement.key))
    return {
        str(number): {judgement.key: judgement.model_dump(mode="json") for judgement in each}
        for number, each in groupby(ordered, key=lambda v: v.trial)
    }


def best_judged_trial(study: Study, judgements: Sequence[Judgement]) -> tuple[int, str] | None:
    """Return the best trial with a judgement, and the judgement's summary; None if no trial was judged."""
    judged = {judgement.trial for judgement in judgements}
    best = next((r.number for r in study.ranked() if r.number in judged and r.keeps_requirements), None)
    if best is None:
        return None
    first = most_important(judgement for judgement in judgements if judgement.trial == best)
    return best, "no judgement" if first is None else first.summary
