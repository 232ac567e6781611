"""What was kept survives: a file cut at any byte, a killed process, a disk that refuses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.storage.failpoints import FAILPOINT_VARIABLE
from trainer.storage.file_lock import FileLock
from trainer.storage.jsonl_store import JsonlStore, read_jsonl_store

THREE = {"a": {"text": "é\n", "n": 1}, "b": [1.5, None], "c": "x"}


def written(path: Path) -> bytes:
    with JsonlStore(path) as stored:
        for key, value in THREE.items():
            stored.put({key: value})
    return path.read_bytes()


def test_values_come_back(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "k.jsonl"
    assert read_jsonl_store(path) == {}
    written(path)
    assert read_jsonl_store(path) == THREE
    with JsonlStore(path) as stored:
        stored.put({"a": 2, "d": 3})
        assert stored.values == THREE | {"a": 2, "d": 3}
    assert read_jsonl_store(path) == THREE | {"a": 2, "d": 3}


def test_cut_at_any_byte_the_whole_lines_are_there_and_it_goes_on(tmp_path: Path) -> None:
    full = written(tmp_path / "k.jsonl")
    ends = [i + 1 for i, byte in enumerate(full) if byte == 10]
    for cut in range(len(full)):
        path = tmp_path / f"cut{cut}.jsonl"
        path.write_bytes(full[:cut])
        lines = sum(end <= cut for end in ends)
        expected = dict(list(THREE.items())[:lines])
        assert read_jsonl_store(path) == expected
        with JsonlStore(path) as stored:
            assert stored.values == expected
            stored.put({"new": 1})
        assert read_jsonl_store(path) == expected | {"new": 1}
        torn = list(tmp_path.glob(f"cut{cut}.jsonl.torn-*"))
        assert [t.read_bytes() for t in torn] == (
            [full[ends[lines - 1] if lines else 0 : cut]] if cut not in [0, *ends] else []
        )


def test_a_damaged_line_is_set_aside_with_all_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "k.jsonl"
    full = written(path)
    second = full.index(b"\n") + 1
    path.write_bytes(full[: second + 12] + bytes([full[second + 12] ^ 1]) + full[second + 13 :])
    with JsonlStore(path) as stored:
        assert stored.values == {"a": THREE["a"]}
    assert len(list(tmp_path.glob("*.torn-*"))) == 1


CHILD = """
import sys
from pathlib import Path
from trainer.storage.jsonl_store import JsonlStore
with JsonlStore(Path(sys.argv[1])) as kept:
    for number in range(5):
        kept.put({str(number): number})
        print(number, flush=True)
"""


@pytest.mark.parametrize("point", ["kept.append:3", "kept.appended:3"])
def test_killed_it_has_all_that_was_said_to_be_kept(tmp_path: Path, point: str) -> None:
    path, env = tmp_path / "k.jsonl", os.environ | {FAILPOINT_VARIABLE: point}
    child = subprocess.run([sys.executable, "-c", CHILD, str(path)], env=env, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL
    messages = {line: int(line) for line in child.stdout.split()}
    assert messages.items() <= read_jsonl_store(path).items()
    assert len(read_jsonl_store(path)) - len(messages) == (1 if "appended" in point else 0)


def test_a_disk_that_refuses_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "k.jsonl"
    with JsonlStore(path) as stored:
        stored.put({"a": 1})

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space"):
                stored.put({"b": 2})
        assert json.loads(json.dumps(dict(stored.values))) == {"a": 1}
        stored.put({"c": 3})
    assert read_jsonl_store(path) == {"a": 1, "c": 3}


def test_a_lock_has_one_holder_and_tells_who_it_is(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    mine, other = FileLock(path, "pid 7"), FileLock(path, "pid 8")
    assert mine.holder() is None
    assert mine.acquire(timeout=0)
    assert not other.acquire(timeout=0)
    assert other.holder() == "pid 7"
    mine.release()
    mine.release()
    assert (other.holder(), path.read_text()) == (None, "")
    with other:
        assert mine.holder() == "pid 8"
        assert not mine.acquire(timeout=0.01)
    with pytest.raises(ZeroDivisionError), mine:
        raise ZeroDivisionError
    assert other.acquire(timeout=0), "whatever ended it, it is free"
