"""Out of memory is answered: half the micro-batch, from the newest checkpoint, remembered; then a failure in words."""

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.execution import trial_retries
from orchestrator.execution.messages import WORKER_FILE, AttemptReport, AttemptResult, AttemptStatus, AttemptTask
from orchestrator.execution.workers.attempt_runner import AttemptRunner
from orchestrator.study.database import process_identity
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailureKind, TrialState
from tests.support.fake_session import FakeSession, make_task, write_script
from tests.support.local_driver import make_controller, run_here
from tests.support.recorders import ListSink, SilentView
from tests.support.small_trials import DATA, MODEL
from tests.support.specs import make_spec, sweep_folder
from trainer.config.trial import TrialConfig
from trainer.forward.pair_model import PairModel
from trainer.results import StepMetrics

OOM = AttemptReport(
    [],
    AttemptResult(AttemptStatus.FAILED, "OutOfMemoryError: CUDA out of memory", failure=FailureKind.OUT_OF_MEMORY),
    1,
)
GUESSING = (
    "ActorDiedError: Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of file. There "
    "are some potential root causes. (1) The process is killed by SIGKILL by OOM killer due to high memory usage."
)


class Driven:
    def __init__(self, study: Study, longest: int = 2048) -> None:
        self.study, self.sink, self.view = study, ListSink(), SilentView()
        self.controller = make_controller(study, self.sink, self.view, longest_row=longest)

    def task(self) -> AttemptTask:
        return self.controller.next_attempt(9)  # pyright: ignore[reportReturnType]

    def budgets(self, run: str) -> list[tuple[int, str | None]]:
        """What MLflow is told at each start: the param, then the tag."""
        return [
            (call[2]["training.tokens_per_micro_batch"], call[3].get("memory.tokens_per_micro_batch"))
            for call in self.sink.calls
            if call[0] == "start" and call[1] == run
        ]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study.create(sweep_folder(tmp_path), make_spec(6))


def budget(task: AttemptTask) -> int:
    return TrialConfig.model_validate_json(task.config).training.tokens_per_micro_batch


def test_half_the_tokens_and_later_trials_know_also_after_a_resume(study: Study) -> None:
    driven = Driven(study)
    task, beside = driven.task(), driven.task()
    assert not driven.controller.on_report(task.id, OOM)
    again = driven.task()
    assert (again.run_name, again.attempt, budget(again)) == ("0", 2, 4096)
    assert again.earlier_attempts == (task.folder,), "it goes on from the first attempt's checkpoints"
    assert not driven.controller.on_report(beside.id, OOM), "one that ran beside it, still with 8192"
    assert budget(driven.task()) == 4096
    assert budget(driven.task()) == 4096, "a new trial"
    assert driven.budgets("0") == [(8192, None), (8192, "4096")], "params are what was asked for, the tag what is used"
    logged = [e.text for e in study.events() if e.kind == "out of memory"]
    assert logged[0] == "attempt 1: OutOfMemoryError: CUDA out of memory; from now on 4096 tokens per micro-batch"
    assert "it continues from its newest checkpoint with 4096 tokens per micro-batch" in driven.view.said[-2]
    study.dispose()
    resumed = Driven(Study.open(study.folder))
    assert [budget(resumed.task()) for _ in range(4)] == [4096] * 4, "three left behind, and a new one"


def test_down_to_one_pair_then_it_failed_and_taught_nothing(study: Study) -> None:
    driven = Driven(study, longest=1500)
    seen: list[int] = []
    while study.trials()[0].state is TrialState.RUNNING if seen else True:
        task = driven.task()
        seen.append(budget(task))
        driven.controller.on_report(task.id, OOM)
    assert seen == [8192, 4096, 2048, 1500]
    record = study.trials()[0]
    assert (record.state, record.failure, record.attempts) == (TrialState.FAILED, FailureKind.OUT_OF_MEMORY, 4)
    assert record.reason == (
        "out of memory at the smallest micro-batch, after halving training.tokens_per_micro_batch from 8192 to 1500; "
        "set training.gradient_checkpointing: true, lower data.max_length, train with lora, or give a trial more "
        "memory (last: OutOfMemoryError: CUDA out of memory)"
    )
    assert driven.sink.tags("0")["failure"] == "OUT_OF_MEMORY"
    assert budget(driven.task()) == 8192, "smaller did not help the first trial: the next one begins as configured"


def test_the_bound_holds_over_a_resume(study: Study) -> None:
    driven = Driven(study)
    driven.controller.on_report(driven.task().id, OOM)
    study.dispose()
    resumed = Driven(Study.open(study.folder))
    task = resumed.task()
    assert budget(task) == 4096
    resumed.controller.on_report(task.id, OOM)
    task = resumed.task()
    assert (budget(task), task.attempt) == (2048, 4)
    resumed.controller.on_report(task.id, OOM)
    assert resumed.study.trials()[0].state is TrialState.FAILED


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernel's counter is what is in here."""
    found = [trial_retries.kernel_oom_kills()]
    monkeypatch.setattr(trial_retries, "kernel_oom_kills", lambda: sum(found))
    return found


def taken(task: AttemptTask, by: str = "") -> AttemptTask:
    """As if a worker had it: of this machine, where nothing else is said."""
    (task.folder / WORKER_FILE).write_text(by or process_identity.process_id())
    return task


def test_a_killed_worker_is_out_of_memory_only_where_that_can_be_told(study: Study, kills: list[int]) -> None:
    driven = Driven(study)
    driven.controller.on_worker_lost(driven.task().id, GUESSING)
    task = driven.task()
    assert (budget(task), task.attempt) == (8192, 2), "Ray only guesses"
    driven.controller.on_worker_lost(
        task.id, "OutOfMemoryError: 1 worker(s) were killed due to the node running low on memory."
    )
    task = driven.task()
    assert (budget(task), task.attempt) == (4096, 3)
    kills.append(1)
    driven.controller.on_worker_lost(taken(task).id, GUESSING)
    assert budget(driven.task()) == 2048
    kinds = [e.kind for e in study.events() if e.kind in ("worker lost", "out of memory")]
    assert kinds == ["worker lost", "out of memory", "out of memory"]


def test_a_kill_of_the_kernel_is_charged_to_one_lost_worker(study: Study, kills: list[int]) -> None:
    driven = Driven(study)
    first, second, third = (taken(driven.task()) for _ in range(3))
    kills.append(1)
    driven.controller.on_worker_lost(first.id, GUESSING)
    assert budget(driven.task()) == 4096
    driven.controller.on_worker_lost(second.id, GUESSING)
    driven.controller.on_worker_lost(third.id, GUESSING)
    logged = [(e.kind, e.trial) for e in study.events() if e.kind in ("worker lost", "out of memory")]
    assert logged == [("out of memory", 0), ("worker lost", 1), ("worker lost", 2)], "one kill is one worker's"
    kills += [1, 1]
    for _ in range(2):
        driven.controller.on_worker_lost(taken(driven.task()).id, GUESSING)
    logged = [e.kind for e in study.events() if e.kind in ("worker lost", "out of memory")]
    assert logged[3:] == ["worker lost"] * 2, "both were killed before these two workers began"


def test_a_kill_before_a_workers_last_report_was_not_that_worker(study: Study, kills: list[int]) -> None:
    driven = Driven(study)
    task = taken(driven.task())
    kills.append(1)  # something else on this machine
    assert driven.controller.on_report(task.id, AttemptReport([StepMetrics(0, {"loss": 1.0})], None, 1))
    driven.controller.on_worker_lost(task.id, GUESSING)
    assert [e.kind for e in study.events() if e.kind in ("worker lost", "out of memory")] == ["worker lost"]


@pytest.mark.parametrize("where", ["another machine", "not known"])
def test_a_kill_on_this_machine_says_nothing_of_a_worker_elsewhere(study: Study, kills: list[int], where: str) -> None:
    driven = Driven(study)
    task = driven.task()
    if where == "another machine":
        taken(task, "pid 7 on there, process another-boot/pid:[1]/99")
    kills.append(1)
    driven.controller.on_worker_lost(task.id, GUESSING)
    assert [e.kind for e in study.events() if e.kind in ("worker lost", "out of memory")] == ["worker lost"]


def test_an_attempt_says_which_process_has_it(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    write_script(tmp_path)
    attempt = AttemptRunner(task, lambda: FakeSession(tmp_path / "cache"))
    assert not trial_retries.is_on_this_machine(task.folder)
    attempt.next_report()
    assert trial_retries.is_on_this_machine(task.folder)


def test_kernel_kills_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trial_retries.kernel_oom_kills() >= 0
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 3\noom 2\noom_kill 2\n")
    monkeypatch.setattr(trial_retries, "_COUNTERS", (tmp_path / "none", tmp_path / "memory.events"))
    assert trial_retries.kernel_oom_kills() == 2


def test_a_real_trial_ends_as_if_it_had_had_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's own forward, made to refuse large micro-batches after a checkpoint; nothing else is scripted."""
    base: dict[str, Any] = {"model": MODEL, "data": DATA, "evaluation": {"prompts": 0}}
    base["training"] = {"learning_rate": 5e-3, "pairs_per_update": 8, "num_train_epochs": 2, "eval_steps": 3}
    calm = _run(tmp_path / "calm", base)
    backward, updates = PairModel.backward, [0]

    def short_of_memory(self: PairModel, pairs: Any, *more: Any) -> Any:
        updates[0] += 1
        if len(pairs.batch.chosen_tokens) > 2 and updates[0] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return backward(self, pairs, *more)

    monkeypatch.setattr(PairModel, "backward", short_of_memory)
    short = _run(tmp_path / "short", base)
    assert short.attempts > 1, short.reason
    assert (calm.state, short.state, short.step) == (TrialState.COMPLETE, TrialState.COMPLETE, 6)
    for name, value in calm.metrics.items():
        if not name.endswith("per_second"):
            assert short.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def _run(root: Path, base: dict[str, Any]) -> Any:
    from trainer.training_session import TrainingSession

    root.mkdir()
    with Study.create(sweep_folder(root), make_spec(1, base=base)) as study:
        # A fresh session for each attempt, as after DedicatedWorker.step.
        run_here(Driven(study, longest=1).controller, lambda: TrainingSession(root / "cache"))
        return study.trials()[0]
