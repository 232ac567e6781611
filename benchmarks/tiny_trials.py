"""Trains small trials with the real trainer in this process; measures their models on prompts they have not seen."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.trial import GeneratedSource, TrialConfig
from trainer.metrics import EXACT_ANSWERS
from trainer.models.model_files import ADAPTER_CONFIG, export_model
from trainer.results import RunStatus, StepMetrics
from trainer.training_session import TrainingSession

FRESH_SEED = 90_000
"""Seed of the prompts of the confirmed metric; no other rows are drawn with it."""


@dataclass(frozen=True, slots=True)
class TrainedTrial:
    """A trial's metrics, those of step 0 first; `model`: its final weights, None if it diverged."""

    history: list[StepMetrics]
    model: Path | None


class TinyTrainer:
    """Trains one trial after the other, with one session, in a scratch folder."""

    def __init__(self, scratch: Path) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        self._cache, self._runs = scratch / "cache", scratch / "trials"
        self._session = TrainingSession(self._cache)

    def initial_model(self, spec: SweepSpec) -> Path:
        """Return the model of the sweep's SFT stage, which is trained once."""
        from orchestrator.driver.sft_stage import sft_config, train_here
        from trainer.data import prepare

        config = sft_config(spec)
        assert config is not None
        fingerprint = prepare(config.data, config.model, self._cache).fingerprint
        return train_here(config, fingerprint, self._cache, self._session, lambda _: None)

    def train(self, config: TrialConfig, name: str) -> TrainedTrial:
        """Train a trial anew. Its weights stay until `forget`."""
        folder = self._runs / name
        shutil.rmtree(folder, ignore_errors=True)
        history: list[StepMetrics] = []
        run = self._session.train(config, folder)
        while True:
            try:
                history.append(next(run))
            except StopIteration as ended:
                result = ended.value
                break
        return TrainedTrial(history, result.folder if result.status is RunStatus.FINISHED else None)

    def measure(self, config: TrialConfig, model: Path) -> StepMetrics:
        """Return the held-out metrics of a model: those of update 0 of a trial that starts from it."""
        from orchestrator.driver.sft_stage import with_model

        folder, merged = self._runs / "measured", self._runs / "merged"
        if (model / ADAPTER_CONFIG).exists():
            export_model(model, merged, merge=True)
            model = merged
        run = self._session.train(with_model(config, model), folder)
        try:
            return next(run)
        finally:
            run.close()
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(merged, ignore_errors=True)

    def confirm(self, config: TrialConfig, model: Path, prompts: int) -> float:
        """Return the share of `prompts` fresh prompts that a model answers right, greedily."""
        return self.measure(fresh_prompts(config, prompts), model).metrics[EXACT_ANSWERS]

    def forget(self, name: str) -> None:
        """Remove a trial's folder."""
        shutil.rmtree(self._runs / name, ignore_errors=True)

    def forget_all(self) -> None:
        """Remove the folders of all trials."""
        shutil.rmtree(self._runs, ignore_errors=True)


def fresh_prompts(config: TrialConfig, prompts: int) -> TrialConfig:
    """Return a configuration that is evaluated on rows of the task that no trial has trained or been chosen on."""
    rows = GeneratedSource(generated="instructions", split="eval", rows=prompts, seed=FRESH_SEED)
    data = config.data.model_copy(update={"eval": (rows,)})
    return config.model_copy(
        update={
            "data": data,
            "evaluation": config.evaluation.model_copy(update={"prompts": prompts, "samples": 0}),
        }
    )


_SECONDS = 10
"""Between two lines of progress in a file."""


class Progress:
    """One line on stderr: what is done, and the CPU seconds of this process per unit and until the end."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._began, self._written_at = total, 0, time.process_time(), 0.0

    def advance(self, what: str) -> None:
        """Report one more unit."""
        self._done += 1
        each = (time.process_time() - self._began) / self._done
        left = each * (self._total - self._done)
        is_terminal = sys.stderr.isatty()
        if not is_terminal and time.monotonic() - self._written_at < _SECONDS and self._done < self._total:
            return
        self._written_at = time.monotonic()
        line = f"{self._done} of {self._total}: {what}; {each:.1f} s of CPU each, about {left / 60:.0f} min of CPU left"
        sys.stderr.write(f"\r\x1b[K{line}" if is_terminal else f"{line}\n")
        sys.stderr.flush()
