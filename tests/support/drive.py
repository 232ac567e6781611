"""A driver as a process of its own, for tests that kill it: `python -m tests.support.drive ROOT`."""

from __future__ import annotations

import sys
from pathlib import Path

from orchestrator import folders
from orchestrator.errors import OrchestrateError
from orchestrator.execution.local_cluster import Slots, local_cluster
from orchestrator.execution.stop_reasons import SignalHandler
from orchestrator.execution.tune_adapter import run_trials
from orchestrator.study.study import Study
from tests.support.fake_session import ListSink, ScriptedSession, SilentView, make_spec, sweep_folder


def main(root: Path) -> str:
    folder = sweep_folder(root)
    folder.path.mkdir(parents=True, exist_ok=True)
    slots = Slots(count=2, gpus=0.0, threads=1)
    with folders.sweep_lock(folder), SignalHandler(lambda: "farewell") as signals:
        study = Study.open(folder) if folder.database.exists() else Study.create(folder, make_spec(4))
        with local_cluster(folder.path / "ray", slots, signals):
            sink = ListSink(root / "sink.jsonl")
            stop = run_trials(study, sink, SilentView(), signals, slots, open_session=ScriptedSession)
        return stop.kind.value


if __name__ == "__main__":
    try:
        print(main(Path(sys.argv[1])))
    except OrchestrateError as error:
        print(error, file=sys.stderr)
        sys.exit(int(error.code))
