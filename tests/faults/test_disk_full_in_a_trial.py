"""Case 4: what interrupts a sweep is no outcome of its trials: a full disk leaves them to be resumed."""

import errno
from pathlib import Path

import pytest

from orchestrator.execution.controller import TrialController
from orchestrator.execution.stop_reasons import SignalHandler, StopKind
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialState
from tests.support.fake_session import FakeSession, write_script
from tests.support.local_driver import make_controller, run_here
from tests.support.recorders import ListSink
from tests.support.specs import make_spec, sweep_folder
from trainer.config.trial import TrialConfig
from trainer.results import StepMetrics


class DiskFull(FakeSession):
    """The disk is full once trial 1 has begun."""

    def on_update(self, config: TrialConfig, folder: Path, metrics: StepMetrics) -> StepMetrics:
        if folder.parent.name == "0001" and metrics.step == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return metrics


def go(study: Study, root: Path, session: type[FakeSession], signals: SignalHandler | None = None) -> TrialController:
    controller = make_controller(study, ListSink(), signals=signals)
    return run_here(controller, lambda: session(root / "cache"), polls=True)


@pytest.mark.parametrize("cause", ["disk", "signal"])
def test_trials_stay_to_be_resumed(fast_tmp_path: Path, cause: str) -> None:
    write_script(fast_tmp_path, steps=4)
    with Study.create(sweep_folder(fast_tmp_path), make_spec(4)) as study:
        signals = SignalHandler(lambda: "")
        signals.received = cause == "signal"
        stopped = go(study, fast_tmp_path, DiskFull if cause == "disk" else FakeSession, signals).result()
        assert stopped.kind is (StopKind.NO_DISK if cause == "disk" else StopKind.INTERRUPTED)
        states = [r.state for r in study.trials()]
        assert TrialState.FAILED not in states
        assert len(states) < 4
        go(study, fast_tmp_path, FakeSession)
        assert [r.state for r in study.trials()] == [TrialState.COMPLETE] * 4
        assert [[p.step for p in study.metric_history(n)] for n in range(4)] == [[0, 1, 2, 3, 4]] * 4
