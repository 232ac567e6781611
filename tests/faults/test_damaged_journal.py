"""Case 7: a journal cut at any byte keeps its whole messages; damage in the middle is an error with its place."""

import random
from pathlib import Path

import pytest

from orchestrator.tracking.message_journal import Journal, JournalDamaged, SetTags
from orchestrator.tracking.outbox import Outbox
from tests.orchestrator.tracking.test_outbox import Recorder, write


def test_a_torn_end_is_set_aside_wherever_it_is_cut(tmp_path: Path) -> None:
    complete = write(tmp_path / "o", 3)
    ends = [i + 1 for i, byte in enumerate(complete) if byte == 10]
    for cut in range(ends[1], len(complete)):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / "messages.jsonl").write_bytes(complete[:cut])
        journal = Journal(folder / "messages.jsonl")
        assert [seq for seq, _ in journal.scan()] == [1, 2]
        journal.append(SetTags("0", {}))
        journal.close()
        temporary = list(folder.glob("*.torn-*"))
        assert [p.read_bytes() for p in temporary] == ([complete[ends[1] : cut]] if cut > ends[1] else [])
        again = Journal(folder / "messages.jsonl")
        assert [seq for seq, _ in again.scan()] == [1, 2, 3]
        again.close()


def test_damage_in_the_middle_is_an_error_with_its_place(tmp_path: Path) -> None:
    complete = write(tmp_path / "o", 3)
    ends = [i + 1 for i, byte in enumerate(complete) if byte == 10]
    second = ends[0]
    damaged = {
        "flipped": complete[: second + 9] + bytes([complete[second + 9] ^ 1]) + complete[second + 10 :],
        "blank": complete[:second] + b"\n" + complete[second:],
        "missing": complete[:second] + complete[ends[1] :],
        "glued": complete[: second + 20] + complete[ends[1] - 1 - 20 :],
    }
    for name, content in damaged.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "messages.jsonl").write_bytes(content)
        with pytest.raises(JournalDamaged, match=f"at byte {second}") as caught:
            Outbox(folder, Recorder())
        assert (caught.value.offset, (folder / "messages.jsonl").read_bytes()) == (second, content)


def scan(path: Path) -> tuple[JournalDamaged | None, list[int]]:
    journal = Journal(path)
    try:
        return None, [seq for seq, _ in journal.scan()]
    except JournalDamaged as damage:
        return damage, []
    finally:
        journal.close()


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    complete, chance = write(tmp_path / "o", 3), random.Random(5)
    for path in sorted(chance.sample(range(len(complete)), 60)):
        folder = tmp_path / f"bit{path}"
        folder.mkdir()
        flipped = complete[:path] + bytes([complete[path] ^ (1 << chance.randrange(8))]) + complete[path + 1 :]
        (folder / "messages.jsonl").write_bytes(flipped)
        damage, stored = scan(folder / "messages.jsonl")
        if damage is not None:
            assert damage.offset <= path
        else:  # the last message only: a torn end, set aside
            assert stored == [1, 2]
            assert list(folder.glob("*.torn-*"))
