"""Case 4: what interrupts a sweep is no outcome of its trials: a full disk leaves them to be resumed."""

from __future__ import annotations

import errno
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
from scripted import ListSink, ScriptedWorkshop, SilentView, make_spec, sweep_folder, write_script

from orchestrator.execution.controller import Conductor
from orchestrator.execution.stop_reasons import Interrupt, StopKind
from orchestrator.execution.workers.attempt_runner import Attempt
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialState
from trainer.config.trial import TrialConfig


class Refused(ScriptedWorkshop):
    """The disk is full once trial 1 has begun."""

    def train(
        self, config: TrialConfig, folder: Path, earlier: Sequence[Path] = (), fork: Path | None = None
    ) -> Generator[Any, None, Any]:
        run = super().train(config, folder, earlier, fork)
        if folder.parent.name == "0001":
            yield next(run)
            raise OSError(errno.ENOSPC, "No space left on device")
        return (yield from run)


def go(study: Study, root: Path, workshop: type[ScriptedWorkshop], interrupt: Interrupt) -> Conductor:
    conductor = Conductor(
        study, ListSink(), SilentView(), interrupt, place=lambda config: config, on_closed=lambda _: None
    )
    while not conductor.idle:
        job = conductor.next(1)
        if job is None:
            continue
        attempt = Attempt(job, lambda: workshop(root / "cache"))
        while conductor.heard(job.id, attempt.pull()):
            pass
        attempt.close()
        conductor.tick()
    return conductor


@pytest.mark.parametrize("cause", ["disk", "signal"])
def test_trials_stay_to_be_resumed(quick_path: Path, cause: str) -> None:
    write_script(quick_path, steps=4)
    with Study.create(sweep_folder(quick_path), make_spec(4)) as study:
        interrupt = Interrupt(lambda: "")
        interrupt.asked = cause == "signal"
        stopped = go(study, quick_path, Refused if cause == "disk" else ScriptedWorkshop, interrupt).result()
        assert stopped.kind is (StopKind.NO_DISK if cause == "disk" else StopKind.INTERRUPTED)
        states = [r.state for r in study.trials()]
        assert TrialState.FAILED not in states
        assert len(states) < 4
        go(study, quick_path, ScriptedWorkshop, Interrupt(lambda: ""))
        assert [r.state for r in study.trials()] == [TrialState.COMPLETE] * 4
        assert [[p.step for p in study.points(n)] for n in range(4)] == [[0, 1, 2, 3, 4]] * 4
