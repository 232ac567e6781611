"""Terminals, pipes and encodings: printing changes neither what a sweep does nor its exit code."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

from orchestrator import folders
from orchestrator.commands.status import status
from orchestrator.folders import SweepFolder
from orchestrator.study.study import Study
from orchestrator.study.trial_records import RequestKind
from tests.end_to_end.test_sweep import TINY
from tests.support.processes import LIMIT_SECONDS, called, environment, finished, json_of, orchestrate, wait_until

STAGE = "sft:\n  training: {learning_rate: 2e-3, pairs_per_update: 8, max_steps: 4}\n"
SWEEP = TINY.replace("max_steps: 60", "max_steps: 40").replace(STAGE, "").replace("[2.0, 5.0, 10.0]", "[2.0, 5.0]")


def shown(terminal: int) -> str:
    """What was written to the terminal until nobody has it open any more."""
    parts: list[bytes] = []
    while True:
        try:
            parts.append(os.read(terminal, 65536))
        except OSError:  # EIO
            return b"".join(parts).decode()


def test_a_detached_driver_outlives_its_terminal_and_no_reader_changes_a_sweeps_end(tmp_path: Path) -> None:
    root, file = tmp_path / "runs", tmp_path / "tiny.yaml"
    file.write_text(SWEEP)
    terminal, inside = pty.openpty()
    shell = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", "sweep", str(file), "--detach"],
        env=environment(root, PYTHONIOENCODING="ascii"), stdin=inside, stdout=inside, stderr=inside,
        start_new_session=True,
    )  # fmt: skip
    os.close(inside)
    assert "orchestrate attach tiny" in shown(terminal)
    assert shell.wait(LIMIT_SECONDS) == 0
    os.close(terminal)
    folder = SweepFolder(root, "tiny")
    assert folders.lock_holder(folder) is not None, "the terminal is gone, the driver is not"
    wait_until(lambda: status("tiny", root)["trials"])
    with Study.open(folder) as study:
        study.add_request(RequestKind.PAUSE, "it must not end before somebody looks")

    viewer = orchestrate(root, "attach", "tiny")
    assert viewer.stderr is not None
    assert viewer.stderr.readline(), "it shows what the sweep does"
    viewer.send_signal(signal.SIGINT)
    _, err = viewer.communicate(timeout=LIMIT_SECONDS)
    assert viewer.returncode == 0
    assert "tiny continues" in err
    assert folders.lock_holder(folder) is not None
    called(root, "stop", "tiny")
    wait_until(lambda: folders.lock_holder(folder) is None)
    log = folder.log.read_text(encoding="utf-8")
    assert "beta" in log
    assert "starting Ray" in log
    assert log.isascii()

    reader, writer = os.pipe()
    os.close(reader)  # as `orchestrate resume tiny 2>&1 | head` once head has ended
    driver = orchestrate(root, "resume", "tiny", stdout=writer, stderr=writer, PYTHONIOENCODING="latin-1")
    os.close(writer)
    assert driver.wait(LIMIT_SECONDS) == 0
    assert {trial["state"] for trial in json_of(root, "status", "tiny")["trials"]} == {"COMPLETE"}
    closed = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m orchestrator.cli resume tiny >&- 2>&- <&-"],
        env=environment(root), check=False, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert closed.returncode == 0


def test_a_detached_sweep_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(SWEEP)
    _, err = finished(tmp_path / "runs", "sweep", str(file), "--detach", "--set", "resources.gpus_per_trial=1", code=2)
    assert "resources" in err
    assert not (tmp_path / "runs").exists()


def test_a_table_on_a_full_disk_is_an_error_and_one_that_nobody_reads_is_not(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        assert orchestrate(tmp_path, "schema", stdout=full).wait(LIMIT_SECONDS) == 5
    reader, writer = os.pipe()
    os.close(reader)
    assert orchestrate(tmp_path, "schema", stdout=writer).wait(LIMIT_SECONDS) == 0
    os.close(writer)
