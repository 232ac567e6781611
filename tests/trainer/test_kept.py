"""What was kept survives: a file cut at any byte, a killed process, a disk that refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.storage.atomic_files import VARIABLE
from trainer.storage.jsonl_store import Kept, peek

THREE = {"a": {"text": "é\n", "n": 1}, "b": [1.5, None], "c": "x"}


def written(path: Path) -> bytes:
    with Kept(path) as kept:
        for key, value in THREE.items():
            kept.put({key: value})
    return path.read_bytes()


def test_values_come_back(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "k.jsonl"
    assert peek(path) == {}
    written(path)
    assert peek(path) == THREE
    with Kept(path) as kept:
        kept.put({"a": 2, "d": 3})
        assert kept.values == THREE | {"a": 2, "d": 3}
    assert peek(path) == THREE | {"a": 2, "d": 3}


def test_cut_at_any_byte_the_whole_lines_are_there_and_it_goes_on(tmp_path: Path) -> None:
    whole = written(tmp_path / "k.jsonl")
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole)):
        path = tmp_path / f"cut{cut}.jsonl"
        path.write_bytes(whole[:cut])
        lines = sum(end <= cut for end in ends)
        expected = dict(list(THREE.items())[:lines])
        assert peek(path) == expected
        with Kept(path) as kept:
            assert kept.values == expected
            kept.put({"new": 1})
        assert peek(path) == expected | {"new": 1}
        torn = list(tmp_path.glob(f"cut{cut}.jsonl.torn-*"))
        assert [t.read_bytes() for t in torn] == (
            [whole[ends[lines - 1] if lines else 0 : cut]] if cut not in [0, *ends] else []
        )


def test_a_damaged_line_is_set_aside_with_all_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "k.jsonl"
    whole = written(path)
    second = whole.index(b"\n") + 1
    path.write_bytes(whole[: second + 12] + bytes([whole[second + 12] ^ 1]) + whole[second + 13 :])
    with Kept(path) as kept:
        assert kept.values == {"a": THREE["a"]}
    assert len(list(tmp_path.glob("*.torn-*"))) == 1


CHILD = """
import sys
from pathlib import Path
from trainer.storage.jsonl_store import Kept
with Kept(Path(sys.argv[1])) as kept:
    for number in range(5):
        kept.put({str(number): number})
        print(number, flush=True)
"""


@pytest.mark.parametrize("point", ["kept.append:3", "kept.appended:3"])
def test_killed_it_has_all_that_was_said_to_be_kept(tmp_path: Path, point: str) -> None:
    path = tmp_path / "k.jsonl"
    env = os.environ | {VARIABLE: point}
    child = subprocess.run([sys.executable, "-c", CHILD, str(path)], env=env, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL
    said = {line: int(line) for line in child.stdout.split()}
    assert said.items() <= peek(path).items()
    assert len(peek(path)) - len(said) == (1 if "appended" in point else 0)


def test_a_disk_that_refuses_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "k.jsonl"
    with Kept(path) as kept:
        kept.put({"a": 1})

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space"):
                kept.put({"b": 2})
        assert json.loads(json.dumps(dict(kept.values))) == {"a": 1}
        kept.put({"c": 3})
    assert peek(path) == {"a": 1, "c": 3}
