"""A sweep whose data or model is elsewhere: accepted where the content is equal, refused with a sentence where not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.driver.data_stage import check_data
from orchestrator.driver.judge_candidates import reward_scores_file
from orchestrator.driver.sft_stage import sft_config
from orchestrator.driver.spec_changes import check_inputs_exist, check_moved_inputs, follow_folder
from orchestrator.errors import DataError, SpecChanged, SpecError
from orchestrator.execution.sft_cache_key import stage_key
from orchestrator.folders import SweepFolder
from orchestrator.judge.answer_pairs import AnswerPair, Preferences, make_judgements
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial
from tests.support.metrics import COMPLETE
from tests.support.preparation import PreparedHere
from tests.support.recorders import SilentView
from tests.support.small_trials import MODEL
from tests.support.specs import METRIC, make_spec
from trainer.config.trial import GeneratedModel, GeneratedSource
from trainer.data import prepare
from trainer.results import StepMetrics
from trainer.storage.atomic_files import write_json
from trainer.synthetic import generate_model
from trainer.synthetic.instructions import generate_rows


def rows_in(folder: Path, rows: int = 40) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made = generate_rows(GeneratedSource(generated="instructions", rows=rows))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def model_in(folder: Path, seed: int = 0) -> Path:
    made = generate_model(GeneratedModel.model_validate(MODEL["generated"] | {"seed": seed}), folder)
    return made.rename(folder / "model")


@pytest.fixture
def begun(tmp_path: Path) -> tuple[SweepFolder, SweepSpec]:
    """A sweep on files of its own, prepared, with one trial ended and one running."""
    base = {
        "model": {"name_or_path": str(model_in(tmp_path / "mine"))},
        "data": {"train": [{"path": str(rows_in(tmp_path / "mine"))}], "max_length": 96},
        "loss": {"kind": "simpo", "beta": 2.0, "gamma": 1.0},
        "training": {"pairs_per_update": 8},
    }
    spec = make_spec(3, base=base)
    folder = SweepFolder(tmp_path / "runs", "s")
    folder.path.mkdir(parents=True)
    folder.spec.write_text(dump_spec(spec))
    check_data(spec, folder, SilentView(), PreparedHere(folder.cache))  # type: ignore[arg-type]
    with Study.create(folder, spec) as study:
        first = study.ask()
        assert isinstance(first, Trial)
        study.report(first, [StepMetrics(1, {METRIC: 0.5})])
        study.tell(first, COMPLETE)
        assert isinstance(study.ask(), Trial)
    return folder, spec


def changed(folder: SweepFolder, spec: SweepSpec, *overrides: str) -> SweepSpec:
    return load_spec_text(dump_spec(spec), folder.path, overrides)


def test_equal_bytes_elsewhere_are_accepted_and_no_point_is_tried_again(
    begun: tuple[SweepFolder, SweepSpec], tmp_path: Path
) -> None:
    folder, spec = begun
    (tmp_path / "mine").rename(tmp_path / "moved")
    overrides = (f"base.data.train={tmp_path}/moved/rows.jsonl", f"base.model.name_or_path={tmp_path}/moved/model")
    with pytest.raises(SpecError, match="cannot be compared") as refused:  # nothing has recorded its weights yet
        check_moved_inputs(folder, spec, changed(folder, spec, *overrides))
    assert "put the model back" in str(refused.value)
    from trainer.models.model_files import model_fingerprint

    new = changed(folder, spec, *overrides)
    assert new.base.model.name_or_path is not None
    fingerprint = model_fingerprint(new.base.model, new.base.model.name_or_path)
    attempt = folder.attempt(0, 1)
    attempt.mkdir(parents=True)
    (attempt / "trial.yaml").write_text(json.dumps(spec.base.model_dump(mode="json")))
    write_json(attempt / "ending.json", {"inputs": {"model": fingerprint, "data": "d"}})
    check_moved_inputs(folder, spec, new)
    with Study.open(folder) as study:
        assert [change.path for change in study.amend(new)] == ["base.data.train", "base.model.name_or_path"]
    with Study.open(folder) as study:
        again, last, none = study.ask(), study.ask(), study.ask()
        assert isinstance(again, Trial)
        assert isinstance(last, Trial)
        assert (again.number, last.number, none) == (1, 2, None), "of three points, the ended one is not tried again"
        for trial in (again, last):
            assert trial.config.model.name_or_path == f"{tmp_path}/moved/model"
            assert trial.config.data.train == new.base.data.train
        assert len({t.fingerprint for t in study.snapshots()}) == 3
        assert study.no_more_trials_reason()


def test_another_content_is_refused_with_what_differs_and_nothing_changes(
    begun: tuple[SweepFolder, SweepSpec], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    folder, spec = begun
    monkeypatch.setenv("ORCHESTRATE_HOME", str(folder.root))
    before = folder.spec.read_text()
    fewer, other = rows_in(tmp_path / "fewer", 30), model_in(tmp_path / "other", seed=1)
    for option, words in (
        (f"base.data.train={fewer}", "is not that with which s began"),
        (f"base.model.name_or_path={other}", "has other weights than the model with which the sweep began"),
        (f"base.data.train={tmp_path}/nowhere.jsonl", "there is no file"),
    ):
        assert main(["resume", "s", "--set", option]) == 2
        assert words in capsys.readouterr().err
    with Study.open(folder) as study:
        assert len(study.spec_history()) == 1
        with pytest.raises(SpecChanged):
            study.amend(changed(folder, spec, "base.data.max_length=64"))
    assert folder.spec.read_text() == before
    rows_in(tmp_path / "mine", 30)
    check_moved_inputs(folder, spec, spec)  # what did not move is for the data stage
    with pytest.raises(DataError, match="changed since the sweep started"):
        check_data(spec, folder, SilentView(), PreparedHere(folder.cache))  # type: ignore[arg-type]


def test_equal_sft_data_and_a_judges_model_elsewhere_are_accepted(
    begun: tuple[SweepFolder, SweepSpec], tmp_path: Path
) -> None:
    """The stage's data is compared with its earlier place, and once that is gone with that of the stage's model."""
    folder, spec = begun
    stage = {
        "data": {"train": [{"path": str(rows_in(tmp_path / "sft", 24))}], "max_length": 96},
        "training": {"max_steps": 4},
    }
    with_stage = {"sft": stage, "judge": {"reward_model": str(tmp_path / "reward")}, "name": "t"}
    spec = SweepSpec.model_validate(spec.model_dump(exclude={"sft", "judge", "name"}) | with_stage)
    folder = SweepFolder(folder.root, "t")
    folder.path.mkdir()
    folder.spec.write_text(dump_spec(spec))
    with Study.create(folder, spec):
        pass
    moved = tmp_path / "there"
    (moved / "reward").mkdir(parents=True)
    (moved / "reward" / "config.json").write_text("{}")
    shutil.copy(tmp_path / "sft" / "rows.jsonl", moved / "rows.jsonl")
    reward = f"judge.reward_model={moved}/reward"
    new = changed(folder, spec, f"sft.data.train={moved}/rows.jsonl", reward)
    check_moved_inputs(folder, spec, new)
    other = changed(folder, spec, f"sft.data.train={rows_in(tmp_path / 'other', 30)}", reward)
    with pytest.raises(DataError, match=r"sft.data: the data at its new place is not that with which t began"):
        check_moved_inputs(folder, spec, other)
    (tmp_path / "sft" / "rows.jsonl").unlink()
    with pytest.raises(SpecError, match="is not the data of the sft stage's model"):
        check_moved_inputs(folder, spec, new)
    config = sft_config(new)
    assert config is not None
    prepared = prepare(config.data, config.model, folder.cache)
    (folder.cache / "sft" / stage_key(config, prepared.fingerprint, folder.cache)).mkdir(parents=True)
    check_moved_inputs(folder, spec, new)
    with pytest.raises(SpecError, match="is not the data of the sft stage's model"):
        check_moved_inputs(folder, spec, other)
    with Study.open(folder) as study:
        assert {change.path for change in study.amend(new)} == {"sft.data.train", "judge.reward_model.name_or_path"}
        assert study.spec.judge == new.judge


def test_a_reward_model_that_has_judged_trials_keeps_its_weights_at_its_new_place(
    begun: tuple[SweepFolder, SweepSpec], tmp_path: Path
) -> None:
    folder, _ = begun
    first, other = model_in(tmp_path / "first"), model_in(tmp_path / "other", seed=1)
    spec = changed(folder, begun[1], f"judge.reward_model={first}")
    with Study.open(folder) as study:
        study.amend(spec)
    moved = Path(shutil.copytree(first, tmp_path / "moved"))
    to_moved, to_other = (changed(folder, spec, f"judge.reward_model={place}") for place in (moved, other))
    check_moved_inputs(folder, spec, to_other)  # it has not judged any trial
    pair = AnswerPair(0, "key", "text", None, None, None, "longer", "short")
    (judged,) = make_judgements("reward", str(first), "greedy", {0: ([pair], Preferences((1.0,)))})
    with Study.open(folder) as study:
        study.save_judgement(0, judged.key, judged.model_dump_json())
    assert spec.judge is not None
    assert spec.judge.reward_model is not None
    scores = reward_scores_file(spec.judge.reward_model, folder.cache)
    scores.parent.mkdir(parents=True)
    scores.touch()
    for weights_known_by in ("its folder", "its scores"):
        check_moved_inputs(folder, spec, to_moved)
        with pytest.raises(SpecError, match=r"judge\.reward_model\.name_or_path") as refused:
            check_moved_inputs(folder, spec, to_other)
        assert f"orchestrate judge s --set judge.reward_model={other}" in str(refused.value), weights_known_by
        if first.exists():
            first.rename(tmp_path / "gone")
    scores.unlink()
    with pytest.raises(SpecError, match="by its weights"):
        check_moved_inputs(folder, spec, to_moved)


@pytest.mark.parametrize("path", ["base.model.name_or_path", "judge.reward_model.name_or_path"])
def test_a_folder_without_a_model_is_refused_as_a_models_new_place(
    begun: tuple[SweepFolder, SweepSpec], tmp_path: Path, path: str
) -> None:
    folder, spec = begun
    (tmp_path / "empty").mkdir()
    judged = changed(folder, spec, f"judge.reward_model={tmp_path}/mine/model")
    with pytest.raises(SpecError, match=f"s: {path}: .*/empty is no model: it has no config.json"):
        check_moved_inputs(folder, judged, changed(folder, judged, f"{path}={tmp_path}/empty"))


def test_missing_inputs_are_named_with_what_to_type_and_found_in_a_moved_runs_folder(
    begun: tuple[SweepFolder, SweepSpec], tmp_path: Path
) -> None:
    _, spec = begun
    (tmp_path / "mine").rename(tmp_path / "runs" / "mine")
    with pytest.raises(SpecError) as refused:
        check_inputs_exist(spec)
    assert f"there is no {tmp_path}/mine/rows.jsonl" in str(refused.value)
    assert "orchestrate resume s --set base.model.name_or_path=NEW_PATH" in str(refused.value)
    followed = follow_folder(spec, tmp_path / "runs")
    check_inputs_exist(followed)
    assert followed.base.model.name_or_path == f"{tmp_path}/runs/mine/model"


def test_commands_that_look_need_neither_data_nor_model(
    begun: tuple[SweepFolder, SweepSpec], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    folder, _ = begun
    monkeypatch.setenv("ORCHESTRATE_HOME", str(folder.root))
    (tmp_path / "mine").rename(tmp_path / "gone")
    for command in (["status"], ["best"], ["history"], ["report", "--output", str(tmp_path / "page.html")]):
        assert main([command[0], "s", *command[1:], "--json"]) == 0, capsys.readouterr().err
    from orchestrator.cli import composition

    assert composition._stored_sweep(folder)[1]  # pyright: ignore[reportPrivateUsage]  what `ui` reads
    monkeypatch.setattr(Study, "exists", lambda _: False)
    assert main(["status", "s", "--json"]) == 0, "also before its first trial"
