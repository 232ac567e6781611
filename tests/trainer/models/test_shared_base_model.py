"""Several trials in one process over one frozen base: each is what it would be alone, to the bit."""

import gc
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.small_trials import finish, model_bytes, trial, without_speed
from trainer.config.trial import ModelConfig, TrialConfig
from trainer.models.policy_model import SharedBaseModel
from trainer.results import ModelError, RunResult, RunStatus, StepMetrics
from trainer.training_session import TrainingSession

LORA = {"r": 4, "alpha": 8, "target_modules": "all-linear"}
TRIALS: dict[str, TrialConfig] = {
    "simpo": trial("simpo", lora=LORA),
    "dpo, dropout": trial({"kind": "dpo", "beta": 0.3}, lora=LORA | {"dropout": 0.2}, training={"seed": 3}),
    "rank 2, checkpointed": trial(
        "orpo",
        lora={"r": 2, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "down_proj"]},
        training={"learning_rate": 1e-2, "gradient_checkpointing": True, "logging_steps": 2},
    ),
    "reference moved": trial(
        {"kind": "dpo", "sync_ref_model": True, "ref_model_sync_steps": 2}, lora=LORA, training={"bf16": True}
    ),
    "autocast": trial("simpo", lora=LORA | {"r": 8}, training={"bf16": True, "pairs_per_update": 5}),
}
Told = tuple[list[tuple[int, dict[str, float]]], RunStatus, dict[str, bytes]]
Course = Generator[StepMetrics, None, RunResult]


@pytest.fixture(scope="module")
def alone(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    """Each trial in a training session of its own."""
    out: dict[str, Told] = {}
    for name, config in TRIALS.items():
        folder = tmp_path_factory.mktemp("alone")
        metrics, result = finish(TrainingSession(cache).train(config, folder))
        out[name] = (without_speed(metrics), result.status, model_bytes(folder))
    return out


def in_turn(curves: Mapping[str, Course]) -> dict[str, tuple[list[StepMetrics], RunResult]]:
    """A point of each, again and again, until all have ended."""
    metrics: dict[str, list[StepMetrics]] = {name: [] for name in curves}
    out: dict[str, tuple[list[StepMetrics], RunResult]] = {}
    while len(out) < len(curves):
        for name, plan in curves.items():
            if name not in out:
                try:
                    metrics[name].append(next(plan))
                except StopIteration as end:
                    out[name] = metrics[name], end.value
    return out


@pytest.mark.parametrize("names", [("simpo", "dpo, dropout"), tuple(TRIALS)], ids=["two", "all"])
def test_trials_in_turn_over_one_base_are_what_each_is_alone(
    cache: Path, tmp_path: Path, alone: dict[str, Told], names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    bases: list[SharedBaseModel] = []
    made = SharedBaseModel.__init__

    def optuna_trials(base: SharedBaseModel, *given: Any) -> None:
        bases.append(base)
        made(base, *given)

    monkeypatch.setattr(SharedBaseModel, "__init__", optuna_trials)
    first_session = TrainingSession(cache)
    sessions = {name: first_session.sibling() for name in names}
    curves = {name: sessions[name].train(TRIALS[name], tmp_path / name) for name in names}
    first = {name: next(plan) for name, plan in curves.items()}
    (base,) = bases
    weights = {parameter.data_ptr() for parameter in base._model.parameters()}
    start = [parameter.detach().clone() for parameter in base._model.parameters()]
    for session in sessions.values():
        policy = session._resources._policy
        frozen = [p for p in policy[1].base.parameters() if not p.requires_grad]
        assert {p.data_ptr() for p in frozen} == weights
        assert all(p.data_ptr() not in weights for p in policy[1].trainable_parameters().values())
    ended = in_turn(curves)
    for name in names:
        metrics, result = ended[name]
        assert (without_speed([first[name], *metrics]), result.status, model_bytes(tmp_path / name)) == alone[name]
    for parameter, before in zip(base._model.parameters(), start, strict=True):
        assert torch.equal(parameter, before)
    counters = first_session.counters
    assert (counters["model_loaded"], counters["data_loaded"], counters["trials"]) == (1, 1, len(names))


def test_what_befalls_one_trial_leaves_its_neighbours_alone(
    cache: Path, tmp_path: Path, alone: dict[str, Told]
) -> None:
    """One is pruned, one raises, one is interrupted and goes on in another process; one runs through it all."""
    first_session = TrainingSession(cache)
    sessions = [first_session.sibling() for _ in range(4)]
    stays = sessions[0].train(TRIALS["dpo, dropout"], tmp_path / "stays")
    pruned = sessions[1].train(TRIALS["autocast"], tmp_path / "pruned")
    raises = sessions[2].train(TRIALS["simpo"], tmp_path / "raises")
    stopped = sessions[3].train(TRIALS["rank 2, checkpointed"], tmp_path / "stopped")
    metrics = [next(stays)]
    for plan in (pruned, raises, stopped):
        next(plan)
    metrics.append(next(stays))
    next(pruned)
    pruned.close()
    metrics.append(next(stays))
    next(stopped)
    sessions[3].interrupt()
    metrics.append(next(stays))
    told_before, result = finish(stopped)
    assert result.status is RunStatus.STOPPED
    with pytest.raises(ZeroDivisionError):
        raises.throw(ZeroDivisionError)

    # The training sessions that are free now take the next trials.
    again = sessions[1].train(TRIALS["rank 2, checkpointed"], tmp_path / "again", [tmp_path / "stopped"])
    simpo = sessions[2].train(TRIALS["simpo"], tmp_path / "simpo")
    ended = in_turn({"dpo, dropout": stays, "rank 2, checkpointed": again, "simpo": simpo})
    ended["dpo, dropout"] = (metrics + ended["dpo, dropout"][0], ended["dpo, dropout"][1])
    for name, folder in {"dpo, dropout": "stays", "rank 2, checkpointed": "again", "simpo": "simpo"}.items():
        given, result = ended[name]
        assert (without_speed(given), result.status, model_bytes(tmp_path / folder)) == alone[name]
    assert (first_session.counters["model_loaded"], told_before) == (1, [])


def test_only_adapters_are_trained_over_a_shared_base(cache: Path, tmp_path: Path) -> None:
    session = TrainingSession(cache).sibling()
    with pytest.raises(ModelError, match="can only be trained with `lora`"):
        finish(session.train(trial("simpo"), tmp_path / "full"))
    metrics, result = finish(session.train(TRIALS["simpo"], tmp_path / "adapters"))
    assert result.status is RunStatus.FINISHED
    assert metrics


def test_another_model_is_another_base_and_goes_with_its_last_trial(cache: Path, tmp_path: Path) -> None:
    first_session, other = TrainingSession(cache), TRIALS["simpo"].model_dump()
    other["model"]["generated"]["seed"] = 5
    one, two = first_session.sibling(), first_session.sibling()
    curves = [
        one.train(TRIALS["simpo"], tmp_path / "one"),
        two.train(TrialConfig.model_validate(other), tmp_path / "two"),
    ]
    first = [next(plan).metrics["eval_margins/logp"] for plan in curves]
    assert first[0] != first[1]
    assert first_session.counters["model_loaded"] == 2
    for plan in curves:
        plan.close()
    known: Mapping[ModelConfig, SharedBaseModel] = first_session._resources._all_bases
    assert len(known) == 2
    del one, two, curves
    gc.collect()
    assert not known
