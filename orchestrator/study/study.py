"""The study: claim, observe, close. Everything else in the house can be lost and made again from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from sqlalchemy import Connection

from orchestrator.folders import SweepFolder
from orchestrator.spec.pruners import WilcoxonPruner, compares
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study import reading
from orchestrator.study.creating import create_store
from orchestrator.study.guard import Guard, as_number
from orchestrator.study.held import Held, Told
from orchestrator.study.holding import HoldingStudy
from orchestrator.study.knowing import Known
from orchestrator.study.pruning.decide import Judge, judged
from orchestrator.study.reading import MICRO_BATCH
from orchestrator.study.records import NotYet, Trial
from orchestrator.study.settled import Settled
from orchestrator.study.watch import Watch
from trainer.report import Point, Verdict


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
            waiting = (t for t in self._remembered.unfinished() if not reading.is_paused(t))
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
