"""The study: claim, observe, close. Everything else in the house can be lost and made again from it.

The trials in the hands of this process's workers: how each is held, put aside, given back and ended.

A study that this process drives: newer drivers fence it off, working time counts, and its spec may be amended.
"""

from __future__ import annotations

import functools
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
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study import sweep_terms, trial_records
from orchestrator.study.database import driver_lease, optuna_trials
from orchestrator.study.database.driver_lease import Driver, Heartbeat
from orchestrator.study.database.optuna_trials import (
    ASKED,
    MICRO_BATCH,
    OUTCOME,
    PAUSE_REASON,
    STARTED,
    TO_OPTUNA,
    VALUES,
)
from orchestrator.study.database.study_database import Store, create_store
from orchestrator.study.pruning.divergence_guard import Guard, as_number
from orchestrator.study.pruning.pruner import Judge, judged
from orchestrator.study.reader import StudyReader
from orchestrator.study.running_trial import Held, NotHeld, Told, TrialFinished, Watch, outcome_to_json, settle
from orchestrator.study.sweep_terms import Change, Settled, Spent
from orchestrator.study.trial_issuer import Issuer
from orchestrator.study.trial_records import PAUSED, UNPAUSED, NotYet, Outcome, Trial, TrialRecord
from orchestrator.study.trial_snapshots import Known
from trainer.results import Point, Verdict


class DrivenStudy(StudyReader):
    """One sweep's truth with the right to change it, taken by the first call that needs it."""

    def __init__(self, folder: SweepFolder, store: Store) -> None:
        super().__init__(folder, store)
        self._driver: Driver | None = None
        self._heart: Heartbeat | None = None
        self._gpus = 1.0
        self._take_spec(self.spec)

    def _take_spec(self, spec: SweepSpec) -> None:
        self.spec = spec
        self._issuer = Issuer(self._remembered, self._ledger, self._queue, spec, self.settled)

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
        """Called now and then while waiting: SweepHeld where another driver has taken over meanwhile."""
        if self._driver is not None and (self._driver.fenced or self._driver.silent >= driver_lease.BEAT):
            self.begin()

    @property
    def fenced(self) -> bool:
        """Whether another driver has taken over from this one, which has noticed."""
        return self._driver is not None and self._driver.fenced

    def check_fence(self) -> None:
        """SweepHeld where another driver has taken over from this one; for what is told elsewhere than in the study.

        From any thread. The database is asked only where this driver was silent for so long that it may be.
        """
        driver = self._driver
        if driver is not None and (driver.fenced or driver.silent >= driver_lease.PATIENCE / 2):
            with self._store.beside() as c:
                driver.still_mine(c)

    def dispose(self) -> None:
        """Leave the study to the next driver and give the database connections back. Held trials stay RUNNING."""
        if self._heart is not None:
            self._heart.end()
            self._heart = None
        if self._driver is not None:
            # What the database refuses here is only a courtesy: the next driver sees that this process has ended.
            with suppress(StorageRefused), self._store.writing() as c:
                self._driver.leave(c)
            self._driver = None
        super().dispose()

    def rest(self, why: str) -> None:
        """The whole sweep is paused: no working time counts until `wake`."""
        with self._driving() as c:
            self._ledger.add_event(c, PAUSED, why, None)
        assert self._driver is not None
        self._driver.rest()

    def wake(self, why: str) -> None:
        """It goes on."""
        assert self._driver is not None
        self._driver.wake()
        with self._driving() as c:
            self._ledger.add_event(c, UNPAUSED, why, None)

    # --- the spec ------------------------------------------------------------------------------------------------

    def admit(self, slots: int) -> None:
        """TooManySlots where so many trials at a time are more than this sweep's rule of knowing allows."""
        self.settled.admit(self.spec, slots)

    def exhausted(self) -> str:
        """Why no new trial will be issued, in words; empty while there is one to come."""
        with self._store.reading() as c:
            return self._limit(c, self._remembered.known())

    def tried(self) -> str:
        """Why there is nothing left to try, however much time there is, in words; empty while there is."""
        with self._store.reading() as c:
            return self._issuer.tried(c, self._remembered.known())

    def amend(self, spec: SweepSpec) -> list[Change]:
        """Continue under another spec: budget, resources and the like may change, what makes trials comparable may not.

        Returns the leaves that changed; the old spec stays in the history.
        """
        changed = sweep_terms.changes(self.spec, spec)
        if changed:
            with self._driving() as c:
                self._ledger.add_spec(c, spec.model_dump_json(), sweep_terms.digest(spec))
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
            self._driver, self._heart = driver, Heartbeat(functools.partial(self._show_life, driver))
            self._remembered.alone()
        with self._store.writing() as c:
            self._driver.still_mine(c)
            yield c

    @contextmanager
    def _writing(self) -> Generator[Connection]:
        """A driver's notes and answers to requests are refused too once another one has taken over."""
        with super()._writing() if self._driver is None else self._driving() as c:
            yield c

    def _show_life(self, driver: Driver) -> None:
        with self._store.beside() as c:
            driver.beat(c)

    def _limit(self, c: Connection, trials: Sequence[Known]) -> str:
        return self._issuer.limit(c, trials, lambda: self._spent(c))


class HoldingStudy(DrivenStudy):
    """A driven study that knows which trials its workers have."""

    def __init__(self, folder: SweepFolder, store: Store) -> None:
        super().__init__(folder, store)
        self._held: dict[int, Held] = {}

    def begun(self, trial: Trial) -> None:
        """A worker has begun with this trial: GPU time counts from now on, not from when it was issued. The first call
        counts."""
        self._hold(trial, "beginning it").begin()

    def close(self, trial: Trial, outcome: Outcome, worker: str = "") -> TrialRecord:
        """End the trial for good; the record says how it ended. The same again changes nothing, another is refused.

        `worker`: by which it was trained, noted beside its end.
        """
        asked = outcome_to_json(outcome)
        with self._driving() as c:
            frozen = self._find(trial.number)
            if frozen is not None and frozen.user_attrs.get(ASKED) == asked:
                return self._record(c, frozen)
            held = self._hold(trial, f"closing it as {outcome.state}")
            self._worked(c, held)
            record = self._finish(c, held.trial_id, outcome)
            if worker:
                self._ledger.add_event(c, "worker", worker, trial.number)
        del self._held[trial.number]
        return record

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
            self._set(trial_id, PAUSE_REASON, why)
            self._ledger.add_event(c, trial_records.PAUSED, why, number)
        self._held.pop(number, None)

    def unpause(self, number: int, why: str) -> None:
        """Have it issued again, before any new trial."""
        with self._driving() as c:
            self._set(self._unfinished(number, "unpausing it"), PAUSE_REASON, "")
            self._ledger.add_event(c, trial_records.UNPAUSED, why, number)

    def dismiss(self, number: int, outcome: Outcome) -> TrialRecord:
        """End a begun trial that no worker has."""
        with self._driving() as c:
            record = self._finish(c, self._unfinished(number, f"closing it as {outcome.state}"), outcome)
        self._held.pop(number, None)
        return record

    # --- inside --------------------------------------------------------------------------------------------------

    def _finish(self, c: Connection, trial_id: int, outcome: Outcome) -> TrialRecord:
        frozen = self._remembered.trial(trial_id)
        _, seen = self._ledger.progress_of(c, frozen.number)
        final, values = settle(outcome, seen, self.spec.goals)
        order = self._ledger.add_event(c, final.state.lower(), final.reason, frozen.number)
        finished = max(time.time(), frozen.user_attrs[STARTED])
        self._set(trial_id, ASKED, outcome_to_json(outcome))
        self._set(trial_id, OUTCOME, outcome_to_json(final) | {"order": order, "finished_at": finished})
        if values is not None:
            self._set(trial_id, VALUES, [str(value) for value in values])  # JSON has no infinity
        self._remembered.finish(trial_id, TO_OPTUNA[final.state], values)
        return self._record(c, self._remembered.trial(trial_id))

    def _find(self, number: int) -> FrozenTrial | None:
        frozen = self._frozen()
        return frozen[number] if number < len(frozen) else None

    def _set(self, trial_id: int, key: str, value: object) -> None:
        self._remembered.set(trial_id, key, value)

    def _hold(self, trial: Trial, asked: str) -> Held:
        held = self._held.get(trial.number)
        if held is not None and held.attempt == trial.attempt:
            return held
        frozen = self._find(trial.number)
        if frozen is not None and frozen.state.is_finished():
            raise TrialFinished(trial.number, optuna_trials.FROM_OPTUNA[frozen.state], asked)
        raise NotHeld(trial.number, trial.attempt, None if held is None else held.attempt)

    def _unfinished(self, number: int, asked: str) -> int:
        """Optuna's id of a trial that has begun and not ended."""
        frozen = self._find(number)
        if frozen is None:
            raise NotHeld(number, 0, None)
        if frozen.state.is_finished():
            raise TrialFinished(number, optuna_trials.FROM_OPTUNA[frozen.state], asked)
        return self._remembered.id_of(number)

    def _worked(self, c: Connection, held: Held) -> None:
        self._ledger.attempt_worked(c, held.number, held.attempt, held.seconds)

    def _spent(self, c: Connection) -> Spent:
        """Of other processes what they wrote; of this one up to now."""
        if self._driver is None:
            return super()._spent(c)
        written = self._ledger.gpu_seconds(c, but={(h.number, h.attempt) for h in self._held.values()})
        held = sum(h.seconds * h.gpus for h in self._held.values())
        return Spent(self._driver.seconds_of_all(c) / 3600, (written + held) / 3600)


class Study(HoldingStudy):
    """One sweep's truth. Reading is open to every process (reader.py); the first claim makes this the driver.

    driven.py has the right to write and the spec, holding.py how trials end and are put aside.
    """

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

    def claim(self) -> Trial | NotYet | None:
        """The next trial to run: first those a dead or interrupted driver left, then new ones; None: nothing is left.

        NotYet comes while the next one's draw or verdicts depend on a trial that still runs; None when the budget is
        spent or the space exhausted; `exhausted` says which.
        """
        with self._driving() as c:
            trials = self._remembered.known()
            waiting = (t for t in self._remembered.unfinished() if not optuna_trials.is_paused(t))
            orphan = next((t for t in waiting if t.number not in self._held), None)
            if orphan is not None:
                issued = self._issuer.again(c, orphan)
            elif self._limit(c, trials):
                issued = None
            elif (waits_for := self._issuer.waits_for(c, trials)) is not None:
                return NotYet(waits_for)
            else:
                issued = self._issuer.new(c, trials)
                trials = trials if issued is None else self._remembered.known()
            if issued is None:
                return None
            trial, trial_id = self._with_memory(issued[0]), issued[1]
            told = [] if orphan is None else self._told(c, trial.number)
            settled = self._issuer.judge(c, trial.number, trials)
            self._ledger.begin_attempt(c, trial.number, trial.attempt, self._gpus)
        watch = self._watch(settled, -1 if trial.fork is None else trial.fork.step)
        watch.see(told)
        return self._take(trial, trial_id, watch)

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
            again, trial_id = self._issuer.again(c, self._remembered.trial(held.trial_id))
            again = self._with_memory(again)
            self._ledger.begin_attempt(c, again.number, again.attempt, self._gpus)
        return self._take(again, trial_id, held.watch)

    def learn_micro_batch(self, tokens: int | None, why: str) -> None:
        """Before the first trial memory ran out: from now on at most so many tokens; None: that did not help either."""
        with self._driving() as c:
            self._remembered.set_study(MICRO_BATCH, tokens)
            told = "one pair was too much" if tokens is None else f"from now on {tokens} tokens per micro-batch"
            self._ledger.add_event(c, "out of memory", f"sft: {why}; {told}" if why else f"sft: {told}", None)

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
            held.begin()
            self._worked(c, held)
            before, held.told = held.told or self._ledger.told(c, trial.number), None
            fresh = {p.step: p for p in reversed(points) if p.step not in before.steps}
            after = self._add(c, held, list(fresh.values()), before) if fresh else before
        held.told = after
        return verdict

    # --- inside --------------------------------------------------------------------------------------------------

    def _add(self, c: Connection, held: Held, fresh: Sequence[Point], before: Told) -> Told:
        after = self._ledger.add_points(c, held.number, fresh, before)
        if isinstance(self.spec.pruner, WilcoxonPruner):
            self._ledger.add_pairs(c, held.number, fresh)
        looked_at = judged(self.spec).metric
        for point in fresh:
            if (value := point.metrics.get(looked_at)) is not None:
                self._remembered.evaluated(held.trial_id, point.step, as_number(value))
        return after

    def _take(self, trial: Trial, trial_id: int, watch: Watch) -> Trial:
        number, attempt = trial.number, trial.attempt
        self._held[number] = Held(number, attempt, trial_id, self._gpus, watch)
        return trial

    def _told(self, c: Connection, number: int) -> list[Point]:
        """The trial's points as they came, with what they know of each pair."""
        pairs = self._ledger.pairs(c, number)
        return [replace(point, pairs=pairs.get(point.step, "")) for point in self._ledger.points(c, number)]

    def _watch(self, settled: Judge, inherited: int) -> Watch:
        """What stops this trial. In `order: asap` what its pruner knows changes all the time."""

        def judge() -> Judge:
            if self.settled.lag is not None or not compares(self.spec.pruner):
                return settled
            with self._store.reading() as c:
                return self._issuer.judge(c, settled.number, self._remembered.known())

        guard = Guard(self.spec.guard, *(goal.metric for goal in self.spec.goals))
        return Watch(guard, judge, settled.goal.metric, inherited=inherited)

    def _with_memory(self, trial: Trial) -> Trial:
        """The trial with what was learned of this machine's memory."""
        return replace(trial, micro_batch=self._learned())
