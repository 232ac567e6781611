import gc
import math
import sqlite3
import threading
from collections.abc import Callable

import pytest

from orchestrator.errors import NameTaken, PasswordInUrl, SpecChanged, StorageRefused, StudyMissing, SweepHeld
from orchestrator.folders import SweepFolder
from orchestrator.spec.samplers import RandomSampler
from orchestrator.spec.sweep_spec import Budget, Objective
from orchestrator.study.database import driver_lease
from orchestrator.study.database.tables import OLDEST_SCHEMA, SCHEMA
from orchestrator.study.running_trial import AttemptSuperseded, TrialFinished
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailureKind, Trial, TrialState
from tests.support.metrics import COMPLETE, DIVERGED, bug, evaluated
from tests.support.processes import LIMIT_SECONDS
from tests.support.specs import GRID, METRIC, RANGES, make_spec
from trainer.results import StepMetrics

Create = Callable[..., Study]


def claimed(study: Study) -> Trial:
    trial = study.ask()
    assert trial is not None
    return trial


def finish(study: Study, value: float = 0.5) -> Trial:
    trial = claimed(study)
    study.report(trial, [evaluated(1, value)])
    study.tell(trial, COMPLETE)
    return trial


# --- claim ---------------------------------------------------------------------------------------------------------
def test_grid_is_issued_in_order_each_point_once(create: Create) -> None:
    study = create()
    sampled = [(t.number, dict(t.params)) for t in iter(study.ask, None)]
    assert sampled == [
        (0, {"loss.beta": 2.0, "loss.gamma": 0.5}),
        (1, {"loss.beta": 2.0, "loss.gamma": 1.0}),
        (2, {"loss.beta": 2.5, "loss.gamma": 0.5}),
        (3, {"loss.beta": 2.5, "loss.gamma": 1.0}),
    ]
    assert study.no_more_trials_reason() == "all points tried: 4 of the grid"
    assert [t.state for t in study.trials()] == [TrialState.RUNNING] * 4


def test_a_claimed_trial_carries_the_whole_configuration(create: Create) -> None:
    trial = claimed(create())
    assert trial.config.flat_params()["loss.gamma"] == 0.5
    assert trial.config.flat_params()["loss.beta"] == 2.0


def test_budget_of_trials_is_a_total_over_all_drivers(create: Create, folder: SweepFolder) -> None:
    study = create(make_spec(GRID, budget=Budget(trials=3)))
    finish(study)
    finish(study)
    study.dispose()
    with Study.open(folder) as later:
        assert later.no_more_trials_reason() == ""
        assert finish(later).number == 2
        assert later.ask() is None
        assert later.no_more_trials_reason() == "3 of 3 trials issued"


def test_budget_of_hours_counts_all_drivers_by_the_monotonic_clock(
    create: Create, folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(driver_lease.time, "monotonic", lambda: clock[0])
    study = create(make_spec(GRID, budget=Budget(hours=1.0)))
    trial = claimed(study)
    clock[0] += 1500
    study.tell(trial, bug("x"))
    study.dispose()
    clock[0] += 1e6  # between drivers nobody works
    with Study.open(folder) as later:
        assert later.usage().hours == pytest.approx(1500 / 3600)
        trial = claimed(later)
        clock[0] += 2200
        later.tell(trial, bug("x"))
        assert later.ask() is None
        assert later.no_more_trials_reason() == "1.03 of 1 hours spent"


def test_trials_left_running_come_first_with_the_same_number_and_the_next_attempt(
    create: Create, folder: SweepFolder
) -> None:
    study = create()
    first, second = claimed(study), claimed(study)
    study.report(second, [evaluated(1, 0.1)])
    study.dispose()  # the driver dies
    with Study.open(folder) as later:
        again = [claimed(later) for _ in range(3)]
        assert [(t.number, t.attempt) for t in again] == [(0, 2), (1, 2), (2, 1)]
        assert (again[0].params, again[1].config) == (first.params, second.config)
        assert [t.attempts for t in later.trials()] == [2, 2, 1]
        assert later.metric_history(1) == [evaluated(1, 0.1)]


def test_a_released_trial_is_issued_again(create: Create) -> None:
    study = create()
    study.release(claimed(study))
    assert study.trials()[0].state is TrialState.RUNNING
    again = claimed(study)
    assert (again.number, again.attempt) == (0, 2)


def test_a_reissued_trial_fences_off_its_lost_worker(create: Create) -> None:
    study = create()
    lost = claimed(study)
    again = study.retry(lost)
    assert (again.number, again.attempt, again.config) == (lost.number, 2, lost.config)
    with pytest.raises(AttemptSuperseded, match="attempt 1 of trial 0 may not write: the trial is in attempt 2"):
        study.report(lost, [evaluated(1, 0.9)])
    assert study.metric_history(0) == []


# --- observe -------------------------------------------------------------------------------------------------------
def test_a_step_told_twice_counts_once_and_the_first_telling_stays(create: Create) -> None:
    study = create()
    trial = claimed(study)
    study.report(trial, [StepMetrics(0, {"loss": 3.0}), evaluated(1, 0.5, loss=2.0)])
    study.report(trial, [evaluated(1, 0.9, loss=9.0), StepMetrics(2, {"loss": 1.0}), StepMetrics(2, {"loss": 8.0})])
    assert study.metric_history(0) == [
        StepMetrics(0, {"loss": 3.0}),
        evaluated(1, 0.5, loss=2.0),
        StepMetrics(2, {"loss": 1.0}),
    ]
    record = study.trials()[0]
    assert (record.step, dict(record.metrics)) == (2, {METRIC: 0.5, "loss": 1.0})


def test_steps_out_of_order_leave_the_last_values_the_last(create: Create) -> None:
    study = create()
    trial = claimed(study)
    study.report(trial, [StepMetrics(5, {"loss": 5.0})])
    study.report(trial, [StepMetrics(3, {"loss": 3.0, "epoch": 0.3}), StepMetrics(2, {"epoch": 0.2})])
    record = study.trials()[0]
    assert (record.step, dict(record.metrics)) == (5, {"loss": 5.0, "epoch": 0.3})


def test_no_points_are_nothing(create: Create) -> None:
    study = create()
    assert not study.report(claimed(study), [])[1].stop
    assert study.trials()[0].step == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_metrics_are_kept_as_they_are(create: Create, value: float) -> None:
    study = create()
    _, decision = study.report(claimed(study), [StepMetrics(3, {"loss": value, METRIC: value})])
    assert decision.stop
    assert decision.reason == f"diverged: loss is {value} at step 3"
    stored = study.metric_history(0)[0].metrics["loss"]
    assert stored == value or (math.isnan(stored) and math.isnan(value))


def test_the_database_holds_json_that_any_reader_takes(create: Create, folder: SweepFolder) -> None:
    study = create()
    study.report(claimed(study), [StepMetrics(1, {"loss": math.nan})])
    with sqlite3.connect(folder.database) as raw:
        assert raw.execute("select json_extract(metrics, '$.loss') from prefsweep_point").fetchone() == ("nan",)


# --- close ---------------------------------------------------------------------------------------------------------
def test_complete_takes_the_last_value_of_the_goal(create: Create) -> None:
    study = create()
    trial = claimed(study)
    study.report(trial, [evaluated(10, 0.9), evaluated(20, 0.7), StepMetrics(21, {"loss": 1.0})])
    record = study.tell(trial, COMPLETE)
    assert (record.state, record.value, record.step) == (TrialState.COMPLETE, 0.7, 21)
    assert record == study.trials()[0]
    assert record.started_at is not None
    assert record.finished_at is not None
    assert record.finished_at >= record.started_at


@pytest.mark.parametrize(
    ("points", "why"), [([], "was never reported"), ([evaluated(1, 0.5), evaluated(2, math.nan)], "is nan")]
)
def test_complete_without_a_finite_goal_is_a_failure_that_says_so(
    create: Create, points: list[StepMetrics], why: str
) -> None:
    study = create()
    trial = claimed(study)
    study.report(trial, points)
    record = study.tell(trial, COMPLETE)
    assert (record.state, record.failure, record.value) == (TrialState.FAILED, FailureKind.BUG, None)
    assert record.reason == f"the trial ran to its end, but its objective {METRIC} {why}"
    assert study.best() is None


def test_a_diverged_trial_is_pruned_with_its_reason_and_the_worst_value(create: Create, folder: SweepFolder) -> None:
    study = create()
    trial = claimed(study)
    study.report(trial, [evaluated(1, 0.9)])
    record = study.tell(trial, DIVERGED)
    assert (record.state, record.diverged, record.value) == (TrialState.PRUNED, True, None)
    assert (record.reason, study.best()) == (DIVERGED.reason, None)
    with sqlite3.connect(folder.database) as raw:
        assert raw.execute("select value_type from trial_values").fetchone() == ("INF_NEG",)


def test_finished_is_final(create: Create, folder: SweepFolder) -> None:
    study = create()
    trial, before = finish(study), study.trials()
    assert study.tell(trial, COMPLETE) == before[0]
    with pytest.raises(TrialFinished, match="trial 0 is COMPLETE, which is final: closing it as FAILED refused"):
        study.tell(trial, bug("late"))
    with pytest.raises(TrialFinished, match="metrics refused"):
        study.report(trial, [evaluated(9, 1.0)])
    with pytest.raises(TrialFinished):
        study.retry(trial)
    with pytest.raises(TrialFinished):
        study.release(trial)
    with Study.open(folder) as later:
        assert later.tell(trial, COMPLETE) == before[0]
        with pytest.raises(TrialFinished):
            later.tell(trial, DIVERGED)
    assert study.trials() == before


def test_only_issued_trials_can_write(create: Create, folder: SweepFolder) -> None:
    study = create()
    trial = claimed(study)
    study.release(trial)
    with pytest.raises(AttemptSuperseded, match="is not issued"):
        study.report(trial, [])
    with pytest.raises(AttemptSuperseded):
        study.tell(Trial(99, 1, {}, trial.config), COMPLETE)


# --- ranking and counting --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("direction", "winner"), [("maximize", 1), ("minimize", 0)])
def test_best_by_the_goals_direction_and_the_first_among_equals(create: Create, direction: str, winner: int) -> None:
    study = create(make_spec(GRID, goal=Objective.model_validate({"metric": METRIC, "direction": direction})))
    for value in (0.2, 0.8, 0.8, 0.2):
        finish(study, value)
    assert study.best().number == winner


def test_the_same_bug_in_a_row_is_counted_by_the_order_of_ending(create: Create) -> None:
    study = create()
    a, b, c, d = (claimed(study) for _ in range(4))
    assert study.consecutive_bugs() == (0, "")
    study.tell(c, bug("KeyError: x"))
    study.report(a, [evaluated(1, 0.5)])
    study.tell(a, COMPLETE)
    assert study.consecutive_bugs() == (0, "")
    study.tell(d, bug("KeyError: x"))
    study.tell(b, bug("KeyError: x"))
    assert study.consecutive_bugs() == (2, "KeyError: x")


def test_another_bug_begins_another_row(create: Create) -> None:
    study = create()
    study.tell(claimed(study), bug("one"))
    study.tell(claimed(study), bug("two"))
    assert study.consecutive_bugs() == (1, "two")


# --- one driver, several terminals -----------------------------------------------------------------------------------
def test_a_newer_driver_fences_off_the_older(create: Create, folder: SweepFolder) -> None:
    old = create()
    trial = claimed(old)
    with Study.open(folder) as new:
        assert claimed(new).attempt == 2
        for write in (lambda: old.report(trial, [evaluated(1, 0.1)]), lambda: old.tell(trial, COMPLETE), old.ask):
            with pytest.raises(SweepHeld, match="pid"):
                write()
        assert new.metric_history(0) == []
        assert [t.attempts for t in new.trials()] == [2]


def test_readers_write_nothing_and_fence_nobody(create: Create, folder: SweepFolder) -> None:
    study = create()
    trial = claimed(study)
    with Study.open(folder) as reader:
        assert (len(reader.trials()), reader.spec, reader.id) == (1, study.spec, study.id)
    study.report(trial, [evaluated(1, 0.1)])


def test_requests_reach_the_driver_in_order_and_are_done_once(create: Create, folder: SweepFolder) -> None:
    study = create()
    claimed(study)
    with Study.open(folder) as other:
        other.add_request("stop", "asked by me", trial=2)
        other.add_request("stop")
    requested = study.requests()
    assert [(r.kind, r.text, r.trial) for r in requested] == [("stop", "asked by me", 2), ("stop", "", None)]
    study.complete_request(requested[0].seq)
    assert [r.seq for r in study.requests()] == [requested[1].seq]


def test_a_request_to_stop_lapses_with_the_next_driver(create: Create, folder: SweepFolder) -> None:
    study = create()
    study.add_request("stop", "enough")
    study.add_request("pause", trial=0)
    claimed(study)
    assert [r.kind for r in study.requests()] == ["pause"]
    assert "a request to stop lapsed: enough" in [e.text for e in study.events()]


def test_events_are_numbered_in_order(create: Create) -> None:
    study = create()
    study.add_event("hello", "world", trial=3)
    finish(study)
    events = study.events()
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    assert [e.kind for e in events] == ["created", "hello", "driver", "issued", "complete"]
    assert study.events(after=4) == events[4:]


# --- the spec --------------------------------------------------------------------------------------------------------
def test_the_budget_may_grow_and_history_remembers(create: Create, folder: SweepFolder) -> None:
    study = create(make_spec(GRID, budget=Budget(trials=1)))
    finish(study)
    assert study.ask() is None
    assert list(map(str, study.amend(make_spec(GRID, budget=Budget(trials=2))))) == ["budget.trials: 1 -> 2"]
    assert claimed(study).number == 1
    assert study.amend(make_spec(GRID, budget=Budget(trials=2))) == []
    with Study.open(folder) as later:
        assert later.spec.budget.trials == 2
        assert [v.version for v in later.spec_history()] == [1, 2]


def test_what_makes_trials_comparable_may_not_change(create: Create) -> None:
    study = create()
    with pytest.raises(SpecChanged, match=r"sampler\.kind"):
        study.amend(make_spec(RANGES, sampler=RandomSampler(seed=1)))
    assert len(study.spec_history()) == 1


# --- opening ---------------------------------------------------------------------------------------------------------
def test_a_name_is_used_once(create: Create, folder: SweepFolder) -> None:
    study = create()
    finish(study)
    with pytest.raises(NameTaken):
        Study.create(folder, make_spec(GRID))
    assert len(study.trials()) == 1


def test_opening_what_is_not_there_makes_nothing(folder: SweepFolder) -> None:
    with pytest.raises(StudyMissing):
        Study.open(folder)
    assert not folder.path.exists()


def test_a_file_that_is_no_database_is_refused_in_words(folder: SweepFolder) -> None:
    folder.path.mkdir()
    folder.database.write_bytes(b"this is no database, whatever its name says" * 100)
    with pytest.raises(StorageRefused, match="file is not a database"):
        Study.open(folder)


def test_a_password_in_the_url_is_refused_and_not_repeated(folder: SweepFolder) -> None:
    with pytest.raises(PasswordInUrl) as caught:
        Study.create(folder, make_spec(GRID), "postgresql://me:hunter2@db/sweeps")
    assert "hunter2" not in str(caught.value)
    assert not folder.database.with_suffix(".url").exists()


def test_another_database_is_found_again(folder: SweepFolder) -> None:
    elsewhere = f"sqlite:///{folder.root / 'elsewhere.db'}"
    with Study.create(folder, make_spec(GRID), elsewhere) as study:
        finish(study)
    assert not folder.database.exists()
    with Study.open(folder) as later:
        assert len(later.trials()) == 1


def test_two_sweeps_share_a_database_without_mixing(folder: SweepFolder) -> None:
    elsewhere, other = f"sqlite:///{folder.root / 'shared.db'}", SweepFolder(folder.root, "t")
    with (
        Study.create(folder, make_spec(GRID), elsewhere) as one,
        Study.create(other, make_spec(GRID), elsewhere) as two,
    ):
        finish(one, 0.1)
        finish(two, 0.2)
        assert ([t.value for t in one.trials()], [t.value for t in two.trials()]) == ([0.1], [0.2])
        assert one.id != two.id
        assert one.metric_history(0) != two.metric_history(0)


@pytest.mark.parametrize("disposed", [True, False])
def test_no_heartbeat_outlives_its_study(folder: SweepFolder, disposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_lease, "HEARTBEAT_SECONDS", 0.01)
    before, study = set(threading.enumerate()), Study.create(folder, make_spec())
    study.start_driving()
    (thread,) = set(threading.enumerate()) - before
    assert thread.name == "heartbeat"
    if disposed:
        study.dispose()
    else:
        del study  # dropped, as by a driver whose error nobody handled
        gc.collect()
        thread.join(LIMIT_SECONDS)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("schema", "said"), [(SCHEMA + 1, "a later version"), (OLDEST_SCHEMA - 1, "an earlier version")]
)
def test_a_study_of_another_version_is_refused(create: Create, folder: SweepFolder, schema: int, said: str) -> None:
    create().dispose()
    with sqlite3.connect(folder.database) as database:
        database.execute("update prefsweep_sweep set schema = ?", (schema,))
    with pytest.raises(StorageRefused, match=said):
        Study.open(folder)
