"""Several trials in one process over one frozen base: each is what it would be alone, to the bit."""

from __future__ import annotations

import gc
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small_trials import finish, model_bytes, told, trial

from trainer.config.trial import ModelConfig, TrialConfig
from trainer.models.policy_model import SharedBase
from trainer.results import Ending, EndKind, ModelError, Point
from trainer.training_session import Workshop

LORA = {"r": 4, "alpha": 8, "target_modules": "all-linear"}
TRIALS: dict[str, TrialConfig] = {
    "simpo": trial("simpo", lora=LORA),
    "dpo, dropout": trial({"kind": "dpo", "beta": 0.3}, lora=LORA | {"dropout": 0.2}, training={"seed": 3}),
    "rank 2, checkpointed": trial(
        "orpo",
        lora={"r": 2, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "down_proj"]},
        training={"learning_rate": 1e-2, "gradient_checkpointing": True, "logging_steps": 2},
    ),
    "autocast": trial("simpo", lora=LORA | {"r": 8}, training={"bf16": True, "pairs_per_update": 5}),
}
Told = tuple[list[tuple[int, dict[str, float]]], EndKind, dict[str, bytes]]
Course = Generator[Point, None, Ending]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def alone(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    """Each trial in a workshop of its own."""
    out: dict[str, Told] = {}
    for name, config in TRIALS.items():
        folder = tmp_path_factory.mktemp("alone")
        points, ending = finish(Workshop(cache).train(config, folder))
        out[name] = (told(points), ending.kind, model_bytes(folder))
    return out


def in_turn(courses: Mapping[str, Course]) -> dict[str, tuple[list[Point], Ending]]:
    """A point of each, again and again, until all have ended."""
    points: dict[str, list[Point]] = {name: [] for name in courses}
    out: dict[str, tuple[list[Point], Ending]] = {}
    while len(out) < len(courses):
        for name, course in courses.items():
            if name not in out:
                try:
                    points[name].append(next(course))
                except StopIteration as end:
                    out[name] = points[name], end.value
    return out


@pytest.mark.parametrize("names", [("simpo", "dpo, dropout"), tuple(TRIALS)], ids=["two", "four"])
def test_trials_in_turn_over_one_base_are_what_each_is_alone(
    cache: Path, tmp_path: Path, alone: dict[str, Told], names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    bases: list[SharedBase] = []
    made = SharedBase.__init__

    def remembered(base: SharedBase, *given: Any) -> None:
        bases.append(base)
        made(base, *given)

    monkeypatch.setattr(SharedBase, "__init__", remembered)
    hall = Workshop(cache)
    shops = {name: hall.beside() for name in names}
    courses = {name: shops[name].train(TRIALS[name], tmp_path / name) for name in names}
    first = {name: next(course) for name, course in courses.items()}
    (base,) = bases
    weights = {parameter.data_ptr() for parameter in base._model.parameters()}
    start = [parameter.detach().clone() for parameter in base._model.parameters()]
    for shop in shops.values():
        live = shop._stock._live
        assert live is not None
        frozen = [p for p in live[1].base.parameters() if not p.requires_grad]
        assert {p.data_ptr() for p in frozen} == weights
        assert all(p.data_ptr() not in weights for p in live[1].trained().values())
    ended = in_turn(courses)
    for name in names:
        points, ending = ended[name]
        assert (told([first[name], *points]), ending.kind, model_bytes(tmp_path / name)) == alone[name]
    for parameter, before in zip(base._model.parameters(), start, strict=True):
        assert torch.equal(parameter, before)
    counters = hall.counters
    assert (counters["model_loaded"], counters["data_loaded"], counters["trials"]) == (1, 1, len(names))


def test_what_befalls_one_trial_leaves_its_neighbours_alone(
    cache: Path, tmp_path: Path, alone: dict[str, Told]
) -> None:
    """One is pruned, one raises, one is interrupted and goes on in another process; one runs through it all."""
    hall = Workshop(cache)
    shops = [hall.beside() for _ in range(4)]
    stays = shops[0].train(TRIALS["dpo, dropout"], tmp_path / "stays")
    pruned = shops[1].train(TRIALS["autocast"], tmp_path / "pruned")
    raises = shops[2].train(TRIALS["simpo"], tmp_path / "raises")
    stopped = shops[3].train(TRIALS["rank 2, checkpointed"], tmp_path / "stopped")
    points = [next(stays)]
    for course in (pruned, raises, stopped):
        next(course)
    points.append(next(stays))
    next(pruned)
    pruned.close()
    points.append(next(stays))
    next(stopped)
    shops[3].interrupt()
    points.append(next(stays))
    told_before, ending = finish(stopped)
    assert ending.kind is EndKind.STOPPED
    with pytest.raises(ZeroDivisionError):
        raises.throw(ZeroDivisionError)

    # The workshops that are free now take the next trials.
    again = shops[1].train(TRIALS["rank 2, checkpointed"], tmp_path / "again", [tmp_path / "stopped"])
    simpo = shops[2].train(TRIALS["simpo"], tmp_path / "simpo")
    ended = in_turn({"dpo, dropout": stays, "rank 2, checkpointed": again, "simpo": simpo})
    ended["dpo, dropout"] = (points + ended["dpo, dropout"][0], ended["dpo, dropout"][1])
    folders = {"dpo, dropout": "stays", "rank 2, checkpointed": "again", "simpo": "simpo"}
    for name, folder in folders.items():
        given, ending = ended[name]
        assert (told(given), ending.kind, model_bytes(tmp_path / folder)) == alone[name]
    assert hall.counters["model_loaded"] == 1
    assert told_before == []


def test_only_adapters_are_trained_over_a_shared_base(cache: Path, tmp_path: Path) -> None:
    shop = Workshop(cache).beside()
    with pytest.raises(ModelError, match="can only be trained with `lora`"):
        finish(shop.train(trial("simpo"), tmp_path / "full"))
    points, ending = finish(shop.train(TRIALS["simpo"], tmp_path / "adapters"))
    assert ending.kind is EndKind.FINISHED
    assert points


def test_another_model_is_another_base_and_goes_with_its_last_trial(cache: Path, tmp_path: Path) -> None:
    hall = Workshop(cache)
    other = TRIALS["simpo"].model_dump()
    other["model"]["generated"]["seed"] = 5
    one, two = hall.beside(), hall.beside()
    courses = [
        one.train(TRIALS["simpo"], tmp_path / "one"),
        two.train(TrialConfig.model_validate(other), tmp_path / "two"),
    ]
    first = [next(course).metrics["eval_margins/logp"] for course in courses]
    assert first[0] != first[1]
    assert hall.counters["model_loaded"] == 2
    for course in courses:
        course.close()
    known: Mapping[ModelConfig, SharedBase] = hall._stock._all_bases
    assert len(known) == 2
    del one, two, courses
    gc.collect()
    assert not known
