"""The mirror's places: whole or not there, whatever is behind the URL."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from orchestrator.mirror import (
    COMPLETE_LIST,
    Mirror,
    MirrorDamaged,
    MirrorError,
    MirrorRefused,
    UploadCancelled,
    probe_mirror,
)
from tests.support.processes import LIMIT_SECONDS
from trainer.storage.failpoints import FAILPOINT_VARIABLE

PREFIX = "trials/0001/1/checkpoints/step-00000010"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "here"
    (made / "model").mkdir(parents=True)
    (made / "manifest.json").write_text("{}")
    (made / "model" / "weights.safetensors").write_bytes(b"\0" * 1000)
    return made


def files(folder: Path) -> dict[str, Path]:
    return {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: file.read_bytes() for name, file in files(folder).items()}


def test_there_and_back(mirror: Mirror, folder: Path, tmp_path: Path) -> None:
    assert mirror.complete_paths() == []
    mirror.put(PREFIX, files(folder))
    mirror.put("trials/0001/1/end", {"manifest.json": folder / "manifest.json"})
    assert mirror.complete_paths() == [PREFIX, "trials/0001/1/end"]
    assert mirror.complete_paths("trials/0001/1/checkpoints") == [PREFIX]
    assert mirror.at("trials/0001").complete_paths() == ["1/checkpoints/step-00000010", "1/end"]
    back = tmp_path / "back" / "step-00000010"
    assert mirror.get(PREFIX, back)
    assert contents(back) == contents(folder)
    mirror.remove("trials/0001/1/checkpoints")
    assert mirror.complete_paths() == ["trials/0001/1/end"]
    assert not mirror.get(PREFIX, back)
    assert contents(back) == contents(folder), "what is here stays where nothing is there"
    mirror.remove("trials/0001/1/checkpoints")


def test_small_files(mirror: Mirror) -> None:
    assert mirror.read("sweep.yaml") is None
    mirror.write("sweep.yaml", b"name: a")
    mirror.write("sweep.yaml", b"name: b")
    assert mirror.read("sweep.yaml") == b"name: b"
    mirror.delete_file("sweep.yaml")
    mirror.delete_file("sweep.yaml")
    assert mirror.read("sweep.yaml") is None


def test_a_second_upload_takes_the_place_of_the_first(mirror: Mirror, folder: Path, tmp_path: Path) -> None:
    mirror.put("a", files(folder))
    (folder / "manifest.json").write_text("another")
    mirror.put("a", files(folder))
    assert mirror.get("a", tmp_path / "back")
    assert (tmp_path / "back" / "manifest.json").read_text() == "another"


def test_an_upload_cut_short_does_not_count(mirror: Mirror, folder: Path, tmp_path: Path) -> None:
    mirror.put("a/one", files(folder))
    with pytest.raises(MirrorRefused, match="FileNotFoundError"):
        mirror.put("a/one", files(folder) | {"zzz": folder / "gone"})
    assert mirror.complete_paths("a") == [], "nor does what was there before it"
    assert not mirror.get("a/one", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    with pytest.raises(UploadCancelled):
        mirror.put("a/one", files(folder), required=lambda: False)
    assert mirror.complete_paths("a") == []


@pytest.mark.parametrize("mirror", ["file", "s3"], indirect=True)  # memory ends with its process
@pytest.mark.parametrize("point", ["mirror.file:1", "mirror.file:2", "mirror.list:1"])
def test_a_process_killed_inside_an_upload_leaves_nothing_that_counts(
    point: str, mirror: Mirror, folder: Path, tmp_path: Path
) -> None:
    program = (
        "import sys; from pathlib import Path; from orchestrator.mirror import Mirror; f = Path(sys.argv[2]);"
        "Mirror(sys.argv[1]).put('a/one', {str(p.relative_to(f)): p for p in f.rglob('*') if p.is_file()})"
    )
    command = [sys.executable, "-c", program, mirror.url, str(folder)]
    killed = subprocess.run(command, env=os.environ | {FAILPOINT_VARIABLE: point}, check=False, timeout=LIMIT_SECONDS)
    assert killed.returncode == -signal.SIGKILL
    assert mirror.complete_paths() == []
    assert not mirror.get("a/one", tmp_path / "back")
    subprocess.run(command, check=True, timeout=LIMIT_SECONDS)
    assert mirror.get("a/one", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)


@pytest.mark.parametrize("content", [b"short", b"\1" * 1000])
def test_a_damaged_file_is_refused_and_leaves_nothing(
    content: bytes, mirror: Mirror, folder: Path, tmp_path: Path
) -> None:
    mirror.put("a/one", files(folder))
    mirror.write("a/one/model/weights.safetensors", content)
    with pytest.raises(MirrorDamaged, match=r"weights\.safetensors: differs from its digest"):
        mirror.get("a/one", tmp_path / "back")
    mirror.delete_file("a/one/model/weights.safetensors")
    with pytest.raises(MirrorDamaged, match=r"weights\.safetensors: missing"):
        mirror.get("a/one", tmp_path / "back")
    assert (list(tmp_path.glob("*back*")), list(tmp_path.glob(".back*"))) == ([], [])


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"../../escaped": {"bytes": 1, "sha256": "a"}}, "points outside"),
        ({"/etc/passwd": {"bytes": 1, "sha256": "a"}}, "points outside"),
        ({"a": 2}, "is not a list of files"),
        ([1], "is not a list of files"),
    ],
)
def test_a_list_that_cannot_be_trusted(told: object, said: str, mirror: Mirror, tmp_path: Path) -> None:
    mirror.write(f"a/one/{COMPLETE_LIST}", json.dumps(told).encode())
    with pytest.raises(MirrorDamaged, match=said):
        mirror.get("a/one", tmp_path / "in" / "back")
    assert not (tmp_path / "in" / "back").exists()


def test_a_probe_leaves_nothing(mirror: Mirror) -> None:
    mirror.write("other", b"1")
    probe_mirror(mirror.url)
    store, root = fsspec.core.url_to_fs(mirror.url, use_listings_cache=False)
    assert [path.rpartition("/")[2] for path in store.find(root)] == ["other"]


def test_storages_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MirrorError, match=r"gss:// is not known; did you mean gs://\?"):
        probe_mirror("gss://bucket/a")
    with pytest.raises(MirrorError, match="/backup is no URL; a folder is written as file:///backup"):
        probe_mirror("/backup")
    with pytest.raises(MirrorError, match="bucket/a is no URL, as s3://BUCKET/FOLDER is one"):
        probe_mirror("bucket/a")
    (tmp_path / "file").touch()
    with pytest.raises(MirrorError, match="write, read, list and delete"):
        probe_mirror(f"file://{tmp_path}/file/below")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MirrorError, match=r"pip install 'prefsweep\[gs\]' \(or pip install gcsfs\)"):
        probe_mirror("gs://bucket/a")
    with pytest.raises(MirrorRefused):
        Mirror("nosuch://bucket").complete_paths()
