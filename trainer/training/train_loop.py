"""`TrainLoop`: a generator of `StepMetrics` over the updates of an engine; its consumer may stop it at any time."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config.trial import TrialConfig
from trainer.distributed.fsdp import copy_into, gather_full
from trainer.distributed.processes import RunInterrupted
from trainer.objectives.pair_logps import MetricSums, merge_sums, metric_means
from trainer.results import ResumeError, RunResult, RunStatus, StepMetrics
from trainer.storage import checkpoints
from trainer.training.engine import Diverged, Engine, TrainingInputs
from trainer.training.schedule import interval

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HeldOutEvaluation:
    """The held-out metrics of the initial model, and a function that evaluates the current model.

    `evaluate(step, all_pairs)` is called after each update; if no evaluation of all held-out pairs is due, it may still
    generate completions. It returns the metrics and the packed margins of each pair (`StepMetrics.pair_margins`).
    """

    initial: dict[str, float]
    evaluate: Callable[[int, bool], tuple[dict[str, float], str]]


class TrainLoop:
    """One trial's updates from the initial model or a checkpoint.

    `result_digest` identifies its configuration, `fingerprints` its model and data (`TrainState.inputs`).
    """

    def __init__(
        self,
        config: TrialConfig,
        inputs: TrainingInputs,
        engine: Engine,
        evaluation: HeldOutEvaluation,
        folder: Path,
        earlier_attempts: Sequence[Path],
        result_digest: str,
        fingerprints: Mapping[str, str],
    ) -> None:
        self._training, self._inputs, self._engine = config.training, inputs, engine
        self._evaluation = evaluation
        self._folder, self._run_folders, self._digest = folder, [*earlier_attempts, folder], result_digest
        self._fingerprints = fingerprints
        self.total_updates = engine.plan.total_updates
        self._eval_every = interval(config.training.eval_steps, self.total_updates)
        self._save_every = config.training.save_steps or self._eval_every
        self._step = 0
        self._saved_at = 0
        self._window: MetricSums = {}
        self.history: list[StepMetrics] = []

    def restore(self, state: checkpoints.TrainState) -> None:
        """Load a checkpoint's state. Raises ResumeError if it has other weights than this trial trains."""
        trained = self._engine.trainable_parameters()
        if state.weights.keys() != trained.keys():
            raise ResumeError(
                f"the checkpoint of update {state.step}: it has other weights than this trial trains; continue it only "
                "with the same model and lora settings"
            )
        for name, parameter in trained.items():
            copy_into(parameter, state.weights[name])
        self._engine.load_state_dict(state.optimizer)
        self._step = self._saved_at = state.step
        self._window = dict(state.window)
        self.history = list(state.history)

    def run(self) -> Generator[StepMetrics, None, RunResult]:
        """Yield the history so far, then train. Closing the generator stops at once without a checkpoint."""
        yield from list(self.history)
        try:
            return (yield from self._run())
        except Diverged as error:
            return RunResult(RunStatus.DIVERGED, str(error), self._step)
        except RunInterrupted:
            if self._step > self._saved_at and self._inputs.cancel_token.wants_checkpoint:
                self._save()
            return RunResult(
                RunStatus.STOPPED, f"interrupted after update {self._step} of {self.total_updates}", self._step
            )
        finally:
            self._engine.close()

    def _run(self) -> Generator[StepMetrics, None, RunResult]:
        if not self.history:
            yield self._record(self._check_finite(StepMetrics(0, self._evaluation.initial)))
        while True:
            # A run that was interrupted during evaluation resumes here, before its metrics were yielded.
            if self.history[-1].step < self._step and (step_metrics := self._evaluate()).metrics:
                yield self._record(self._check_finite(step_metrics))
            if self._step == self.total_updates:
                return RunResult(
                    RunStatus.FINISHED, f"{self.total_updates} updates done", self._step, self._folder / "model"
                )
            if self._step % self._save_every == 0 and self._step > self._saved_at:
                self._save()
            self._inputs.cancel_token.check_all_ranks()
            self._accumulate(self._engine.step(self._step + 1))
            self._step += 1

    def _record(self, step_metrics: StepMetrics) -> StepMetrics:
        self.history.append(step_metrics)
        return step_metrics

    # --- metrics and checkpoints -------------------------------------------------------------------------------------

    def _accumulate(self, sums: MetricSums) -> None:
        if self._window:
            # The learning rate is that of the last update; everything else is averaged over the window.
            self._window["learning_rate"] = (0.0, 0.0)
        self._window = merge_sums([self._window, sums]) if self._window else sums

    def _evaluate(self) -> StepMetrics:
        last = self._step == self.total_updates
        held_out, pairs = self._evaluation.evaluate(self._step, last or self._step % self._eval_every == 0)
        # The window is reset only after evaluation, so that an interrupted evaluation keeps it.
        if not (last or self._step % self._training.logging_steps == 0):
            return StepMetrics(self._step, held_out, pairs)
        trained = metric_means(self._window)
        trained["epoch"] = self._step * self._training.pairs_per_update / len(self._inputs.train)
        self._window = {}
        return StepMetrics(self._step, trained | held_out, pairs)

    def _check_finite(self, step_metrics: StepMetrics) -> StepMetrics:
        bad = [f"{name} {value}" for name, value in step_metrics.metrics.items() if not math.isfinite(value)]
        if bad:
            message = f"after update {step_metrics.step} of {self.total_updates}: not finite: {', '.join(bad)}"
            raise Diverged(message)
        return step_metrics

    def _save(self) -> None:
        process_group = self._inputs.process_group
        weights = gather_full(self._engine.trainable_parameters(), on_this_process=process_group.is_main)
        moments = gather_full(self._engine.state_dict(), on_this_process=process_group.is_main)
        if process_group.is_main:
            state = checkpoints.TrainState(
                self._digest, self._step, weights, moments, self.history, self._window, self._fingerprints
            )
            path = checkpoints.save_checkpoint(self._folder, state)
            checkpoints.remove_checkpoints(self._run_folders, before=self._step)
            log.info("checkpoint of update %d: %s", self._step, path)
        process_group.barrier()
        self._saved_at = self._step
