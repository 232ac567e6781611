"""The study: claim, observe, close. Everything else in the house can be lost and made again from it."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Self

from optuna.trial import FrozenTrial
from sqlalchemy import Connection

from orchestrator.errors import StorageRefused
from orchestrator.folders import SweepFolder
from orchestrator.spec.pruners import WilcoxonPruner, compares
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study import lease, reading, records, specs
from orchestrator.study.creating import create_store
from orchestrator.study.driver import Driver
from orchestrator.study.ending import outcome_to_json, settle
from orchestrator.study.errors import NotHeld, TrialFinished
from orchestrator.study.guard import Guard, as_number
from orchestrator.study.held import Held
from orchestrator.study.issue import Issuer
from orchestrator.study.knowing import Known
from orchestrator.study.pruning.decide import Judge, judged
from orchestrator.study.reader import StudyReader
from orchestrator.study.reading import ASKED, MICRO_BATCH, OUTCOME, PAUSED, STARTED, TO_OPTUNA, VALUES
from orchestrator.study.records import NotYet, Trial, TrialRecord
from orchestrator.study.settled import Settled
from orchestrator.study.specs import Change
from orchestrator.study.spending import Spent
from orchestrator.study.state import Outcome
from orchestrator.study.store import Store
from orchestrator.study.watch import Watch
from trainer.report import Point, Verdict


class Study(StudyReader):
    """One sweep's truth. Reading is open to every process (reader.py); the first claim makes this the driver."""

    def __init__(self, folder: SweepFolder, store: Store) -> None:
        super().__init__(folder, store)
        self._driver: Driver | None = None
        self._held: dict[int, Held] = {}
        self._gpus = 1.0
        self._take_spec(self.spec)

    def _take_spec(self, spec: SweepSpec) -> None:
        self.spec = spec
        self._issuer = Issuer(self._store, self._ledger, self._queue, self._study_id, spec, self.settled)

    # --- opening -------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        folder: SweepFolder,
        spec: SweepSpec,
        storage: str | None = None,
        *,
        slots: int = 1,
        train_pairs: int | None = None,
        earlier: Sequence[Known] = (),
    ) -> Self:
        """A new study in `storage` (an SQLAlchemy URL without password); by default the spec's, else SQLite here.

        `slots`: trials at a time, which settles how much a trial may know of the others; `train_pairs`: pairs to train
        on, where rungs are shares of the training; `earlier`: another sweep's trials, for the sampler.
        """
        settled = Settled.of(spec, slots, train_pairs, earlier)
        return cls(folder, create_store(folder, spec, settled, storage or spec.storage))

    def begin(self, gpus: float | None = None) -> None:
        """Drive from now on: older drivers' writes are refused and working time counts. Claiming does so by itself.

        `gpus` are those of a trial's slot; without any, slots are counted in their place. SweepHeld where another
        driver lives; one of another machine that says nothing for a minute does not.
        """
        if gpus is not None:
            self._gpus = gpus or 1.0
        with self._driving():
            pass

    def beat(self) -> None:
        """A sign of life, now and then; SweepHeld where another driver has taken over meanwhile."""
        if self._driver is not None and self._driver.silent >= lease.BEAT:
            self.begin()

    def dispose(self) -> None:
        """Leave the study to the next driver and give the database connections back. Held trials stay RUNNING."""
        if self._driver is not None:
            # What the database refuses here is only a courtesy: the next driver sees that this process has ended.
            with suppress(StorageRefused), self._store.writing() as c:
                self._driver.leave(c)
            self._driver = None
        super().dispose()

    # --- driving -------------------------------------------------------------------------------------------------

    def admit(self, slots: int) -> None:
        """TooManySlots where so many trials at a time are more than this sweep's rule of knowing allows."""
        self.settled.admit(self.spec, slots)

    def claim(self) -> Trial | NotYet | None:
        """The next trial to run: first those a dead or interrupted driver left, then new ones; None: nothing is left.

        NotYet comes while the next one's draw or verdicts depend on a trial that still runs; None when the budget is
        spent or the space exhausted; `exhausted` says which.
        """
        with self._driving() as c:
            frozen = self._frozen()
            trials = [reading.known(trial) for trial in frozen]
            waiting = (t for t in trials if not t.state.finished and not reading.is_paused(frozen[t.number]))
            orphan = next((t for t in waiting if t.number not in self._held), None)
            if orphan is not None:
                issued = self._issuer.again(c, frozen[orphan.number])
            elif self._limit(c, trials):
                issued = None
            elif (waits_for := self._issuer.waits_for(c, trials)) is not None:
                return NotYet(waits_for)
            else:
                issued = self._issuer.new(c, trials)
                trials = trials if issued is None else [reading.known(trial) for trial in self._frozen()]
            if issued is None:
                return None
            trial, trial_id = self._with_memory(issued[0]), issued[1]
            told = [] if orphan is None else self._told(c, trial.number)
            settled = self._issuer.judge(c, trial.number, trials)
            self._ledger.begin_attempt(c, trial.number, trial.attempt, self._gpus)
        watch = self._watch(settled)
        watch.see(told)
        return self._take(trial, trial_id, watch)

    def _take(self, trial: Trial, trial_id: int, watch: Watch) -> Trial:
        number, attempt = trial.number, trial.attempt
        self._held[number] = Held(number, attempt, trial_id, self._gpus, time.monotonic(), watch)
        return trial

    def _told(self, c: Connection, number: int) -> list[Point]:
        """The trial's points as they came, with what they know of each pair."""
        pairs = self._ledger.pairs(c, number)
        return [replace(point, pairs=pairs.get(point.step, "")) for point in self._ledger.points(c, number)]

    def _watch(self, settled: Judge) -> Watch:
        """What stops this trial. In `order: asap` what its pruner knows changes all the time."""

        def judge() -> Judge:
            if self.settled.lag is not None or not compares(self.spec.pruner):
                return settled
            with self._store.reading() as c:
                known = [reading.known(trial) for trial in self._frozen()]
                return self._issuer.judge(c, settled.number, known)

        return Watch(Guard(self.spec.guard, *(goal.metric for goal in self.spec.goals)), judge, settled.goal.metric)

    def reissue(self, trial: Trial, micro_batch: int | None = None, why: str = "") -> Trial:
        """The worker of this trial is lost: the same trial, next attempt. The old attempt can write no more.

        Where it ran out of memory: with at most `micro_batch` tokens, remembered for whatever is issued from now on.
        """
        with self._driving() as c:
            held = self._hold(trial, "another attempt")
            self._worked(c, held)
            if micro_batch is not None:
                self._set(held.trial_id, MICRO_BATCH, micro_batch)
                told = f"attempt {trial.attempt}: {why}; from now on {micro_batch} tokens per micro-batch"
                self._ledger.add_event(c, "out of memory", told, trial.number)
            again, trial_id = self._issuer.again(c, self._store.storage.get_trial(held.trial_id))
            again = self._with_memory(again)
            self._ledger.begin_attempt(c, again.number, again.attempt, self._gpus)
        return self._take(again, trial_id, held.watch)

    def accept(self, trial: Trial, points: Sequence[Point]) -> tuple[list[Point], Verdict]:
        """Which of these points count, and whether to go on after them; for who has to tell others before `observe`.

        Where the trial must stop at a step, nothing beyond it counts, however early it arrived: a sweep that was
        killed in between ends with the same points. Writes nothing; asked again, it answers the same.
        """
        held = self._hold(trial, "points")
        return held.watch.see(points), held.watch.verdict

    def observe(self, trial: Trial, points: Sequence[Point]) -> Verdict:
        """Keep points that are new by their step, and say whether to go on. A step told twice counts once."""
        points, verdict = self.accept(trial, points)
        with self._driving() as c:
            held = self._hold(trial, "points")
            self._worked(c, held)
            known = self._ledger.known_steps(c, trial.number, [p.step for p in points])
            fresh = {p.step: p for p in reversed(points) if p.step not in known}
            if fresh:
                self._ledger.add_points(c, trial.number, list(fresh.values()))
                if isinstance(self.spec.pruner, WilcoxonPruner):
                    self._ledger.add_pairs(c, trial.number, list(fresh.values()))
            looked_at = judged(self.spec).metric
            for step, point in fresh.items():
                if (value := point.metrics.get(looked_at)) is not None:
                    self._store.storage.set_trial_intermediate_value(held.trial_id, step, as_number(value))
        return verdict

    def close(self, trial: Trial, outcome: Outcome) -> TrialRecord:
        """End the trial for good; the record says how it ended. The same again changes nothing, another is refused."""
        asked = outcome_to_json(outcome)
        with self._driving() as c:
            frozen = self._find(trial.number)
            if frozen is not None and frozen.user_attrs.get(ASKED) == asked:
                return self._record(c, frozen)
            held = self._hold(trial, f"closing it as {outcome.state}")
            self._worked(c, held)
            record = self._finish(c, held.trial_id, outcome)
        del self._held[trial.number]
        return record

    def _finish(self, c: Connection, trial_id: int, outcome: Outcome) -> TrialRecord:
        frozen = self._store.storage.get_trial(trial_id)
        _, seen = self._ledger.progress(c).get(frozen.number, (0, {}))
        final, values = settle(outcome, seen, self.spec.goals)
        order = self._ledger.add_event(c, final.state.lower(), final.reason, frozen.number)
        finished = max(time.time(), frozen.user_attrs[STARTED])
        self._set(trial_id, ASKED, outcome_to_json(outcome))
        self._set(trial_id, OUTCOME, outcome_to_json(final) | {"order": order, "finished_at": finished})
        if values is not None:
            self._set(trial_id, VALUES, [str(value) for value in values])  # JSON has no infinity
        self._store.storage.set_trial_state_values(trial_id, TO_OPTUNA[final.state], values)
        return self._record(c, self._store.storage.get_trial(trial_id))

    def release(self, trial: Trial) -> None:
        """The trial is interrupted, not ended: it stays RUNNING and is issued again by a later claim."""
        with self._driving() as c:
            held = self._hold(trial, "releasing it")
            self._worked(c, held)
            self._ledger.add_event(c, "released", f"attempt {trial.attempt} interrupted", trial.number)
        del self._held[trial.number]

    # --- by hand -------------------------------------------------------------------------------------------------

    def pause(self, number: int, why: str) -> None:
        """Put a begun trial aside: it is not issued again before `unpause`. A held one must have checkpointed."""
        with self._driving() as c:
            trial_id = self._unfinished(number, "pausing it")
            if number in self._held:
                self._worked(c, self._held[number])
            self._set(trial_id, PAUSED, why)
            self._ledger.add_event(c, records.PAUSED, why, number)
        self._held.pop(number, None)

    def unpause(self, number: int, why: str) -> None:
        """Have it issued again, before any new trial."""
        with self._driving() as c:
            self._set(self._unfinished(number, "unpausing it"), PAUSED, "")
            self._ledger.add_event(c, records.UNPAUSED, why, number)

    def dismiss(self, number: int, outcome: Outcome) -> TrialRecord:
        """End a begun trial that no worker has."""
        with self._driving() as c:
            record = self._finish(c, self._unfinished(number, f"closing it as {outcome.state}"), outcome)
        self._held.pop(number, None)
        return record

    def rest(self, why: str) -> None:
        """The whole sweep is paused: no working time counts until `wake`."""
        with self._driving() as c:
            self._ledger.add_event(c, records.PAUSED, why, None)
        assert self._driver is not None
        self._driver.rest()

    def wake(self, why: str) -> None:
        """It goes on."""
        assert self._driver is not None
        self._driver.wake()
        with self._driving() as c:
            self._ledger.add_event(c, records.UNPAUSED, why, None)

    # --- the spec ------------------------------------------------------------------------------------------------

    def exhausted(self) -> str:
        """Why no new trial will be issued, in words; empty while there is one to come."""
        with self._store.reading() as c:
            return self._limit(c, [reading.known(trial) for trial in self._frozen()])

    def amend(self, spec: SweepSpec) -> list[Change]:
        """Continue under another spec: budget, resources and the like may change, what makes trials comparable may not.

        Returns the leaves that changed; the old spec stays in the history.
        """
        changed = specs.changes(self.spec, spec)
        if changed:
            with self._driving() as c:
                self._ledger.add_spec(c, spec.model_dump_json(), specs.digest(spec))
                self._ledger.add_event(c, "spec", "; ".join(map(str, changed)), None)
            self._take_spec(spec)
        return changed

    # --- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _driving(self) -> Generator[Connection]:
        if self._driver is None:
            Driver.await_turn(self._ledger, self._store.reading)
            with self._store.writing() as c:
                driver = Driver.begin(self._ledger, c)
            self._driver = driver
        with self._store.writing() as c:
            self._driver.still_mine(c)
            yield c

    def _find(self, number: int) -> FrozenTrial | None:
        return next((t for t in self._frozen() if t.number == number), None)

    def _set(self, trial_id: int, key: str, value: object) -> None:
        self._store.storage.set_trial_user_attr(trial_id, key, value)

    def _with_memory(self, trial: Trial) -> Trial:
        """The trial with what was learned of this machine's memory."""
        return replace(trial, micro_batch=reading.learned_micro_batch(self._frozen()))

    def _hold(self, trial: Trial, asked: str) -> Held:
        held = self._held.get(trial.number)
        if held is not None and held.attempt == trial.attempt:
            return held
        frozen = self._find(trial.number)
        if frozen is not None and frozen.state.is_finished():
            raise TrialFinished(trial.number, reading.FROM_OPTUNA[frozen.state], asked)
        raise NotHeld(trial.number, trial.attempt, None if held is None else held.attempt)

    def _unfinished(self, number: int, asked: str) -> int:
        """Optuna's id of a trial that has begun and not ended."""
        frozen = self._find(number)
        if frozen is None:
            raise NotHeld(number, 0, None)
        if frozen.state.is_finished():
            raise TrialFinished(number, reading.FROM_OPTUNA[frozen.state], asked)
        return self._store.storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _worked(self, c: Connection, held: Held) -> None:
        self._ledger.attempt_worked(c, held.number, held.attempt, held.seconds)

    def _spent(self, c: Connection) -> Spent:
        """Of other processes what they wrote; of this one up to now."""
        if self._driver is None:
            return super()._spent(c)
        written = self._ledger.gpu_seconds(c, but={(h.number, h.attempt) for h in self._held.values()})
        held = sum(h.seconds * h.gpus for h in self._held.values())
        return Spent(self._driver.seconds_of_all(c) / 3600, (written + held) / 3600)

    def _limit(self, c: Connection, trials: Sequence[Known]) -> str:
        return self._issuer.limit(c, trials, self._spent(c))
