"""Case 4: what interrupts a sweep is no outcome of its trials: a full disk leaves them to be resumed."""

from __future__ import annotations

import errno
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.execution.controller import TrialController
from orchestrator.execution.stop_reasons import SignalHandler, StopKind
from orchestrator.execution.workers.attempt_runner import AttemptRunner
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialState
from tests.support.fake_session import ListSink, ScriptedSession, SilentView, make_spec, sweep_folder, write_script
from trainer.config.trial import TrialConfig


class Refused(ScriptedSession):
    """The disk is full once trial 1 has begun."""

    def train(
        self, config: TrialConfig, folder: Path, earlier: Sequence[Path] = (), fork: Path | None = None
    ) -> Generator[Any, None, Any]:
        run = super().train(config, folder, earlier, fork)
        if folder.parent.name == "0001":
            yield next(run)
            raise OSError(errno.ENOSPC, "No space left on device")
        return (yield from run)


def go(study: Study, root: Path, session: type[ScriptedSession], signals: SignalHandler) -> TrialController:
    controller = TrialController(
        study, ListSink(), SilentView(), signals, finish_config=lambda config: config, on_trial_end=lambda _: None
    )
    while not controller.is_idle:
        task = controller.next_attempt(1)
        if task is None:
            continue
        attempt = AttemptRunner(task, lambda: session(root / "cache"))
        while controller.on_report(task.id, attempt.next_report()):
            pass
        attempt.close()
        controller.poll()
    return controller


@pytest.mark.parametrize("cause", ["disk", "signal"])
def test_trials_stay_to_be_resumed(fast_tmp_path: Path, cause: str) -> None:
    write_script(fast_tmp_path, steps=4)
    with Study.create(sweep_folder(fast_tmp_path), make_spec(4)) as study:
        signals = SignalHandler(lambda: "")
        signals.stop_requested = cause == "signal"
        stopped = go(study, fast_tmp_path, Refused if cause == "disk" else ScriptedSession, signals).result()
        assert stopped.kind is (StopKind.NO_DISK if cause == "disk" else StopKind.INTERRUPTED)
        states = [r.state for r in study.trials()]
        assert TrialState.FAILED not in states
        assert len(states) < 4
        go(study, fast_tmp_path, ScriptedSession, SignalHandler(lambda: ""))
        assert [r.state for r in study.trials()] == [TrialState.COMPLETE] * 4
        assert [[p.step for p in study.metric_history(n)] for n in range(4)] == [[0, 1, 2, 3, 4]] * 4
