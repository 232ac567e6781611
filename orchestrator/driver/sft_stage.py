"""The SFT stage: one start model for all trials, made once. Memory and lost workers are answered as in trials."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from orchestrator.errors import Finding, SpecError, StorageRefused
from orchestrator.execution import retry_policy
from orchestrator.execution.messages import MIRROR, End, EndKind, Job, Report
from orchestrator.execution.retry_policy import LOSSES
from orchestrator.execution.sft_cache_key import stage_key
from orchestrator.execution.user_requests import Wishes
from orchestrator.execution.workers.data_process import Preparing
from orchestrator.execution.workers.stage_worker import StageDied, StageFailed, StageWorker
from orchestrator.folders import SweepFolder
from orchestrator.interfaces import SFT, Sink, View
from orchestrator.mirror import Mirror, of_sft
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailureKind
from trainer.config.loss_config import SftLoss
from trainer.config.trial import ModelConfig, TrialConfig
from trainer.data.data_report import DataReport
from trainer.training.schedule import total_updates

_SHOWN = ("eval_nll_loss", "eval_exact_answers")
_CONFIG = "trial.json"
"""The configuration that a run of the stage was begun with."""
_COMPUTED = ("tokens_per_micro_batch", "distributed")
"""How the work is cut, which may change while a run goes on."""
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


def made_start_model(
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


def _begun_as(place: Path) -> TrialConfig | None:
    """The configuration that a run was begun with; None before it is begun."""
    file = place / _CONFIG
    return TrialConfig.model_validate_json(file.read_text(encoding="utf-8")) if file.is_file() else None


def _begin(place: Path, config: TrialConfig, mirror: Mirror | None) -> TrialConfig:
    """The configuration that the run here goes on with: as whoever began it measured it, computed as this one says.

    Whoever began it may be another sweep with another `evaluation`, at this moment too.
    """
    place.mkdir(parents=True, exist_ok=True)
    said = (None if mirror is None else mirror.read(_CONFIG)) or config.model_dump_json(indent=1).encode()
    aside = place / f".{_CONFIG}.{uuid4().hex[:8]}.tmp"
    aside.write_bytes(said)
    with suppress(FileExistsError):  # whole or not at all, and never over another's
        os.link(aside, place / _CONFIG)
    aside.unlink()
    begun = _begun_as(place)
    assert begun is not None
    if mirror is not None:
        mirror.write(_CONFIG, (place / _CONFIG).read_bytes())
    mine = {name: getattr(config.training, name) for name in _COMPUTED}
    return begun.model_copy(update={"training": begun.training.model_copy(update=mine)})


def train_start_model(
    study: Study, data: Preparing, report: DataReport, sink: Sink, view: View, worker: StageWorker, wishes: Wishes
) -> Path | None:
    """Run the SFT stage once, cached by content; the folder of its model, None where the sweep has no such stage."""
    config = sft_config(study.spec)
    if config is None:
        return None
    if config.data != study.spec.base.data:
        report = DataReport.model_validate_json(data.prepare(config))
    stage = _Stage(study, sink, view, worker, wishes, config, report)
    end = stage.train()
    tags = {"state": "COMPLETE" if end.kind is EndKind.FINISHED else "FAILED", "reason": end.reason}
    status = "FINISHED" if end.kind is EndKind.FINISHED else "FAILED"
    sink.end(SFT, status=status, tags=tags, at=time.time())
    if end.kind is EndKind.NO_DISK:
        raise StorageRefused(f"the sft stage could not write: {end.reason}")
    if end.kind is not EndKind.FINISHED:
        raise StageFailed(f"the sft stage ended as {end.kind}: {end.reason} (see {stage.place})")
    view.say(f"sft: {end.steps} updates done; every trial starts from {stage.place / 'model'}")
    return stage.place / "model"


class _Stage:
    """One SFT run, by as many workers as it takes."""

    def __init__(
        self,
        study: Study,
        sink: Sink,
        view: View,
        worker: StageWorker,
        wishes: Wishes,
        config: TrialConfig,
        report: DataReport,
    ) -> None:
        self._study, self._sink, self._view, self._worker, self._wishes = study, sink, view, worker, wishes
        self._longest = report.lengths["row"]["p100"]
        self._steps = total_updates(config.training, report.train_rows)
        self._key = worker.key(config, report.fingerprint)
        self.place = _folder(study.folder.cache, self._key, config)
        spec = study.spec
        self._mirror = None if spec.mirror is None else of_sft(spec.mirror, spec.name, self._key)
        self._config = _begin(self.place, config, self._mirror)
        if self._config.evaluation != config.evaluation:
            view.say("sft: the run of another sweep makes the same weights, and is taken with that sweep's evaluation")

    def train(self) -> End:
        """Train to an end that another worker or a smaller micro-batch would not change."""
        losses, kills = 0, retry_policy.KernelKills()
        while True:
            before = retry_policy.kernel_kills()
            try:
                end = self._attempt()
            except StageDied as died:
                cause = kills.answer(self.place, str(died), before)
                if not cause:
                    losses += 1
                    if losses == LOSSES:
                        raise
                    self._study.note("worker lost", f"sft: {died}")
                    self._view.say(f"sft: {died}; it goes on from its newest checkpoint")
                    self._worker.restart()
                    continue
                end = End(EndKind.FAILED, cause, failure=FailureKind.OUT_OF_MEMORY)
            if end.failure is not FailureKind.OUT_OF_MEMORY:
                return end
            if (failed := self._smaller(end.reason)) is not None:
                return failed
            self._worker.restart()

    def _attempt(self) -> End:
        learned = self._study.learned_micro_batch()
        config = retry_policy.fitted(self._config, learned)
        tags = {"state": "RUNNING", "sft.key": self._key}
        if config is not self._config:  # the params stay what was asked for
            tags["memory.tokens_per_micro_batch"] = str(config.training.tokens_per_micro_batch)
        self._sink.start(SFT, name=SFT, params=self._config.leaves(), tags=tags, at=time.time())
        self._view.stage(f"sft: 0 of {self._steps} updates")
        mirror = None if self._mirror is None else self._mirror.url
        job = Job(SFT, 1, config.model_dump_json(), self.place, mirror=mirror)
        return self._worker.train(job, self._heard, lambda: self._wishes.ask() is not None)

    def _heard(self, said: Report) -> None:
        for told in said.said:
            self._study.note(MIRROR, f"sft: {told}")
            self._view.say(f"sft: {told}")
        self._sink.points(SFT, said.points, at=time.time())
        for point in said.points:
            told = [f"{name}={point.metrics[name]:.4g}" for name in _SHOWN if name in point.metrics]
            if told:
                self._view.stage(f"sft: {point.step} of {self._steps} updates  {'  '.join(told)}")

    def _smaller(self, why: str) -> End | None:
        """Half the micro-batch from now on, also for the trials; where one pair was too much, how the stage ends."""
        learned = self._study.learned_micro_batch()
        tokens = retry_policy.smaller(retry_policy.in_effect(self._config, learned), self._longest)
        if tokens is None:
            self._study.learn_micro_batch(None, "")  # what did not help teaches nothing
            told = retry_policy.given_up(self._config, learned, why)
            return End(EndKind.FAILED, told, failure=FailureKind.OUT_OF_MEMORY)
        self._study.learn_micro_batch(tokens, why)
        self._view.say(
            f"the sft stage ran out of memory ({why}); it goes on from its newest checkpoint with {tokens} tokens per "
            "micro-batch, as do the trials"
        )
        return None
