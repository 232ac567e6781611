"""Training sessions that train nothing: one does what a script says, one writes every file of a real trial."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from orchestrator.execution.messages import AttemptTask
from orchestrator.execution.slots import Slots
from orchestrator.execution.stop_reasons import SignalHandler, StopReason
from tests.support.processes import LIMIT_SECONDS
from tests.support.recorders import ListSink, SilentView
from tests.support.specs import METRIC, make_spec
from trainer.config.trial import TrialConfig
from trainer.results import RunResult, RunStatus, StepMetrics

if TYPE_CHECKING:
    from orchestrator.study.study import Study

SLOTS = Slots(count=2, gpus=0.0, threads=1)
CUDA_ERROR = "CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_..."


def write_script(root: Path, **script: Any) -> None:
    """What the trials below `root` do from now on.

    `trials`: what one does, by number: ok, bug, memory, nan, die (once), deadly (always), nogoal, device (a GPU fails,
    once). `until`: what a trial waits for, repeating its first point: `began-N` or `failed-N` of trial N; by number.
    `warnings`: what the trainer warns of, by number. `steps`: updates of each; `hold`: the update after which a trial
    waits for another script; both by number, with `*` for all others. `deaf`: nobody interrupts it while it waits.
    `pause`: seconds an update. `gpu`: as if the process used one.
    """
    root.mkdir(parents=True, exist_ok=True)
    (root / "script.tmp").write_text(json.dumps(script))
    (root / "script.tmp").replace(root / "script.json")


def trained(root: Path) -> list[str]:
    """`trial update` of every update that was computed, in order."""
    log = root / "trained.log"
    return log.read_text().splitlines() if log.exists() else []


class FakeSession:
    """Does what `write_script` wrote; a checkpoint after every second update."""

    def __init__(self, cache: Path) -> None:
        self._cache, self._root = cache, cache.parent
        self.counters = {"imports": 1, "trials": 0}
        self._requested, self._keeps = False, True

    def interrupt(self, *, checkpoint: bool = True) -> None:
        self._requested, self._keeps = True, checkpoint

    def sibling(self) -> FakeSession:
        other = FakeSession(self._cache)
        other.counters = self.counters
        return other

    def on_update(self, config: TrialConfig, folder: Path, metrics: StepMetrics) -> StepMetrics:
        """For a test's own session: another point to report, or an error."""
        return metrics

    def train(
        self, config: TrialConfig, folder: Path, earlier_attempts: Sequence[Path] = (), fork_folder: Path | None = None
    ) -> Generator[StepMetrics, None, RunResult]:
        script, number = self._script(), int(folder.parent.name)
        what, steps = script.get("trials", {}).get(str(number), "ok"), _of(script.get("steps", 4), number)
        self.counters["trials"] += 1
        if script.get("gpu"):
            cuda = SimpleNamespace(is_initialized=lambda: True, empty_cache=lambda: None)
            sys.modules.setdefault("torch", SimpleNamespace(cuda=cuda))  # pyright: ignore[reportArgumentType]
        for message in script.get("warnings", {}).get(str(number), ()):
            logging.getLogger("trainer.scripted").warning("%s", message)
        (self._root / f"began-{number}").touch()
        while (event := script.get("until", {}).get(str(number))) and not (self._root / event).exists():
            yield StepMetrics(0, {"loss": 1.0, METRIC: 0.5})
        files = [path / "checkpoint.json" for path in (*earlier_attempts, folder)]
        done = max((int(file.read_text()) for file in files if file.is_file()), default=0)
        for step in range(steps + 1):
            if step > done:
                self._wait(number, step)
                if self._requested:
                    self._requested = False
                    if self._keeps:
                        _save(folder, done)
                    return RunResult(RunStatus.STOPPED, "interrupted", done)
                time.sleep(script.get("pause", 0.0))
                done = step
                if step % 2 == 0:
                    _save(folder, step)
                with (self._root / "trained.log").open("a") as log:
                    log.write(f"{number} {step}\n")
            metrics = {"loss": float("nan") if what == "nan" and step == 2 else 1.0 / (1 + step), "grad_norm": 1.0}
            if step % 2 == 0 and what != "nogoal":
                metrics[METRIC] = 0.5 + 0.01 * config.training.seed + 0.001 * step
            yield self.on_update(config, folder, StepMetrics(step, metrics))
            match what, step:
                case ("deadly", 3):
                    os.kill(os.getpid(), signal.SIGKILL)
                case ("die", 3) if not earlier_attempts:
                    os.kill(os.getpid(), signal.SIGKILL)
                case ("bug", 1):
                    (self._root / f"failed-{number}").touch()
                    raise ValueError(f"scripted bug in trial {number}")
                case ("memory", 1):
                    raise MemoryError
                case ("device", 3) if not earlier_attempts:
                    (self._root / f"failed-{number}").touch()
                    raise RuntimeError(CUDA_ERROR)
                case _:
                    continue
        return RunResult(RunStatus.FINISHED, "", steps)

    def _script(self) -> dict[str, Any]:
        return json.loads((self._root / "script.json").read_text())

    def _wait(self, number: int, step: int) -> None:
        """Until the script lets the trial make this update, or somebody interrupts."""
        until = time.monotonic() + LIMIT_SECONDS
        while step > _of((script := self._script()).get("hold", {}), number, step):
            if self._requested and not script.get("deaf"):
                return
            assert time.monotonic() < until, "nobody let the trial go on"
            time.sleep(0.01)


def _of(given: int | dict[str, int], number: int, otherwise: int = 0) -> int:
    return given if isinstance(given, int) else given.get(str(number), given.get("*", otherwise))


def make_task(root: Path, number: int = 0, attempt: int = 1) -> AttemptTask:
    """An attempt of a scripted trial below `root`, after those before it."""
    folder = root / "trials" / f"{number:04d}"
    earlier = tuple(folder / str(k) for k in range(1, attempt))
    return AttemptTask(str(number), attempt, make_spec().base.model_dump_json(), folder / str(attempt), earlier)


def _save(folder: Path, step: int) -> None:
    temporary = folder / "checkpoint.tmp"
    temporary.write_text(str(step))
    temporary.replace(folder / "checkpoint.json")


class CheckpointingSession:
    """Real checkpoints, endings, samples and models of trials whose weights are four numbers.

    `each` is called after every update, `began` is the update that the last trial went on from.
    """

    STEPS = 6

    def __init__(self, save_steps: int = 2, each: Callable[[int], object] = lambda step: None) -> None:
        self.counters = {"trials": 0}
        self.began = -1
        self.requested = False
        self._save_steps, self._each = save_steps, each

    def interrupt(self, *, checkpoint: bool = True) -> None:
        self.requested = True

    def train(
        self, config: TrialConfig, folder: Path, earlier_attempts: Sequence[Path] = (), fork_folder: Path | None = None
    ) -> Generator[StepMetrics, None, RunResult]:
        import torch

        from trainer.storage import checkpoints
        from trainer.storage.atomic_files import write_folder, write_text

        self.counters["trials"] += 1
        folders = [*earlier_attempts, folder]
        ended = checkpoints.load_run_result(folders)
        if ended is not None:
            yield from ended.history
            return ended.result
        state = checkpoints.load_newest(folders) or (
            None if fork_folder is None else checkpoints.load_newest([fork_folder])
        )
        assert fork_folder is None or state is not None, "a fork begins from no start model"
        history = [] if state is None else list(state.history)
        self.began = 0 if state is None else state.step
        w = torch.zeros(4) if state is None else state.weights["w"]
        yield from list(history)
        for step in range(len(history), self.STEPS + 1):
            if self.requested:
                return RunResult(RunStatus.STOPPED, "interrupted", step - 1)
            w = w + (1 + config.training.seed) * config.training.learning_rate
            value = 0.5 + 0.01 * config.training.seed + 0.001 * step + float(w[0])
            history.append(StepMetrics(step, {"loss": 1.0 / (1 + step), METRIC: value}))
            write_text(folder / "samples.jsonl", json.dumps({"seed": config.training.seed, "step": step}) + "\n")
            if step and step % self._save_steps == self._save_steps - 1:
                checkpoints.save_checkpoint(folder, checkpoints.TrainState("c", step, {"w": w}, {}, history))
                checkpoints.remove_checkpoints(folders, before=step)
            if step:
                self._each(step)
            yield history[-1]
        write_folder(folder / "model", lambda to: checkpoints.save_file({"w": w}, to / "model.safetensors"))
        result = RunResult(RunStatus.FINISHED, "", self.STEPS, folder / "model")
        checkpoints.save_run_result(folder, checkpoints.StoredRunResult("c", result, history))
        checkpoints.remove_checkpoints(folders)
        return result


def run_study(
    study: Study,
    sink: ListSink | None = None,
    view: SilentView | None = None,
    signals: SignalHandler | None = None,
    slots: Slots = SLOTS,
    open_session: Any = FakeSession,
    **more: Any,
) -> StopReason:
    """Drive a sweep on the Ray that is there."""
    from orchestrator.execution.tune_adapter import run_trials  # workers import this module, and need neither

    signals = signals or SignalHandler(lambda: "")
    return run_trials(
        study, sink or ListSink(), view or SilentView(), signals, slots, open_session=open_session, **more
    )
