"""Finalists: which configurations are trained again after the search, with which seeds, and on which rows.

The choice is derived from the study: it is the same in every driver, as no finalist begins before the trials of the
search have ended. Seeds advance before configurations, so that a sweep that ends early has as many of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.spec.search.trial_params import SEED, apply_params
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.repeats import first_number, rank_configurations
from orchestrator.study.sweep_terms import Usage
from orchestrator.study.trial_records import TrialRecord, TrialState
from trainer.config.trial import TrialConfig

FIRST_SEED = 1000
"""A finalist's seeds begin at `base.training.seed` + this number; those of repeats follow `base.training.seed`."""
RESERVED_SHARE = 0.5
"""Largest share of a limit on time that the search leaves to finalists."""


@dataclass(frozen=True, slots=True)
class NextFinalist:
    """A finalist to train: the first trial of its configuration, its seed and the place of that in `seeds`, from 1."""

    of: int
    seed: int
    place: int
    seeds: int

    @property
    def origin(self) -> str:
        """Where the trial comes from, as text."""
        return f"finalist: seed {self.place} of {self.seeds} of trial {self.of}'s configuration"


def chosen_finalists(records: Sequence[TrialRecord], spec: SweepSpec) -> list[TrialRecord]:
    """Return the best configurations of the search that keep every requirement, at most `finalists.top`.

    With several objectives in the order of the ranking: the Pareto front first, by the first objective. Forks are left
    out, as their result is not that of their settings alone.
    """
    if spec.finalists is None:
        return []
    search = [record for record in records if record.finalist_of is None and record.fork is None]
    return [r for r in rank_configurations(search, spec) if r.keeps_requirements][: spec.finalists.top]


def due_finalists(records: Sequence[TrialRecord], spec: SweepSpec) -> list[NextFinalist]:
    """Return the finalists that have not begun, in their order; empty while a trial of the search runs."""
    if spec.finalists is None or any(is_open(record) for record in records):
        return []
    base, count = spec.base.training.seed + FIRST_SEED, spec.finalists.seeds
    searched = {record.params.get(SEED) for record in records if record.finalist_of is None}
    due: list[NextFinalist] = []
    for of in map(first_number, chosen_finalists(records, spec)):
        begun = {record.params[SEED] for record in records if record.finalist_of == of}
        taken = begun | searched
        fresh = (seed for seed in range(base, base + count + len(taken)) if seed not in taken)
        due += [NextFinalist(of, next(fresh), place, count) for place in range(len(begun) + 1, count + 1)]
    return sorted(due, key=lambda each: each.place)


def is_open(record: TrialRecord) -> bool:
    """Return whether a trial of the search may still change the choice: one that was paused by a user does not."""
    return record.finalist_of is None and not (record.state.is_final or record.state is TrialState.PAUSED)


def finalists_text(records: Sequence[TrialRecord], spec: SweepSpec) -> str:
    """Return how many finalists there are, and why fewer than `finalists.top`; "" in a sweep without."""
    if spec.finalists is None:
        return ""
    chosen, top = len(chosen_finalists(records, spec)), spec.finalists.top
    ranked = rank_configurations([record for record in records if record.finalist_of is None], spec)
    if not ranked:
        return "no finalists: no trial completed"
    why = "no more completed" if all(r.keeps_requirements for r in ranked) else "no others keep every requirement"
    if not chosen:
        return "no finalists: no complete trial keeps every requirement"
    count = f"{chosen} finalist{'s' if chosen > 1 else ''}"
    return f"{count}, fewer than finalists.top {top}: {why}" if chosen < top else count


def reserved_time_reason(spec: SweepSpec, ended: int, usage: Usage) -> str:
    """Return why the search ends so that a limit on time leaves finalists theirs; "" while it continues.

    Their time is the mean of the `ended` trials of the search times the number of finalists, at most half of the limit.
    """
    if spec.finalists is None or ended == 0:
        return ""
    for name, used in (("hours", usage.hours), ("gpu_hours", usage.gpu_hours)):
        limit = getattr(spec.budget, name)
        if limit is None:
            continue
        reserved = min(RESERVED_SHARE * limit, spec.finalists.trials * used / ended)
        if used + reserved >= limit:
            return f"{used:.3g} of {limit:g} {name} spent, and {reserved:.3g} are left to finalists"
    return ""


def with_confirm_rows(config: TrialConfig) -> TrialConfig:
    """Return the configuration evaluated on the held-out rows that the search has not seen."""
    return config.model_copy(update={"data": config.data.model_copy(update={"eval_on": "confirm"})})


def trial_config(spec: SweepSpec, record: TrialRecord, params: Mapping[str, Any] | None = None) -> TrialConfig:
    """Return a trial's configuration: the base with `params`, by default the record's, and a finalist's rows."""
    config = apply_params(spec.base, record.params if params is None else params)
    return config if record.finalist_of is None else with_confirm_rows(config)
