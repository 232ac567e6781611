"""`engine: trl` beside `engine: packed`: same start, tokens and order, so the same weights and held-out metrics."""

import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from tests.support.processes import LIMIT_SECONDS
from tests.support.small_trials import MODEL, finish, model_bytes, take, trial, without_speed
from trainer import metrics
from trainer.config.trial import TrialConfig
from trainer.config.trl_support import pairs_per_micro_batch
from trainer.results import RunStatus
from trainer.training_session import TrainingSession, result_digest
from trainer.trl_engine import instrumented_trainers
from trainer.trl_engine.trl_engine import iterate_in_thread

LORA = {"r": 2, "alpha": 4, "dropout": 0.3}
SMALL = {"tokens_per_micro_batch": 400}
"""Two pairs of at most 96 tokens at once: four micro-batches in an update of eight."""


@pytest.fixture(scope="module")
def session(cache: Path) -> TrainingSession:
    return TrainingSession(cache)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "model").glob("*.safetensors")
    return load_file(file)


def apart(one: Path, other: Path) -> float:
    """The largest difference of any weight."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


# With one micro-batch where TRL would average cross-entropies of micro-batches, with four elsewhere.
EQUAL: dict[str, tuple[Any, dict[str, Any]]] = {
    "simpo": ("simpo", SMALL),
    "simpo-sft-smoothed": ({"kind": "simpo", "sft_weight": 0.3, "label_smoothing": 0.1, "gamma": 1.0}, {}),
    "alphapo": ({"kind": "simpo", "beta": 2.5, "gamma": 0.1, "alpha": 0.25}, SMALL),
    "dpo": ("dpo", SMALL),
    "dpo-mixture": (
        {"kind": "dpo", "loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"weight_decay": 0.1, "lr_scheduler_type": "linear", "max_grad_norm": 0.5},
    ),
    "dpo-ipo-js": ({"kind": "dpo", "loss_type": "ipo", "f_divergence_type": "js_divergence"}, SMALL),
    "dpo-ld-nll": ({"kind": "dpo", "ld_alpha": 0.5, "nll_scale": 0.2}, {"max_grad_norm": 0}),
    "dpo-wpo": ({"kind": "dpo", "use_weighting": True}, SMALL),
    "dpo-aot": ({"kind": "dpo", "loss_type": "aot", "label_smoothing": 0.05}, {}),
    # At full rate from the first update, where Adam makes much of gradients that are rounding: hence epsilon.
    "orpo": ("orpo", {"lr_scheduler_type": "constant", "adam_epsilon": 1e-4}),
    "cpo": ("cpo", {"lr_scheduler_type": "constant_with_warmup"}),
    "cpo-hinge": ({"kind": "cpo", "loss_type": "hinge", "nll_scale": 0.0}, SMALL),
}


@pytest.mark.parametrize("name", EQUAL)
def test_both_engines_arrive_at_the_same_weights_and_metrics(
    session: TrainingSession, tmp_path: Path, name: str
) -> None:
    loss, training = EQUAL[name]
    ran = {}
    for engine in ("packed", "trl"):
        config = trial(loss, training={"learning_rate": 1e-3} | training, engine=engine)
        ran[engine], result = finish(session.train(config, tmp_path / engine))
        assert result.status is RunStatus.FINISHED
        assert sorted(p.name for p in (tmp_path / engine).iterdir()) == [
            *("checkpoints", "ending.json", "eval_pairs.safetensors", "model", "samples.jsonl")
        ]
    assert apart(tmp_path / "packed", tmp_path / "trl") < 2e-6
    assert ran["trl"][0] == ran["packed"][0]
    for ours, theirs in zip(ran["packed"], ran["trl"], strict=True):
        assert theirs.step == ours.step
        assert theirs.metrics.keys() == ours.metrics.keys() <= set(metrics.all_names())
        for metric, value in ours.metrics.items():
            # At the start DPO's gaps are rounding, above or below zero; what TRL computes in a second is its own.
            if metric != "rewards/accuracies" and not metric.endswith("_per_second"):
                assert theirs.metrics[metric] == pytest.approx(value, rel=1e-4, abs=2e-5), (ours.step, metric)
    moved, start = weights(tmp_path / "trl"), weights_at_start(session, tmp_path)
    assert max(float((moved[n] - start[n]).abs().max()) for n in moved) > 1e-3


def weights_at_start(session: TrainingSession, tmp_path: Path) -> dict[str, torch.Tensor]:
    finish(session.train(trial(training={"learning_rate": 1e-30, "max_steps": 1}), tmp_path / "start"))
    return weights(tmp_path / "start")


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_adapters_train_and_are_saved_alone(session: TrainingSession, tmp_path: Path, loss: str) -> None:
    training = {"gradient_checkpointing": True, "learning_rate": 2e-3} | SMALL
    for engine in ("packed", "trl"):
        config = trial(loss, lora=LORA | {"dropout": 0.0}, training=training, engine=engine)
        finish(session.train(config, tmp_path / engine))
        assert [p.name for p in (tmp_path / engine / "model").rglob("*.safetensors")] == ["adapter_model.safetensors"]
    assert apart(tmp_path / "packed", tmp_path / "trl") < 2e-6


def test_bf16_is_near(session: TrainingSession, tmp_path: Path) -> None:
    last = {}
    for engine in ("packed", "trl"):
        config = trial("dpo", training={"bf16": True, "learning_rate": 1e-3}, engine=engine)
        last[engine] = finish(session.train(config, tmp_path / engine))[0][-1].metrics
    assert last["trl"]["eval_loss"] == pytest.approx(last["packed"]["eval_loss"], rel=0.02)
    plain, _ = finish(session.train(trial("dpo", training={"learning_rate": 1e-3}, engine="trl"), tmp_path / "plain"))
    assert plain[-1].metrics["eval_loss"] != last["trl"]["eval_loss"]


def test_bfloat16_weights_are_rounded_to_nearest_when_that_is_asked_for(
    session: TrainingSession, tmp_path: Path
) -> None:
    last = {}
    for engine in ("packed", "trl"):
        training = {"learning_rate": 1e-3, "stochastic_rounding": False}
        config = trial("dpo", model=MODEL | {"dtype": "bfloat16"}, training=training, engine=engine)
        last[engine] = finish(session.train(config, tmp_path / engine))[0][-1].metrics
    assert last["trl"]["eval_loss"] == pytest.approx(last["packed"]["eval_loss"], rel=0.02)


def test_the_next_trial_finds_everything_as_it_was(cache: Path, tmp_path: Path) -> None:
    warm = TrainingSession(cache)
    between = [
        trial("dpo", engine="trl", training={"bf16": True}),
        trial("simpo", engine="trl", lora=LORA),
        trial("dpo", engine="trl", lora=LORA),
    ]
    for number in range(4):
        finish(warm.train(trial("dpo"), tmp_path / f"packed {number}"))
        if number < len(between):
            finish(warm.train(between[number], tmp_path / f"trl {number}"))
    for number in range(1, 4):
        assert model_bytes(tmp_path / f"packed {number}") == model_bytes(tmp_path / "packed 0")
    assert (warm.counters["model_loaded"], warm.counters["data_loaded"]) == (1, 1)
    saved = {p.name: p.read_bytes() for p in (tmp_path / "packed 0/model").iterdir() if p.suffix != ".safetensors"}
    assert {n: (tmp_path / "trl 0/model" / n).read_bytes() for n in saved} == saved


# --- going on --------------------------------------------------------------------------------------------------------

# Windows of four updates: most interruptions fall into the middle of one.
SETTINGS = {"logging_steps": 4, "eval_steps": 3} | SMALL


def going(kind: str) -> TrialConfig:
    if kind == "full":
        return trial("dpo", training=SETTINGS, engine="trl")
    return trial(training=SETTINGS, lora=LORA, engine="trl")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_interrupted_anywhere_it_ends_where_the_whole_run_does(
    session: TrainingSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    full, _ = finish(session.train(going(kind), tmp_path / "whole"))
    calls, stop_at = 0, 0
    plain = instrumented_trainers._InstrumentedTrainer.compute_loss  # pyright: ignore[reportPrivateUsage]

    def counted(self: Any, *args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            session.interrupt()
        return plain(self, *args, **more)

    monkeypatch.setattr(instrumented_trainers._InstrumentedTrainer, "compute_loss", counted)  # pyright: ignore[reportPrivateUsage]
    # In the first update, in its last micro-batch, and in the second, fourth and sixth.
    for stop_at, steps in ((2, 0), (4, 0), (7, 1), (15, 3), (24, 5)) if kind == "full" else ((4, 0), (15, 3), (24, 5)):
        calls, folder = 0, tmp_path / str(stop_at)
        _, result = finish(session.train(going(kind), folder / "1"))
        assert (result.status, result.updates) == (RunStatus.STOPPED, steps)
        calls = 100
        metrics, result = finish(session.train(going(kind), folder / "2", [folder / "1"]))
        assert result.status is RunStatus.FINISHED
        assert without_speed(metrics) == without_speed(full)
        assert model_bytes(folder / "2") == model_bytes(tmp_path / "whole")
    assert not any(thread.name == "trl" for thread in threading.enumerate())


def test_a_signal_reaches_a_run_in_the_middle_of_an_update(
    session: TrainingSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested = threading.Event()

    def handler(*_: object) -> None:
        session.interrupt()
        requested.set()

    plain, calls = instrumented_trainers.InstrumentedCpoTrainer.concatenated_forward, 0

    def signalled(self: Any, model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            # Handlers run in the main thread, which waits for this one.
            os.kill(os.getpid(), signal.SIGUSR1)
            assert requested.wait(LIMIT_SECONDS)
        return plain(self, model, batch)

    monkeypatch.setattr(instrumented_trainers.InstrumentedCpoTrainer, "concatenated_forward", signalled)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        _, result = finish(session.train(trial(training=SMALL, engine="trl"), tmp_path))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (result.status, result.updates, calls) == (RunStatus.STOPPED, 1, 6)


def test_closed_at_any_point_it_ends_where_the_whole_run_does(cache: Path, tmp_path: Path) -> None:
    settings = trial("cpo", training={"save_steps": 2}, engine="trl")
    full, _ = finish(TrainingSession(cache).train(settings, tmp_path / "whole"))
    for taken in (1, 3, 4, 6):
        first, second = tmp_path / f"{taken}-1", tmp_path / f"{taken}-2"
        begun = take(TrainingSession(cache).train(settings, first), taken)
        assert without_speed(begun) == without_speed(full[:taken])
        assert not any(thread.name == "trl" for thread in threading.enumerate())
        metrics, result = finish(TrainingSession(cache).train(settings, second, [first]))
        assert result.status is RunStatus.FINISHED
        assert without_speed(metrics) == without_speed(full)
        assert model_bytes(second) == model_bytes(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("checkpoint-*"))


@pytest.mark.parametrize(("where", "word"), [("loss", "the loss is nan"), ("gradient", "the gradient norm is nan")])
def test_what_is_not_finite_ends_the_run_before_the_step(
    session: TrainingSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, word: str
) -> None:
    calls = 0
    plain = instrumented_trainers.InstrumentedCpoTrainer.concatenated_forward

    def poisoned(self: Any, model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        found = plain(self, model, batch)
        if calls != 4:
            return found
        if where == "loss":
            return (found[0] * math.nan, *found[1:])
        found[0].register_hook(lambda gradient: gradient * math.nan)
        return found

    monkeypatch.setattr(instrumented_trainers.InstrumentedCpoTrainer, "concatenated_forward", poisoned)
    metrics, result = finish(session.train(trial(engine="trl"), tmp_path))
    assert (result.status, result.updates, result.folder) == (RunStatus.DIVERGED, 3, None)
    assert "update 4 of 6" in result.reason
    assert word in result.reason
    assert (calls, [p.step for p in metrics]) == (4, [0, 1, 2, 3])


# --- what is refused -------------------------------------------------------------------------------------------------
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ({"kind": "simpo", "loss_type": "hinge"}, {}, "no hinge form of SimPO"),
    ({"kind": "orpo", "nll_scale": 0.5}, {}, "leave nll_scale at 1"),
    ({"kind": "orpo", "nll_prompt": False}, {}, "nll_prompt at true"),
    ("simper", {}, "TRL has no SimPER"),
    ("kto", {}, "KTOTrainer estimates the KL divergence in each micro-batch"),
    ("sft", {}, "for sft use engine packed"),
    ({"kind": "dpo", "loss_type": "sft"}, {}, "loss_type sft alone"),
    ({"kind": "dpo", "loss_type": ["dpop", "sft"]}, {}, "TRL's DPOTrainer has no loss_type dpop; use engine packed"),
    ({"kind": "dpo", "loss_type": "chipo"}, {}, "no loss_type chipo"),
    ({"kind": "dpo", "length_alpha": 0.1}, {}, "no length_alpha"),
    ({"kind": "dpo", "nll_scale": 0.1, "use_weighting": True}, {}, "would apply use_weighting to the cross-entropy"),
    ({"kind": "dpo", "loss_type": ["sigmoid", "aot"]}, {"training": SMALL}, "raise tokens_per_micro_batch"),
    ("dpo", {"model": MODEL | {"dtype": "bfloat16"}}, "set training.stochastic_rounding to false"),
    ("dpo", {"model": MODEL | {"load_in_4bit": True}, "lora": LORA}, "load_in_4bit is not supported by engine trl"),
]


@pytest.mark.parametrize(("loss", "more", "sentence"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_trl_lacks_is_refused_when_read(loss: Any, more: dict[str, Any], sentence: str) -> None:
    assert trial(loss, **more).engine == "packed"
    with pytest.raises(ValidationError, match=sentence):
        trial(loss, **more, engine="trl")


def test_an_update_is_cut_into_equal_micro_batches() -> None:
    assert pairs_per_micro_batch(128, 8192, 1024) == 4
    assert pairs_per_micro_batch(6, 10 * 2 * 100, 100) == 6
    assert pairs_per_micro_batch(7, 6 * 2 * 100, 100) == 1
    assert pairs_per_micro_batch(9, 4 * 2 * 100, 100) == 3
    assert pairs_per_micro_batch(8, 1, 1024) == 1


def test_the_engine_is_part_of_what_a_run_is() -> None:
    assert result_digest(trial()) != result_digest(trial(engine="trl"))
    with pytest.raises(ValidationError, match="'packed' or 'trl'"):
        trial(engine="liger")


# --- the thread ------------------------------------------------------------------------------------------------------
def test_a_call_stands_still_while_its_consumer_has_the_word() -> None:
    done: list[int] = []

    def call(give: Any) -> None:
        for number in range(3):
            done.append(number)
            give(number)
        raise ValueError("after the last")

    given = iterate_in_thread(call, "handed")
    for number in range(3):
        assert next(given) == number
        assert done == list(range(number + 1))
    with pytest.raises(ValueError, match="after the last"):
        next(given)


def test_a_closed_call_unwinds() -> None:
    unwound: list[str] = []

    def call(give: Any) -> None:
        try:
            give(1)
        finally:
            unwound.append("yes")

    given = iterate_in_thread(call, "handed")
    assert next(given) == 1
    given.close()
    assert unwound == ["yes"]
    assert not any(thread.name == "handed" for thread in threading.enumerate())
