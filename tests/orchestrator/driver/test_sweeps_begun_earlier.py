"""A sweep that an earlier version began keeps its order and its pruner, also by `sweep --continue`."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.driver import run_sweep
from orchestrator.errors import NameTaken
from orchestrator.execution.stop_reasons import StopKind, StopReason
from orchestrator.folders import SweepFolder, create_sweep_folder
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.pruners import MedianPruner, NoPruner
from orchestrator.spec.sweep_spec import GridSampler, SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Outcome, Trial, TrialState
from trainer.results import StepMetrics

TEXT = """
name: s
base: {model: {generated: {}}, data: {train: {generated: instructions}}}
search: {loss.beta: [1.0, 2.0, 3.0, 4.0]}
budget: {trials: 3}
"""


def test_a_grid_begun_before_there_was_an_order_goes_on_in_the_files_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = load_spec_text(TEXT, tmp_path)
    assert file.sampler == GridSampler(order="shuffled")
    stored = json.loads(file.model_dump_json()) | {"sampler": {"kind": "grid"}}
    old, folder = SweepSpec.from_stored(json.dumps(stored)), SweepFolder(tmp_path, "s")
    create_sweep_folder(folder, dump_spec(old).replace("  order: null\n", "").replace("  seed: 0\n", ""))
    with Study.create(folder, old) as study:
        end(study)
    driven: list[SweepSpec] = []

    def drive(at: SweepFolder, spec: SweepSpec, *_: Any) -> StopReason:
        driven.append(spec)
        with Study.open(at) as study:
            while end(study):
                pass
            assert [record.params["loss.beta"] for record in study.trials()] == [1.0, 2.0, 3.0, 4.0]
        return StopReason(StopKind.FINISHED)

    presentation: Any = None
    monkeypatch.setattr(run_sweep, "_drive", drive)
    run_sweep.resume("s", tmp_path, presentation, ["budget.trials=4"])
    run_sweep.start_or_resume(file, tmp_path, presentation)
    assert [spec.sampler for spec in driven] == [GridSampler()] * 2
    with pytest.raises(NameTaken):
        run_sweep.start_or_resume(load_spec_text(TEXT, tmp_path, ["loss.beta=2.0"]), tmp_path, presentation)


def test_a_sweep_begun_before_there_was_a_default_pruner_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TEXT.replace("{trials: 3}", "{}").replace("[1.0, 2.0, 3.0, 4.0]", f"{[1 + k / 10 for k in range(20)]}")
    file = load_spec_text(text, tmp_path)
    assert file.pruner == MedianPruner()
    stored = json.loads(file.model_dump_json()) | {"pruner": {"kind": "none"}}
    old, folder = SweepSpec.from_stored(json.dumps(stored)), SweepFolder(tmp_path, "s")
    create_sweep_folder(folder, dump_spec(old))
    with Study.create(folder, old) as study:
        end(study)
    driven: list[SweepSpec] = []

    def drive(at: SweepFolder, spec: SweepSpec, *_: Any) -> StopReason:
        driven.append(spec)
        return StopReason(StopKind.FINISHED)

    presentation: Any = None
    monkeypatch.setattr(run_sweep, "_drive", drive)
    run_sweep.start_or_resume(file, tmp_path, presentation)
    assert [spec.pruner for spec in driven] == [NoPruner()]


def end(study: Study) -> bool:
    """Run the next trial; False where there is none."""
    trial = study.ask()
    if not isinstance(trial, Trial):
        return False
    study.report(trial, [StepMetrics(1, {"eval_accuracies/logp": 0.5})])
    study.tell(trial, Outcome(TrialState.COMPLETE))
    return True
