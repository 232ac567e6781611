"""What an event costs the driver does not grow with the trials that have ended: statements, rows, files looked at."""

import functools
import sqlite3
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.driver import EVERY, REPORTS, ScriptedTune, spec_of
from dashboards.sweep_reporter import DashboardReporter
from orchestrator.driver.parent_run import RunningDescription
from orchestrator.driver.sweep_driver import AfterTrial
from orchestrator.execution.controller import TrialController
from orchestrator.execution.messages import AttemptReport, AttemptTask
from orchestrator.execution.stop_reasons import SignalHandler
from orchestrator.folders import SweepFolder, create_sweep_folder
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.study.database import driver_lease, study_database
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialState
from tests.support.recorders import ListSink, SilentView

SLOTS, TRIALS = 4, 72


class Counts:
    statements = 0
    rows = 0


class CountingCursor(sqlite3.Cursor):
    def execute(self, *given: Any) -> Any:
        Counts.statements += 1
        return super().execute(*given)

    def executemany(self, *given: Any) -> Any:
        Counts.statements += 1
        return super().executemany(*given)

    def fetchone(self) -> Any:
        row = super().fetchone()
        Counts.rows += row is not None
        return row

    def fetchmany(self, *given: Any) -> Any:
        rows = super().fetchmany(*given)
        Counts.rows += len(rows)
        return rows

    def fetchall(self) -> Any:
        rows = super().fetchall()
        Counts.rows += len(rows)
        return rows


class CountingConnection(sqlite3.Connection):
    def cursor(self, factory: type[sqlite3.Cursor] = CountingCursor) -> sqlite3.Cursor:
        return super().cursor(factory)


class Measured(TrialController):
    """Notes what every event took of the database, by kind and by the number of trials that had ended."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.ended = 0
        self.taken: list[tuple[str, int, int, int]] = []

    def next_attempt(self, slots: int) -> AttemptTask | None:
        return self._count("start", lambda: super(Measured, self).next_attempt(slots))

    def on_report(self, task_id: str, report: AttemptReport) -> bool:
        evaluated = any(name.startswith("eval_") for step_metrics in report.metrics for name in step_metrics.metrics)
        kind = "end" if report.result is not None else "evaluation" if evaluated else "report"
        goes_on = self._count(kind, lambda: super(Measured, self).on_report(task_id, report))
        self.ended += not goes_on
        return goes_on

    def _count(self, kind: str, call: Callable[[], Any]) -> Any:
        statements, rows = Counts.statements, Counts.rows
        found = call()
        self.taken.append((kind, self.ended, Counts.statements - statements, Counts.rows - rows))
        return found


@contextmanager
def driving(root: Path, trials: int, slots: int) -> Generator[tuple[Measured, Study]]:
    """A whole sweep, every event counted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver_lease, "HEARTBEAT_SECONDS", 1e6)  # no thread's statements between those that are counted
        patch.setattr(study_database.sqlite3, "connect", functools.partial(sqlite3.connect, factory=CountingConnection))
        spec = spec_of(trials, slots)
        folder = SweepFolder(root, spec.name)
        create_sweep_folder(folder, dump_spec(spec))
        study = Study.create(folder, spec, slots=slots, train_pairs=10_000)
        sink, view = ListSink(), SilentView()
        after = AfterTrial(study, sink, DashboardReporter())
        patch.setattr(RunningDescription, "update", lambda _: None)  # bounded by its share of the time instead
        with study, SignalHandler(lambda: "") as signals:
            controller = Measured(study, sink, view, signals, finalize_config=lambda c, _: c, on_trial_end=after)
            ScriptedTune(controller, slots, paced=False).run(lambda bucket: None)
            yield controller, study


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Measured, Study]]:
    with driving(tmp_path_factory.mktemp("runs"), TRIALS, SLOTS) as found:
        yield found


def test_the_script_is_a_sweep(driven: tuple[Measured, Study]) -> None:
    controller, study = driven
    records = study.trials()
    assert len(records) == TRIALS == controller.ended
    states = {record.state for record in records}
    assert states == {TrialState.COMPLETE, TrialState.PRUNED}, "the pruner looks and acts"
    assert [kind for kind, *_ in controller.taken].count("report") > TRIALS * (REPORTS - REPORTS // EVERY - 3)
    assert sum(statements for _, _, statements, _ in controller.taken) > 1000, "they are counted"
    assert sum(rows for *_, rows in controller.taken) > 1000


@pytest.mark.parametrize("kind", ["report", "evaluation", "end", "start"])
def test_an_event_costs_the_same_at_the_end_as_at_the_beginning(driven: tuple[Measured, Study], kind: str) -> None:
    controller, _ = driven
    early = [(s, r) for k, ended, s, r in controller.taken if k == kind and SLOTS <= ended < TRIALS // 3]
    late = [(s, r) for k, ended, s, r in controller.taken if k == kind and ended >= TRIALS - TRIALS // 3 - SLOTS]
    assert len(early) > 5 < len(late)
    assert max(statements for statements, _ in late) <= max(statements for statements, _ in early)
    assert max(rows for _, rows in late) <= max(rows for _, rows in early)


def test_a_report_writes_one_row_of_each_table_and_reads_whether_it_may(driven: tuple[Measured, Study]) -> None:
    controller, _ = driven
    reports = [(statements, rows) for kind, _, statements, rows in controller.taken if kind == "report"]
    # begin; the fence; the driver's time; the attempt's time; the point; its trial's last values
    assert set(reports) == {(6, 1)}


def test_an_event_costs_the_same_however_many_trials_are_open(driven: tuple[Measured, Study], tmp_path: Path) -> None:
    few, _ = driven
    with driving(tmp_path, 6 * SLOTS, 4 * SLOTS) as (many, _):
        for kind in ("report", "evaluation", "start", "end"):
            most = max((s, r) for k, _, s, r in few.taken if k == kind)
            assert max((s, r) for k, _, s, r in many.taken if k == kind) <= most, kind


def test_ended_trials_are_read_once_and_an_undone_transaction_is_forgotten(driven: tuple[Measured, Study]) -> None:
    _, study = driven
    study.snapshots()
    before = Counts.rows
    assert len(study.snapshots()) == TRIALS
    assert Counts.rows - before < 10
    with pytest.raises(RuntimeError), study._database.transaction():  # pyright: ignore[reportPrivateUsage]
        raise RuntimeError("undone")
    before = Counts.rows
    assert len(study.snapshots()) == TRIALS
    assert Counts.rows - before > TRIALS
