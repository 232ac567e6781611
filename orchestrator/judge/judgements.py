"""`Judgement`: one judge's result for one trial."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, Literal

from pydantic import Field

from orchestrator.study.study import Study
from orchestrator.study.trial_records import rank_trials
from trainer.config.base import FrozenModel

JudgeKind = Literal["checker", "reward", "endpoint"]
DecodingKind = Literal["greedy", "sampled"]


class Rate(FrozenModel):
    """A share with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves one half out."""
        return self.low > 0.5 or self.high < 0.5


class EndpointUsage(FrozenModel):
    """What asking an endpoint took. `calls` counts every request, `failures` those without a judgement, by kind."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    failures: dict[str, int] = Field(default_factory=dict[str, int])
    unanswered: int = 0
    """Questions that are still open: asked again by the next run."""


class PairOutcome(FrozenModel):
    """One pair of answers: to which prompt, which of its samples (None: greedy), and how far the trial's is
    preferred: 1, 0.5 for a tie, 0; None without a judgement.
    """

    prompt: str
    sample: int | None
    preference: float | None


class Example(FrozenModel):
    """A pair of answers to look at."""

    prompt: str
    ours: str
    theirs: str
    preference: float


class Judgement(FrozenModel):
    """One judge's comparison of a trial's answers with the initial model's."""

    trial: int
    judge: JudgeKind
    by: str
    """Who judged, in words: a model's name."""
    decoding: DecodingKind
    wins: int
    """Prompts whose samples' mean preference is the trial's; ties are those of exactly one half."""
    ties: int
    losses: int
    left_out: int
    """Pairs without a judgement."""
    prompts: int
    """Prompts with at least one judgement."""
    win_rate: Rate | None
    """Ties count half; None where nothing was judged."""
    lc_win_rate: Rate | None
    """Length-controlled, as AlpacaEval 2 defines it; None where it cannot be fitted."""
    difficulty: bool
    """Whether the length-controlled one knows how hard each prompt is."""
    length: float
    start_length: float
    """Mean characters of an answer; as all means here, over prompts, of each prompt's mean over its samples."""
    score: float | None
    start_score: float | None
    """Share of right answers (checker) or mean reward (reward); None for an endpoint."""
    first: Rate | None
    """Share of decided votes for the answer that was shown first, both orders of a pair as one observation; None where
    order plays no part."""
    agree: float | None
    """Share of pairs of which both orders say the same."""
    asked: EndpointUsage | None
    outcomes: tuple[PairOutcome, ...]
    examples: tuple[Example, ...]
    at: float

    @property
    def key(self) -> str:
        """By which it is told from the trial's other judgements, and named in MLflow."""
        return f"{self.judge}_{self.decoding}"

    @property
    def judge_label(self) -> str:
        """The judge, in words."""
        return {"checker": "the rows' own answers", "reward": f"reward model {self.by}"}.get(self.judge, self.by)

    @property
    def summary(self) -> str:
        """A sentence without its subject, the trial."""
        how = f"by {self.judge_label}, {self.decoding} answers"
        if self.win_rate is None:
            return f"has no verdict {how}"
        rate = f"{self.win_rate.value:.0%} (95 % interval {self.win_rate.low:.0%} … {self.win_rate.high:.0%})"
        level = "" if self.lc_win_rate is None else f", {self.lc_win_rate.value:.0%} at equal length"
        return f"wins {rate} of {self.prompts} prompts against the start model{level}; {how}"

    def metrics(self) -> dict[str, float]:
        """The numbers for tracking, by name."""
        rates = {"win_rate": self.win_rate, "lc_win_rate": self.lc_win_rate}
        found = {f"judge/{self.key}_{name}": rate.value for name, rate in rates.items() if rate is not None}
        if self.first is not None:
            found[f"judge/{self.key}_first_position"] = self.first.value
        return found


_ORDER: tuple[str, ...] = ("endpoint_greedy", "endpoint_sampled", "reward_greedy", "reward_sampled")
"""Which judgement counts first where there are several; a checker sees right and wrong alone."""


def headline(judgements: Iterable[Judgement]) -> Judgement | None:
    """The judgement to name first, of those with a win rate."""
    by_key = {judgement.key: judgement for judgement in judgements if judgement.win_rate is not None}
    return next((by_key[key] for key in (*_ORDER, *sorted(by_key)) if key in by_key), None)


def parse_judgements(texts: Iterable[str]) -> list[Judgement]:
    """Verdicts as the study keeps them; ValueError for one that this version cannot read."""
    return [Judgement.model_validate_json(text) for text in texts]


def as_json(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """For programs: by trial, then by judge and decoding."""
    ordered = sorted(judgements, key=lambda v: (v.trial, v.key))
    return {
        str(number): {judgement.key: judgement.model_dump(mode="json") for judgement in each}
        for number, each in groupby(ordered, key=lambda v: v.trial)
    }


def best_judged_trial(study: Study, judgements: Sequence[Judgement]) -> tuple[int, str] | None:
    """The best trial that a judge has seen, and what it says in a sentence."""
    judged = {judgement.trial for judgement in judgements}
    best = next((r.number for r in rank_trials(study.trials(), *study.spec.objectives) if r.number in judged), None)
    if best is None:
        return None
    first = headline(judgement for judgement in judgements if judgement.trial == best)
    return best, "no verdict" if first is None else first.summary
