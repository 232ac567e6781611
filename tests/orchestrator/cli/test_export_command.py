"""`orchestrate best NAME --export DIR`: what the best trial trained, which still loads when the cache is gone."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from orchestrator.cli import main
from orchestrator.driver.sft_stage import sft_config, sft_model_folder, with_model
from orchestrator.errors import ExitCode
from orchestrator.execution.workers.stage_worker import stage_key
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Outcome, TrialState
from tests.support.preparation import prepared_sweep
from tests.support.small_trials import DATA, MODEL
from tests.support.specs import make_spec
from trainer.training_session import TrainingSession

SPEC = make_spec(
    {"loss.beta": {"choice": [2.0]}},
    name="adapted",
    base={
        "model": MODEL,
        "data": DATA,
        "training": {"pairs_per_update": 8, "max_steps": 2, "eval_steps": 2, "learning_rate": 5e-2},
        "lora": {"r": 4},
        "evaluation": {"prompts": 0},
    },
    sft={"training": {"pairs_per_update": 8, "max_steps": 2, "learning_rate": 1e-2}},
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a finished sweep: an SFT stage, and one trial with adapters over its model."""
    root = tmp_path_factory.mktemp("trained") / "runs"
    folder, report = prepared_sweep(root, SPEC)
    session, sft = TrainingSession(folder.cache), sft_config(SPEC)
    assert sft is not None
    list(session.train(sft, folder.cache / "sft" / stage_key(sft, report.fingerprint, folder.cache) / "run"))
    start = sft_model_folder(SPEC, folder, report)
    assert start is not None
    with Study.create(folder, SPEC, train_pairs=report.train_rows) as study:
        study.start_driving()
        trial = study.ask()
        metrics = list(session.train(with_model(trial.config, start), folder.attempt(trial.number, trial.attempt)))
        study.report(trial, metrics)
        study.tell(trial, Outcome(TrialState.COMPLETE))
    return root


@pytest.fixture
def home(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(trained))
    return trained


def test_adapters_after_an_sft_stage_bring_their_base_along(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["best", "adapted", "--export", str(tmp_path / "out"), "--json"]) == ExitCode.DONE
    messages = capsys.readouterr()
    assert json.loads(messages.out)["exported"] == str(tmp_path / "out")
    assert "export: mean log-prob of the responses of 6 held-out pairs: " in messages.err
    assert f"it was copied to {tmp_path / 'out/base'} (--merge merges both into one model)" in messages.err
    assert "compared: mean log-prob of the responses of 6 held-out pairs" in (tmp_path / "out/README.md").read_text()
    temporary = home.with_name("elsewhere")
    home.rename(temporary)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert any("lora_" in name for name, _ in loaded.named_parameters())
    finally:
        temporary.rename(home)


def test_merged_it_is_one_model(home: Path, tmp_path: Path) -> None:
    assert main(["best", "adapted", "--export", str(tmp_path / "out"), "--merge"]) == ExitCode.DONE
    assert not list((tmp_path / "out").glob("adapter*"))
    assert not (tmp_path / "out/base").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"
    assert home.exists()


def test_what_cannot_be_or_does_not_compare_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "runs"
    shutil.copytree(home, copy)
    monkeypatch.setenv("ORCHESTRATE_HOME", str(copy))
    (file,) = (copy / "adapted").rglob("adapter_model.safetensors")
    known = file.parents[1] / "eval_pairs.safetensors"
    stored = known.read_bytes()
    known.unlink()
    out = str(tmp_path / "out")
    assert main(["best", "adapted", "--export", out]) == ExitCode.USER
    assert "cannot be compared with its trial: the log-probs of the trial's last evaluation" in capsys.readouterr().err
    assert main(["best", "adapted", "--export", str(tmp_path / "unseen"), "--no-compare"]) == ExitCode.DONE
    assert "compared" not in (tmp_path / "unseen/README.md").read_text()
    known.write_bytes(stored)
    save_file({k: 2 * v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    for merge in ([], ["--merge"]):
        assert main(["best", "adapted", "--export", out, *merge]) == ExitCode.INTERNAL_ERROR
        assert "the export is not the trained model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_base_that_is_gone_is_a_sentence_with_what_makes_it_again(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, temporary = home / "cache/sft", tmp_path / "sft"
    stage.rename(temporary)
    try:
        for merge in ([], ["--merge"]):
            assert main(["best", "adapted", "--export", str(tmp_path / "out"), *merge]) == ExitCode.USER
            messages = capsys.readouterr().err
            assert "of these adapters was not found; orchestrate resume adapted creates it again" in messages
    finally:
        temporary.rename(stage)


@pytest.mark.parametrize("flag", ["--merge", "--no-compare", "--trust-remote-code"])
def test_flags_of_an_export_want_one(home: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["best", "adapted", flag]) == ExitCode.USER
    assert f"{flag} requires --export DIR" in capsys.readouterr().err
    assert home.exists()
