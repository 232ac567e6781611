"""Claim, observe, close, crash, reopen, take over, in any order: no trial and no step is ever lost or doubled."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from orchestrator.errors import SweepHeld
from orchestrator.folders import SweepFolder
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.running_trial import AttemptSuperseded, TrialFinished
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial, TrialState
from tests.support import IN_MEMORY
from tests.support.metrics import COMPLETE, DIVERGED, bug
from tests.support.specs import GRID, METRIC, make_spec
from trainer.results import StepMetrics

SPEC = make_spec(GRID)
ENDINGS = {"complete": COMPLETE, "diverged": DIVERGED, "bug": bug("KeyError")}


class Machine(RuleBasedStateMachine):
    """The study against a model of it made of dicts."""

    copy: Callable[[Path, SweepSpec], SweepFolder]
    live = Bundle("live")
    stale = Bundle("stale")

    @initialize()
    def begin(self) -> None:
        self.place = tempfile.TemporaryDirectory(dir=IN_MEMORY)
        self.folder = self.copy(Path(self.place.name), SPEC)
        self.study = Study.open(self.folder)
        self.attempts: dict[int, int] = {}
        self.held: dict[int, int] = {}
        self.points: dict[int, dict[int, float]] = {}
        self.ended: dict[int, TrialState] = {}

    def teardown(self) -> None:
        self.study.dispose()
        self.place.cleanup()

    @rule(target=live)
    def ask(self) -> Any:
        trial = self.study.ask()
        lost = sorted(n for n in self.attempts if n not in self.held and n not in self.ended)
        if lost:
            assert (trial.number, trial.attempt) == (lost[0], self.attempts[lost[0]] + 1)
        elif len(self.attempts) < 4:
            assert (trial.number, trial.attempt) == (len(self.attempts), 1)
        else:
            assert trial is None
            return multiple()
        self.attempts[trial.number] = self.held[trial.number] = trial.attempt
        self.points.setdefault(trial.number, {})
        return trial

    @rule(trial=live, steps=st.lists(st.integers(0, 6), max_size=4), value=st.floats(0, 1))
    def report(self, trial: Trial, steps: list[int], value: float) -> None:
        metrics = [StepMetrics(step, {METRIC: value, "loss": value}) for step in steps]
        if self.held.get(trial.number) != trial.attempt:
            with pytest.raises((AttemptSuperseded, TrialFinished)):
                self.study.report(trial, metrics)
            return
        assert not self.study.report(trial, metrics)[1].stop
        for step in steps:
            self.points[trial.number].setdefault(step, value)

    @rule(trial=live, how=st.sampled_from(sorted(ENDINGS)))
    def tell(self, trial: Trial, how: str) -> None:
        if self.held.get(trial.number) != trial.attempt:
            if self.ended.get(trial.number) is None:
                with pytest.raises(AttemptSuperseded):
                    self.study.tell(trial, ENDINGS[how])
            return
        record = self.study.tell(trial, ENDINGS[how])
        del self.held[trial.number]
        expected, has_value = ENDINGS[how].state, bool(self.points[trial.number])
        if expected is TrialState.COMPLETE and not has_value:
            expected = TrialState.FAILED
        assert record.state is expected
        self.ended[trial.number] = expected

    @rule(trial=consumes(live), target=live)
    def retry(self, trial: Trial) -> Any:
        if self.held.get(trial.number) != trial.attempt:
            with pytest.raises((AttemptSuperseded, TrialFinished)):
                self.study.retry(trial)
            return multiple()
        again = self.study.retry(trial)
        self.attempts[trial.number] = self.held[trial.number] = again.attempt
        return multiple(trial, again)

    @rule(trial=live)
    def release(self, trial: Trial) -> None:
        if self.held.get(trial.number) != trial.attempt:
            with pytest.raises((AttemptSuperseded, TrialFinished)):
                self.study.release(trial)
            return
        self.study.release(trial)
        del self.held[trial.number]

    @rule()
    def crash(self) -> None:
        """The driver is gone without a word; somebody opens the study again."""
        self.study.dispose()
        self.study = Study.open(self.folder)
        self.held.clear()

    @rule()
    def taken_over(self) -> None:
        """Another driver claims while this one sleeps; this one wakes up and is refused."""
        with Study.open(self.folder) as other:
            trial = other.ask()
            if trial is not None:
                self.attempts[trial.number] = trial.attempt
                self.points.setdefault(trial.number, {})
            other.add_event("took over", "for a moment")
        if self.study._driver is not None:  # pyright: ignore[reportPrivateUsage]
            with pytest.raises(SweepHeld):
                self.study.ask()
        self.crash()

    @rule()
    def what_the_driver_remembers_is_what_the_database_says(self) -> None:
        with Study.open(self.folder) as fresh:
            assert repr(self.study.snapshots()) == repr(fresh.snapshots())  # NaN is like NaN
            assert repr(self.study.trials()) == repr(fresh.trials())

    @invariant()
    def nothing_lost_nothing_doubled(self) -> None:
        if not hasattr(self, "study"):
            return
        records = self.study.trials()
        assert [t.number for t in records] == list(range(len(self.attempts)))
        for record in records:
            assert record.attempts == self.attempts[record.number]
            assert record.state is self.ended.get(record.number, TrialState.RUNNING)
            logged = {p.step: p.metrics["loss"] for p in self.study.metric_history(record.number)}
            assert logged == self.points[record.number]
            last = max(logged, default=None)
            assert record.step == (last or 0)
            assert record.metrics.get(METRIC) == (None if last is None else logged[last])
            if record.state is TrialState.COMPLETE:
                assert record.value == record.metrics[METRIC]


def test_any_order_of_events(template: Callable[[Path, SweepSpec], SweepFolder]) -> None:
    Machine.copy = staticmethod(template)
    case = Machine.TestCase
    case.settings = settings(
        max_examples=10,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    case().runTest()
