"""Failed trials that are tried again: their number and configuration stay, their failure stays visible to all."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.folders import SweepFolder
from orchestrator.spec.pruners import MedianPruner
from orchestrator.spec.samplers import Reproducible
from orchestrator.spec.sweep_spec import Budget, SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailedAttempt, FailureKind, Outcome, Trial, TrialState, WaitForTrial
from orchestrator.study.trial_snapshots import visible_trials
from tests.support.metrics import COMPLETE, bug, evaluated
from tests.support.specs import GRID, METRIC, RANGES, SAMPLERS, make_spec

SAME_BUG = "same bug"


def asked(study: Study) -> Trial:
    trial = study.ask()
    assert isinstance(trial, Trial)
    return trial


def fail(study: Study, text: str = "KeyError: x", at: Sequence[int] = (0, 2)) -> Trial:
    trial = asked(study)
    study.report(trial, [evaluated(step, 0.1) for step in at])
    study.tell(trial, bug(text))
    return trial


def test_a_retried_trial_keeps_number_and_configuration_and_its_failure(create: Callable[..., Study]) -> None:
    study = create()
    first = fail(study)
    other = asked(study)
    study.retry_failed([0], "mended (by me)")
    record = study.trial(0)
    assert record is not None
    assert (record.state, record.reason, record.failure, record.step) == (TrialState.RUNNING, "", None, 0)
    assert record.failed_attempts == (FailedAttempt(1, "KeyError: x", 2),)
    assert study.metric_history(0) == [], "the failed attempt's values are not part of the new one's curve"

    again = asked(study)
    assert (again.number, again.attempt, again.first_attempt) == (0, 2, 2)
    assert (again.params, again.config) == (first.params, first.config)
    study.report(again, [evaluated(0, 0.5), evaluated(2, 0.7)])
    ended = study.tell(again, COMPLETE)
    assert (ended.state, ended.value, ended.attempts) == (TrialState.COMPLETE, 0.7, 2)
    assert ended.failed_attempts == record.failed_attempts
    told = [(e.kind, e.text) for e in study.events() if e.trial == 0 and e.kind in ("failed", "retried", "complete")]
    assert told == [
        ("failed", "KeyError: x"),
        ("retried", "attempt 1 failed after update 2: KeyError: x; mended (by me)"),
        ("complete", ""),
    ]
    study.tell(other, COMPLETE) if study.report(other, [evaluated(0, 0.2)]) else None
    assert study.best() == ended


def test_the_same_failure_once_more_is_another_failure(create: Callable[..., Study], folder: SweepFolder) -> None:
    study = create()
    fail(study)
    fail(study)
    assert study.consecutive_bugs() == (2, "KeyError: x")
    study.retry_failed([0, 1], "mended")
    assert study.consecutive_bugs() == (0, "")
    study.dispose()
    with Study.open(folder) as next_driver:  # killed in between: they are issued all the same
        assert fail(next_driver).number == 0
        record = next_driver.trial(0)
        assert record is not None
        assert (record.state, record.attempts, record.reason) == (TrialState.FAILED, 2, "KeyError: x")
        assert next_driver.consecutive_bugs() == (1, "KeyError: x")
        next_driver.retry_failed([0], "once more")
        assert asked(next_driver).first_attempt == 3


def test_a_process_that_only_reads_sees_the_retry(create: Callable[..., Study], folder: SweepFolder) -> None:
    study = create()
    fail(study)
    with Study.open(folder) as reader:
        assert [r.state for r in reader.trials()] == [TrialState.FAILED]
        study.retry_failed([0], "mended")
        assert [r.state for r in reader.trials()] == [TrialState.RUNNING]


def test_memory_that_did_not_suffice_limits_nobody_after_the_retry(create: Callable[..., Study]) -> None:
    study = create()
    trial = study.retry(asked(study), micro_batch_limit=64, reason="CUDA out of memory")
    study.tell(trial, Outcome(TrialState.FAILED, "out of memory", FailureKind.OUT_OF_MEMORY))
    study.retry_failed([0], "a larger GPU")
    assert study.micro_batch_limit() is None
    assert asked(study).micro_batch_limit is None


def test_a_stop_for_the_same_bug_names_the_trials_that_failed_alike(create: Callable[..., Study]) -> None:
    study = create()
    running = [asked(study) for _ in range(4)]
    study.tell(running[0], bug("an older one"))
    study.report(running[1], [evaluated(0, 0.3)])
    study.tell(running[1], COMPLETE)
    study.tell(running[2], bug("KeyError: x"))
    assert study.failed_alike(SAME_BUG) == [], "nothing has stopped"
    study.add_event("stopping", f"{SAME_BUG}: the same bug ended 1 trials in a row")
    study.tell(running[3], bug("KeyError: x"))
    assert study.failed_alike(SAME_BUG) == [2, 3], "the last ended while the sweep stopped"
    study.retry_failed([2, 3], "mended")
    assert study.failed_alike(SAME_BUG) == []
    study.dispose()


def test_a_driver_that_went_on_ends_what_a_stop_named(create: Callable[..., Study], folder: SweepFolder) -> None:
    study = create()
    fail(study)
    study.add_event("stopping", f"{SAME_BUG}: it did")
    study.dispose()
    with Study.open(folder) as reader:
        assert reader.failed_alike(SAME_BUG) == [0]
    with Study.open(folder) as later:
        asked(later)
        assert later.failed_alike(SAME_BUG) == []


def test_trials_issued_before_a_retry_still_see_a_failure_and_later_ones_wait(create: Callable[..., Study]) -> None:
    search = {"loss.beta": {"choice": [float(k) for k in range(1, 9)]}}
    study = create(make_spec(search, pruner=MedianPruner(), order=Reproducible(lag=1)))
    fail(study)
    for _ in range(2):
        trial = asked(study)
        study.report(trial, [evaluated(0, 0.4)])
        study.tell(trial, COMPLETE)
    study.retry_failed([0], "mended")
    again = asked(study)
    assert study.ask() == WaitForTrial(0), "the next one depends on its result"
    study.report(again, [evaluated(2, 0.9)])
    study.tell(again, COMPLETE)
    before, after = (visible_trials(study.snapshots(), number, 1)[0] for number in (2, 3))
    assert (before.state, before.values, dict(before.curve)) == (TrialState.FAILED, None, {2: 0.1})
    assert (after.state, after.values) == (TrialState.COMPLETE, (0.9,))
    assert asked(study).number == 3


def _value(trial: Trial) -> float:
    return 1.0 - abs(trial.config.loss.beta - 2.3) / 10


def _run(folder: SweepFolder, spec: SweepSpec, *, killed: bool, begun: int = 6) -> list[Any]:
    """Every third trial fails; once so many have begun and ended the failed ones are retried, and then none fails."""
    study = Study.create(folder, spec, slots=2)
    mended, held = False, list[Trial]()
    for turn in range(200):
        if killed and turn % 3 == 2:  # no release, no end: its trials are issued again
            study.dispose()
            study, held = Study.open(folder), []
        records = study.trials()
        if not mended and len(records) == begun and all(r.state.is_final for r in records):
            mended = True
            study.retry_failed([r.number for r in records if r.state is TrialState.FAILED], "mended")
        left = sum(not r.state.is_final for r in records)
        while len(held) < 2 and (mended or len(study.trials()) < begun or len(held) < left):
            trial = study.ask()
            if not isinstance(trial, Trial):
                break
            held.append(trial)
        if not held:
            break
        trial = held.pop(0)
        _, decision = study.report(trial, [evaluated(step, _value(trial) + step / 100) for step in (0, 2, 4)])
        broken = not mended and trial.number % 3 == 0
        end = Outcome(TrialState.PRUNED, decision.reason) if decision.stop else COMPLETE
        study.tell(trial, bug("KeyError: x") if broken else end)
    rows = [(r.number, dict(r.params), r.state, r.value, len(r.failed_attempts)) for r in study.trials()]
    study.dispose()
    return rows


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in ("grid", "staged")])
def test_after_a_retry_a_sweep_is_the_same_however_often_it_is_killed(tmp_path: Path, name: str) -> None:
    spec = make_spec(RANGES, sampler=SAMPLERS[name], pruner=MedianPruner(n_startup_trials=2), budget=Budget(trials=9))
    calm = _run(SweepFolder(tmp_path / "calm", "s"), spec, killed=False)
    assert _run(SweepFolder(tmp_path / "killed", "s"), spec, killed=True) == calm
    assert len(calm) == 9
    assert {row[4] for row in calm} == {0, 1}
    assert {row[2] for row in calm} <= {TrialState.COMPLETE, TrialState.PRUNED}


def test_a_stage_that_began_before_a_retry_goes_on_around_the_winner_it_began_with(tmp_path: Path) -> None:
    spec = make_spec(GRID, sampler=SAMPLERS["staged"])
    with Study.create(SweepFolder(tmp_path, "s"), spec) as study:
        values = {2.0: 0.9, 2.5: 0.5}
        margins, betas = list[Any](), list[Any]()
        for turn in range(3):
            trial = asked(study)
            if turn == 0:
                study.report(trial, [evaluated(0, 0.1)])
                study.tell(trial, bug("KeyError: x"))
                continue
            study.report(trial, [evaluated(0, 0.6 + turn / 100)])
            study.tell(trial, COMPLETE)
        begun = study.trials()
        winner = begun[1].params["loss.gamma"]
        assert begun[2].params["loss.gamma"] == winner, "the second stage has begun"
        study.retry_failed([0], "mended")
        while isinstance(trial := study.ask(), Trial):
            study.report(trial, [evaluated(0, values.get(trial.config.loss.beta, 0.5))])
            study.tell(trial, COMPLETE)
        records = study.trials()
        margins = [r.params["loss.gamma"] for r in records]
        betas = [(r.params["loss.gamma"], r.params["loss.beta"]) for r in records]
        assert set(margins[2:]) == {winner}
        assert len(betas) == len(set(betas)), "no point twice"
        assert study.no_more_trials_reason().startswith("all 2 stages done")
        assert METRIC in records[0].metrics
