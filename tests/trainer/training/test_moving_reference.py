"""TR-DPO: a reference model that is moved towards the policy during training."""

import logging
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from trl import DPOConfig

from tests.support.device_waits import packed_engine
from tests.support.small_trials import MODEL, finish, model_bytes, take, trial, without_speed
from trainer.config.trial import TrialConfig
from trainer.data.pair_dataset import PairDataset
from trainer.distributed.processes import CancelToken, ProcessGroup, RunInterrupted
from trainer.forward.pair_model import PairModel
from trainer.objectives.pair_logps import MetricSums
from trainer.results import RunStatus
from trainer.storage import checkpoints
from trainer.training.packed_engine import MovingReference
from trainer.training_session import TrainingSession
from trainer.trl_engine.instrumented_trainers import InstrumentedDpoTrainer, StepCallbacks
from trainer.trl_engine.trl_inputs import RemainingRows, common_arguments, on_one_device

LORA = {"r": 2, "alpha": 4}


def moving(alpha: float = 0.6, every: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "kind": "dpo",
        "sync_ref_model": True,
        "ref_model_mixup_alpha": alpha,
        "ref_model_sync_steps": every,
        **more,
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "model").glob("*.safetensors")
    return load_file(file)


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def rows_of(pairs: PairDataset) -> Any:
    """A function from a pair's index to a row of TRL's collator, without reference log-probs."""

    def row(index: int) -> dict[str, Any]:
        pair = pairs.pair(index)
        return {f"{n}_ids": getattr(pair, n).tolist() for n in ("prompt", "chosen", "rejected")}

    return row


def trained_by_trl(config: TrialConfig, cache: Path, folder: Path, **options: Any) -> tuple[Any, list[MetricSums]]:
    """The weights and the metrics of each update that DPOTrainer makes of the same start, pairs and order."""
    engine, policy = packed_engine(config, cache)
    inputs, plan = engine._inputs, engine.plan  # pyright: ignore[reportPrivateUsage]
    model, emitted = deepcopy(policy.base), list[MetricSums]()
    resources = TrainingSession(cache)._resources  # pyright: ignore[reportPrivateUsage]
    common = common_arguments(config, plan.total_updates, plan.total_updates, folder, cpu=True)
    arguments = DPOConfig(**common, beta=config.loss.beta, max_length=None, **options)  # pyright: ignore
    row = rows_of(inputs.train)
    trainer: Any = InstrumentedDpoTrainer(
        model,
        ref_model=deepcopy(model).eval(),
        args=on_one_device(arguments),
        train_dataset=Dataset.from_list([row(0)]),
        processing_class=resources.load_data(config.data, config.model)[1],
    )
    trainer.train_dataset = RemainingRows(plan, 0, row)
    trainer.callbacks = StepCallbacks(plan, 0, CancelToken(ProcessGroup(), lambda: False), emitted.append)
    trainer.train()
    return dict(model.state_dict()), emitted


@pytest.mark.parametrize(("alpha", "every"), [(0.6, 2), (1.0, 1), (0.25, 3)], ids=["soft", "hard", "slow"])
def test_weights_and_losses_are_those_of_trls_sync_ref_model(
    session: TrainingSession, cache: Path, tmp_path: Path, alpha: float, every: int
) -> None:
    training = {"learning_rate": 1e-3, "max_steps": 6}
    config = trial(moving(alpha, every), training=training)
    found, _ = finish(session.train(config, tmp_path / "ours"))
    theirs, emitted = trained_by_trl(
        trial("dpo", training=training), cache, tmp_path / "trl",
        sync_ref_model=True, ref_model_mixup_alpha=alpha, ref_model_sync_steps=every,
    )  # fmt: skip
    ours = weights(tmp_path / "ours")
    assert apart(ours, {name: theirs[name] for name in ours}) < 2e-6
    for step, sums in zip(found[1:], emitted, strict=True):
        for name in ("loss", "rewards/margins", "rewards/chosen"):
            number, weight = sums[name]
            assert step.metrics[name] == pytest.approx(number / weight, rel=1e-4, abs=2e-5), (step.step, name)
    finish(session.train(trial("dpo", training=training), tmp_path / "still"))
    assert apart(ours, weights(tmp_path / "still")) > 1e-4


def test_a_reference_that_follows_at_once_leaves_the_loss_at_its_start(
    session: TrainingSession, tmp_path: Path
) -> None:
    found, _ = finish(session.train(trial(moving(1.0, 1)), tmp_path))
    for point in found[1:]:
        assert point.metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert point.metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    # Evaluation compares with the initial model, as for every trial.
    assert abs(found[-1].metrics["eval_rewards/margins"]) > 1e-3
    assert session.counters["reference_computed"] == session.counters["reference_loaded"] == 0


@pytest.mark.parametrize("lora", [None, LORA], ids=["weights", "adapters"])
def test_a_reference_that_never_moves_is_dpo_and_is_warned_of(
    session: TrainingSession, tmp_path: Path, caplog: pytest.LogCaptureFixture, lora: dict[str, Any] | None
) -> None:
    with caplog.at_level(logging.WARNING, logger="trainer"):
        still, _ = finish(session.train(trial(moving(every=6), lora=lora), tmp_path / "still"))
    assert "ref_model_sync_steps 6: the reference does not move in 6 updates" in caplog.text
    plain, _ = finish(session.train(trial("dpo", lora=lora), tmp_path / "dpo"))
    assert apart(weights(tmp_path / "still"), weights(tmp_path / "dpo")) < 1e-5
    for one, other in zip(still, plain, strict=True):
        assert one.metrics["eval_loss" if "eval_loss" in one.metrics else "loss"] == pytest.approx(
            other.metrics["eval_loss" if "eval_loss" in one.metrics else "loss"], rel=1e-4
        )


def test_weights_after_a_move_are_the_weighted_mean() -> None:
    policy = {"a": torch.nn.Parameter(torch.tensor([1.0, 2.0])), "b": torch.nn.Parameter(torch.tensor([[3.0]]))}
    loss = trial(moving(0.25, 2)).loss
    reference = MovingReference(loss, policy)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        policy["a"].add_(4.0)
        policy["b"].mul_(2.0)
    reference.after_update(1)
    assert reference.state_dict()["reference.a"].tolist() == [1.0, 2.0]
    with reference.in_model():
        assert (policy["a"].tolist(), policy["b"].tolist()) == ([1.0, 2.0], [[3.0]])
    assert (policy["a"].tolist(), policy["b"].tolist()) == ([5.0, 6.0], [[6.0]])
    reference.after_update(2)
    assert reference.state_dict()["reference.a"].tolist() == [2.0, 3.0]
    assert reference.state_dict()["reference.b"].tolist() == [[3.75]]


def test_micro_batches_and_coupled_pairs_change_nothing(session: TrainingSession, tmp_path: Path) -> None:
    for loss_type in ("sigmoid", "aot"):
        for budget in (60, 10_000):
            training = {"tokens_per_micro_batch": budget, "learning_rate": 1e-3}
            config = trial(moving(loss_type=loss_type), training=training)
            finish(session.train(config, tmp_path / f"{loss_type} {budget}"))
        assert apart(*(weights(tmp_path / f"{loss_type} {budget}") for budget in (60, 10_000))) < 2e-5


def test_an_interruption_while_the_reference_is_in_the_model_leaves_the_policys_weights(cache: Path) -> None:
    engine, policy = packed_engine(trial(moving()), cache)
    engine.step(1)
    before = [p.detach().clone() for p in policy.base.parameters()]

    def interrupted(*_: object) -> None:
        raise RunInterrupted

    engine._inputs.pair_model.logps = interrupted  # type: ignore[method-assign]  # pyright: ignore
    with pytest.raises(RunInterrupted):
        engine.step(2)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.base.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["weights", "adapters", "bfloat16"])
def test_a_resumed_run_has_the_references_weights_to_the_bit(cache: Path, tmp_path: Path, kind: str) -> None:
    """Before and after the reference moved, at every update between two moves."""
    more: dict[str, Any] = {
        "weights": {},
        "adapters": {"lora": LORA | {"dropout": 0.3}},
        "bfloat16": {"model": MODEL | {"dtype": "bfloat16"}},
    }[kind]
    config = trial(moving(every=2), training={"save_steps": 1, "logging_steps": 1}, **more)
    full, _ = finish(TrainingSession(cache).train(config, tmp_path / "whole"))
    for taken in (2, 3, 4, 6):
        begun = take(TrainingSession(cache).train(config, tmp_path / f"{taken}-1"), taken)
        assert without_speed(begun) == without_speed(full[:taken])
        state = checkpoints.load_newest([tmp_path / f"{taken}-1"])
        if state is not None:
            assert {f"reference.{name}" for name in state.weights} <= state.optimizer.keys()
        found, result = finish(TrainingSession(cache).train(config, tmp_path / f"{taken}-2", [tmp_path / f"{taken}-1"]))
        assert result.status is RunStatus.FINISHED
        assert without_speed(found) == without_speed(full)
        assert model_bytes(tmp_path / f"{taken}-2") == model_bytes(tmp_path / "whole")


def test_a_fork_begins_with_the_reference_of_the_run_that_it_continues(
    session: TrainingSession, tmp_path: Path
) -> None:
    """The initial model where that was plain DPO; its moved weights where it was TR-DPO."""
    saved = {"save_steps": 1, "logging_steps": 1}
    for name, loss in (("dpo", {"kind": "dpo"}), ("moving", moving(1.0, 2))):
        take(session.train(trial(loss, training=saved), tmp_path / name), 4)
        fork = trial(moving(every=6, beta=0.3), training=saved)
        forked, _ = finish(session.train(fork, tmp_path / f"from {name}", (), tmp_path / name))
        at = checkpoints.load_newest([tmp_path / name])
        assert at is not None
        margin = next(p for p in forked if p.step == at.step + 1).metrics["rewards/margins"]
        assert (abs(margin) > 1e-3) is (name == "dpo")


@pytest.mark.parametrize("lora", [None, {"r": 8, "alpha": 16, "dropout": 0.5}], ids=["weights", "adapters"])
def test_the_references_log_probs_are_of_its_weights_without_dropout(cache: Path, lora: dict[str, Any] | None) -> None:
    config = trial(moving(every=2), lora=lora, training={"learning_rate": 2e-2, "warmup_ratio": 0.0})
    engine, policy = packed_engine(config, cache)
    indexes = engine.plan.order.pairs_of(1)
    pairs = [engine._inputs.train.pair(i) for i in indexes]  # pyright: ignore[reportPrivateUsage]
    engine.step(1)
    engine.step(2)
    reference = engine.state_dict()
    engine.step(3)
    copied = deepcopy(policy.base).eval()
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            parameter.copy_(reference.get(f"reference.{name}", parameter))
    found = engine._reference(indexes)  # pyright: ignore[reportPrivateUsage]
    assert found is not None
    assert policy.base.training
    expected, now = PairModel(copied).logps(pairs), PairModel(policy.base.eval()).logps(pairs)
    torch.testing.assert_close(found.chosen, expected.chosen, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.rejected, expected.rejected, rtol=1e-6, atol=1e-6)
    assert float((now.chosen - expected.chosen).abs().max()) > 1e-2
