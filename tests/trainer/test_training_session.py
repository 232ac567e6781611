import json
import math
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.small_trials import MODEL, finish, model_bytes, take, trial, without_speed
from trainer import metrics, training_session
from trainer.config.trial import TrialConfig
from trainer.forward.pair_model import PairModel
from trainer.models.model_files import export_model
from trainer.results import ModelError, ResumeError, RunStatus, StepMetrics, TrialError
from trainer.training_session import TrainingSession, digest_with_checkpointing, result_digest

LORA = {"r": 4, "alpha": 8, "target_modules": "all-linear"}


def test_a_run_says_and_leaves_everything(session: TrainingSession, tmp_path: Path) -> None:
    history, result = finish(session.train(trial(), tmp_path))
    assert result.status is RunStatus.FINISHED
    assert (result.updates, result.folder) == (6, tmp_path / "model")
    assert [p.step for p in history] == list(range(7))
    for step_metrics in history:
        assert set(step_metrics.metrics) <= set(metrics.all_names())
        assert all(math.isfinite(v) for v in step_metrics.metrics.values())
        assert ("eval_loss" in step_metrics.metrics) == (step_metrics.step in (0, 3, 6))
        assert ("loss" in step_metrics.metrics) == (step_metrics.step > 0)
        assert ("eval_exact_answers" in step_metrics.metrics) == (step_metrics.step in (0, 3, 6))
    assert (history[3].metrics["epoch"], history[1].metrics["learning_rate"]) == (1.0, 0.0)
    assert history[2].metrics["learning_rate"] == 5e-3
    assert history[6].metrics["eval_loss"] != history[3].metrics["eval_loss"] != history[0].metrics["eval_loss"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 0, 3, 3, 6, 6]
    assert set(lines[0]) == {"step", "prompt", "answer", "expected", "right"}
    pairs = load_file(tmp_path / "eval_pairs.safetensors")
    gap = pairs["chosen"] / pairs["chosen_tokens"] - pairs["rejected"] / pairs["rejected_tokens"]
    assert float(gap.mean()) == pytest.approx(history[6].metrics["eval_margins/logp"], rel=1e-12)
    assert pairs["row"].tolist() == [1, 2, 3, 4, 5, 6]
    before = pairs["start_chosen"] / pairs["chosen_tokens"] - pairs["start_rejected"] / pairs["rejected_tokens"]
    assert float(before.mean()) == pytest.approx(history[0].metrics["eval_margins/logp"], rel=1e-12)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_warm_workshop_trains_as_a_fresh_one_does_to_the_bit(cache: Path, tmp_path: Path) -> None:
    trials = [
        trial("dpo"),
        trial("simpo", training={"learning_rate": 1e-2}),
        trial("simpo", lora=LORA),
        trial("dpo", lora=LORA, training={"seed": 7}),
        trial("sft", training={"gradient_checkpointing": True}),
        trial("dpo", training={"bf16": True}),
        trial("dpo"),
    ]
    warm = TrainingSession(cache)
    for number, config in enumerate(trials):
        history, _ = finish(warm.train(config, tmp_path / "warm" / str(number)))
        fresh, _ = finish(TrainingSession(cache).train(config, tmp_path / "fresh" / str(number)))
        assert without_speed(history) == without_speed(fresh)
        assert model_bytes(tmp_path / "warm" / str(number)) == model_bytes(tmp_path / "fresh" / str(number))
    assert model_bytes(tmp_path / "warm/0") == model_bytes(tmp_path / "warm/6")
    assert model_bytes(tmp_path / "warm/0") != model_bytes(tmp_path / "warm/1")
    done = warm.counters
    assert (done["imports"], done["trials"]) == (1, 7)
    assert (done["data_loaded"], done["model_loaded"]) == (1, 1)
    # After each full fine-tuning (0, 1, 4, 5) but not after adapters, which leave the base as it is.
    assert done["weights_restored"] == 4
    # One of the training pairs in float32 and one in bf16, whatever the number of DPO trials.
    assert done["reference_computed"] + done["reference_loaded"] == 2
    assert done["start_computed"] + done["start_loaded"] == 2


def test_the_reference_is_computed_once_for_all(tmp_path: Path) -> None:
    first, second = TrainingSession(tmp_path / "cache"), TrainingSession(tmp_path / "cache")
    one, _ = finish(first.train(trial("dpo"), tmp_path / "1"))
    two, _ = finish(second.train(trial("dpo"), tmp_path / "2"))
    assert (first.counters["reference_computed"], first.counters["reference_loaded"]) == (1, 0)
    assert (second.counters["reference_computed"], second.counters["reference_loaded"]) == (0, 1)
    assert (second.counters["start_loaded"], second.counters["answers_loaded"]) == (1, 1)
    assert without_speed(one) == without_speed(two)


def begin(config: TrialConfig, cache: Path, folder: Path) -> tuple[list[StepMetrics], Counter[str]]:
    """The first point of a trial in a session of its own, and the session's counters."""
    session = TrainingSession(cache)
    return take(session.train(config, folder), 1), Counter(session.counters)


def test_sessions_that_start_together_evaluate_the_initial_model_once(tmp_path: Path) -> None:
    config = trial("dpo", training={"tokens_per_micro_batch": 150})
    alone = TrainingSession(tmp_path / "alone")
    expected = take(alone.train(config, tmp_path / "0"), 1)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        begun = [processes.submit(begin, config, tmp_path / "cache", tmp_path / name) for name in ("1", "2")]
        found = [future.result() for future in begun]
    assert [without_speed(points) for points, _ in found] == [without_speed(expected)] * 2
    together = sum((counters for _, counters in found), Counter[str]())
    assert (together["start_computed"], together["reference_computed"], together["answers_computed"]) == (1, 1, 1)
    for name in ("start_parts", "reference_parts"):
        assert together[name] == alone.counters[name] > 1, "each part of the pairs in one session"


def test_sft_learns(session: TrainingSession, tmp_path: Path) -> None:
    history, _ = finish(session.train(trial("sft"), tmp_path))
    assert history[6].metrics["nll_loss"] < history[1].metrics["nll_loss"] - 0.3
    assert history[6].metrics["eval_nll_loss"] < history[0].metrics["eval_nll_loss"] - 0.3


def test_dpo_starts_at_no_reward(session: TrainingSession, tmp_path: Path) -> None:
    history, _ = finish(session.train(trial("dpo"), tmp_path))
    assert history[0].metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert history[0].metrics["eval_rewards/margins"] == 0.0
    assert history[1].metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_micro_batches_do_not_matter(session: TrainingSession, tmp_path: Path) -> None:
    for budget in (40, 100, 10_000):
        config = trial(training={"tokens_per_micro_batch": budget, "learning_rate": 1e-3})
        finish(session.train(config, tmp_path / str(budget)))
    full = load_file(tmp_path / "10000/model/model.safetensors")
    for budget in (40, 100):
        part = load_file(tmp_path / str(budget) / "model/model.safetensors")
        for name, tensor in full.items():
            torch.testing.assert_close(part[name], tensor, rtol=1e-4, atol=1e-5)


def log_normal_rows(path: Path) -> dict[str, object]:
    """A data set whose lengths are spread as those of public ones: most rows short, a few very long."""
    rng = np.random.default_rng(0)

    def words(mean: float) -> str:
        return " ".join(f"w{n % 7}" for n in range(1 + min(40, int(rng.lognormal(mean, 0.9)))))

    rows = [{"prompt": f"{i} {words(1.2)}", "chosen": words(1.5) + " yes", "rejected": words(1.5)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"train": str(path), "eval_share": 0.2, "max_length": 128, "apply_template": False}


def test_padding_counts_towards_the_budget(
    session: TrainingSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of padded micro-batches, in training and evaluation; only a pair that is longer alone may pass the budget."""
    data, model, computed = log_normal_rows(tmp_path / "rows.jsonl"), MODEL | {"attention": "separate"}, []
    plain = PairModel._make_batch  # pyright: ignore[reportPrivateUsage]

    def recorded(self: PairModel, *args: Any) -> Any:
        batch = plain(self, *args)
        computed.append((len(batch), batch.tokens))
        return batch

    monkeypatch.setattr(PairModel, "_make_batch", recorded)
    budgets, history, passes = (250, 1000, 100_000), {}, {}
    for budget in budgets:
        computed.clear()
        training = {"tokens_per_micro_batch": budget, "max_steps": 3, "learning_rate": 1e-3}
        config = trial(training=training, data=data, model=model)
        history[budget], result = finish(session.train(config, tmp_path / str(budget)))
        assert result.status is RunStatus.FINISHED
        assert all(tokens <= budget or pairs == 1 for pairs, tokens in computed)
        passes[budget] = len(computed)
    assert any(tokens > 250 for _, tokens in computed)
    assert passes[250] > passes[1000] > passes[100_000]
    for budget in budgets[:2]:
        part, full = (load_file(tmp_path / str(b) / "model/model.safetensors") for b in (budget, 100_000))
        for name, tensor in full.items():
            torch.testing.assert_close(part[name], tensor, rtol=1e-4, atol=1e-5)
        for one, other in zip(without_speed(history[budget]), without_speed(history[100_000]), strict=True):
            assert one[1] == pytest.approx(other[1], rel=1e-4, abs=1e-6)


def test_micro_batches_do_not_matter_where_pairs_are_coupled(session: TrainingSession, tmp_path: Path) -> None:
    history = {}
    for budget in (60, 10_000):
        config = trial(loss={"kind": "dpo", "loss_type": "aot"}, training={"tokens_per_micro_batch": budget})
        history[budget], _ = finish(session.train(config, tmp_path / str(budget)))
    for small, large in zip(history[60], history[10_000], strict=True):
        assert small.metrics.keys() == large.metrics.keys()
        for name in {"loss", "grad_norm", "eval_loss"} & small.metrics.keys():
            assert small.metrics[name] == pytest.approx(large.metrics[name], rel=1e-3)


@pytest.mark.parametrize(
    "loss",
    [
        {"kind": "orpo"},
        {"kind": "cpo"},
        {"kind": "dpo", "loss_type": ["sigmoid", "hinge"], "loss_weights": [1, 0.5], "use_weighting": True},
    ],
)
def test_other_objectives_train(session: TrainingSession, tmp_path: Path, loss: dict[str, object]) -> None:
    history, result = finish(session.train(trial(loss=loss, training={"max_steps": 2}), tmp_path))
    assert result.status is RunStatus.FINISHED
    assert all(set(p.metrics) <= set(metrics.all_names()) for p in history)


@pytest.mark.parametrize(
    "loss",
    [
        {"kind": "dpo", "loss_type": "dpop"},
        {"kind": "dpo", "loss_type": "chipo"},
        {"kind": "dpo", "length_alpha": 0.01},
        {"kind": "simper"},
        {"kind": "kto"},
        {"kind": "kto", "loss_type": "apo_zero_unpaired"},
    ],
)
def test_the_loss_of_objectives_beyond_trl_falls(
    session: TrainingSession, tmp_path: Path, loss: dict[str, object]
) -> None:
    history, result = finish(session.train(trial(loss=loss, training={"max_steps": 6}), tmp_path))
    assert result.status is RunStatus.FINISHED
    losses = [step.metrics["loss"] for step in history if "loss" in step.metrics]
    assert losses[-1] < losses[0]


def test_windows_average_over_their_updates(session: TrainingSession, tmp_path: Path) -> None:
    single, _ = finish(session.train(trial(training={"eval_steps": 4}), tmp_path / "1"))
    history, _ = finish(session.train(trial(training={"logging_steps": 3, "eval_steps": 4}), tmp_path / "3"))
    assert [p.step for p in history] == [0, 3, 4, 6]
    assert set(history[2].metrics) == {n for n in history[2].metrics if n.startswith("eval_")}
    for name in ("loss", "rewards/margins", "margins/logp", "grad_norm"):
        mean = sum(p.metrics[name] for p in single[1:4]) / 3
        assert history[1].metrics[name] == pytest.approx(mean, rel=1e-12)
    tokens = [p.metrics["lengths/chosen"] * 8 for p in single[1:4]]
    nll = sum(p.metrics["nll_loss"] * t for p, t in zip(single[1:4], tokens, strict=True)) / sum(tokens)
    assert history[1].metrics["nll_loss"] == pytest.approx(nll, rel=1e-12)
    assert history[1].metrics["learning_rate"] == single[3].metrics["learning_rate"]


@pytest.mark.parametrize(("where", "word"), [("loss", "the loss is nan"), ("gradient", "the gradient norm is nan")])
def test_what_is_not_finite_ends_the_run_at_once(
    session: TrainingSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, word: str
) -> None:
    calls, plain = 0, PairModel.backward

    def poisoned(self: PairModel, *args: object) -> object:
        nonlocal calls
        calls += 1
        weight = next(self._core.parameters())  # pyright: ignore[reportPrivateUsage]
        if calls == 4 and where == "loss":
            with torch.no_grad():
                weight.fill_(float("nan"))
        terms = plain(self, *args)  # pyright: ignore[reportArgumentType]
        if calls == 4 and where == "gradient":
            weight.grad[0, 0] = float("nan")
        return terms

    monkeypatch.setattr(PairModel, "backward", poisoned)
    history, result = finish(session.train(trial(), tmp_path))
    assert (result.status, result.updates, result.folder) == (RunStatus.DIVERGED, 3, None)
    assert "update 4 of 6" in result.reason
    assert word in result.reason
    assert (calls, [p.step for p in history]) == (4, [0, 1, 2, 3])
    assert not (tmp_path / "model").exists()
    monkeypatch.undo()
    assert finish(session.train(trial(), tmp_path))[1] == result


def test_a_diverged_trial_leaves_the_next_one_untouched(cache: Path, session: TrainingSession, tmp_path: Path) -> None:
    finish(session.train(trial(), tmp_path / "good"))
    wild = trial(training={"learning_rate": 1e30, "max_grad_norm": 0, "warmup_ratio": 0.0})
    _, result = finish(session.train(wild, tmp_path / "wild"))
    assert result.status is RunStatus.DIVERGED
    finish(session.train(trial(), tmp_path / "again"))
    assert model_bytes(tmp_path / "again") == model_bytes(tmp_path / "good")


@pytest.mark.parametrize("loss", ["simpo", "dpo"])
def test_adapters_are_saved_alone_and_merged_on_request(session: TrainingSession, tmp_path: Path, loss: str) -> None:
    history, _ = finish(session.train(trial(loss, lora=LORA, training={"learning_rate": 2e-2}), tmp_path / "run"))
    saved = tmp_path / "run/model"
    assert [p.name for p in saved.glob("*.safetensors")] == ["adapter_model.safetensors"]
    export_model(saved, tmp_path / "merged", merge=True)
    merged = trial(loss, model={"name_or_path": str(tmp_path / "merged")}, training={"learning_rate": 1e-9})
    again, _ = finish(session.train(merged, tmp_path / "from merged"))
    for name in ("eval_margins/logp", "eval_nll_loss"):
        assert again[0].metrics[name] == pytest.approx(history[-1].metrics[name], rel=1e-4)
        assert abs(history[-1].metrics[name] - history[0].metrics[name]) > 1e-3
    with pytest.raises(ModelError, match="adapters, not a whole model"):
        finish(session.train(trial(model={"name_or_path": str(saved)}), tmp_path / "no"))


def test_a_folder_of_another_configuration_is_refused(session: TrainingSession, tmp_path: Path) -> None:
    take(session.train(trial(training={"save_steps": 1}), tmp_path), 4)
    with pytest.raises(ResumeError, match="another configuration"):
        next(session.train(trial("dpo"), tmp_path))
    smaller = trial(training={"save_steps": 1, "tokens_per_micro_batch": 64, "gradient_checkpointing": True})
    assert finish(session.train(smaller, tmp_path))[1].status is RunStatus.FINISHED


def test_a_run_that_an_earlier_version_began_with_checkpointing_continues_without(
    session: TrainingSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(training_session, "result_digest", partial(digest_with_checkpointing, on=True))
        take(session.train(trial(training={"save_steps": 1, "gradient_checkpointing": True}), tmp_path), 4)
    plain = trial(training={"save_steps": 1})
    assert result_digest(plain) != digest_with_checkpointing(plain, on=True)
    run = session.train(plain, tmp_path / "2", [tmp_path])
    history, result = finish(run)
    assert (result.status, [p.step for p in history]) == (RunStatus.FINISHED, list(range(7)))


def test_too_little_data_is_a_sentence(session: TrainingSession, tmp_path: Path) -> None:
    with pytest.raises(TrialError, match="the 24 training pairs are fewer than one update of pairs_per_update 32"):
        finish(session.train(trial(training={"pairs_per_update": 32}), tmp_path))


def test_no_prompts_no_answers(session: TrainingSession, tmp_path: Path) -> None:
    history, _ = finish(session.train(trial(evaluation={"prompts": 0}), tmp_path))
    assert not any("answer" in name or "repetition" in name for p in history for name in p.metrics)
    assert not (tmp_path / "samples.jsonl").exists()


@pytest.mark.parametrize(("every", "looks"), [(2, [0, 2, 4, 6]), (0, [0, 6]), (4, [0, 4, 6])])
def test_how_often_the_answers_are_looked_at(
    session: TrainingSession, tmp_path: Path, every: int, looks: list[int]
) -> None:
    config = trial(evaluation={"prompts": 2, "max_new_tokens": 6, "answer_steps": every, "samples": 1})
    run = session.train(config, tmp_path / "1")
    first = [next(run) for _ in range(6)]
    run.close()  # after update 5; its newest checkpoint is of update 3
    history, _ = finish(session.train(config, tmp_path / "2", [tmp_path / "1"]))
    assert without_speed(history[:6]) == without_speed(first)
    assert [p.step for p in history if "eval_repetition" in p.metrics] == looks
    lines = [json.loads(line) for line in (tmp_path / "2/samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == looks, "older attempts' texts are kept"


def test_dtypes_and_attention_modes_train(session: TrainingSession, tmp_path: Path) -> None:
    from tests.support.small_trials import MODEL

    _, packed = finish(session.train(trial(training={"max_steps": 2}), tmp_path / "p"))
    history = {}
    for name, model in {"separate": {"attention": "separate"}, "bfloat16": {"dtype": "bfloat16"}}.items():
        history[name], result = finish(
            session.train(trial(model=MODEL | model, training={"max_steps": 2}), tmp_path / name)
        )
        assert result.status is packed.status is RunStatus.FINISHED
    ours = load_file(tmp_path / "p/model/model.safetensors")
    theirs = load_file(tmp_path / "separate/model/model.safetensors")
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-4)
    assert next(iter(load_file(tmp_path / "bfloat16/model/model.safetensors").values())).dtype == torch.bfloat16
