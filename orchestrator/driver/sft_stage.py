"""SFT stage: trains the initial model of all trials once. Lost workers and memory errors are retried as for trials."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from orchestrator.errors import SpecError, SpecProblem, StorageRefused
from orchestrator.execution import trial_retries
from orchestrator.execution.messages import (
    MIRROR_EVENT,
    RELEASE_REQUEST_FILE,
    WORKER_FILE,
    AttemptReport,
    AttemptResult,
    AttemptStatus,
    AttemptTask,
)
from orchestrator.execution.sft_cache_key import stage_key
from orchestrator.execution.stop_reasons import StageInterrupted
from orchestrator.execution.trainer_warnings import WarningLog
from orchestrator.execution.trial_retries import MAX_LOST_WORKERS
from orchestrator.execution.user_requests import StopConditions
from orchestrator.execution.workers.attempt_runner import AttemptRunner, Session
from orchestrator.execution.workers.data_process import DataProcess
from orchestrator.execution.workers.stage_worker import StageDied, StageFailed, StageWorker
from orchestrator.folders import SweepFolder
from orchestrator.interfaces import SFT_RUN, ProgressView, TrackingSink
from orchestrator.mirror import Mirror, sft_mirror
from orchestrator.spec.estimates.gpu_layouts import Arrangement, with_settings
from orchestrator.spec.sweep_spec import AUTO_TRAINING, MODEL_SOURCES, SFT_WITH_SEARCHED_MODEL, SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailureKind
from trainer.config.locations import differ_in_locations_only, relocated
from trainer.config.loss_config import SftLoss
from trainer.config.trial import STORED, ModelConfig, TrialConfig
from trainer.data.data_report import DataReport
from trainer.results import TrialError, clause
from trainer.training.schedule import total_updates

_SHOWN_METRICS = ("eval_nll_loss", "eval_exact_answers")
STAGE_CONFIG = "trial.json"
"""File with the configuration with which a run of the stage was started."""
_EXECUTION_KEYS = ("tokens_per_micro_batch", "distributed", "gradient_checkpointing")
"""Training settings without effect on the result, which may change when a run continues."""


@dataclass(frozen=True, slots=True)
class TrialInputs:
    """Start of all trials: the data report, the folder of the SFT stage's model if there is one, the arrangement."""

    data: DataReport
    initial_model: Path | None = None
    arrangement: Arrangement | None = None
    auto: tuple[str, ...] = ()
    """Settings of the file that the arrangement has chosen."""

    def apply(self, config: TrialConfig, params: Mapping[str, Any]) -> TrialConfig:
        """Return the configuration with the SFT stage's model and the arrangement's values.

        `params`: settings of the trial alone, which stay as they are.
        """
        if self.initial_model is not None:
            config = with_model(config, self.initial_model)
        if self.arrangement is None:
            return config
        chosen = [path for path in AUTO_TRAINING if f"base.{path}" in self.auto and path not in params]
        return with_settings(config, self.arrangement.trials, chosen)


def with_model(config: TrialConfig, folder: Path) -> TrialConfig:
    """Return the configuration with the model in this folder as initial model."""
    origin = {"name_or_path": str(folder), "generated": None, "revision": None}
    model = ModelConfig.model_validate(config.model.model_dump() | origin)
    return config.model_copy(update={"model": model})


def sft_config(spec: SweepSpec) -> TrialConfig | None:
    """Return the SFT stage as a trial configuration; None where the sweep has no such stage.

    Raises:
        SpecError: the initial model is searched, although the stage trains only one.
    """
    if spec.sft is None:
        return None
    searched = [path for path in spec.search.paths if path.startswith(MODEL_SOURCES)]
    if searched:  # of a sweep that an earlier version accepted
        hint = "remove it from search, or remove sft"
        raise SpecError([SpecProblem(spec.name, searched[0], SFT_WITH_SEARCHED_MODEL, hint)])
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
    """Return the folder of the SFT stage's model; None where the sweep has no such stage.

    Reads the stage's data where it differs from the trials'.

    Raises:
        StorageRefused: the model is no longer in the cache.
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
        raise StorageRefused(f"the sft stage's model is no longer in {model}")
    return model


def _folder(cache: Path, key: str, config: TrialConfig) -> Path:
    """Return the folder of this configuration's run, the same in every call once the run has started.

    Configurations with the same key have the same result and share one run. Earlier versions had a folder of its own
    for another `gradient_checkpointing`.
    """
    key_folder, checkpointing = cache / "sft" / key, config.training.gradient_checkpointing
    own_folder = key_folder / ("run-checkpointing" if checkpointing else "run-plain")
    return own_folder if own_folder.is_dir() else key_folder / "run"


def stored_stage_config(path: Path) -> TrialConfig | None:
    """Return the configuration with which a run was started; None before its start."""
    file = path / STAGE_CONFIG
    if not file.is_file():
        return None
    return TrialConfig.model_validate_json(file.read_text(encoding="utf-8"), context=STORED)


def _begin(path: Path, config: TrialConfig, mirror: Mirror | None) -> TrialConfig:
    """Return the configuration of the run in `path`: that of its first sweep, with this sweep's execution settings.

    Model and data are read where this sweep has them: their contents are equal, and the first sweep's may have moved.

    Another sweep with another `evaluation` may have started the run, possibly at the same time.
    """
    path.mkdir(parents=True, exist_ok=True)
    content = (None if mirror is None else mirror.read(STAGE_CONFIG)) or config.model_dump_json(indent=1).encode()
    temporary = path / f".{STAGE_CONFIG}.{uuid4().hex[:8]}.tmp"
    temporary.write_bytes(content)
    with suppress(FileExistsError):  # atomic, and never replaces another sweep's file
        os.link(temporary, path / STAGE_CONFIG)
    temporary.unlink()
    begun = stored_stage_config(path)
    assert begun is not None
    if mirror is not None:
        mirror.write(STAGE_CONFIG, (path / STAGE_CONFIG).read_bytes())
    execution = {name: getattr(config.training, name) for name in _EXECUTION_KEYS}
    begun = begun.model_copy(update={"training": begun.training.model_copy(update=execution)})
    if differ_in_locations_only(begun.model_copy(update={"evaluation": config.evaluation}), config):
        begun = relocated(begun, begun, config)
    return begun


def run_sft_stage(
    study: Study,
    data: DataProcess,
    report: DataReport,
    sink: TrackingSink,
    view: ProgressView,
    worker: StageWorker,
    stop_conditions: StopConditions,
    arrangement: Arrangement | None = None,
) -> Path | None:
    """Run the SFT stage, or use its cached result; return its model folder, None where the sweep has no such stage.

    Raises:
        StageFailed: the training failed.
        StorageRefused: the disk is full.
    """
    config = sft_config(study.spec)
    if config is None:
        return None
    if arrangement is not None and arrangement.sft is not None:
        chosen = [path for path in AUTO_TRAINING if f"sft.{path}" in study.spec.auto]
        config = with_settings(config, arrangement.sft, chosen)
    if config.data != study.spec.base.data:
        report = DataReport.model_validate_json(data.prepare(config))
    stage = _Stage(study, sink, view, worker, stop_conditions, config, report)
    try:
        end = stage.train()
    except StageInterrupted:
        tags = {"state": "INTERRUPTED", "reason": "the sweep was stopped during this stage; resume continues it"}
        sink.end_run(SFT_RUN, status="KILLED", tags=tags, at=time.time())
        raise
    tags = {"state": "COMPLETE" if end.status is AttemptStatus.FINISHED else "FAILED", "reason": end.reason}
    status = "FINISHED" if end.status is AttemptStatus.FINISHED else "FAILED"
    sink.end_run(SFT_RUN, status=status, tags=tags, at=time.time())
    if end.status is AttemptStatus.NO_DISK:
        raise StorageRefused(f"the sft stage could not write: {end.reason}")
    if end.status is not AttemptStatus.FINISHED:
        raise StageFailed(f"the sft stage ended as {end.status}: {end.reason} (see {stage.folder})")
    view.log(f"sft: {end.updates} updates done; every trial starts from {stage.folder / 'model'}")
    return stage.folder / "model"


def train_here(
    config: TrialConfig,
    fingerprint: str,
    cache: Path,
    session: Session,
    on_report: Callable[[AttemptReport], None],
) -> Path:
    """Train the stage in this process, unless the cache has its result, and return its model folder.

    A sweep with this stage finds the result, or continues from its checkpoint. Waits while another process trains it.

    Raises:
        TrialError: the training failed.
    """
    folder = _folder(cache, stage_key(config, fingerprint, cache), config)
    config = _begin(folder, config, None)
    for name in (RELEASE_REQUEST_FILE, WORKER_FILE):  # left by an earlier process in the same folder
        (folder / name).unlink(missing_ok=True)
    runner = AttemptRunner(
        AttemptTask(SFT_RUN, 1, config.model_dump_json(), folder), lambda: session, lock_timeout=float("inf")
    )
    try:
        while (result := (report := runner.next_report()).result) is None:
            on_report(report)
    finally:
        runner.close()
    if result.status is not AttemptStatus.FINISHED:
        raise TrialError(f"the sft stage ended as {result.status}: {result.reason} (see {folder})")
    return folder / "model"


class _Stage:
    """One run of the SFT stage, retried with new workers and smaller micro-batches."""

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
        self._warnings = WarningLog(study, sink, view)
        self._longest_row = report.lengths["row"]["p100"]
        self._planned_updates = total_updates(config.training, report.train_rows)
        self._key = worker.key(config, report.fingerprint)
        self.folder = _folder(study.folder.cache, self._key, config)
        spec = study.spec
        self._mirror = None if spec.mirror is None else sft_mirror(spec.mirror, spec.name, self._key)
        self._config = _begin(self.folder, config, self._mirror)
        if self._config.evaluation != config.evaluation:
            view.log("sft: using the equal run of another sweep, with that sweep's evaluation")

    def train(self) -> AttemptResult:
        """Train until the run finishes, or fails for a reason that a retry or a smaller micro-batch cannot fix."""
        losses, kills = 0, trial_retries.OomKillCounter()
        while True:
            before = trial_retries.kernel_oom_kills()
            try:
                end = self._attempt()
            except StageDied as died:
                cause = kills.out_of_memory_cause(self.folder, str(died), before)
                if not cause:
                    losses += 1
                    if losses == MAX_LOST_WORKERS:
                        raise
                    self._study.add_event("worker lost", f"sft: {died}")
                    self._view.log(f"sft: {clause(died)}; it continues from its newest checkpoint")
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
        config = trial_retries.with_micro_batch_limit(self._config, limit)
        tags = {"state": "RUNNING", "reason": "", "sft.key": self._key}
        if config is not self._config:  # the logged params stay as configured
            tags["memory.tokens_per_micro_batch"] = str(config.training.tokens_per_micro_batch)
        self._sink.start_run(SFT_RUN, name=SFT_RUN, params=self._config.flat_params(), tags=tags, at=time.time())
        self._view.set_activity(f"sft: 0 of {self._planned_updates} updates")
        mirror = None if self._mirror is None else self._mirror.url
        task = AttemptTask(SFT_RUN, 1, config.model_dump_json(), self.folder, mirror=mirror)
        return self._worker.train(task, self._on_report, lambda: self._stop_conditions.read_study() is not None)

    def _on_report(self, report: AttemptReport) -> None:
        for message in report.notices:
            self._study.add_event(MIRROR_EVENT, f"sft: {message}")
            self._view.log(f"sft: {message}")
        self._warnings.report(report.warnings, None)
        self._sink.log_metrics(SFT_RUN, report.metrics, at=time.time())
        for step_metrics in report.metrics:
            metrics_text = [
                f"{name}={step_metrics.metrics[name]:.4g}" for name in _SHOWN_METRICS if name in step_metrics.metrics
            ]
            if metrics_text:
                self._view.set_activity(
                    f"sft: {step_metrics.step} of {self._planned_updates} updates  {'  '.join(metrics_text)}"
                )
        if report.metrics:
            self._view.set_stage_progress(report.metrics[-1].step, self._planned_updates)

    def _halve_micro_batch(self, reason: str) -> AttemptResult | None:
        """Halve the micro-batch, also for the trials; return the failed result if it is already at its minimum."""
        limit = self._study.micro_batch_limit()
        tokens = trial_retries.halved_micro_batch(
            trial_retries.effective_micro_batch(self._config, limit), self._longest_row
        )
        if tokens is None:
            self._study.set_micro_batch_limit(None, "")  # a limit that did not help is not used for trials
            message = trial_retries.out_of_memory_message(self._config, limit, reason)
            return AttemptResult(AttemptStatus.FAILED, message, failure=FailureKind.OUT_OF_MEMORY)
        self._study.set_micro_batch_limit(tokens, reason)
        self._view.log(
            f"the sft stage ran out of memory ({reason}); it continues from its newest checkpoint with {tokens} "
            "tokens per micro-batch, as do the trials"
        )
        return None
