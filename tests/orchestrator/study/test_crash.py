"""kill -9 at any instant, also inside a write: the study is as it was before or as it is after, never between."""

import itertools
import os
import random
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy.event
import sqlalchemy.pool
from optuna.storages import RDBStorage

from orchestrator.errors import StorageRefused
from orchestrator.folders import SweepFolder
from orchestrator.spec.sweep_spec import Budget, SweepSpec
from orchestrator.study.database import study_database
from orchestrator.study.database.repository import SweepRepository
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial, TrialState
from tests.support.metrics import COMPLETE, evaluated
from tests.support.specs import GRID, make_spec
from trainer.results import StepMetrics

Template = Callable[[Path, SweepSpec], SweepFolder]
STEPS = 6
SPEC = make_spec(GRID, budget=Budget(trials=4))


def drive(folder: SweepFolder) -> None:
    """A driver with perfect workers: each step is told once more after a restart, as a checkpoint would."""
    with Study.open(folder) as study:
        for trial in iter(study.ask, None):
            for step in range(STEPS):
                study.report(trial, [evaluated(step, step / 10 + trial.number)])
            study.tell(trial, COMPLETE)


def forked(work: Callable[[], None]) -> int:
    """Run it in a child; the exit status as os.waitstatus_to_exitcode gives it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def assert_whole(folder: SweepFolder) -> None:
    with Study.open(folder) as study:
        trials = study.trials()
        assert [t.number for t in trials] == [0, 1, 2, 3]
        assert [t.state for t in trials] == [TrialState.COMPLETE] * 4
        assert [t.value for t in trials] == [pytest.approx(0.5 + n) for n in range(4)]
        for trial in trials:
            logged = study.metric_history(trial.number)
            assert logged == [evaluated(step, step / 10 + trial.number) for step in range(STEPS)]
        assert sorted([e.trial for e in study.events() if e.kind == "complete"]) == [0, 1, 2, 3]


INSIDE = [
    (SweepRepository, "add_driver"),
    (SweepRepository, "set_driver_seconds"),
    (SweepRepository, "add_metrics"),
    (SweepRepository, "add_event"),
    (RDBStorage, "create_new_trial"),
    (RDBStorage, "set_trial_intermediate_value"),
    (RDBStorage, "set_trial_user_attr"),
    (RDBStorage, "set_trial_state_values"),
]


@pytest.mark.parametrize(("where", "name"), INSIDE, ids=[name for _, name in INSIDE])
def test_killed_inside_a_write(template: Template, tmp_path: Path, where: type, name: str) -> None:
    folder = template(tmp_path, SPEC)
    for nth in (1, 2, 5):

        def die(nth: int = nth) -> None:
            original, calls = getattr(where, name), [0]

            def deadly(*args: object, **named: object) -> object:
                done = original(*args, **named)
                calls[0] += 1
                if calls[0] == nth:
                    os.kill(os.getpid(), signal.SIGKILL)
                return done

            setattr(where, name, deadly)
            drive(folder)

        assert status(forked(die)) in (-signal.SIGKILL, 0)  # 0: it was not called that often
        with Study.open(folder) as study:  # half-written things would show here
            for trial in study.trials():
                assert trial.state in (TrialState.RUNNING, TrialState.COMPLETE)
                assert (trial.finished_at is None) == (trial.state is TrialState.RUNNING)
    drive(folder)
    assert_whole(folder)


def test_killed_at_twenty_random_instants(template: Template, tmp_path: Path) -> None:
    """SQLite runs its progress handler every few instructions, so the kill lands inside transactions as well."""
    folder, chance, kills = template(tmp_path, SPEC), random.Random(0), 0
    while kills < 20:
        instant = chance.randrange(800)

        def die(instant: int = instant, folder: SweepFolder = folder) -> None:
            instructions = itertools.count()

            def handler() -> int:
                if next(instructions) == instant:
                    os.kill(os.getpid(), signal.SIGKILL)
                return 0

            @sqlalchemy.event.listens_for(sqlalchemy.pool.Pool, "connect")
            def connected(connection: sqlite3.Connection, _: object) -> None:
                connection.set_progress_handler(handler, 10)

            drive(folder)

        ended = status(forked(die))
        assert ended in (-signal.SIGKILL, 0)
        if ended == 0:  # the sweep ended before its instant: the next one begins anew
            assert_whole(folder)
            folder = template(tmp_path / str(kills), SPEC)
        kills += ended != 0
    drive(folder)
    assert_whole(folder)


def test_a_reader_sees_whole_steps_while_the_driver_writes(template: Template, tmp_path: Path) -> None:
    folder = template(tmp_path, SPEC)
    child = forked(lambda: drive(folder))
    steps = seen = 0
    with Study.open(folder) as reader:
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            trials = reader.trials()
            now = sum(t.step for t in trials)
            assert now >= steps, "a step was seen and then was gone"
            for trial in trials:
                assert (trial.value is not None) == (trial.state is TrialState.COMPLETE)
                logged = [p.step for p in reader.metric_history(trial.number)]
                assert logged == list(range(len(logged)))
                assert len(logged) > trial.step or not trial.metrics
            steps, seen = now, seen + 1
    assert seen > 3
    assert_whole(folder)


def test_other_terminals_may_ask_while_the_driver_writes(template: Template, tmp_path: Path) -> None:
    folder = template(tmp_path, SPEC)
    child = forked(lambda: drive(folder))
    with Study.open(folder) as other:
        requested = [other.add_request("prune", str(i), trial=0) for i in range(20)]
    assert status(child) == 0
    with Study.open(folder) as study:
        assert [r.seq for r in study.requests()] == requested
    assert_whole(folder)


def test_metrics_are_in_tracking_before_they_are_committed(template: Template, tmp_path: Path) -> None:
    seen: list[tuple[list[StepMetrics], list[StepMetrics]]] = []
    with Study.open(template(tmp_path, SPEC)) as study:
        trial = study.ask()
        assert isinstance(trial, Trial)
        counted, _ = study.report(
            trial, [evaluated(1, 0.5)], lambda metrics: seen.append((list(metrics), study.metric_history(0)))
        )
        assert seen == [(counted, [])]
        with pytest.raises(ZeroDivisionError):
            study.report(trial, [evaluated(2, 0.6)], _fails)
        assert study.metric_history(0) == counted, "what tracking could not take is not committed"
        study.report(trial, [evaluated(2, 0.6)])
        assert [metrics.step for metrics in study.metric_history(0)] == [1, 2]


def test_an_error_inside_leaves_the_study_usable(template: Template, tmp_path: Path) -> None:
    with Study.open(template(tmp_path, SPEC)) as study:
        trial = study.ask()
        assert trial is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RDBStorage, "set_trial_state_values", _fails)
            study.report(trial, [evaluated(1, 0.5)])
            with pytest.raises(ZeroDivisionError):
                study.tell(trial, COMPLETE)
        assert study.trials()[0].state is TrialState.RUNNING
        assert study.trials()[0].finished_at is None
        assert study.tell(trial, COMPLETE).value == 0.5


def test_a_full_disk_is_a_refusal_in_words_and_loses_nothing(template: Template, tmp_path: Path) -> None:
    folder = template(tmp_path, SPEC)

    def fill() -> None:
        import resource

        with Study.open(folder) as study:
            trial = study.ask()
            assert trial is not None
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            wal = folder.database.with_name("study.db-wal")
            resource.setrlimit(resource.RLIMIT_FSIZE, (wal.stat().st_size, resource.RLIM_INFINITY))
            try:
                for step in range(100):
                    study.report(trial, [evaluated(step, 0.1, **{f"m{i}": 0.1 for i in range(200)})])
            except StorageRefused as error:
                os._exit(42 if "hunter" not in str(error) else 43)
            os._exit(44)

    assert status(forked(fill)) == 42
    with Study.open(folder) as study:
        steps = [p.step for p in study.metric_history(0)]
        assert steps == list(range(len(steps)))


def test_the_file_system_of_a_path_is_known() -> None:
    assert study_database.filesystem_type(Path("/proc/self")) == "proc"
    assert study_database.filesystem_type(Path("/")) not in ("", "proc")


def _fails(*_: object, **__: object) -> None:
    raise ZeroDivisionError
