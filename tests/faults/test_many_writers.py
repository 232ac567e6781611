"""Case 8: many processes write to one study and nothing is lost or doubled; network disks are refused."""

from pathlib import Path

import pytest

from orchestrator.errors import NetworkDisk
from orchestrator.folders import SweepFolder
from orchestrator.study.database import study_database
from orchestrator.study.study import Study
from tests.support.local_driver import forked_together
from tests.support.specs import GRID, make_spec

PROCESSES, EACH = 10, 200


@pytest.mark.faults
def test_ten_processes_of_two_hundred_requests(fast_tmp_path: Path) -> None:
    folder = SweepFolder(fast_tmp_path, "s")
    Study.create(folder, make_spec(GRID)).dispose()

    def write(process: int) -> None:
        with Study.open(folder) as study:
            for i in range(EACH):
                study.add_request("pause", f"{process} {i}")

    assert forked_together(PROCESSES, write) == [0] * PROCESSES
    with Study.open(folder) as study:
        requested = study.requests()
    assert [r.seq for r in requested] == list(range(1, PROCESSES * EACH + 1))
    for process in range(PROCESSES):
        mine = [r.text for r in requested if r.text.startswith(f"{process} ")]
        assert mine == [f"{process} {i}" for i in range(EACH)], "each process's own are in its order"


def test_sqlite_on_a_network_disk_is_refused_with_a_way_out(
    fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_database, "filesystem_type", lambda path: "nfs4")
    with pytest.raises(NetworkDisk, match=r"ORCHESTRATE_HOME.*PostgreSQL"):
        Study.create(SweepFolder(fast_tmp_path, "s"), make_spec(GRID))
