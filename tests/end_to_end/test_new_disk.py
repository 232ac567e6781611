"""A sweep loses its machine and its whole disk; study and copies outlive them, and another disk goes on with it."""

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from orchestrator.commands.status import status
from orchestrator.folders import SweepFolder
from orchestrator.mirror import Mirror
from orchestrator.study.study import Study
from tests.faults.storm import sweep_file
from tests.support.postgresql import postgresql_server
from tests.support.processes import LIMIT_SECONDS, finished, orchestrate, wait_until
from tests.support.sweep_record import best_model, differences, study_record


@pytest.fixture
def storage(request: pytest.FixtureRequest, fast_tmp_path: Path) -> Iterator[str]:
    """The URL of a database that outlives the machine."""
    if request.param == "sqlite":
        yield f"sqlite:///{fast_tmp_path}/elsewhere/study.db"
        return
    with postgresql_server() as url:
        yield url


def _sweep(mirror_folder: Path, name: str, **more: Any) -> Path:
    given = sweep_file(trials=4, seed=3) | {"name": name} | more
    given["base"]["training"] |= {"max_steps": 120, "save_steps": 5}
    file = mirror_folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(given))
    return file


def _kill_all(driver: psutil.Process) -> None:
    """As a machine that is gone: no process says goodbye."""
    family = [*driver.children(recursive=True), driver]
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=LIMIT_SECONDS)


def _running_with_a_copy(mirror: Mirror, root: Path, name: str) -> list[int]:
    """A trial that runs and has a whole checkpoint far away, once another one has ended."""
    if not (root / name / "study.url").is_file():
        return []
    trials = status(name, root)["trials"]
    if not any(trial["state"] in ("COMPLETE", "PRUNED") for trial in trials):
        return []
    copied = {
        int(mirror_folder.split("/")[1])
        for mirror_folder in mirror.complete_paths("trials")
        if "/checkpoints/" in mirror_folder
    }
    return [t["number"] for t in trials if t["state"] == "RUNNING" and t["number"] in copied][:1]


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["sqlite", "postgresql"], indirect=True)
def test_a_sweep_goes_on_on_a_new_disk(storage: str, fast_tmp_path: Path, s3: Any) -> None:
    name = f"moved-{uuid.uuid4().hex[:8]}"
    lost, new, alone = (fast_tmp_path / home for home in ("lost", "new", "alone"))
    (fast_tmp_path / "elsewhere").mkdir()
    url = f"{s3.url}/sweeps"
    file = _sweep(
        fast_tmp_path,
        name,
        mirror=url,
        storage=storage,
        tracking={"uri": f"sqlite:///{fast_tmp_path}/elsewhere/mlflow.db", "artifacts": f"{s3.url}/files"},
    )
    mirror, driver = Mirror(url).at(name), orchestrate(lost, "sweep", str(file))
    (number,) = wait_until(lambda: driver.poll() is not None or _running_with_a_copy(mirror, lost, name))
    _kill_all(psutil.Process(driver.pid))
    driver.communicate(timeout=LIMIT_SECONDS)
    shutil.rmtree(lost)

    assert "mirror: downloaded results of" in finished(new, "resume", name, "--mirror", url)[1]
    with Study.open(SweepFolder(new, name)) as study:
        records, events = study.trials(), study.events()
    assert records[number].attempts == 2, [record.attempts for record in records]
    assert (new / name / "trials" / f"{number:04d}" / "1").is_dir(), "fetched, not begun anew"
    assert not [event for event in events if event.kind == "mirror"], "nothing went wrong with any copy"
    left = mirror.files("trials")
    assert not [mirror_folder for mirror_folder in left if "/checkpoints/" in mirror_folder]
    stored = {mirror_folder.split("/")[1] for mirror_folder in left if "/model/" in mirror_folder}
    assert stored == {f"{status(name, new)['best']:04d}"}
    assert Mirror(f"{s3.url}/files").files(), "MLflow's files are in the bucket"
    assert not (new / "artifacts").exists()
    assert not [path for path in new.rglob("*") if path.is_file() and b"not-a-real-secret" in path.read_bytes()]

    finished(alone, "sweep", str(_sweep(fast_tmp_path, name)))
    assert differences(study_record(alone, name), study_record(new, name)) == []
    assert best_model(alone, name) == best_model(new, name)
    assert json.dumps(best_model(new, name)) != "{}"
