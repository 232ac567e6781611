import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.processes import LIMIT_SECONDS
from tests.support.small_trials import SPEED, finish, trial, without_speed
from trainer.__main__ import main
from trainer.config.yaml_files import InvalidTrialFile, load_trial
from trainer.training_session import TrainingSession

GOOD = """
model: {generated: {}}
data: {train: a.jsonl, max_length: 64}
training: {learning_rate: 6e-7, num_train_epochs: 1}
"""


def problems(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "trial.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidTrialFile) as caught:
        load_trial(file)
    return caught.value.problems


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    file = tmp_path / "trial.yaml"
    file.write_text(GOOD)
    assert load_trial(file).training.learning_rate == 6e-7


def test_every_mistake_is_one_sentence(tmp_path: Path) -> None:
    bad = GOOD.replace("6e-7", "fast").replace("{generated: {}}", "{}") + "loss: {kind: simpo, betta: 2}\nmore: 1\n"
    found = problems(tmp_path, bad)
    assert len(found) == 4
    assert any("learning_rate" in p and "'fast'" in p for p in found)
    assert any("exactly one of name_or_path and generated" in p for p in found)
    assert any("betta: there is no such key" in p for p in found)
    assert any(p == "line 6: more: there is no such key" for p in found)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (GOOD + "training: {}\n", "line 5: training: given twice (first at"),
        ("a: [1\nb: 2\n", "line 2"),
        ("a: &x [*x]\n", "aliases expand without end"),
        ("a: !!python/object/apply:os.system ['touch /tmp/never']\n", "has no meaning here"),
        ("", "line 1: the file is empty"),
        ("- 1\n", "the file"),
        ("? [1]\n: 2\n", "line 1: a key must be a word"),
        ("a: \t- b\n\t- c", "line"),
        ("[" * 5000, "nested deeper"),
    ],
)
def test_what_is_no_configuration_is_told(tmp_path: Path, text: str, word: str) -> None:
    found = problems(tmp_path, text)
    assert len(found) == 1
    assert word in found[0]


def test_bad_configurations_exit_with_2_and_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trial.yaml"
    file.write_text("nothing: here\n")
    assert main([str(file)]) == 2
    assert main([str(tmp_path / "absent.yaml")]) == 2
    messages = capsys.readouterr()
    assert messages.out == ""
    assert "model: is missing" in messages.err
    assert "Traceback" not in messages.err


def test_diverged_exits_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wild = trial(training={"learning_rate": 1e30, "max_grad_norm": 0, "warmup_ratio": 0.0})
    file = tmp_path / "trial.yaml"
    file.write_text(json.dumps(wild.model_dump(mode="json", exclude_none=True)))
    assert main([str(file), "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]) == 3
    history = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [p["step"] for p in history][:2] == [0, 1]


def test_the_configuration_is_told_before_the_heavy_imports() -> None:
    code = "import sys, trainer.__main__; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    config = trial(
        "dpo", training={"learning_rate": 1e-3, "pairs_per_update": 7, "num_train_epochs": 1, "eval_steps": 2}
    )
    file = tmp_path / "trial.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    one, _ = finish(TrainingSession(tmp_path / "cache").train(config, tmp_path / "one"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "trainer"]
    done = subprocess.run(
        [*launch, str(file), "--out", str(tmp_path / "two"), "--cache", str(tmp_path / "other")],
        capture_output=True, text=True, env=environment, check=False, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    history = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(history) == len(one)
    for ours, (step, metrics) in zip(history, without_speed(one), strict=True):
        assert ours.pop("step") == step
        assert ours == pytest.approx(metrics | {name: ours[name] for name in SPEED if name in ours}, rel=1e-4, abs=1e-6)
    theirs = load_file(tmp_path / "two/model/model.safetensors")
    for name, tensor in load_file(tmp_path / "one/model/model.safetensors").items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-6)
