"""tpe and hyperband under any order of events: every draw and every decision is that of the sweep left alone."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator.errors import SweepHeld
from orchestrator.folders import SweepFolder
from orchestrator.spec.pruners import HyperbandPruner
from orchestrator.spec.samplers import Reproducible, TpeSampler
from orchestrator.spec.sweep_spec import Budget, SweepSpec
from orchestrator.study.running_trial import AttemptSuperseded, TrialFinished
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Outcome, Trial, TrialState, WaitForTrial
from tests.support import IN_MEMORY
from tests.support.metrics import COMPLETE
from tests.support.specs import BASE, METRIC, RANGES, make_spec
from trainer.results import StepMetrics

STEPS, TRIALS, LAG = 4, 9, 3
SPEC = make_spec(
    RANGES,
    base={**BASE, "training": {"max_steps": STEPS}},
    sampler=TpeSampler(seed=3, n_startup_trials=2),
    pruner=HyperbandPruner(min_resource=1, reduction_factor=2),
    order=Reproducible(lag=LAG),
    budget=Budget(trials=TRIALS),
)


def point(trial: Trial, step: int) -> StepMetrics:
    """What the trial says there: a function of its settings, so that all runs of it are alike."""
    value = round(0.9 - 0.1 * abs(trial.params["loss.beta"] - 2.5) - 0.05 / (step + 1) * (trial.number % 3), 6)
    return StepMetrics(step, {METRIC: value, "loss": 0.5})


def advance(study: Study, trial: Trial, step: int) -> bool:
    """Tell one step; whether the trial ended there."""
    _, decision = study.report(trial, [point(trial, step)])
    if decision.stop:
        study.tell(trial, Outcome(TrialState.PRUNED, decision.reason, diverged=decision.diverged))
    elif step == STEPS:
        study.tell(trial, COMPLETE)
    return decision.stop or step == STEPS


def table(study: Study) -> list[Any]:
    return [(t.number, dict(t.params), t.state, t.reason, t.value, t.step) for t in study.trials()]


def left_alone(folder: SweepFolder) -> list[Any]:
    with Study.open(folder) as study:
        while isinstance(trial := study.ask(), Trial):
            for step in range(STEPS + 1):
                if advance(study, trial, step):
                    break
        return table(study)


class Machine(RuleBasedStateMachine):
    copy: Callable[[Path, SweepSpec], SweepFolder]
    alone: list[Any]

    @initialize()
    def begin(self) -> None:
        self.place = tempfile.TemporaryDirectory(dir=IN_MEMORY)
        self.folder = self.copy(Path(self.place.name), SPEC)
        self.study = Study.open(self.folder)
        self.held: dict[int, tuple[Trial, int]] = {}
        self.stale: list[Trial] = []

    def teardown(self) -> None:
        """However it was left, it can be brought to its end, and the end is the same."""
        for _ in range(TRIALS * (STEPS + 3)):
            self.ask()
            if not self.held:
                break
            self.tell(0, 0)
        assert table(self.study) == self.alone
        self.study.dispose()
        self.place.cleanup()

    @precondition(lambda self: len(self.held) < LAG)
    @rule()
    def ask(self) -> None:
        if len(self.held) >= LAG:
            return
        trial = self.study.ask()
        if isinstance(trial, WaitForTrial):
            assert trial.number in self.held, "what is waited for runs"
        elif trial is not None:
            self.held[trial.number] = (trial, 0)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, LAG), back=st.integers(0, 2))
    def tell(self, which: int, back: int) -> None:
        """The next step, after a few that were told before, as a worker does that continues from a checkpoint."""
        number = sorted(self.held)[which % len(self.held)]
        trial, step = self.held[number]
        for again in range(max(0, step - back), step):
            assert not self.study.report(trial, [point(trial, again)])[1].stop
        if advance(self.study, trial, step):
            self.stale.append(self.held.pop(number)[0])
        else:
            self.held[number] = (trial, step + 1)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, LAG), release=st.booleans())
    def lose_a_worker(self, which: int, release: bool) -> None:
        number = sorted(self.held)[which % len(self.held)]
        trial, _ = self.held.pop(number)
        self.stale.append(trial)
        if release:
            self.study.release(trial)
        else:
            self.held[number] = (self.study.retry(trial), 0)

    @rule()
    def crash(self) -> None:
        self.stale += [trial for trial, _ in self.held.values()]
        self.held.clear()
        self.study.dispose()
        self.study = Study.open(self.folder)

    @rule()
    def lose_the_lease(self) -> None:
        """Another driver takes over; this one wakes up, is refused, and the other one dies too."""
        with Study.open(self.folder) as other:
            other.start_driving()
        if self.study._driver is not None:  # pyright: ignore[reportPrivateUsage]
            with pytest.raises(SweepHeld):
                self.study.ask()
        self.crash()

    @precondition(lambda self: self.stale)
    @rule()
    def a_late_worker_is_refused(self) -> None:
        with pytest.raises((AttemptSuperseded, TrialFinished)):
            self.study.report(self.stale[-1], [point(self.stale[-1], STEPS)])

    @invariant()
    def as_if_left_alone(self) -> None:
        if not hasattr(self, "study"):
            return
        for mine, theirs in zip(table(self.study), self.alone, strict=False):
            assert mine[:2] == theirs[:2]
            if mine[2].is_final:
                assert mine == theirs


def test_any_order_of_events_ends_in_the_same_table(
    template: Callable[[Path, SweepSpec], SweepFolder], tmp_path: Path
) -> None:
    Machine.copy = staticmethod(template)
    Machine.alone = left_alone(template(tmp_path, SPEC))
    states = {row[2] for row in Machine.alone}
    assert states == {TrialState.COMPLETE, TrialState.PRUNED}, "the test is about verdicts too"
    case = Machine.TestCase
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    case.settings = settings(max_examples=6, stateful_step_count=25, deadline=None, suppress_health_check=checks)
    case().runTest()
