"""Values that earlier versions offered: refused in new files, read as they are in old sweeps, which are not resumed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import cli
from orchestrator.errors import ExitCode
from orchestrator.folders import SweepFolder
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.sweep_spec import SweepSpec
from tests.support.scripted_sweep import COMPLETE, GRID, Script, make_spec, run_sweep
from trainer.config.trial import ZERO3_REMOVED, TrialConfig

ZERO3 = {"distributed": "zero3"}
OLD = """\
name: a
base:
  model: org/model
  data: {train: rows.jsonl}
  training: {learning_rat: 1e-6, distributed: zero3}
search:
  training.distributed: [ddp, zero3]
sft:
  training: {distributed: zero3}
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "runs"))
    return tmp_path / "runs"


def old_sweep(root: Path, *, searched: bool) -> SweepFolder:
    """What an earlier version stored: three complete trials of a sweep with zero3."""
    search = GRID | {"training.distributed": {"choice": ["zero3", "ddp"]}} if searched else GRID
    sft = {"data": {"train": [{"generated": "instructions"}]}, "training": {"max_steps": 2}}
    made: dict[str, Any] = json.loads(make_spec("old", {**search}, sft=sft).model_dump_json(by_alias=True))
    for stage in (made["base"], made["sft"]):
        stage["training"] |= ZERO3
    return run_sweep(root, SweepSpec.from_stored(json.dumps(made)), lambda t: Script(t.number / 10), trials=3)


def test_zero3_is_refused_with_its_line_and_what_to_write_instead(findings: Callable[..., list[str]]) -> None:
    found = findings(OLD)
    assert found == [
        f"sweep.yaml:5: base.training.distributed: {ZERO3_REMOVED}",
        "sweep.yaml:5: base.training.learning_rat: unknown key (did you mean learning_rate?)",
        f"sweep.yaml:9: sft.training.distributed: {ZERO3_REMOVED}",
    ]
    assert "write fsdp2" in ZERO3_REMOVED
    searched = OLD.replace("learning_rat: 1e-6, distributed: zero3", "").replace(", distributed: zero3", "")
    assert f"sweep.yaml:7: search.training.distributed.1: {ZERO3_REMOVED}" in findings(searched)


def test_the_commands_refuse_it_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3)
    file = tmp_path / "sweep.yaml"
    file.write_text(OLD)
    for command in ("plan", "sweep"):
        assert cli.main([command, str(file)]) == ExitCode.USER
        assert f"{file}:5: base.training.distributed: {ZERO3_REMOVED}" in capsys.readouterr().err


def test_it_is_no_value_like_the_others(findings: Callable[..., list[str]]) -> None:
    (found,) = findings("", "training.distributed=zero2")
    assert "must be one of ddp, fsdp2; not the text 'zero2'" in found
    with pytest.raises(ValueError, match="write fsdp2"):
        TrialConfig.model_validate({"model": "m", "data": {"train": "d"}, "training": ZERO3})


@pytest.mark.parametrize("searched", [False, True])
def test_an_old_sweep_is_read_and_not_resumed(searched: bool, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = old_sweep(root, searched=searched)
    assert cli.main(["status", "old", "--json"]) == ExitCode.DONE
    status = json.loads(capsys.readouterr().out)
    assert [trial["state"] for trial in status["trials"]] == [COMPLETE.state] * 3
    assert cli.main(["history", "old", "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["specs"][0]["version"] == 1
    assert cli.main(["best", "old", "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["number"] == 2
    assert cli.main(["report", "old"]) == ExitCode.DONE
    capsys.readouterr()
    before = folder.spec.read_text()
    assert cli.main(["resume", "old"]) == ExitCode.USER
    message = capsys.readouterr().err
    lines = [i for i, line in enumerate(before.splitlines(), 1) if line.strip() == "distributed: zero3"]
    for line, section in zip(lines, ("base", "sft"), strict=True):
        assert f"{folder.spec}:{line}: {section}.training.distributed: {ZERO3_REMOVED}" in message
    assert ("search.training.distributed" in message, folder.spec.read_text()) == (searched, before)


def test_what_follows_an_old_sweep_is_written_with_fsdp2(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old_sweep(root, searched=False)
    assert cli.main(["suggest", "old", "--output", str(tmp_path / "next.yaml")]) == ExitCode.DONE
    text = (tmp_path / "next.yaml").read_text()
    made = yaml.safe_load(text)
    assert made["base"]["training"]["distributed"] == made["sft"]["training"]["distributed"] == "fsdp2"
    assert "# training.distributed is fsdp2 here: zero3 (DeepSpeed)" in text
    assert cli.main(["plan", str(tmp_path / "next.yaml")]) == ExitCode.DONE
    assert "zero3" not in capsys.readouterr().out


def test_its_name_is_taken_and_its_dump_is_as_it_was(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, spec, file = old_sweep(root, searched=False), make_spec("old"), root / "new.yaml"
    file.write_text(dump_spec(spec))
    assert cli.main(["sweep", str(file), "--continue"]) == ExitCode.USER
    assert "old" in capsys.readouterr().err
    assert "distributed: zero3" in folder.spec.read_text()
