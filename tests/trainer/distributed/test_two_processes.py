"""Two processes against one: the same trial, whether the model is copied or cut into slices. Float32, gloo, CPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.process_pool import Together
from tests.support.small_trials import MODEL, finish, trial, without_speed
from trainer.config.trial import TrialConfig
from trainer.evaluation.evaluator import pair_costs
from trainer.forward.packing import micro_batches
from trainer.results import RunStatus
from trainer.storage import checkpoints
from trainer.training.schedule import DataOrder
from trainer.training_session import TrainingSession

# 7 pairs for two processes; so few tokens at once that they need different numbers of passes.
UNEVEN = {"learning_rate": 1e-3, "pairs_per_update": 7, "num_train_epochs": 2, "tokens_per_micro_batch": 150}
# Of a gradient near zero AdamW's first steps magnify the rounding of sums; this floor lets them vanish.
STEADY = {"adam_epsilon": 1e-4, "adam_beta2": 0.95}
MOVING = {"kind": "dpo", "sync_ref_model": True, "ref_model_sync_steps": 2}


@pytest.fixture(scope="module")
def two(cache: Path) -> Iterator[Together]:
    pair = Together(cache)
    yield pair
    pair.end()


@pytest.fixture(scope="module")
def one(cache: Path) -> TrainingSession:
    return TrainingSession(cache)


def config(
    strategy: str, loss: str | dict[str, Any] = "dpo", training: dict[str, Any] | None = None, **more: Any
) -> TrialConfig:
    return trial(loss, training=UNEVEN | STEADY | {"distributed": strategy} | (training or {}), **more)


def assert_same(theirs: list[tuple[int, dict[str, float]]], ours: list[tuple[int, dict[str, float]]]) -> None:
    assert [step for step, _ in theirs] == [step for step, _ in ours]
    for (step, found), (_, expected) in zip(theirs, ours, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6), f"step {step}"


def assert_same_model(theirs: Path, ours: Path) -> None:
    names = sorted(p.name for p in (ours / "model").glob("*.safetensors"))
    assert names == sorted(p.name for p in (theirs / "model").glob("*.safetensors"))
    for name in names:
        found, expected = load_file(theirs / "model" / name), load_file(ours / "model" / name)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)


CASES = {
    "copies": config("ddp"),
    "slices": config("fsdp2"),
    "slices, computed again": config("fsdp2", "simpo", {"gradient_checkpointing": True}),
    "slices of adapters": config("fsdp2", lora={"r": 1, "alpha": 4}),
    "slices, pairs coupled": config("fsdp2", {"kind": "dpo", "loss_type": "aot"}),
    "copies, KL estimated": config("ddp", "kto"),
    "slices, KL estimated": config("fsdp2", "kto"),
    "copies, reference moved": config("ddp", MOVING),
    "slices, reference moved": config("fsdp2", MOVING),
    "slices of adapters, reference moved": config("fsdp2", MOVING, lora={"r": 1, "alpha": 4}),
    "slices, separate sequences": config("fsdp2", "sft", model=MODEL | {"attention": "separate"}),
}
SLOW = (
    "computed again",
    "copies, KL estimated",
    "pairs coupled",
    "separate sequences",
    "copies, reference moved",
    "adapters, reference moved",
)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case.endswith(SLOW) else []) for case in CASES]
)
def test_two_processes_train_as_one(case: str, two: Together, one: TrainingSession, tmp_path: Path) -> None:
    expected, _ = finish(one.train(CASES[case], tmp_path / "one"))
    ran = two.run(CASES[case], tmp_path / "two")
    assert ran.kind is RunStatus.FINISHED
    assert_same(ran.points, without_speed(expected))
    assert_same_model(tmp_path / "two", tmp_path / "one")
    assert (tmp_path / "two/samples.jsonl").read_text() == (tmp_path / "one/samples.jsonl").read_text()
    found, known = (load_file(tmp_path / n / "eval_pairs.safetensors") for n in ("two", "one"))
    for name, column in known.items():
        torch.testing.assert_close(found[name], column, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("processes", "training"),
    [
        (1, {"gradient_checkpointing": True, "tokens_per_micro_batch": 80}),
        (2, {"distributed": "fsdp2", "gradient_checkpointing": True, "tokens_per_micro_batch": 150}),
        (2, {"distributed": "ddp", "tokens_per_micro_batch": 400}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "-".join(map(str, value.values())),
)
def test_no_arrangement_changes_what_is_learned(
    processes: int, training: dict[str, Any], two: Together, one: TrainingSession, tmp_path: Path
) -> None:
    """Whatever `auto` chooses, losses and final weights are those of one process with whole updates, to rounding."""
    plain, other = config("ddp", training={"tokens_per_micro_batch": 10_000}), config("ddp", training=training)
    expected, _ = finish(one.train(plain, tmp_path / "plain"))
    if processes == 1:
        found = without_speed(finish(one.train(other, tmp_path / "other"))[0])
    else:
        found = two.run(other, tmp_path / "other").points
    assert_same(found, without_speed(expected))
    assert_same_model(tmp_path / "other", tmp_path / "plain")


def test_the_cases_ask_for_different_numbers_of_passes(one: TrainingSession, tmp_path: Path) -> None:
    settings = CASES["slices"]
    prepared, _ = one._resources.load_data(settings.data, settings.model)  # pyright: ignore[reportPrivateUsage]

    class Packed:
        mode = "packed"
        rotary = None

    costs = pair_costs(Packed(), prepared.train)  # pyright: ignore[reportArgumentType]
    order = DataOrder(len(prepared.train), 7, settings.training.seed)
    passes = []
    for step in range(1, 7):
        lengths = [costs[i] for i in order.pairs_of(step)]
        passes.append([len(micro_batches(lengths, range(rank, 7, 2), 150)) for rank in range(2)])
    assert any(a != b for a, b in passes)


@pytest.mark.parametrize(
    ("strategy", "then"),
    [
        pytest.param("ddp", "ddp", marks=pytest.mark.slow),
        ("fsdp2", "fsdp2"),
        pytest.param("ddp", "fsdp2", marks=pytest.mark.slow),
    ],
)
def test_continued_with_another_number_of_processes(
    strategy: str, then: str, two: Together, one: TrainingSession, tmp_path: Path
) -> None:
    """Two processes, one, then two again that may hold the model otherwise."""
    settings = config(strategy, training={"save_steps": 1})
    expected, _ = finish(one.train(settings, tmp_path / "whole"))
    paths = [tmp_path / str(n) for n in range(3)]
    assert two.run(settings, paths[0], take=3).kind is None
    state = checkpoints.load_newest(paths[:1])
    assert state.step == 1
    assert state.weights["model.embed_tokens.weight"].shape == (320, 32)
    run = one.train(settings, paths[1], paths[:1])
    for _ in range(5):
        next(run)
    run.close()
    state = checkpoints.load_newest(paths[:2])
    assert state.step == 3
    last = two.run(config(then, training={"save_steps": 1}), paths[2], paths[:2])
    assert last.kind is RunStatus.FINISHED
    assert_same(last.points, without_speed(expected))
    assert_same_model(paths[2], tmp_path / "whole")
    assert not list(tmp_path.glob("*/checkpoints/*"))


SIXTEEN = {"dtype": "bfloat16"}
ADAPTERS_BESIDE = {"model": MODEL | SIXTEEN, "lora": {"r": 2, "alpha": 4}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        pytest.param("fsdp2", {"model": MODEL | SIXTEEN}, id="weights"),
        pytest.param("fsdp2", ADAPTERS_BESIDE, id="adapters beside them"),
        pytest.param("fsdp2", {"training": {"bf16": True}}, id="autocast"),
    ],
)
def test_slices_of_a_model_in_16_bits(
    strategy: str, more: dict[str, Any], two: Together, one: TrainingSession, tmp_path: Path
) -> None:
    """In full each process rounds its rows by its own chance; adapters are in float32."""
    training = {"learning_rate": 1e-4} | more.get("training", {})
    settings = config(strategy, **(more | {"training": training}))
    expected, _ = finish(one.train(settings, tmp_path / "one"))
    ran = two.run(settings, tmp_path / "two")
    assert ran.kind is RunStatus.FINISHED
    name = "eval_logps/chosen"
    ends = [ran.points[-1][1][name], expected[-1].metrics[name]]
    start = expected[0].metrics[name]
    assert abs(ends[0] - ends[1]) < 0.2 * abs(ends[1] - start) + 0.05
    assert two.run(settings, tmp_path / "again").points == ran.points


def test_a_model_in_4_bits_is_not_cut() -> None:
    four = {"name_or_path": "somewhere", "load_in_4bit": True}
    with pytest.raises(ValueError, match=r"use training\.distributed ddp"):
        config("fsdp2", model=four, lora={})
    assert config("ddp", model=four, lora={}).model.load_in_4bit
