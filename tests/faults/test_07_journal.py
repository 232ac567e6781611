"""Case 7: a journal cut at any byte keeps its whole messages; damage in the middle is an error with its place."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from test_outbox import Recorder, write

from orchestrator.tracking.message_journal import Damaged, Journal, Tag
from orchestrator.tracking.outbox import Outbox


def test_a_torn_end_is_set_aside_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = write(tmp_path / "o", 3)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(ends[1], len(whole)):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / "messages.jsonl").write_bytes(whole[:cut])
        journal = Journal(folder / "messages.jsonl")
        assert [seq for seq, _ in journal.scan()] == [1, 2]
        journal.append(Tag("0", {}))
        journal.close()
        aside = list(folder.glob("*.torn-*"))
        assert [p.read_bytes() for p in aside] == ([whole[ends[1] : cut]] if cut > ends[1] else [])
        again = Journal(folder / "messages.jsonl")
        assert [seq for seq, _ in again.scan()] == [1, 2, 3]
        again.close()


def test_damage_in_the_middle_is_an_error_with_its_place(tmp_path: Path) -> None:
    whole = write(tmp_path / "o", 3)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    second = ends[0]
    damaged = {
        "flipped": whole[: second + 9] + bytes([whole[second + 9] ^ 1]) + whole[second + 10 :],
        "blank": whole[:second] + b"\n" + whole[second:],
        "missing": whole[:second] + whole[ends[1] :],
        "glued": whole[: second + 20] + whole[ends[1] - 1 - 20 :],
    }
    for name, content in damaged.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "messages.jsonl").write_bytes(content)
        with pytest.raises(Damaged, match=f"at byte {second}") as caught:
            Outbox(folder, Recorder())
        assert caught.value.offset == second
        assert (folder / "messages.jsonl").read_bytes() == content


def scan(path: Path) -> tuple[Damaged | None, list[int]]:
    journal = Journal(path)
    try:
        return None, [seq for seq, _ in journal.scan()]
    except Damaged as damage:
        return damage, []
    finally:
        journal.close()


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    whole = write(tmp_path / "o", 3)
    chance = random.Random(5)
    for place in sorted(chance.sample(range(len(whole)), 60)):
        folder = tmp_path / f"bit{place}"
        folder.mkdir()
        flipped = whole[:place] + bytes([whole[place] ^ (1 << chance.randrange(8))]) + whole[place + 1 :]
        (folder / "messages.jsonl").write_bytes(flipped)
        damage, kept = scan(folder / "messages.jsonl")
        if damage is not None:
            assert damage.offset <= place
        else:  # the last message only: a torn end, set aside
            assert kept == [1, 2]
            assert list(folder.glob("*.torn-*"))
