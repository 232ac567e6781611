"""`StudyReader`: reads a study from any process and adds requests and events; needs no driver's lease."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

from optuna.trial import FrozenTrial
from sqlalchemy import Connection

from orchestrator.errors import NoTrialCompleted, StorageRefused, StudyMissing
from orchestrator.folders import SweepFolder
from orchestrator.spec.requirements import find_violations
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study import retried_trials
from orchestrator.study.confirmation import Confirmation, parse_confirmation
from orchestrator.study.database import optuna_trials
from orchestrator.study.database.driver_lease import has_ended
from orchestrator.study.database.enqueued_trials import EnqueuedTrial, TrialQueue
from orchestrator.study.database.optuna_trials import MICRO_BATCH, OptunaTrials
from orchestrator.study.database.repository import AttemptRow, SweepRepository
from orchestrator.study.database.study_database import StudyDatabase, study_exists, study_url
from orchestrator.study.database.tables import OLDEST_SCHEMA, SCHEMA
from orchestrator.study.repeats import front_of_configurations, rank_configurations
from orchestrator.study.sweep_terms import EARLIEST_TERMS, TERMS_KEY, SweepTerms, Usage
from orchestrator.study.trial_records import (
    DRIVER_EVENT,
    ISSUED,
    PAUSED,
    RELEASED,
    REQUESTED_EVENT,
    STOPPING,
    UNPAUSED,
    Event,
    Fork,
    Request,
    RequestKind,
    SpecVersion,
    TrialRecord,
    TrialState,
    best_of,
    requirements_text,
)
from orchestrator.study.trial_snapshots import TrialSnapshot
from trainer.results import StepMetrics

CONFIRMATION = "confirmation"
"""Key among the study's user attributes."""


class StudyReader:
    """One sweep's study, for reading and for requests to the driver. `Study` adds what the driver writes."""

    def __init__(self, folder: SweepFolder, database: StudyDatabase) -> None:
        self.folder = folder
        self._database = database
        self._repository = SweepRepository(folder.name)
        self._queue = TrialQueue(folder.name)
        with database.snapshot() as connection:
            row = self._repository.sweep_row(connection)
            versions = self._repository.spec_versions(connection)
            attrs = {} if row is None else database.storage.get_study_user_attrs(row.study_id)
        if row is None:
            raise StudyMissing(database.url)
        if row.schema > SCHEMA:
            raise StorageRefused(
                f"{database.url}: the study was written by a later version of this program; use that one"
            )
        if row.schema < OLDEST_SCHEMA:
            raise StorageRefused(
                f"{database.url}: the study was written by an earlier version of this program with other "
                "fingerprints of trials; read it and finish it with that version"
            )
        if row.schema < SCHEMA:
            database.upgrade()
        self.id: str = row.id
        """Unique to this sweep, also if another sweep gets the same name."""
        self._study_id = row.study_id
        self._optuna_trials = OptunaTrials(database.storage, row.study_id)
        database.on_rollback = self._optuna_trials.invalidate
        self.terms = SweepTerms.from_json(attrs[TERMS_KEY]) if TERMS_KEY in attrs else EARLIEST_TERMS
        self.spec = SweepSpec.from_stored(versions[-1].text)
        self._first_spec = self.spec if len(versions) == 1 else SweepSpec.from_stored(versions[0].text)

    # --- opening -------------------------------------------------------------------------------------------------

    @staticmethod
    def exists(folder: SweepFolder) -> bool:
        """Return whether the sweep has a study, in its folder or in another database; not if partly created."""
        return study_exists(study_url(folder), folder.name)

    @classmethod
    def open(cls, folder: SweepFolder, *, read_only: bool = False) -> Self:
        """Open the study of an existing sweep. Raises StudyMissing.

        `read_only`: for commands that only look; the folder may belong to another user.
        """
        return cls(folder, StudyDatabase(study_url(folder), read_only=read_only))

    def dispose(self) -> None:
        """Close the database connections. Running trials stay RUNNING."""
        self._database.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.dispose()

    @contextmanager
    def at_one_moment(self) -> Generator[None]:
        """Read everything in the context from one state of the database, over one connection. Nothing is written."""
        with self._database.snapshot(), self._optuna_trials.reading_once():
            yield

    # --- reading -------------------------------------------------------------------------------------------------

    def trials(self) -> list[TrialRecord]:
        """Return every trial issued so far, by number."""
        with self._database.snapshot() as connection:
            progress, seconds = self._repository.progress(connection), self._repository.trial_seconds(connection)
            frozen = self._frozen()
            attrs = self._optuna_trials.study_attrs()
        order = self.spec.search.paths
        records = [
            optuna_trials.to_record(trial, *progress.get(trial.number, (0, {})), order, seconds.get(trial.number, 0.0))
            for trial in frozen
        ]
        found = parse_confirmation(attrs.get(CONFIRMATION))
        return records if found is None else [_with_confirmation(record, found) for record in records]

    def confirmation(self) -> Confirmation | None:
        """Return the comparison of the finalists; None before it was made."""
        with self._database.snapshot():
            return parse_confirmation(self._optuna_trials.study_attrs().get(CONFIRMATION))

    def trial(self, number: int) -> TrialRecord | None:
        """Return one trial; None if it was not issued yet."""
        with self._database.snapshot() as connection:
            frozen = self._frozen()
            return self._record(connection, frozen[number]) if number < len(frozen) else None

    def snapshots(self) -> list[TrialSnapshot]:
        """Return every trial as samplers and pruners see it."""
        with self._database.snapshot():
            return self._optuna_trials.snapshots()

    def metric_history(self, number: int, after: int = -1) -> list[StepMetrics]:
        """Return the metrics of a trial after step `after`, by step."""
        with self._database.snapshot() as connection:
            return self._repository.metric_history(connection, number, after)

    def last_steps(self) -> dict[int, int]:
        """Return the last step of every trial that has metrics."""
        with self._database.snapshot() as connection:
            return self._repository.last_steps(connection)

    def metrics_after(self, steps: Mapping[int, int]) -> tuple[dict[int, int], dict[int, list[StepMetrics]]]:
        """Return what was reported since an earlier call, in one reading of the database.

        Args:
            steps: The last step of every trial at that call.

        Returns:
            The last step of every trial that has metrics, and by trial the metrics after `steps`; of a trial that began
            again, all of them.
        """
        with self._database.snapshot() as connection:
            last, found = self._repository.last_steps(connection), dict[int, list[StepMetrics]]()
            for number, step in sorted(last.items()):
                known = steps.get(number, -1)
                if step != known:
                    after = known if step > known else -1
                    found[number] = self._repository.metric_history(connection, number, after)
        return last, found

    def attempts(self, number: int) -> list[AttemptRow]:
        """Return the attempts at a trial, oldest first."""
        with self._database.snapshot() as connection:
            return self._repository.attempts(connection, number)

    def trials_at_work(self) -> set[int]:
        """Return the trials that the newest driver issued and has neither ended nor released.

        Other RUNNING trials wait for a worker, or for the next driver.
        """
        issued: set[int | None] = set()
        for event in self.events():
            if event.kind == DRIVER_EVENT:
                issued.clear()
            elif event.kind == ISSUED:
                issued.add(event.trial)
            elif event.kind in (RELEASED, PAUSED):
                issued.discard(event.trial)
        return {
            record.number for record in self.trials() if record.state is TrialState.RUNNING and record.number in issued
        }

    def initial_metrics(self, beside: TrialRecord | None = None) -> dict[str, float]:
        """Return the initial model's metrics: those at step 0 of the first trial that has any; empty before.

        `beside`: the record that they are compared with; for a finalist they are those on the rows of the finalists.
        """
        of = None if beside is None else beside.finalist_of
        for record in self.trials():
            if (record.finalist_of is None) != (of is None):
                continue
            history = self.metric_history(record.number)
            if record.fork is None and history and history[0].step == 0:
                return dict(history[0].metrics)
        return {}

    def violations(self, number: int, spec: SweepSpec) -> dict[str, float]:
        """Return by how much a trial's last metrics miss each requirement of `spec`, which may be another sweep's."""
        with self._database.snapshot() as connection:
            return self._violations(connection, number, spec)

    def best(self) -> TrialRecord | None:
        """Return the configuration with the best objective; with several objectives, the first of the Pareto front.

        None if none is complete, or if each breaks a requirement.
        """
        return best_of(self.ranked())

    def ranked(self) -> list[TrialRecord]:
        """Return the complete configurations, best first; those that break a requirement last."""
        return rank_configurations(self.trials(), self.spec)

    def no_best(self) -> NoTrialCompleted:
        """Return the error of a command that needs the best trial where there is none, with the reason."""
        name = self.folder.name
        if text := requirements_text(self.ranked()):
            return NoTrialCompleted(f"{name}: {text[:1].lower()}{text[1:]}")
        return NoTrialCompleted(f"no trial of {name} has completed yet")

    def breaks(self, number: int) -> tuple[str, ...]:
        """Return the requirements that a trial's last metrics break, also before its end, as value and bound."""
        record = self.trial(number)
        if record is None or not self.spec.require:
            return ()
        return replace(record, violations=self.violations(number, self.spec)).breaks

    def pareto_front(self) -> list[TrialRecord]:
        """Return the configurations on the Pareto front; with one objective, the best."""
        return front_of_configurations(self.trials(), self.spec)

    def events(self, after: int = 0) -> list[Event]:
        """Return the events after event number `after`, in order."""
        with self._database.snapshot() as connection:
            return self._repository.events(connection, after)

    def consecutive_bugs(self) -> tuple[int, str]:
        """Return how many of the last ended trials failed with the same BUG in a row, and its text."""
        with self._database.snapshot():
            return optuna_trials.consecutive_bugs(self._frozen())

    def failed_alike(self, same_bug: str) -> list[int]:
        """Return the failed trials for which the last driver stopped, whose reason begins with `same_bug`."""
        with self._database.snapshot() as connection:
            return retried_trials.failed_alike(self._frozen(), self._repository.events(connection, 0), same_bug)

    def micro_batch_limit(self) -> int | None:
        """Return the limit on tokens per micro-batch that out-of-memory errors have set; None without any."""
        with self._database.snapshot():
            return self._micro_batch_limit()

    def usage(self) -> Usage:
        """Return the working time of all drivers and the GPU time of all attempts."""
        with self._database.snapshot() as connection:
            return self._usage(connection)

    def pause_reason(self) -> str:
        """Return why the whole sweep is paused; "" if it is not."""
        with self._database.snapshot() as connection:
            last = self._repository.last_event(connection, (DRIVER_EVENT, PAUSED, UNPAUSED))
        return last.text if last is not None and last.kind == PAUSED else ""

    def will_be_paused(self, trial: int | None = None) -> bool:
        """Return whether the whole sweep is paused, or will be once its driver has done what was requested last.

        `trial`: whether this running trial will be.
        """
        pauses = (RequestKind.PAUSE, RequestKind.UNPAUSE)
        with self._database.snapshot() as connection:
            if trial is not None:
                pending = [request for request in self._repository.requests(connection) if request.trial == trial]
                return next((r.kind == RequestKind.PAUSE for r in reversed(pending) if r.kind in pauses), False)
            events = [event for event in self._repository.events(connection, 0) if event.trial is None]
        for event in reversed(events):
            asked = event.text.partition(":")[0] if event.kind == REQUESTED_EVENT else ""
            if asked in pauses:
                return asked == RequestKind.PAUSE
            if event.kind in (DRIVER_EVENT, PAUSED, UNPAUSED):
                return event.kind == PAUSED
        return False

    def stop_reason(self) -> str:
        """Return why the last driver ended; "" after a new one started or continued, or if the sweep is finished."""
        with self._database.snapshot() as connection:
            last = self._repository.last_event(connection, (DRIVER_EVENT, STOPPING, UNPAUSED))
        return last.text if last is not None and last.kind == STOPPING else ""

    def driver_has_ended(self) -> bool:
        """Return whether the last driver has certainly ended; False for one of another machine that may be alive."""
        with self._database.snapshot() as c:
            row = self._repository.sweep_row(c)
            token = 0 if row is None else row.driver
            return token == 0 or has_ended(self._repository.holder(c, token))

    def spec_history(self) -> list[SpecVersion]:
        """Return every spec this sweep ran with, oldest first."""
        with self._database.snapshot() as connection:
            return self._repository.spec_versions(connection)

    def judgements(self) -> list[str]:
        """Return all judgements as the JSON passed to `save_judgement`, by trial and key."""
        with self._database.snapshot() as connection:
            return self._repository.judgements(connection)

    # --- writing, from any process -------------------------------------------------------------------------------

    def add_event(self, kind: str, text: str, trial: int | None = None) -> int:
        """Add an event to the history; return its number."""
        with self._transaction() as connection:
            return self._repository.add_event(connection, kind, text, trial)

    def enqueue(
        self,
        params: Mapping[str, Any],
        origin: str,
        *,
        kind: str,
        parent: int | None = None,
        fork: Fork | None = None,
    ) -> EnqueuedTrial:
        """Enqueue a trial: it runs before those that the sampler proposes, and on top of `budget.trials`.

        Args:
            params: Settings over the base, checked by `orchestrator.spec.search.manual_trials`.
            origin: Who enqueued the trial and why, as text.
            kind: Kind of the event in the history: "enqueued" or "cloned".
            parent: The trial that it is a clone of.
            fork: The checkpoint of `parent` that it continues from.
        """
        with self._transaction() as connection:
            seq = self._queue.add(connection, params, origin, by_command=True, parent=parent, fork=fork)
            self._repository.add_event(connection, kind, origin, parent)
            return next(enqueued for enqueued in self._queue.all(connection) if enqueued.seq == seq)

    def enqueued_trials(self) -> list[EnqueuedTrial]:
        """Return every enqueued trial; waiting ones have no trial number yet."""
        with self._database.snapshot() as connection:
            return self._queue.all(connection)

    def save_judgement(self, trial: int, key: str, judgement: str) -> None:
        """Store a judgement of a trial; an older one with the same key is replaced."""
        with self._transaction() as connection:
            self._repository.save_judgement(connection, trial, key, judgement)

    def add_request(self, kind: str, text: str = "", trial: int | None = None) -> int:
        """Add a request to the driver; return its number. `kind`: a `RequestKind`."""
        with self._transaction() as connection:
            return self._repository.add_request(connection, str(kind), text, trial)

    def requests(self) -> list[Request]:
        """Return the pending requests, oldest first."""
        with self._database.snapshot() as connection:
            return self._repository.requests(connection)

    def complete_request(self, seq: int) -> None:
        """Mark a request as completed."""
        with self._transaction() as connection:
            self._repository.complete_request(connection, seq)

    # --- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Generator[Connection]:
        with self._database.transaction() as connection:
            self._repository.sweep_row(connection, lock=True)
            yield connection

    def _frozen(self) -> list[FrozenTrial]:
        return self._optuna_trials.trials()

    def _find(self, number: int) -> FrozenTrial | None:
        frozen = self._frozen()
        return frozen[number] if number < len(frozen) else None

    def _micro_batch_limit(self) -> int | None:
        by_sft = self._optuna_trials.study_attrs().get(MICRO_BATCH)
        by_trials = optuna_trials.micro_batch_limit(self._frozen())
        return min((tokens for tokens in (by_sft, by_trials) if tokens is not None), default=None)

    def _record(self, connection: Connection, frozen: FrozenTrial) -> TrialRecord:
        progress = self._repository.progress_of(connection, frozen.number)
        seconds = self._repository.seconds_of_trial(connection, frozen.number)
        return optuna_trials.to_record(frozen, *progress, self.spec.search.paths, seconds)

    def _violations(self, connection: Connection, number: int, spec: SweepSpec) -> dict[str, float]:
        """Return by how much a trial's last metrics miss each requirement of `spec`, with the metrics at its step 0.

        A fork, which has no step 0, is compared with the initial model of the first trial that has one.
        """
        if not spec.require:
            return {}
        _, metrics = self._repository.progress_of(connection, number)
        numbers = [number, *(trial.number for trial in self._frozen())]
        histories = (self._repository.metric_history(connection, each)[:1] for each in numbers)
        initial = next((history[0].metrics for history in histories if history and history[0].step == 0), {})
        return find_violations(spec.require, metrics, initial)

    def _usage(self, connection: Connection) -> Usage:
        return Usage(
            self._repository.total_driver_seconds(connection) / 3600, self._repository.gpu_seconds(connection) / 3600
        )


def _with_confirmation(record: TrialRecord, found: Confirmation) -> TrialRecord:
    """Return the record with what the comparison of the finalists says of its configuration."""
    if record.finalist_of is None:
        return record
    mean = next((value.mean for value in found.values if value.of == record.finalist_of), None)
    interval = (mean.low, mean.high) if mean is not None and record.number in found.trials else None
    return replace(record, is_recommended=record.finalist_of == found.recommended, confirmed_interval=interval)
