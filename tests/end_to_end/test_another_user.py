"""A user who may read a runs folder and not write to it, on a sweep whose data is gone: every command that looks."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dashboards.sweep_reporter import DashboardReporter
from orchestrator.driver.parent_run import open_sink
from orchestrator.folders import SweepFolder
from orchestrator.interfaces import SWEEP_RUN
from orchestrator.study.study import Study
from tests.support.local_driver import forked
from tests.support.processes import LIMIT_SECONDS, environment, wait_until
from tests.support.scripted_sweep import Script, make_spec, run_sweep

NOBODY = 65534


RUN_ALL = """
import contextlib, io, json, sys
from orchestrator import cli
done = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli.main(arguments)
    done.append([int(code), out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""


def as_nobody(root: Path, home: Path, *arguments: str) -> subprocess.Popen[str]:
    """Python with ARGUMENTS as another user, who may read all files (Python may be in root's home) and write none."""
    user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    reads = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"]
    command = ["setpriv", *user, *reads, sys.executable, "-B", *arguments]
    return subprocess.Popen(
        command, env=environment(root, HOME=str(home), TMPDIR=str(home)), cwd=home, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def contents(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder of the other user's own."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can be another user")
    path = tmp_path / "elsewhere"
    path.mkdir()
    os.chown(path, NOBODY, NOBODY)
    return path


def told_sweep(root: Path, name: str, data: Path) -> None:
    """A finished sweep on this data file, in MLflow too."""
    base = {"data": {"train": [{"path": str(data)}]}}
    with Study.open(
        run_sweep(root, make_spec(name, base=base), lambda trial: Script(0.2 + 0.01 * trial.number))
    ) as study:
        sink = open_sink(study, root, DashboardReporter())
        sink.start_run(SWEEP_RUN, name=name, params={}, tags={}, at=1.0)
        sink.end_run(SWEEP_RUN, status="FINISHED", tags={}, at=2.0)
        assert sink.close(LIMIT_SECONDS) == 0


@pytest.mark.parametrize("has_driver", [False, True])
def test_another_user_reads_everything_and_writes_nothing(tmp_path: Path, elsewhere: Path, has_driver: bool) -> None:
    root, data = tmp_path / "runs", tmp_path / "rows.jsonl"
    data.write_text("{}")
    assert forked(lambda: [told_sweep(root, name, data) for name in ("one", "two")]) == 0  # its files are closed then
    data.unlink()
    study = Study.open(_folder(root)) if has_driver else None  # as a driver has it open: with a write-ahead log
    if study is not None:
        study.start_driving()
    before = contents(root)
    page, pages = elsewhere / "page.html", elsewhere / "compared.html"
    commands = [
        ["status", "one", "--json"],
        ["best", "one", "--json"],
        ["history", "one", "--json"],
        ["report", "one", "--json", "--output", str(page)],
        ["compare", "one", "two", "--json", "--output", str(pages)],
        ["report", "one"],
        ["stop", "one", "0"],
    ]
    process = as_nobody(root, elsewhere, "-c", RUN_ALL, json.dumps(commands))  # in one process: each costs seconds
    out, err = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, err
    *looks, report, stop = json.loads(out)
    for code, shown, said in looks:
        assert code == 0, said
        assert json.loads(shown)
    assert page.stat().st_size > 10_000
    assert pages.is_file()
    assert (report[0], report[2].count("\n") < 3) == (5, True), report
    assert stop[0] in (2, 5)
    after = contents(root)
    assert after.keys() == before.keys()
    assert study is not None or after == before
    if study is not None:
        study.dispose()


def test_the_page_of_another_users_sweep_opens(tmp_path: Path, elsewhere: Path) -> None:
    root, data = tmp_path / "runs", tmp_path / "rows.jsonl"
    data.write_text("{}")
    assert forked(lambda: told_sweep(root, "one", data)) == 0
    data.unlink()
    before = contents(root)
    process = as_nobody(root, elsewhere, "-m", "orchestrator.cli", "ui", "one", "--port", "0")
    assert process.stdout is not None
    try:
        assert "viewStateShareKey=prefsweep-" in wait_until(process.stdout.readline)
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=LIMIT_SECONDS)
    assert contents(root) == before
    assert not list(elsewhere.glob("orchestrate-ui-*")), "the copy of the store is removed"


def _folder(root: Path) -> SweepFolder:

    return SweepFolder(root, "one")
