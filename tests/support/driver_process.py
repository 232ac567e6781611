"""A driver of scripted trials on a Ray of its own, as a process that tests may kill: this module, run with ROOT."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from orchestrator import folders
from orchestrator.errors import OrchestrateError
from orchestrator.execution.local_cluster import local_cluster
from orchestrator.execution.stop_reasons import SignalHandler
from orchestrator.study.study import Study
from orchestrator.study.trial_records import TrialRecord, TrialState
from tests.support.fake_session import SLOTS, run_study
from tests.support.processes import LIMIT_SECONDS, wait_until
from tests.support.recorders import ListSink
from tests.support.specs import make_spec, sweep_folder

STEPS = 12


def command(root: Path) -> list[str]:
    return [sys.executable, "-m", "tests.support.driver_process", str(root)]


def drive(root: Path, *before: str) -> subprocess.Popen[str]:
    """Started as a terminal would: a process group of its own, which Ctrl-C reaches as a whole."""
    pipe = subprocess.PIPE
    return subprocess.Popen([*before, *command(root)], stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until it is so, which it will not be any more where the driver has ended."""
    wait_until(lambda: process.poll() is not None or what())
    assert what() or process.poll() is None, process.communicate()


def finish(root: Path) -> None:
    driver = drive(root)
    out, err = driver.communicate(timeout=LIMIT_SECONDS)
    assert (driver.returncode, out.strip(), err) == (0, "finished", "")


def records(root: Path) -> list[TrialRecord]:
    with Study.open(sweep_folder(root)) as study:
        return study.trials()


def check_exact(root: Path) -> None:
    with Study.open(sweep_folder(root)) as study:
        assert [r.state for r in study.trials()] == [TrialState.COMPLETE] * 4
        for number in range(4):
            assert [p.step for p in study.metric_history(number)] == list(range(STEPS + 1))


def main(root: Path) -> str:
    folder = sweep_folder(root)
    folder.path.mkdir(parents=True, exist_ok=True)
    with folders.sweep_lock(folder), SignalHandler(lambda: "farewell") as signals:
        study = Study.open(folder) if folder.database.exists() else Study.create(folder, make_spec(4))
        with local_cluster(folder.path / "ray", SLOTS, signals):
            return run_study(study, ListSink(root / "sink.jsonl"), signals=signals).kind.value


if __name__ == "__main__":
    try:
        print(main(Path(sys.argv[1])))
    except OrchestrateError as error:
        print(error, file=sys.stderr)
        sys.exit(int(error.code))
