"""Before the first trial: the data is prepared and checked, and the start model is made by SFT where asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.engine.messages import EndKind, Job, Report
from orchestrator.engine.stage import StageFailed, StageWorker
from orchestrator.engine.view import View
from orchestrator.engine.wishes import Wishes
from orchestrator.errors import DataError, Finding, SpecError, StorageRefused
from orchestrator.folders import DATA_FILE, SweepFolder
from orchestrator.spec.place import place
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study.study import Study
from orchestrator.tracking.sink import SFT, Sink
from trainer.config import ModelConfig, TrialConfig
from trainer.data.summary import DataReport
from trainer.errors import TrialError
from trainer.loss_config import SftLoss
from trainer.storage.durable import write_text
from trainer.training.schedule import total_updates

_CORNERS = 1024
_SHOWN = ("eval_nll_loss", "eval_exact_answers")
_ORIGIN = ("model.name_or_path", "model.generated", "model.revision")


@dataclass(frozen=True, slots=True)
class Ready:
    """What the trials start from. `start_model` is the folder that the SFT stage made."""

    data: DataReport
    start_model: Path | None = None

    def place(self, config: TrialConfig) -> TrialConfig:
        """A trial's configuration, complete: with the model it really starts from."""
        return config if self.start_model is None else with_model(config, self.start_model)


def with_model(config: TrialConfig, folder: Path) -> TrialConfig:
    """The configuration, starting from the model in this folder."""
    origin = {"name_or_path": str(folder), "generated": None, "revision": None}
    model = ModelConfig.model_validate(config.model.model_dump() | origin)
    return config.model_copy(update={"model": model})


def sft_config(spec: SweepSpec) -> TrialConfig | None:
    """The SFT stage as a trial of its own; None where the sweep has none."""
    if spec.sft is None:
        return None
    searched = [path for path in spec.search.paths if path.startswith(_ORIGIN)]
    if searched:
        problem = "the sft stage makes one start model for all trials, so the start model cannot be searched"
        raise SpecError([Finding(spec.name, searched[0], problem, "remove it from search, or remove sft")])
    base = spec.base
    return TrialConfig(
        model=base.model,
        data=spec.sft.data or base.data,
        loss=SftLoss(),
        training=spec.sft.training,
        evaluation=base.evaluation,
    )


def check_data(spec: SweepSpec, folder: SweepFolder, view: View, worker: StageWorker) -> DataReport:
    """Prepare what the trials and the SFT stage will read; DataError, with the list, when it must not be used."""
    view.stage("preparing and checking the data")
    report = DataReport.model_validate_json(worker.prepare(spec.base))
    _refuse_changed(spec, folder, load_report(folder), report)
    write_text(folder.path / DATA_FILE, report.model_dump_json(indent=1))
    view.say(f"data: {report.train_rows:,} pairs to train on, {report.eval_rows:,} held out")
    for finding in report.findings:
        view.say(f"data: {finding}")
    for variant in _variants(spec):
        steps_of(variant, DataReport.model_validate_json(worker.prepare(variant)))
    sft = sft_config(spec)
    if sft is not None:
        of_sft = report if sft.data == spec.base.data else DataReport.model_validate_json(worker.prepare(sft))
        steps_of(sft, of_sft)
    return report


def _variants(spec: SweepSpec) -> list[TrialConfig]:
    """The corners of the search that read other data, or read it through another model, than the ones before them."""
    corners = spec.search.corners()
    placed = [spec.search.place(spec.base, corners.point(i)) for i in range(min(len(corners), _CORNERS))] or [spec.base]
    return list({(config.data.model_dump_json(), config.model.model_dump_json()): config for config in placed}.values())


def _refuse_changed(spec: SweepSpec, folder: SweepFolder, before: DataReport | None, now: DataReport) -> None:
    """A sweep's trials all see the same data."""
    if before is not None and before.fingerprint != now.fingerprint:
        from trainer.data.compare import changes

        listed = "".join(f"\n  {line}" for line in changes(folder.cache, before, now))
        raise DataError(
            f"the data of {spec.name} changed since the sweep began (fingerprint {before.fingerprint}, now "
            f"{now.fingerprint}): its trials would no longer be comparable; put the old data back, or start another "
            f"sweep{listed}"
        )


def steps_of(config: TrialConfig, report: DataReport) -> int:
    """Updates of a trial; DataError where the data cannot fill one."""
    try:
        return total_updates(config.training, report.train_rows)
    except TrialError as why:
        raise DataError(str(why)) from why


def steps_by_params(spec: SweepSpec, report: DataReport) -> Callable[[Mapping[str, Any]], int]:
    """Updates of a trial, from what it drew."""

    def steps(params: Mapping[str, Any]) -> int:
        return steps_of(place(spec.base, params), report)

    return steps


def load_report(folder: SweepFolder) -> DataReport | None:
    """What was found in the data; None before it was looked at."""
    path = folder.path / DATA_FILE
    return DataReport.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def train_start_model(
    study: Study, report: DataReport, sink: Sink, view: View, worker: StageWorker, wishes: Wishes
) -> Path | None:
    """Run the SFT stage once, cached by content; the folder of its model, None where the sweep has no such stage."""
    spec = study.spec
    config = sft_config(spec)
    if config is None:
        return None
    if config.data != spec.base.data:
        report = DataReport.model_validate_json(worker.prepare(config))
    key = worker.key(config, report.fingerprint)
    place = study.folder.cache / "sft" / key / "run"
    place.mkdir(parents=True, exist_ok=True)
    (place / "trial.json").write_text(json.dumps(config.model_dump(mode="json"), indent=1), encoding="utf-8")
    steps = total_updates(config.training, report.train_rows)
    sink.start(SFT, name=SFT, params=config.leaves(), tags={"state": "RUNNING", "sft.key": key}, at=time.time())
    view.stage(f"sft: 0 of {steps} updates")

    def heard(said: Report) -> None:
        sink.points(SFT, said.points, at=time.time())
        for point in said.points:
            told = [f"{name}={point.metrics[name]:.4g}" for name in _SHOWN if name in point.metrics]
            if told:
                view.stage(f"sft: {point.step} of {steps} updates  {'  '.join(told)}")

    end = worker.train(Job(SFT, 1, config.model_dump_json(), place), heard, lambda: wishes.ask() is not None)
    tags = {"state": "COMPLETE" if end.kind is EndKind.FINISHED else "FAILED", "reason": end.reason}
    status = "FINISHED" if end.kind is EndKind.FINISHED else "FAILED"
    sink.end(SFT, status=status, tags=tags, at=time.time())
    if end.kind is EndKind.NO_DISK:
        raise StorageRefused(f"the sft stage could not write: {end.reason}")
    if end.kind is not EndKind.FINISHED:
        raise StageFailed(f"the sft stage ended as {end.kind}: {end.reason} (see {place})")
    view.say(f"sft: {end.steps} updates done; every trial starts from {place / 'model'}")
    return place / "model"
