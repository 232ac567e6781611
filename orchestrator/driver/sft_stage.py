"""The SFT stage: one initial model for all trials, trained once. Lost workers and memory are handled as in trials."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from orchestrator.errors import Finding, SpecError, StorageRefused
from orchestrator.execution import retry_policy
from orchestrator.execution.messages import MIRROR, AttemptReport, AttemptResult, AttemptStatus, AttemptTask
from orchestrator.execution.retry_policy import MAX_LOSSES
from orchestrator.execution.sft_cache_key import stage_key
from orchestrator.execution.user_requests import StopConditions
from orchestrator.execution.workers.data_process import DataProcess
from orchestrator.execution.workers.stage_worker import StageDied, StageFailed, StageWorker
from orchestrator.folders import SweepFolder
from orchestrator.interfaces import SFT, ProgressView, TrackingSink
from orchestrator.mirror import Mirror, sft_path
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailureKind
from trainer.config.loss_config import SftLoss
from trainer.config.trial import STORED, ModelConfig, TrialConfig
from trainer.data.data_report import DataReport
from trainer.training.schedule import total_updates

_SHOWN_METRICS = ("eval_nll_loss", "eval_exact_answers")
_CONFIG = "trial.json"
"""The configuration that a run of the stage was begun with."""
_COMPUTED = ("tokens_per_micro_batch", "distributed")
"""How the work is cut, which may change while a run goes on."""
_MODEL_SOURCE_PATHS = ("model.name_or_path", "model.generated", "model.revision")


@dataclass(frozen=True, slots=True)
class InitialState:
    """What the trials start from. `initial_model` is the folder that the SFT stage made."""

    data: DataReport
    initial_model: Path | None = None

    def apply(self, config: TrialConfig) -> TrialConfig:
        """A trial's configuration, complete: with the model it really starts from."""
        return config if self.initial_model is None else with_model(config, self.initial_model)


def with_model(config: TrialConfig, folder: Path) -> TrialConfig:
    """The configuration, starting from the model in this folder."""
    origin = {"name_or_path": str(folder), "generated": None, "revision": None}
    model = ModelConfig.model_validate(config.model.model_dump() | origin)
    return config.model_copy(update={"model": model})


def sft_config(spec: SweepSpec) -> TrialConfig | None:
    """The SFT stage as a trial of its own; None where the sweep has none."""
    if spec.sft is None:
        return None
    searched = [path for path in spec.search.paths if path.startswith(_MODEL_SOURCE_PATHS)]
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


def sft_model_folder(
    spec: SweepSpec, folder: SweepFolder, report: DataReport, *, trust_remote_code: bool = False
) -> Path | None:
    """Where the sft stage left its model; None where the sweep has no such stage. Reads the data where it has its own.

    StorageRefused where it is no longer in the cache.
    """
    config = sft_config(spec)
    if config is None:
        return None
    fingerprint = report.fingerprint
    if config.data != spec.base.data:
        from trainer.data import prepare

        fingerprint = prepare(config.data, config.model, folder.cache, trust_remote_code=trust_remote_code).fingerprint
    model = _folder(folder.cache, stage_key(config, fingerprint, folder.cache), config) / "model"
    if not model.is_dir():
        raise StorageRefused(f"the start model that the sft stage made is no longer in {model}")
    return model


def _folder(cache: Path, key: str, config: TrialConfig) -> Path:
    """Where this configuration's run lies among those of the same key; once begun, always the same place.

    All of a key make the same weights, so one run serves them; but an unfinished one that keeps all activations must
    not be forced on a configuration whose memory has no room for them, nor the other way round.
    """
    key_folder, checkpointing = cache / "sft" / key, config.training.gradient_checkpointing
    own = key_folder / ("run-checkpointing" if checkpointing else "run-plain")
    first = key_folder / "run"
    begun = _begun_as(first)
    fits = begun is None or begun.training.gradient_checkpointing is checkpointing or (first / "model").is_dir()
    return first if fits and not own.is_dir() else own


def _begun_as(path: Path) -> TrialConfig | None:
    """The configuration that a run was begun with; None before it is begun."""
    file = path / _CONFIG
    if not file.is_file():
        return None
    return TrialConfig.model_validate_json(file.read_text(encoding="utf-8"), context=STORED)


def _begin(path: Path, config: TrialConfig, mirror: Mirror | None) -> TrialConfig:
    """The configuration that the run here goes on with: as whoever began it measured it, computed as this one says.

    Whoever began it may be another sweep with another `evaluation`, at this moment too.
    """
    path.mkdir(parents=True, exist_ok=True)
    report = (None if mirror is None else mirror.read(_CONFIG)) or config.model_dump_json(indent=1).encode()
    temporary = path / f".{_CONFIG}.{uuid4().hex[:8]}.tmp"
    temporary.write_bytes(report)
    with suppress(FileExistsError):  # whole or not at all, and never over another's
        os.link(temporary, path / _CONFIG)
    temporary.unlink()
    begun = _begun_as(path)
    assert begun is not None
    if mirror is not None:
        mirror.write(_CONFIG, (path / _CONFIG).read_bytes())
    mine = {name: getattr(config.training, name) for name in _COMPUTED}
    return begun.model_copy(update={"training": begun.training.model_copy(update=mine)})


def run_sft_stage(
    study: Study,
    data: DataProcess,
    report: DataReport,
    sink: TrackingSink,
    view: ProgressView,
    worker: StageWorker,
    stop_conditions: StopConditions,
) -> Path | None:
    """Run the SFT stage once, cached by content; the folder of its model, None where the sweep has no such stage."""
    config = sft_config(study.spec)
    if config is None:
        return None
    if config.data != study.spec.base.data:
        report = DataReport.model_validate_json(data.prepare(config))
    stage = _Stage(study, sink, view, worker, stop_conditions, config, report)
    end = stage.train()
    tags = {"state": "COMPLETE" if end.status is AttemptStatus.FINISHED else "FAILED", "reason": end.reason}
    status = "FINISHED" if end.status is AttemptStatus.FINISHED else "FAILED"
    sink.end_run(SFT, status=status, tags=tags, at=time.time())
    if end.status is AttemptStatus.NO_DISK:
        raise StorageRefused(f"the sft stage could not write: {end.reason}")
    if end.status is not AttemptStatus.FINISHED:
        raise StageFailed(f"the sft stage ended as {end.status}: {end.reason} (see {stage.folder})")
    view.log(f"sft: {end.steps} updates done; every trial starts from {stage.folder / 'model'}")
    return stage.folder / "model"


class _Stage:
    """One SFT run, by as many workers as it takes."""

    def __init__(
        self,
        study: Study,
        sink: TrackingSink,
        view: ProgressView,
        worker: StageWorker,
        stop_conditions: StopConditions,
        config: TrialConfig,
        report: DataReport,
    ) -> None:
        self._study, self._sink, self._view, self._worker, self._stop_conditions = (
            study,
            sink,
            view,
            worker,
            stop_conditions,
        )
        self._longest_row = report.lengths["row"]["p100"]
        self._steps = total_updates(config.training, report.train_rows)
        self._key = worker.key(config, report.fingerprint)
        self.folder = _folder(study.folder.cache, self._key, config)
        spec = study.spec
        self._mirror = None if spec.mirror is None else sft_path(spec.mirror, spec.name, self._key)
        self._config = _begin(self.folder, config, self._mirror)
        if self._config.evaluation != config.evaluation:
            view.log("sft: the run of another sweep makes the same weights, and is taken with that sweep's evaluation")

    def train(self) -> AttemptResult:
        """Train to an end that another worker or a smaller micro-batch would not change."""
        losses, kills = 0, retry_policy.KernelKills()
        while True:
            before = retry_policy.kernel_kills()
            try:
                end = self._attempt()
            except StageDied as died:
                cause = kills.answer(self.folder, str(died), before)
                if not cause:
                    losses += 1
                    if losses == MAX_LOSSES:
                        raise
                    self._study.add_event("worker lost", f"sft: {died}")
                    self._view.log(f"sft: {died}; it goes on from its newest checkpoint")
                    self._worker.restart()
                    continue
                end = AttemptResult(AttemptStatus.FAILED, cause, failure=FailureKind.OUT_OF_MEMORY)
            if end.failure is not FailureKind.OUT_OF_MEMORY:
                return end
            if (failed := self._halve_micro_batch(end.reason)) is not None:
                return failed
            self._worker.restart()

    def _attempt(self) -> AttemptResult:
        limit = self._study.micro_batch_limit()
        config = retry_policy.with_micro_batch_limit(self._config, limit)
        tags = {"state": "RUNNING", "sft.key": self._key}
        if config is not self._config:  # the params stay what was asked for
            tags["memory.tokens_per_micro_batch"] = str(config.training.tokens_per_micro_batch)
        self._sink.start_run(SFT, name=SFT, params=self._config.flat_params(), tags=tags, at=time.time())
        self._view.set_stage(f"sft: 0 of {self._steps} updates")
        mirror = None if self._mirror is None else self._mirror.url
        task = AttemptTask(SFT, 1, config.model_dump_json(), self.folder, mirror=mirror)
        return self._worker.train(task, self._on_report, lambda: self._stop_conditions.poll() is not None)

    def _on_report(self, report: AttemptReport) -> None:
        for message in report.notices:
            self._study.add_event(MIRROR, f"sft: {message}")
            self._view.log(f"sft: {message}")
        self._sink.log_metrics(SFT, report.metrics, at=time.time())
        for step_metrics in report.metrics:
            message = [
                f"{name}={step_metrics.metrics[name]:.4g}" for name in _SHOWN_METRICS if name in step_metrics.metrics
            ]
            if message:
                self._view.set_stage(f"sft: {step_metrics.step} of {self._steps} updates  {'  '.join(message)}")

    def _halve_micro_batch(self, reason: str) -> AttemptResult | None:
        """Half the micro-batch from now on, also for the trials; where one pair was too much, how the stage ends."""
        limit = self._study.micro_batch_limit()
        tokens = retry_policy.halved_micro_batch(
            retry_policy.effective_micro_batch(self._config, limit), self._longest_row
        )
        if tokens is None:
            self._study.set_micro_batch_limit(None, "")  # what did not help teaches nothing
            message = retry_policy.out_of_memory_message(self._config, limit, reason)
            return AttemptResult(AttemptStatus.FAILED, message, failure=FailureKind.OUT_OF_MEMORY)
        self._study.set_micro_batch_limit(tokens, reason)
        self._view.log(
            f"the sft stage ran out of memory ({reason}); it goes on from its newest checkpoint with {tokens} tokens "
            "per micro-batch, as do the trials"
        )
        return None
