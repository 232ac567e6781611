"""Finalists' stage: compares the trials of the finalists once they have ended, and stores which one to use.

The trials themselves are issued by the study (`orchestrator.study.finalists`) and run as all others do. The comparison
is a function of their files and of the study: a driver that was killed before it was stored makes the same one again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.interfaces import SWEEP_RUN, SweepReporter, TrackingSink
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.confirmation import Confirmation, FinalistSample, compare_finalists
from orchestrator.study.finalists import trial_config
from orchestrator.study.repeats import CONFIRMING_SEEDS, first_number, group_by_configuration, merge_records
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord, TrialState
from trainer.metrics import CHOSEN, KL
from trainer.storage.failpoints import failpoint


def confirm_finalists(
    study: Study, sink: TrackingSink, reporter: SweepReporter, log: Callable[[str], None]
) -> Confirmation | None:
    """Compare the complete finalists and store the result; return it, None without two complete seeds of one."""
    spec = study.spec
    if spec.finalists is None:
        return None
    records = study.trials()
    found = _compare(study, reporter, records)
    if found is None:
        return None
    if found != study.confirmation():
        failpoint("finalists.compared")
        study.save_confirmation(found)
    sink.set_tags(SWEEP_RUN, _tags(spec, found, records))
    log(f"finalists: {found.text}")
    return found


def _compare(study: Study, reporter: SweepReporter, records: Sequence[TrialRecord]) -> Confirmation | None:
    spec = study.spec
    finalists = [record for record in records if record.finalist_of is not None]
    means = {r.finalist_of: r for r in merge_records(finalists, spec)}
    groups = {
        of: [record for record in group if record.state is TrialState.COMPLETE]
        for group in group_by_configuration(finalists, spec.search)
        if (of := group[0].finalist_of) is not None
    }
    complete = max((len(group) for group in groups.values()), default=0)
    if complete < CONFIRMING_SEEDS:
        return None
    compared = {of: g for of, g in groups.items() if len(g) == complete and means[of].keeps_requirements}
    if not compared:
        return None
    trials = [record for group in compared.values() for record in group]
    by_pair = reporter.pair_values(study, trials)
    widths = {len(by_pair[record.number]) for record in trials if record.number in by_pair}
    paired = len(by_pair) == len(trials) and len(widths) == 1
    initial = study.metric_history(trials[0].number)
    start = initial[0].metrics.get(CHOSEN) if initial and initial[0].step == 0 else None
    kl = all(KL in means[of].metrics for of in compared)
    samples = [
        FinalistSample(
            of,
            np.array([by_pair[r.number] if paired else [r.value] for r in group], dtype=np.float64),
            group[0].step * trial_config(spec, group[0]).training.pairs_per_update,
            means[of].metrics[KL] if kl else _distance(means[of], start),
        )
        for of, group in compared.items()
    ]
    sign = 1.0 if spec.first_objective.direction == "maximize" else -1.0
    return compare_finalists(samples, [r.number for r in trials], sign, _initial(study, reporter, trials[0], paired))


def _initial(study: Study, reporter: SweepReporter, record: TrialRecord, paired: bool) -> NDArray[np.float64] | None:
    """Return the initial model's objective on each pair, [N], or its value alone, [1]; None if unknown."""
    if paired:
        by_pair = reporter.pair_values(study, [record], initial=True).get(record.number)
        return None if by_pair is None else np.array(by_pair, dtype=np.float64)
    value = study.initial_metrics(record).get(study.spec.first_objective.metric)
    return None if value is None or not math.isfinite(value) else np.array([value], dtype=np.float64)


def _distance(mean: TrialRecord, start: float | None) -> float | None:
    """Return how far the mean log-prob per token of the chosen responses moved, in nats; None if unknown."""
    end = mean.metrics.get(CHOSEN)
    return None if start is None or end is None or not math.isfinite(end) else abs(end - start)


def _tags(spec: SweepSpec, found: Confirmation, records: Sequence[TrialRecord]) -> dict[str, str]:
    """Return the tags of the parent run: the recommended configuration with its value in the search and confirmed."""
    search = merge_records([record for record in records if record.finalist_of is None], spec)
    before = next((record.value for record in search if first_number(record) == found.recommended), None)
    mean = next(value.mean for value in found.values if value.of == found.recommended)
    gain = found.gain
    return ({} if gain is None else {"confirmed.gain": f"{gain.value} ({gain.low} to {gain.high})"}) | {
        "finalists": found.text,
        "finalists.trials": ",".join(map(str, found.trials)),
        "finalists.tied": ",".join(map(str, found.tied)),
        "confirmed.of": str(found.recommended),
        "confirmed.value": str(mean.value),
        "confirmed.interval": f"{mean.low} to {mean.high}",
        "confirmed.search_value": str(before),
    }
