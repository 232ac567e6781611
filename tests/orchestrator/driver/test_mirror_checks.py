"""`mirror:` and `tracking.artifacts:` at the doors: what is refused before anything is spent, and in which words."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import sweeps
from orchestrator import cli
from orchestrator.api.driving import presentation
from orchestrator.commands import status
from orchestrator.driver import run_sweep as root
from orchestrator.driver.mirror_maintenance import claim_mirror
from orchestrator.errors import NameTaken, SpecError
from orchestrator.folders import SweepFolder
from orchestrator.mirror import MirrorError
from orchestrator.spec.estimates.disk_space import disk_need
from orchestrator.spec.loading.loader import load_spec, load_spec_text
from orchestrator.spec.loading.serialization import dump_spec, sweep_identity
from orchestrator.study.study import Study
from trainer.storage.atomic_files import write_text

QUICKSTART = Path(sweeps.__file__).parent / "quickstart.yaml"


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def run(*arguments: str) -> str:
        """What the command says; it ends with code 2 and writes nothing."""
        assert cli.main(list(arguments)) == 2
        assert not list((tmp_path / "runs").glob("*/sweep.yaml"))
        return capsys.readouterr().err

    return run


def test_it_is_a_key_of_the_file_and_no_part_of_the_identity() -> None:
    alone, mirrored = load_spec(QUICKSTART), load_spec(QUICKSTART, ["mirror=s3://bucket/prefix/"])
    assert mirrored.mirror == "s3://bucket/prefix"
    assert "mirror: s3://bucket/prefix" in dump_spec(mirrored)
    assert load_spec_text(dump_spec(mirrored), Path()) == mirrored
    assert "mirror" not in dump_spec(alone)
    assert sweep_identity(alone) == sweep_identity(mirrored)
    elsewhere = load_spec(QUICKSTART, ["tracking.artifacts=gs://bucket/files"])
    assert elsewhere.tracking.artifacts == "gs://bucket/files"
    assert load_spec_text(dump_spec(elsewhere), Path()) == elsewhere
    assert "artifacts" not in dump_spec(alone)
    assert sweep_identity(alone) == sweep_identity(elsewhere)


def test_the_disk_holds_one_checkpoint_more_that_is_on_its_way() -> None:
    alone = disk_need(load_spec(QUICKSTART), 2)
    mirrored = disk_need(load_spec(QUICKSTART, ["mirror=s3://bucket"]), 2)
    assert mirrored.bytes - alone.bytes == 2 * alone.checkpoint
    assert "with 3 checkpoints of" in str(mirrored)


@pytest.mark.parametrize("key", ["mirror", "tracking.artifacts"])
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("/shared/folder", "must be a URL such as s3://bucket/prefix"),
        ("s3://me:secret@bucket/prefix", "credentials come from the environment"),
        ("s3://bucket/prefix?versionId=1", "without ? and #"),
        ("memory://bucket", "does not outlive its process"),
        ("file://shared/folder", "three slashes"),
        ("s3://bucket/../other", "must not contain .."),
    ],
)
def test_urls_that_cannot_be_meant(key: str, url: str, said: str) -> None:
    with pytest.raises(SpecError) as error:
        load_spec(QUICKSTART, [f"{key}={url}"])
    (finding,) = error.value.problems
    assert finding.path == key
    assert said in finding.problem
    assert "secret" not in finding.problem


def test_a_mirror_that_cannot_be_used_is_refused_before_anything_is_written(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    messages = refused("sweep", str(QUICKSTART), "--set", f"mirror=file://{tmp_path}/file/below")
    assert "grant permission to write, read, list and delete" in messages
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # of a test before this one
    messages = refused("sweep", str(QUICKSTART), "--set", "mirror=s3://bucket/prefix")
    assert "pip install 'prefsweep[s3]' (or pip install s3fs)" in messages
    messages = refused("sweep", str(QUICKSTART), "--set", "tracking.artifacts=s3://bucket/prefix")
    assert messages.startswith("tracking.artifacts: s3://bucket/prefix needs a library that is not installed")
    assert "is not known" in refused("sweep", str(QUICKSTART), "--set", "mirror=ss3://bucket")


def test_a_name_that_has_copies_already(refused: Callable[..., str], tmp_path: Path) -> None:
    url = f"file://{tmp_path}/far"
    write_text(tmp_path / "far" / "quickstart" / "study", "0" * 32)
    messages = refused("sweep", str(QUICKSTART), "--set", f"mirror={url}")
    assert f"orchestrate resume quickstart --mirror {url}" in messages


def test_a_sweep_that_cannot_be_brought(refused: Callable[..., str], tmp_path: Path) -> None:
    url = f"file://{tmp_path}/far"
    assert f"there is no sweep named 'quickstart' in {url}" in refused("resume", "quickstart", "--mirror", url)
    far = tmp_path / "far" / "quickstart"
    write_text(far / "study", "0" * 32)
    write_text(far / "sweep.yaml", dump_spec(load_spec(QUICKSTART, [f"mirror={url}"])))
    assert "a mirror has only checkpoints and models" in refused("resume", "quickstart", "--mirror", url)
    assert "cannot be a sweep's name" in refused("resume", "../quickstart", "--mirror", url)


def test_a_study_that_is_not_where_the_mirror_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path / "runs"))
    far = tmp_path / "far" / "quickstart"
    given = [f"mirror=file://{tmp_path}/far", f"storage=sqlite:///{tmp_path}/gone.db"]
    write_text(far / "study", "0" * 32)
    write_text(far / "sweep.yaml", dump_spec(load_spec(QUICKSTART, given)))
    assert cli.main(["resume", "quickstart", "--mirror", f"file://{tmp_path}/far"]) == 5
    assert f"the study of quickstart is not in sqlite:///{tmp_path}/gone.db" in capsys.readouterr().err


def test_two_sweeps_of_one_name_do_not_share_a_place(tmp_path: Path) -> None:
    spec = load_spec(QUICKSTART, [f"mirror=file://{tmp_path}/far"])
    for home in ("one", "two"):
        folder = SweepFolder(tmp_path / home, spec.name)
        write_text(folder.spec, dump_spec(spec))
        write_text(folder.path / "data.json", "{}")
        with Study.create(folder, spec) as study:
            if home == "one":
                claim_mirror(study)
                claim_mirror(study)
                continue
            with pytest.raises(MirrorError, match="another sweep named 'quickstart' has its files in"):
                claim_mirror(study)


def test_a_scheduler_that_starts_the_job_again_on_a_new_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [f"mirror=file://{tmp_path}/far", f"storage=sqlite:///{tmp_path}/study.db"]
    spec = load_spec(QUICKSTART, given)
    called: list[str] = []
    monkeypatch.setattr(root, "start", lambda *_, **__: called.append("start"))
    monkeypatch.setattr(root, "resume", lambda *_, **__: called.append("resume"))
    root.start_or_resume(spec, tmp_path / "two", presentation())
    assert called == ["start"], "nobody has begun it"

    folder = SweepFolder(tmp_path / "one", spec.name)
    write_text(folder.spec, dump_spec(spec))
    write_text(folder.path / "data.json", '{"rows": 7}')
    with Study.create(folder, spec) as study:
        claim_mirror(study)
        study.add_event("mirror", "a copy failed (503)", 3)
        study.add_event("mirror", "copies to the mirror work again")
    root.start_or_resume(spec, tmp_path / "two", presentation())
    assert called == ["start", "resume"]
    brought = SweepFolder(tmp_path / "two", spec.name)
    assert Study.exists(brought)
    assert (brought.path / "data.json").read_text() == '{"rows": 7}', "so that changed data are noticed"
    monkeypatch.setattr(status, "updates_if_known", lambda *_: None)
    found = status.status(spec.name, tmp_path / "two")
    assert found["mirror"] == {"url": spec.mirror, "told": 2, "last": "copies to the mirror work again"}
    with pytest.raises(NameTaken):
        root.start_or_resume(load_spec(QUICKSTART, [*given, "budget.trials=3"]), tmp_path / "three", presentation())
