from pathlib import Path
from unittest.mock import patch

import pytest

from orchestrator import cli
from orchestrator.commands.init_file import LOSSES, check_answer
from orchestrator.spec.loading.loader import load_spec
from trainer.config.trial import FileSource


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)


@pytest.mark.parametrize("objective", LOSSES)
@pytest.mark.parametrize("gpus", ["0", "2"])
def test_what_is_written_loads(objective: str, gpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", "first.yaml", "--objective", objective, "--gpus", gpus]) == 0
    assert capsys.readouterr().out == "first.yaml\n"
    spec = load_spec(Path("first.yaml"))
    assert (spec.name, spec.base.loss.kind) == ("first", objective)
    assert ("resources.gpus_per_trial" in spec.auto, spec.resources.gpus_per_trial) == (
        (False, 0) if gpus == "0" else (True, None)
    )
    assert Path("first.yaml").read_text().count("#") > 10


def test_a_mistyped_model_or_file_is_answered_with_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    (tmp_path / "pairs.jsonl").write_text("{}\n", encoding="utf-8")
    assert check_answer("model", "./my-modle") == "there is no ./my-modle (did you mean ./my-model?)"
    assert check_answer("data", "pair.jsonl") == "there is no file pair.jsonl (did you mean pairs.jsonl?)"
    assert check_answer("data", "nowhere/x.jsonl") == "there is no file nowhere/x.jsonl"


def test_a_file_of_pairs_with_odd_names(tmp_path: Path) -> None:
    odd = tmp_path / "pairs: 'a' #1.jsonl"
    odd.write_text("".join(f'{{"prompt": "{prompt}", "chosen": "b", "rejected": "c"}}\n' for prompt in "xyz"))
    assert cli.main(["init", "--data", odd.name, "--model", "me/my: model"]) == 0
    spec = load_spec(Path("sweep.yaml"))
    assert spec.base.data.train == (FileSource(path=str(odd)),)
    assert spec.base.model.name_or_path == "me/my: model"


def test_paths_with_a_dollar_sign_are_written_so_that_they_load(tmp_path: Path) -> None:
    (tmp_path / "${ROWS}").mkdir()
    rows = tmp_path / "${ROWS}" / "pairs.jsonl"
    rows.write_text("".join(f'{{"prompt": "{prompt}", "chosen": "b", "rejected": "c"}}\n' for prompt in "xyz"))
    (tmp_path / "${ROWS}" / "config.json").write_text("{}")
    assert cli.main(["init", "--data", str(rows), "--model", "${ROWS}"]) == 0
    assert "$${ROWS}" in Path("sweep.yaml").read_text()
    spec = load_spec(Path("sweep.yaml"))
    assert spec.base.data.train == (FileSource(path=str(rows)),)
    assert spec.base.model.name_or_path == str(rows.parent)


def test_a_mistyped_folder_that_becomes_a_hub_name_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my-base").mkdir()
    assert cli.main(["init", "--model", "my-bas"]) == 0
    assert "so it is a name on the hub; did you mean my-base?" in capsys.readouterr().err


def test_nothing_is_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("sweep.yaml").write_text("mine")
    assert cli.main(["init"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert Path("sweep.yaml").read_text() == "mine"


def test_every_wrong_answer_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", "--objective", "simp", "--gpus", "two", "--data", "no.jsonl", "--model", ""]) == 2
    messages = capsys.readouterr().err
    assert all(f"--{question}: " in messages for question in ("model", "data", "gpus", "objective"))
    assert not Path("sweep.yaml").exists()


def test_on_a_terminal_it_asks_until_it_can_use_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with patch("click.prompt", side_effect=["org/start", "org/pairs", "many", "1", "dpo"]) as requested:
        assert cli.main(["init"]) == 0
    assert requested.call_count == 5
    spec = load_spec(Path("sweep.yaml"))
    assert (spec.base.model.name_or_path, spec.base.loss.kind) == ("org/start", "dpo")


def test_a_name_no_sweep_can_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", "my sweep.yaml"]) == 2
    assert "name" in capsys.readouterr().err
    assert not Path("my sweep.yaml").exists()
