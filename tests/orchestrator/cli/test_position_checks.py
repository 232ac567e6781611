"""Lengths beyond a model's positions, as `plan` and `sweep` tell of them: with the line, before anything is spent."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli

SWEEP = """name: lengths
base:
  model: {model}
  data:
    train: rows.jsonl
    max_length: {length}
  training: {{max_steps: 1, pairs_per_update: 2}}
{more}maximize: eval_accuracies/logp
"""


@pytest.fixture(autouse=True)
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def model(path: Path, **config: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (path / "tokenizer.json").write_text("{}", encoding="utf-8")
    return path


def told(capsys: pytest.CaptureFixture[str], command: str, model: Path, length: int, more: str = "") -> tuple[int, str]:
    Path("sweep.yaml").write_text(SWEEP.format(model=model, length=length, more=more), encoding="utf-8")
    code, out = cli.main([command, "sweep.yaml"]), capsys.readouterr()
    return code, out.out + out.err


@pytest.mark.parametrize("command", ["plan", "sweep"])
def test_a_length_beyond_learned_positions_is_a_finding_with_its_line(
    command: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, messages = told(capsys, command, model(tmp_path / "gpt2", model_type="gpt2", n_positions=1024), 2048)
    assert code == 2
    assert "sweep.yaml:6: base.data.max_length: 2,048 tokens exceed the 1,024 positions that the model has" in messages
    assert "(write 1024 or less)" in messages
    assert not home.exists()


def test_every_finding_is_told_at_once_where_the_file_says_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model(tmp_path / "opt", model_type="opt", max_position_embeddings=1024)
    small = model(tmp_path / "small", model_type="gptj", n_positions=512)
    searched = f"search:\n  model.name_or_path: [{path}, {small}]\n"
    judge = "judge: {max_new_tokens: 900, reward_model: Org/Reward}\n"
    code, messages = told(capsys, "plan", path, 800, searched + judge)
    assert code == 2
    assert f"sweep.yaml:6: base.data.max_length: with {small}: 800 tokens exceed the 512 positions" in messages
    assert "sweep.yaml:10: judge.max_new_tokens: 900 new tokens after a prompt of up to 544" in messages
    assert messages.count("base.data.max_length") == 1
    sft = "sft:\n  training: {max_steps: 1}\n  data: {train: rows.jsonl, max_length: 3000}\n"
    code, messages = told(capsys, "plan", path, 800, sft + judge)
    assert code == 2
    assert "sweep.yaml:10: sft.data.max_length: 3,000 tokens exceed the 1,024 positions" in messages
    assert "sweep.yaml:11: judge.max_new_tokens: 900 new tokens after a prompt of up to 544" in messages


def test_a_length_beyond_a_rotary_models_training_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model(tmp_path / "neox", model_type="gpt_neox", max_position_embeddings=1024)
    code, messages = told(capsys, "plan", path, 2048)
    assert code == 0
    messages = " ".join(messages.split())
    assert (
        "sweep.yaml:6: base.data.max_length: 2,048 tokens are more than the 1,024 that the model was trained"
        in messages
    )


def test_lengths_within_the_model_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    path = model(tmp_path / "qwen", model_type="qwen2", max_position_embeddings=1024, rope_scaling=scaling)
    code, messages = told(capsys, "plan", path, 2048)
    assert code == 0
    assert "was trained" not in messages
