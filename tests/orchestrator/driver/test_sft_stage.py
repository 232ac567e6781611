"""The SFT stage without memory or without its worker: it goes on as a trial would, and trials know what it learned."""

import json
import os
import signal
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.driver.data_stage import check_data
from orchestrator.driver.sft_stage import run_sft_stage
from orchestrator.execution.messages import AttemptReport, AttemptResult, AttemptTask
from orchestrator.execution.messages import AttemptStatus as EndOfAttempt
from orchestrator.execution.sft_cache_key import stage_key
from orchestrator.execution.stop_reasons import SignalHandler, StageInterrupted
from orchestrator.execution.user_requests import StopConditions
from orchestrator.execution.workers.attempt_runner import AttemptRunner, open_session
from orchestrator.execution.workers.stage_worker import StageDied, StageFailed, StageWorker
from orchestrator.folders import SweepFolder
from orchestrator.interfaces import SFT_RUN
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from tests.support.fake_session import SLOTS
from tests.support.preparation import PreparedHere
from tests.support.recorders import ListSink, SilentView
from tests.support.specs import BASE, make_spec, sweep_folder
from trainer.config.trial import TrialConfig
from trainer.results import RunResult, RunStatus, StepMetrics

SMALL = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 1, "num_key_value_heads": 1}
DATA = {"train": [{"generated": "instructions", "rows": 64}], "max_length": 64}
SPEC = make_spec(
    2,
    base=BASE | {"model": {"generated": SMALL}, "data": DATA, "training": {"pairs_per_update": 8}},
    sft={"training": {"max_steps": 4, "pairs_per_update": 8, "tokens_per_micro_batch": 512}},
)


class Faulty:
    """Four updates, a checkpoint after each. script.json: `fits`, tokens that memory holds; `deaths` at update 2."""

    def __init__(self, cache: Path) -> None:
        self._root = cache.parent
        self.counters: dict[str, int] = {}

    def interrupt(self, *, checkpoint: bool = True) -> None: ...
    def train(
        self, config: TrialConfig, folder: Path, earlier_attempts: Sequence[Path] = (), fork_folder: Path | None = None
    ) -> Generator[StepMetrics, None, RunResult]:
        script = json.loads((self._root / "script.json").read_text())
        tokens, path = config.training.tokens_per_micro_batch, folder / "step"
        done = int(path.read_text()) if path.exists() else 0
        for step in range(5):
            if step > done:
                with (self._root / "trained.log").open("a") as log:
                    log.write(f"{step} {tokens}\n")
                if step == 2:
                    deaths = (self._root / "trained.log").read_text().count("2 ")
                    if deaths <= script.get("deaths", 0):
                        os.kill(os.getpid(), signal.SIGKILL)
                    if tokens > script.get("fits", 1 << 30):
                        raise MemoryError
                path.write_text(str(step))
            yield StepMetrics(step, {"loss": 1.0, "eval_nll_loss": 1.0})
        (folder / "model").mkdir(exist_ok=True)
        return RunResult(RunStatus.FINISHED, "", 4, folder / "model")


class Staged:
    def __init__(self, root: Path, **script: Any) -> None:
        (root / "script.json").write_text(json.dumps(script))
        folder, self.view, self.sink = sweep_folder(root), SilentView(), ListSink()
        folder.path.mkdir(parents=True, exist_ok=True)
        signals = SignalHandler(lambda: "")
        self.error: StageFailed | None = None
        data: Any = PreparedHere(folder.cache)
        with StageWorker(SLOTS, folder.cache, signals, self.view.refresh, Faulty) as worker:
            worker.start()
            report = check_data(SPEC, folder, self.view, data)
            self.longest = int(report.lengths["row"]["p100"])
            self.study = Study.open(folder) if Study.exists(folder) else Study.create(folder, SPEC)
            self.study.start_driving()
            try:
                stop_conditions = StopConditions(self.study)
                self.model = run_sft_stage(self.study, data, report, self.sink, self.view, worker, stop_conditions)
            except StageFailed as error:
                self.error = error
        self.log = [tuple(map(int, line.split())) for line in (root / "trained.log").read_text().splitlines()]
        self.events = [(e.kind, e.trial, e.text) for e in self.study.events()]


def test_half_the_micro_batch_from_the_newest_checkpoint_and_the_trials_know(tmp_path: Path, ray_cluster: None) -> None:
    ran = Staged(tmp_path, fits=200)
    assert ran.model.is_dir()
    assert ran.log == [(1, 512), (2, 512), (2, 256), (2, 128), (3, 128), (4, 128)]
    assert [e for e in ran.events if e[0] == "out of memory"] == [
        ("out of memory", None, f"sft: MemoryError: no message; from now on {tokens} tokens per micro-batch")
        for tokens in (256, 128)
    ]
    assert sum("the sft stage ran out of memory" in line for line in ran.view.said) == 2
    assert ran.sink.tags("sft")["memory.tokens_per_micro_batch"] == "128"
    started = [call[2]["training.tokens_per_micro_batch"] for call in ran.sink.calls if call[0] == "start"]
    assert started == [512] * 3, "params stay what was asked for"
    ran.study.dispose()
    with Study.open(sweep_folder(tmp_path)) as later:
        trial = later.ask()
        assert trial.micro_batch_limit == 128
        smaller = later.retry(trial, 100, "a trial knows better")
        assert (smaller.micro_batch_limit, later.micro_batch_limit()) == (100, 100)


def test_one_pair_too_much_is_a_failure_in_words_and_teaches_nothing(tmp_path: Path, ray_cluster: None) -> None:
    ran = Staged(tmp_path, fits=0)
    logged = str(ran.error)
    assert "the sft stage ended as failed: out of memory at the smallest micro-batch" in logged
    assert f"after halving training.tokens_per_micro_batch from 512 to {ran.longest}" in logged
    assert [tokens for step, tokens in ran.log if step == 2][-1] == ran.longest
    assert ran.study.micro_batch_limit() is None
    assert ran.sink.tags("sft")["state"] == "FAILED"
    ran.study.dispose()


@pytest.mark.slow
def test_a_lost_worker_is_followed_by_another_a_bounded_number_of_times(tmp_path: Path, ray_cluster: None) -> None:
    ran = Staged(tmp_path, deaths=3)
    assert isinstance(ran.error, StageDied)
    assert [step for step, _ in ran.log] == [1, 2, 2, 2]
    assert [kind for kind, *_ in ran.events].count("worker lost") == 2
    ran.study.dispose()
    again = Staged(tmp_path, deaths=3)
    assert again.error is None
    assert [step for step, _ in again.log] == [1, 2, 2, 2, 2, 3, 4], "resumed, from the newest checkpoint"
    again.study.dispose()


class InProcess:
    """The real trainer, in this process. `stop_at`: an update after which somebody interrupts."""

    def __init__(self, cache: Path, stop_at: int | None = None) -> None:
        self._cache, self._stop_at = cache, stop_at
        self._session = open_session(cache)
        self.steps: list[int] = []

    def key(self, config: TrialConfig, fingerprint: str) -> str:
        return stage_key(config, fingerprint, self._cache)

    def train(
        self, task: AttemptTask, received: Callable[[AttemptReport], None], stopped: Callable[[], bool]
    ) -> AttemptResult:
        task.folder.mkdir(parents=True, exist_ok=True)
        attempt = AttemptRunner(task, lambda: self._session)
        while True:
            report = attempt.next_report()
            received(report)
            self.steps += [step_metrics.step for step_metrics in report.metrics]
            if self._stop_at is not None and self._stop_at in self.steps:
                self._session.interrupt()
            if report.result is not None:
                if report.result.status is EndOfAttempt.RELEASED:
                    raise StageInterrupted
                return report.result

    def restart(self) -> None:
        raise AssertionError("nothing is lost here")


class Shared:
    """Sweeps of one runs folder, each up to its initial model."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache, self.count = root, root / "runs" / "cache", 0
        self.view, self.sink = SilentView(), ListSink()

    def start_model(self, worker: InProcess, sft: dict[str, Any] | None = None, **base: Any) -> Path | None:
        self.count += 1
        spec = SPEC.model_copy(update={"name": f"s{self.count}"})
        training = {"max_steps": 6, "pairs_per_update": 8, "save_steps": 2, "logging_steps": 1} | (sft or {})
        spec = SweepSpec.model_validate(
            spec.model_dump() | {"base": SPEC.base.model_dump() | LITTLE | base, "sft": {"training": training}}
        )
        folder = SweepFolder(self.root / "runs", spec.name)
        folder.path.mkdir(parents=True)
        data: Any = PreparedHere(self.cache)
        report, study = check_data(spec, folder, self.view, data), Study.create(folder, spec)
        study.start_driving()
        try:
            in_process: Any = worker
            return run_sft_stage(study, data, report, self.sink, self.view, in_process, StopConditions(study))
        finally:
            study.dispose()


EVALUATED = {"evaluation": {"prompts": 2, "max_new_tokens": 3}}
LITTLE = {"evaluation": {"prompts": 1, "samples": 0, "max_new_tokens": 1}}


def test_another_evaluation_takes_the_start_model_that_is_there(tmp_path: Path) -> None:
    shared = Shared(tmp_path)
    first = InProcess(shared.cache)
    model = shared.start_model(first)
    written = (model / "model.safetensors").stat().st_mtime_ns
    for sft, base in (
        ({}, EVALUATED),
        ({"eval_steps": 1, "logging_steps": 2, "save_steps": 1}, {}),
        ({"gradient_checkpointing": True, "tokens_per_micro_batch": 300}, {}),
    ):
        later = InProcess(shared.cache)
        assert shared.start_model(later, sft, **base) == model
        assert later.steps == first.steps, "its story is told again"
        assert later._session.counters["model_loaded"] == 0  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    assert (model / "model.safetensors").stat().st_mtime_ns == written
    assert sum("with that sweep's evaluation" in line for line in shared.view.said) == 1
    assert shared.start_model(InProcess(shared.cache), {"learning_rate": 1e-3}) != model


def test_another_evaluation_goes_on_with_what_was_interrupted(tmp_path: Path) -> None:
    alone, shared = Shared(tmp_path / "alone"), Shared(tmp_path / "shared")
    untouched = alone.start_model(InProcess(alone.cache))
    with pytest.raises(StageInterrupted):
        shared.start_model(InProcess(shared.cache, stop_at=3))
    tags = shared.sink.tags(SFT_RUN)
    assert tags["state"] == "INTERRUPTED", "its own state in MLflow, not RUNNING for ever"
    assert "resume continues it" in tags["reason"]
    assert shared.view.stage_progress[1] == 6
    other_memory = shared.start_model(InProcess(shared.cache), {"gradient_checkpointing": True})
    later = InProcess(shared.cache)
    model = shared.start_model(later, {"eval_steps": 1}, **EVALUATED)
    assert untouched is not None
    assert later.steps == list(range(7))
    assert other_memory == model, "one run, whether its updates were computed with checkpointing or without"
    assert (model / "model.safetensors").read_bytes() == (untouched / "model.safetensors").read_bytes()
    (model.parent.parent / "run-checkpointing").mkdir()
    of_earlier = shared.start_model(InProcess(shared.cache), {"gradient_checkpointing": True})
    assert of_earlier == model.parent.parent / "run-checkpointing" / "model", "a run that an earlier version began"
    again = shared.start_model(InProcess(shared.cache), {"gradient_checkpointing": True})
    assert again == of_earlier, "always the same place"
