"""`enqueue` checks what `plan` checks of a file, and trains nothing twice unless `--again` asks for another seed."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.commands import enqueue_checks
from orchestrator.commands.request_commands import RequestRefused, enqueue_clone, enqueue_trial
from orchestrator.errors import DataError, OrchestrateError, SpecError
from orchestrator.folders import SweepFolder
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.samplers import StagedSampler
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailureKind, Outcome, Trial, TrialState
from tests.support.specs import GRID, METRIC, make_spec
from trainer.results import StepMetrics

FAILED = Outcome(TrialState.FAILED, "a bug", FailureKind.BUG)
DATA = {"train": [{"generated": "instructions", "rows": 640}], "max_length": 512}


def begun(root: Path, spec: SweepSpec, *outcomes: Outcome) -> SweepFolder:
    """A sweep whose first trials have ended so."""
    folder = SweepFolder(root, "s")
    with Study.create(folder, spec) as study:
        folder.spec.write_text(dump_spec(spec))
        for outcome in outcomes:
            trial = study.ask()
            assert isinstance(trial, Trial)
            study.report(trial, [StepMetrics(1, {METRIC: 0.5})])
            study.tell(trial, outcome)
    return folder


def model(path: Path, positions: int) -> str:
    """A folder of which only the configuration is read."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "opt", "max_position_embeddings": positions}))
    return str(path)


def test_paths_lengths_rows_and_memory_are_checked_before_a_trial_is_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, short = model(tmp_path / "large", 2048), model(tmp_path / "short", 128)
    base: dict[str, Any] = {"model": {"name_or_path": large}, "data": DATA, "loss": {"kind": "simpo"}}
    search = {"model.name_or_path": {"choice": [large, str(tmp_path)]}}
    folder = begun(tmp_path, make_spec(search, base=base))

    def refused(kind: type[OrchestrateError], *overrides: str) -> str:
        with pytest.raises(kind) as error:
            enqueue_trial("s", tmp_path, overrides)
        return str(error.value)

    assert "write --set training.learning_rate=1e-4" in refused(SpecError, "lr=1e-4")
    assert "did you mean loss.beta?" in refused(SpecError, "loss.bta=3")
    wrong = refused(SpecError, "model.name_or_path=./nowhere")
    assert "--set model.name_or_path=./nowhere: " in wrong
    assert "there is no ./nowhere" in wrong
    wrong = refused(SpecError, f"model.name_or_path={short}")
    assert "--set model.name_or_path=" in wrong or "data.max_length" in wrong
    assert "128" in wrong
    assert "pairs" in refused(DataError, "training.pairs_per_update=100000")
    with Study.open(folder) as study:
        assert study.enqueued_trials() == []
    monkeypatch.chdir(tmp_path)
    enqueue_trial("s", tmp_path, ["model.name_or_path=./large", "training.learning_rate=1e-5"])
    with Study.open(folder) as study:
        assert study.enqueued_trials()[0].settings["model.name_or_path"] == large


def test_variables_of_enqueued_and_cloned_trials_are_expanded_and_secrets_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, other = model(tmp_path / "large", 2048), model(tmp_path / "${odd}", 2048)
    base: dict[str, Any] = {"model": {"name_or_path": large}, "data": DATA, "loss": {"kind": "simpo"}}
    spec = make_spec({"model.name_or_path": {"choice": [large, other]}}, base=base)
    folder = begun(tmp_path, spec, Outcome(TrialState.COMPLETE), Outcome(TrialState.COMPLETE))
    monkeypatch.setenv("LARGE", large)
    enqueue_trial("s", tmp_path, ["model.name_or_path=${LARGE}", "training.learning_rate=1e-5"])
    enqueue_clone("s", tmp_path, 0, [f"model.name_or_path={tmp_path}/$${{odd}}", "training.learning_rate=1e-4"])
    for asked, said in (
        ("model.name_or_path=${NOWHERE_SET}", "the environment variable NOWHERE_SET is not set"),
        ("model.name_or_path=${API_KEY}", "looks like a secret"),
        ("loss.loss_type=${LARGE}", "is text here"),
    ):
        for ask in (lambda s: enqueue_trial("s", tmp_path, [s]), lambda s: enqueue_clone("s", tmp_path, 0, [s])):
            with pytest.raises(SpecError) as refused:
                ask(asked)
            assert said in str(refused.value)
            assert f"--set {asked}" in str(refused.value)
    with Study.open(folder) as study:
        assert [e.settings["model.name_or_path"] for e in study.enqueued_trials()] == [large, other]


def test_a_later_stage_may_start_from_an_enqueued_trial_and_the_notice_says_so(tmp_path: Path) -> None:
    begun(tmp_path, make_spec(GRID, sampler=StagedSampler()))
    notices = enqueue_trial("s", tmp_path, ["loss.beta=3", "loss.gamma=0.5"])
    assert any("later stages start from the best trial" in notice for notice in notices)


def test_what_does_not_fit_by_formula_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path, make_spec(GRID))
    monkeypatch.setattr(enqueue_checks, "gpu_memory", lambda: 0.2e9)
    notices = enqueue_trial("s", tmp_path, ["loss.beta=3", "loss.gamma=1", "training.tokens_per_micro_batch=10000000"])
    assert any("training.tokens_per_micro_batch 10,000,000 does not fit" in notice for notice in notices)


def test_a_point_is_repeated_with_again_only_and_with_a_seed_of_its_own(tmp_path: Path) -> None:
    folder = begun(tmp_path, make_spec(GRID), Outcome(TrialState.COMPLETE), FAILED)
    point = ["loss.beta=2", "loss.gamma=0.5"]
    with pytest.raises(RequestRefused, match=r"trial 0 \(COMPLETE\) of s has these settings and this seed already"):
        enqueue_trial("s", tmp_path, point)
    with pytest.raises(RequestRefused, match="enqueue it without --again"):
        enqueue_trial("s", tmp_path, ["loss.beta=7"], again=True)
    with pytest.raises(RequestRefused, match=r"trial 0 \(COMPLETE\) of s has these settings"):
        enqueue_clone("s", tmp_path, 1, ["loss.gamma=0.5"])
    again = [enqueue_trial("s", tmp_path, point, again=True) for _ in range(2)]
    assert not any("outside the search space" in notice for notices in again for notice in notices)
    enqueue_trial("s", tmp_path, ["loss.beta=2", "loss.gamma=1"])  # trial 1 failed: it was never trained to its end
    with pytest.raises(RequestRefused, match="a waiting trial of s has these settings"):
        enqueue_trial("s", tmp_path, ["loss.beta=2", "loss.gamma=1"])
    with Study.open(folder) as study:
        issued = [trial for trial in (study.ask() for _ in range(3)) if isinstance(trial, Trial)]
        assert [trial.config.training.seed for trial in issued] == [43, 44, 42]
        for trial, value in zip(issued, (0.7, 0.9, 0.1), strict=True):
            study.report(trial, [StepMetrics(1, {METRIC: value})])
            study.tell(trial, Outcome(TrialState.COMPLETE))
        best = study.best()
        assert best is not None
        assert (best.label, best.value, best.params) == (
            "0,2,3",
            pytest.approx(0.7),
            {"loss.beta": 2.0, "loss.gamma": 0.5},
        )
