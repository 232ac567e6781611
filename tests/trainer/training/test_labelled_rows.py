"""KTO on rows with one response and a label: data, estimate of the KL divergence, metrics, resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.data_cases import LLAMA, chat, data, saved, tokenizer, write_rows
from tests.support.small_trials import DATA, MODEL, finish, model_bytes, take, trial, without_speed
from trainer.config.loss_config import DpoLoss, KtoLoss, SftLoss
from trainer.config.trial import GeneratedSource, ModelConfig
from trainer.data import UnreadableData, check_rows, prepare
from trainer.data.pair_dataset import MismatchedPairs
from trainer.data.row_preview import preview
from trainer.results import RunStatus, TrialError
from trainer.synthetic.instructions import generate_rows
from trainer.training_session import TrainingSession

_SPLITS: tuple[tuple[Any, int], ...] = (("train", 24), ("eval", 12))


def labelled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each pair without one of its responses: two of three lose the chosen one."""
    kept = [("rejected", "chosen")[number % 3 == 0] for number in range(len(rows))]
    return [
        {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
        | {"completion": row[side], "label": side == "chosen"}
        for row, side in zip(rows, kept, strict=True)
    ]


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The `data` section of small trials with labelled rows."""
    folder = tmp_path_factory.mktemp("rows")
    train, held_out = (
        labelled(list(generate_rows(GeneratedSource(generated="instructions", split=split, rows=count))))
        for split, count in _SPLITS
    )
    files = {name: str(write_rows(folder / f"{name}.jsonl", rows)) for name, rows in (("t", train), ("e", held_out))}
    return DATA | {"train": files["t"], "eval": files["e"]}


# --- data ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def model(tmp_path: Path) -> ModelConfig:
    return saved(tokenizer(LLAMA), tmp_path / "tokenizer")


def test_a_labelled_row_has_the_tokens_that_its_response_has_in_a_pair(tmp_path: Path, model: ModelConfig) -> None:
    pairs = [chat(f"ask {i}", f"yes {i}" * (i % 4 + 1), f"no {i}") for i in range(12)]
    found = {
        name: prepare(data(write_rows(tmp_path / f"{name}.jsonl", rows)), model, tmp_path / "cache")
        for name, rows in (("pairs", pairs), ("labels", labelled(pairs)))
    }
    for split in ("train", "eval"):
        whole, single = (getattr(found[name], split) for name in ("pairs", "labels"))
        assert single.rows.tolist() == whole.rows.tolist(), "held out are the same prompts"
        assert (whole.paired, single.paired) == (True, False)
        for left, right, row in zip(whole, single, single.rows.tolist(), strict=True):
            kept, gone = ("chosen", "rejected") if (row - 1) % 3 == 0 else ("rejected", "chosen")
            assert np.array_equal(left.prompt, right.prompt)
            assert np.array_equal(getattr(left, kept), getattr(right, kept))
            assert not len(getattr(right, gone))
    report = found["labels"].report
    assert found["pairs"].report.labels is None
    assert report.labels is not None
    assert sum(yes for yes, _ in report.labels.values()) == 4
    assert report.summary_lines()[1].startswith("one response a row, with a label: train ")
    assert not report.findings


def test_labels_of_a_csv_file_and_columns_of_other_names(tmp_path: Path, model: ModelConfig) -> None:
    lines = ["question,text,good"] + [f"q {n},a {n},{('true', 'False', '1', '0')[n % 4]}" for n in range(12)]
    (tmp_path / "a.csv").write_text("\n".join(lines), encoding="utf-8")
    columns = {"prompt": "question", "completion": "text", "label": "good"}
    config = data({"path": str(tmp_path / "a.csv"), "columns": columns}, apply_template=True)
    found = prepare(config, model, tmp_path / "cache").report
    assert found.labels is not None
    assert tuple(map(sum, zip(*found.labels.values(), strict=True))) == (6, 6)


def test_opposite_labels_of_one_response_are_counted(tmp_path: Path, model: ModelConfig) -> None:
    rows = labelled([chat(f"ask {i}", "yes", "no") for i in range(9)])
    rows += [rows[0] | {"label": False}, rows[1]]
    config = data(write_rows(tmp_path / "a.jsonl", rows), eval=str(write_rows(tmp_path / "b.jsonl", labelled([
        chat(f"held {i}", "yes", "no") for i in range(3)
    ]))))  # fmt: skip
    kinds = {finding.kind: finding.count for finding in prepare(config, model, tmp_path / "cache").report.findings}
    assert kinds == {"contradiction": 1, "duplicate_row": 1}


def test_pairs_and_labelled_rows_together_are_refused(tmp_path: Path, model: ModelConfig) -> None:
    pairs, others = ([chat(f"{name} {i}", "yes", "no") for i in range(8)] for name in ("ask", "held"))
    files = [write_rows(tmp_path / "a.jsonl", pairs), write_rows(tmp_path / "b.jsonl", labelled(others))]
    config = data(files[0], eval=str(files[1]))
    with pytest.raises(UnreadableData, match=r"some rows are pairs.*write each pair as two rows"):
        prepare(config, model, tmp_path / "cache")


def test_rows_that_a_loss_cannot_be_trained_on_are_refused_with_what_to_do(tmp_path: Path, model: ModelConfig) -> None:
    rows = labelled([chat(f"ask {i % 4}", f"yes {i}", f"no {i}") for i in range(16)])
    found = prepare(data(write_rows(tmp_path / "a.jsonl", rows)), model, tmp_path / "cache").train
    check_rows(KtoLoss(), found)
    desirable = [row for row in found if len(row.chosen)]
    one = [row for row in found if np.array_equal(row.prompt, found.pair(0).prompt)]
    for loss, part, message in (
        (DpoLoss(), found, "loss.kind dpo needs pairs: use loss.kind kto, or join"),
        (SftLoss(), found, r"supervised fine-tuning.*\(sft.data\)"),
        (KtoLoss(), desirable, f"all {len(desirable)} rows of one split have label true"),
        (KtoLoss(loss_type="apo_zero_unpaired"), desirable, "both labels"),
        (KtoLoss(), one, "the same prompt.*apo_zero_unpaired"),
    ):
        with pytest.raises(TrialError, match=message):
            check_rows(loss, part)
    check_rows(KtoLoss(loss_type="apo_zero_unpaired"), one)


def test_the_preview_shows_the_response_that_there_is(tmp_path: Path, model: ModelConfig) -> None:
    rows = labelled([chat(f"ask {i}", f"yes {i}", f"no {i}") for i in range(30)])
    config = data(write_rows(tmp_path / "a.jsonl", rows), eval_share=0.4)
    found = preview(config, model, tmp_path / "cache", loss=KtoLoss())
    assert found.refused is None
    for row in found.rows:
        texts = (row.chosen, row.rejected)
        assert [text is None for text in texts] == [row.row % 3 != 1, row.row % 3 == 1]
    refused = preview(config, model, tmp_path / "cache", loss=DpoLoss()).refused
    assert "loss.kind dpo needs pairs" in str(refused)


def test_a_row_gets_the_response_of_the_row_before_whatever_its_label(tmp_path: Path, model: ModelConfig) -> None:
    rows = labelled([chat(f"ask {i}", f"yes {i}", f"no {i}") for i in range(12)])
    pairs = prepare(data(write_rows(tmp_path / "a.jsonl", rows)), model, tmp_path / "cache").train
    found = MismatchedPairs(pairs)
    for i, own in enumerate(pairs):
        other, made = pairs.pair(i - 1 if i else len(pairs) - 1), found.pair(i)
        response = np.concatenate([other.chosen, other.rejected])
        assert (len(made.chosen) > 0) == (len(own.chosen) > 0)
        assert (len(made.rejected) > 0) == (len(own.rejected) > 0)
        assert np.array_equal(
            np.concatenate([made.chosen, made.rejected]), response[: len(made.chosen) + len(made.rejected)]
        )
        lengths = int(found.chosen_lengths[i]), int(found.rejected_lengths[i])
        assert lengths == (len(made.chosen), len(made.rejected))


# --- training --------------------------------------------------------------------------------------------------------
def test_a_trial_on_labelled_rows_measures_what_they_have(
    session: TrainingSession, tmp_path: Path, section: dict[str, Any]
) -> None:
    config = trial("kto", training={"logging_steps": 1, "learning_rate": 1e-2}, data=section)
    history, result = finish(session.train(config, tmp_path / "run"))
    assert result.status is RunStatus.FINISHED
    first, last = history[0].metrics, history[-1].metrics
    assert first["eval_loss"] == pytest.approx(0.5)
    assert last["eval_loss"] < first["eval_loss"]
    for prefix in ("", "eval_"):
        assert not {f"{prefix}accuracies/logp", f"{prefix}rewards/accuracies"} & last.keys()
        for name, one, other in (
            ("margins/logp", "logps_per_token/chosen", "logps_per_token/rejected"),
            ("rewards/margins", "rewards/chosen", "rewards/rejected"),
        ):
            assert last[f"{prefix}{name}"] == pytest.approx(last[f"{prefix}{one}"] - last[f"{prefix}{other}"])
        assert last[f"{prefix}kl"] >= 0
    stored = load_file(tmp_path / "run" / "eval_pairs.safetensors")
    present = stored["chosen_tokens"] > 0
    assert torch.equal(present, stored["rejected_tokens"] == 0)
    mean = (stored["chosen"] / stored["chosen_tokens"])[present].mean()
    assert last["eval_logps_per_token/chosen"] == pytest.approx(float(mean))
    assert all(metrics.pair_margins == "" for metrics in history)


def test_micro_batches_and_layouts_change_nothing(
    session: TrainingSession, tmp_path: Path, section: dict[str, Any]
) -> None:
    weights: list[dict[str, torch.Tensor]] = []
    for name, budget, more in (
        ("small", 60, {}),
        ("one", 10_000, {}),
        ("padded", 200, {"model": MODEL | {"attention": "separate"}}),
    ):
        settings = {"learning_rate": 1e-3, "tokens_per_micro_batch": budget}
        finish(session.train(trial("kto", training=settings, data=section, **more), tmp_path / name))
        (file,) = (tmp_path / name / "model").glob("*.safetensors")
        weights.append(load_file(file))
    for other in weights[1:]:
        assert max(float((weights[0][name] - other[name]).abs().max()) for name in other) < 2e-5


def test_a_resumed_run_is_the_same_to_the_bit(cache: Path, tmp_path: Path, section: dict[str, Any]) -> None:
    config = trial("kto", training={"save_steps": 1, "logging_steps": 2}, data=section)
    full, _ = finish(TrainingSession(cache).train(config, tmp_path / "whole"))
    begun = take(TrainingSession(cache).train(config, tmp_path / "1"), 3)
    assert without_speed(begun) == without_speed(full[:3])
    found, result = finish(TrainingSession(cache).train(config, tmp_path / "2", [tmp_path / "1"]))
    assert result.status is RunStatus.FINISHED
    assert without_speed(found) == without_speed(full)
    assert model_bytes(tmp_path / "2") == model_bytes(tmp_path / "whole")


def test_another_loss_is_refused_before_the_model_is_loaded(
    session: TrainingSession, tmp_path: Path, section: dict[str, Any]
) -> None:
    before = session.counters["model_loaded"]
    with pytest.raises(TrialError, match=r"loss.kind simpo needs pairs"):
        finish(session.train(trial("simpo", data=section), tmp_path / "run"))
    assert session.counters["model_loaded"] == before
