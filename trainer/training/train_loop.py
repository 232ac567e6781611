"""The training loop: a generator of points. Who consumes it decides how far it goes; an engine takes the updates."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config.trial import TrialConfig
from trainer.distributed.fsdp import gathered, put
from trainer.distributed.processes import Interrupted
from trainer.objectives.pair_logps import Totals, add_totals, means
from trainer.results import Ending, EndKind, Point, ResumeError
from trainer.storage import checkpoints
from trainer.training.engine import Diverged, Engine, Material
from trainer.training.schedule import every

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Exam:
    """The held-out metrics of the start model, and of the model as it is after an update.

    `now(step, whole)` is asked after each update; where not the `whole` is due, it may still look at the answers.
    Beside the metrics it gives what is known of each pair (`Point.pairs`).
    """

    start: dict[str, float]
    now: Callable[[int, bool], tuple[dict[str, float], str]]


class Run:
    """One trial's updates from its start, or from a checkpoint's state. `config_digest` names its configuration."""

    def __init__(
        self,
        config: TrialConfig,
        material: Material,
        engine: Engine,
        exam: Exam,
        folder: Path,
        earlier: Sequence[Path],
        config_digest: str,
    ) -> None:
        self._training, self._material, self._engine, self._exam = config.training, material, engine, exam
        self._folder, self._places, self._digest = folder, [*earlier, folder], config_digest
        self.total = engine.course.total
        self._eval_every = every(config.training.eval_steps, self.total)
        self._save_every = config.training.save_steps or self._eval_every
        self._step = 0
        self._saved_at = 0
        self._window: Totals = {}
        self.history: list[Point] = []

    def restore(self, state: checkpoints.State) -> None:
        """Take over a checkpoint's state. ResumeError where it is of other weights than this trial trains."""
        trained = self._engine.trained()
        if state.weights.keys() != trained.keys():
            raise ResumeError(f"the checkpoint of update {state.step} holds other weights than this trial trains")
        for name, parameter in trained.items():
            put(parameter, state.weights[name])
        self._engine.load(state.optimiser)
        self._step = self._saved_at = state.step
        self._window = dict(state.window)
        self.history = list(state.history)

    def points(self) -> Generator[Point, None, Ending]:
        """Train; earlier points first. Closing the generator stops at once and saves nothing."""
        yield from list(self.history)
        try:
            return (yield from self._points())
        except Diverged as why:
            return Ending(EndKind.DIVERGED, str(why), self._step)
        except Interrupted:
            if self._step > self._saved_at:
                self._save()
            return Ending(EndKind.STOPPED, f"interrupted after update {self._step} of {self.total}", self._step)
        finally:
            self._engine.close()

    def _points(self) -> Generator[Point, None, Ending]:
        if not self.history:
            yield self._remember(self._finite(Point(0, self._exam.start)))
        while True:
            # A run that was interrupted while it evaluated comes here with its point still to be said.
            if self.history[-1].step < self._step and (point := self._look()).metrics:
                yield self._remember(self._finite(point))
            if self._step == self.total:
                return Ending(EndKind.FINISHED, f"{self.total} updates done", self._step, self._folder / "model")
            if self._step % self._save_every == 0 and self._step > self._saved_at:
                self._save()
            self._material.patience.settle()
            self._add(self._engine.update(self._step + 1))
            self._step += 1

    def _remember(self, point: Point) -> Point:
        self.history.append(point)
        return point

    # --- what is said and kept ---------------------------------------------------------------------------------------

    def _add(self, totals: Totals) -> None:
        if self._window:
            # The rate of the last update is what a schedule shows; everything else is averaged.
            self._window["learning_rate"] = (0.0, 0.0)
        self._window = add_totals([self._window, totals]) if self._window else totals

    def _look(self) -> Point:
        last = self._step == self.total
        held_out, pairs = self._exam.now(self._step, last or self._step % self._eval_every == 0)
        # The window is emptied only now: an interruption while evaluating leaves it whole.
        if not (last or self._step % self._training.logging_steps == 0):
            return Point(self._step, held_out, pairs)
        trained = means(self._window)
        trained["epoch"] = self._step * self._training.pairs_per_update / len(self._material.train)
        self._window = {}
        return Point(self._step, trained | held_out, pairs)

    def _finite(self, point: Point) -> Point:
        bad = [f"{name} {value}" for name, value in point.metrics.items() if not math.isfinite(value)]
        if bad:
            raise Diverged(f"after update {point.step} of {self.total} not finite: {', '.join(bad)}")
        return point

    def _save(self) -> None:
        world = self._material.world
        weights = gathered(self._engine.trained(), keep=world.is_main)
        moments = gathered(self._engine.state(), keep=world.is_main)
        if world.is_main:
            state = checkpoints.State(self._digest, self._step, weights, moments, self.history, self._window)
            place = checkpoints.save(self._folder, state)
            checkpoints.discard(self._places, before=self._step)
            log.info("checkpoint of update %d: %s", self._step, place)
        world.wait()
        self._saved_at = self._step
