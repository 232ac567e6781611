"""A service's supervisor and its drivers as processes that tests may kill: `service ROOT AT_ONCE` or `driver FILE`.

A driver has the sweep's real lock, study and lease, and trains nothing: it ends when its sweep's name is in the file
`enough`, or with the exit code in the file `NAME.code`.
"""

import sys
import time
from pathlib import Path

from orchestrator import folders
from orchestrator.folders import SweepFolder, create_sweep_folder, runs_folder
from orchestrator.service.driver_supervisor import DriverSupervisor
from orchestrator.service.sweep_queue import SweepQueue
from orchestrator.spec.loading.loader import load_spec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial
from tests.support.metrics import COMPLETE, evaluated
from tests.support.processes import wait_until


def queue_url(root: Path) -> str:
    return f"sqlite:///{root}/service/queue.db"


def driver_command(file: Path) -> list[str]:
    return [sys.executable, "-m", "tests.support.service_process", "driver", str(file)]


def serve(root: Path, at_once: int) -> None:
    """A service's loop, without its pages."""
    supervisor = DriverSupervisor(root, SweepQueue(queue_url(root)), at_once=at_once, command=driver_command)
    print("serves", flush=True)
    while True:
        supervisor.step()
        time.sleep(0.05)


def drive(file: Path) -> int:
    root, name = runs_folder(), file.stem
    folder = SweepFolder(root, name)
    if (code := root / f"{name}.code").exists():
        print(f"{name} cannot be trained", file=sys.stderr)
        return int(code.read_text())
    if not folder.spec.exists():
        create_sweep_folder(folder, file.read_text(encoding="utf-8"))
    with (
        folders.sweep_lock(folder),
        Study.open(folder) if Study.exists(folder) else Study.create(folder, load_spec(file)) as study,
    ):
        study.start_driving()
        with (root / "starts").open("a") as starts:
            starts.write(f"{name}\n")
        wait_until(lambda: (root / "enough").exists() and name in (root / "enough").read_text().split())
        while isinstance(trial := study.ask(), Trial):
            study.report(trial, [evaluated(1, 0.5)])
            study.tell(trial, COMPLETE)
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "service":
        serve(Path(sys.argv[2]), int(sys.argv[3]))
    sys.exit(drive(Path(sys.argv[2])))
