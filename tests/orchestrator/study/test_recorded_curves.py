"""Recorded curves: the file keeps them, and their replay chooses as a sweep does."""

import math
from pathlib import Path

import pytest

from benchmarks.recorded import EVALUATIONS, UPDATES, RecordedTask, RecordedTrial, read_tasks, task_spec, write_tasks
from benchmarks.replay import best_of, replay_pruner, replay_sampler
from orchestrator.spec.pruners import MedianPruner, NoPruner
from orchestrator.spec.samplers import RandomSampler
from trainer.metrics import ANSWER_LENGTH, CHOSEN, COMPARISON_METRIC, EXACT_ANSWERS, REPETITION

STEPS = range(0, UPDATES + 1, UPDATES // EVALUATIONS)


def trial(number: int, accuracy: float, answers: float, until: int = UPDATES) -> RecordedTrial:
    metrics = {
        at: {
            COMPARISON_METRIC: round(0.5 + (accuracy - 0.5) * at / UPDATES, 5),
            EXACT_ANSWERS: answers if at else 0.4,
            CHOSEN: -0.6,
            REPETITION: 0.0,
            ANSWER_LENGTH: 6.0,
        }
        for at in STEPS
        if at <= until
    }
    params = {
        "loss.beta": 1.0 + number,
        "loss.gamma_beta_ratio": 0.1 * number,
        "loss.sft_weight": 0.3 * number,
        "training.learning_rate": 1e-3,
    }
    return RecordedTrial(params, metrics, {}, answers if until == UPDATES else None, 1.0)


@pytest.fixture
def task() -> RecordedTask:
    rising = [trial(number, 0.52 + 0.02 * number, 0.45) for number in range(8)]
    return RecordedTask(0.4, [*rising, trial(8, 0.9, 0.1), trial(9, 0.95, 0.45, until=UPDATES // 2)])


def test_a_file_gives_back_what_was_recorded(task: RecordedTask, tmp_path: Path) -> None:
    assert read_tasks(tmp_path / "none.json") == {}
    write_tasks({"simpo": task, "dpo": RecordedTask(0.3, [])}, tmp_path / "recorded.json")
    assert read_tasks(tmp_path / "recorded.json") == {"simpo": task, "dpo": RecordedTask(0.3, [])}


def test_a_diverged_trial_has_no_value_where_it_was_not_evaluated(task: RecordedTask) -> None:
    values = task.trials[9].curve.values
    assert [at for at, value in values.items() if math.isnan(value)] == [at for at in STEPS if at > UPDATES // 2]


def test_without_a_pruner_every_order_ships_the_best_that_keeps_the_requirements(task: RecordedTask) -> None:
    spec = task_spec("simpo")
    assert best_of(spec, task) == 7  # 8 answers too few prompts right, 9 diverged
    outcomes = [replay_pruner(spec, task, NoPruner(), seed) for seed in range(5)]
    assert {outcome.winner for outcome in outcomes} == {7}
    assert all(outcome.saved == pytest.approx(0.04) for outcome in outcomes)  # the diverged trial's last updates


def test_a_pruner_saves_updates_of_recorded_trials(task: RecordedTask) -> None:
    outcome = replay_pruner(task_spec("simpo"), task, MedianPruner(n_startup_trials=1), 0)
    assert outcome.saved > 0.04
    assert outcome.winner == 7


def test_a_proposal_is_answered_by_the_nearest_recorded_trial(task: RecordedTask) -> None:
    outcome = replay_sampler(task_spec("simpo"), task, RandomSampler(seed=1), NoPruner())
    assert outcome.winner is not None
    assert outcome.winner < 8
