"""A sweep whose next trial has to wait: the slot is idle, nothing hangs, and two slots do what one does."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import TooManySlots
from orchestrator.execution.slots import Slots
from orchestrator.execution.stop_reasons import StopKind
from orchestrator.spec.pruners import SuccessiveHalvingPruner
from orchestrator.spec.samplers import Reproducible, TpeSampler
from orchestrator.spec.sweep_spec import Budget
from orchestrator.study.study import Study
from tests.support.fake_session import SLOTS, run_study, write_script
from tests.support.specs import make_spec, sweep_folder

SPEC = make_spec(
    {"training.seed": {"int_uniform": [0, 40]}},
    sampler=TpeSampler(seed=1, n_startup_trials=2),
    pruner=SuccessiveHalvingPruner(rungs=(2,), reduction_factor=2),
    order=Reproducible(lag=2),
    budget=Budget(trials=5),
)


def ran(root: Path, slots: Slots, **script: Any) -> list[Any]:
    write_script(root, **script)
    with Study.create(sweep_folder(root), SPEC, slots=slots.count) as study:
        stop = run_study(study, slots=slots)
        assert stop.kind is StopKind.FINISHED
        assert stop.text == "5 of 5 trials issued"
        return [(t.number, dict(t.params), t.state, t.reason, t.step) for t in study.trials()]


def test_a_slot_waits_for_what_the_next_trial_must_know(tmp_path: Path, ray_cluster: None) -> None:
    two = ran(tmp_path / "two", SLOTS)
    assert two == ran(tmp_path / "one", Slots(count=1, gpus=0.0, threads=1))
    assert len(two) == 5
    assert any("the best one continues" in row[3] for row in two), "some trial was pruned"


def test_more_slots_than_the_order_allows_are_refused(tmp_path: Path) -> None:
    with Study.create(sweep_folder(tmp_path), SPEC, slots=2) as study:
        slots = Slots(count=3, gpus=0.0, threads=1)
        with pytest.raises(TooManySlots, match="at most 2 trials can run at a time, not 3"):
            run_study(study, slots=slots)
    with pytest.raises(TooManySlots):
        Study.create(sweep_folder(tmp_path / "other"), SPEC, slots=3)
