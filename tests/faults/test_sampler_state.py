"""Case 3: a killed sweep's sampler knows what the one left alone knows: it keeps no state but the study."""

from pathlib import Path

import optuna

from orchestrator.folders import SweepFolder
from orchestrator.study.study import Study
from tests.support.local_driver import KILLED, drive, forked, killed_at
from tests.support.specs import make_spec
from tests.support.sweep_record import differences, study_record

SPACE = {"training.learning_rate": {"log_uniform": [1e-6, 1e-3]}, "training.seed": {"int_uniform": [0, 40]}}


def test_suggestions_after_a_kill_are_those_of_the_sweep_left_alone(fast_tmp_path: Path) -> None:
    spec = make_spec(SPACE, sampler={"kind": "tpe", "seed": 5, "n_startup_trials": 2}, budget={"trials": 6})
    calm, stormy = fast_tmp_path / "calm", fast_tmp_path / "stormy"
    for root in (calm, stormy):
        root.mkdir()
    assert forked(lambda: drive(calm, spec)) == 0
    kills = 0
    while killed_at(lambda: drive(stormy, spec), "trial.closed:2") == KILLED:
        kills += 1
    assert kills >= 2
    assert forked(lambda: drive(stormy, spec)) == 0
    assert differences(study_record(calm, "s"), study_record(stormy, "s")) == []
    with Study.open(SweepFolder(stormy, "s")) as study:
        logged = {r.number: r.value for r in study.trials()}
    theirs = optuna.load_study(study_name="s", storage=f"sqlite:///{stormy / 's' / 'study.db'}")
    assert {t.number: t.value for t in theirs.trials} == logged, "Optuna's own view is the study's"
    assert len(logged) == 6
