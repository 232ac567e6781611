"""The trial controller over a real study, without Ray: what counts of what workers say."""

from pathlib import Path

import pytest

from orchestrator.execution.messages import AttemptReport, AttemptResult, AttemptStatus
from orchestrator.execution.stop_reasons import StopKind
from orchestrator.execution.workers.attempt_runner import AttemptRunner
from orchestrator.study.study import Study
from orchestrator.study.trial_records import FailureKind, TrialState
from tests.support.fake_session import FakeSession, write_script
from tests.support.local_driver import make_controller
from tests.support.recorders import ListSink, SilentView
from tests.support.specs import METRIC, make_spec, sweep_folder
from trainer.results import StepMetrics

HISTORY = [StepMetrics(s, {"loss": float("nan") if s == 3 else 1.0, METRIC: 0.5}) for s in range(6)]
ENDS = {
    "goes on": None,
    "finished": AttemptResult(AttemptStatus.FINISHED, ""),
    "failed": AttemptResult(AttemptStatus.FAILED, "KeyError: x", failure=FailureKind.BUG, bug_signature="x"),
    "diverged": AttemptResult(AttemptStatus.DIVERGED, "update 6: the loss is nan"),
    "released": AttemptResult(AttemptStatus.RELEASED, ""),
    "no disk": AttemptResult(AttemptStatus.NO_DISK, "full"),
}


class Driven:
    def __init__(self, root: Path, study: Study | None = None, trials: int = 1) -> None:
        root.mkdir(exist_ok=True)
        self.study = study or Study.create(sweep_folder(root), make_spec(trials))
        self.sink, self.view = ListSink(), SilentView()
        self.controller = make_controller(self.study, self.sink, self.view)

    def logged_steps(self) -> list[int]:
        return [step for call in self.sink.of("points") for step in call[2]]


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("batches", [[6], [4, 2], [2, 4], [1, 1, 1, 1, 1, 1]])
def test_what_came_after_the_point_at_which_it_diverged_does_not_count(
    tmp_path: Path, how: str, batches: list[int]
) -> None:
    driven = Driven(tmp_path)
    task = driven.controller.next_attempt(1)
    at, goes_on = 0, True
    for size in batches:
        if goes_on:
            end = ENDS[how] if at + size == len(HISTORY) else None
            goes_on = driven.controller.on_report(task.id, AttemptReport(HISTORY[at : at + size], end, 1))
        at += size
    record = driven.study.trials()[0]
    assert (record.state, record.diverged) == (TrialState.PRUNED, True)
    assert record.reason == "diverged: loss is nan at step 3"
    assert [p.step for p in driven.study.metric_history(0)] == driven.logged_steps() == [0, 1, 2, 3]
    assert (driven.sink.tags("0")["reason"], driven.sink.tags("0")["diverged"]) == (record.reason, "true")
    stopped = driven.controller.stop_reason
    assert (stopped is not None and stopped.kind is StopKind.NO_DISK) == (how == "no disk" and batches in ([6], [2, 4]))


def test_a_driver_that_died_before_the_trial_was_closed(tmp_path: Path) -> None:
    """The next one knows from the points that the trial was to stop, however far its checkpoint got."""
    first = Driven(tmp_path)
    first.study.report(first.study.ask(), HISTORY)
    first.study.dispose()
    second = Driven(tmp_path, Study.open(first.study.folder))
    task = second.controller.next_attempt(1)
    assert not second.controller.on_report(task.id, AttemptReport(HISTORY[:1], None, 1))
    assert second.study.trials()[0].reason == "diverged: loss is nan at step 3"
    assert [p.step for p in second.study.metric_history(0)] == [0, 1, 2, 3]


def test_the_trainers_own_end_by_divergence_has_its_words(tmp_path: Path) -> None:
    driven = Driven(tmp_path)
    task = driven.controller.next_attempt(1)
    driven.controller.on_report(task.id, AttemptReport(HISTORY[:2], ENDS["diverged"], 1))
    record = driven.study.trials()[0]
    assert (record.diverged, record.reason) == (True, "diverged: update 6: the loss is nan")


def test_what_the_trainer_warns_of_is_told_once_in_a_sweep(tmp_path: Path) -> None:
    """In the output, the history and a tag of the parent run; neither the next trial nor the next driver repeats it."""
    falcon = "switched off in the model while it is trained and evaluated: hidden_dropout 0.1"
    other = "a mixture of experts: its load-balancing loss is not part of the objective"
    write_script(tmp_path, warnings={"0": [falcon, falcon], "1": [falcon], "2": [falcon, other]})
    driven = Driven(tmp_path, trials=3)

    def train() -> None:
        task = driven.controller.next_attempt(1)
        assert task is not None
        attempt = AttemptRunner(task, lambda: FakeSession(tmp_path / "cache"))
        while driven.controller.on_report(task.id, attempt.next_report()):
            pass

    train()
    train()
    assert [text for text in driven.view.said if falcon in text] == [f"trial 0: {falcon}"]
    assert driven.sink.tags("sweep")["warnings"] == falcon
    driven.study.dispose()
    driven = Driven(tmp_path, Study.open(driven.study.folder))
    train()
    assert [(e.trial, e.text) for e in driven.study.events() if e.kind == "warning"] == [(0, falcon), (2, other)]
    assert [text for text in driven.view.said if falcon in text] == []
    assert driven.sink.tags("sweep")["warnings"] == f"{falcon}\n{other}"
