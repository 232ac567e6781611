from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest
import torch

from trainer.distributed.processes import World
from trainer.evaluation.completions import Answer
from trainer.evaluation.reference_cache import start_answers, start_logps
from trainer.objectives.pair_logps import PairLogps


def logps() -> PairLogps:
    return PairLogps(
        torch.tensor([-1.1, -2.2], dtype=torch.float64),
        torch.tensor([-3.3, -1 / 3], dtype=torch.float64),
        torch.tensor([4, 5]),
        torch.tensor([6, 7]),
    )


def same(a: PairLogps, b: PairLogps) -> bool:
    return a.columns().keys() == b.columns().keys() and all(
        torch.equal(tensor, b.columns()[name]) and tensor.dtype == b.columns()[name].dtype
        for name, tensor in a.columns().items()
    )


def never() -> PairLogps:
    raise AssertionError("computed again")


def test_computed_once_per_key(tmp_path: Path) -> None:
    world = World()
    found, computed = start_logps(tmp_path, {"start": "a"}, world, logps)
    again, computed_again = start_logps(tmp_path, {"start": "a"}, world, never)
    assert (computed, computed_again) == (True, False)
    assert same(found, logps())
    assert same(again, logps())
    assert start_logps(tmp_path, {"start": "b"}, world, logps)[1]


def test_simultaneous_trials_compute_it_once(tmp_path: Path) -> None:
    computed: list[bool] = []

    def slowly() -> PairLogps:
        time.sleep(0.2)
        return logps()

    def trial() -> None:
        computed.append(start_logps(tmp_path, {"start": "a"}, World(), slowly)[1])

    threads = [threading.Thread(target=trial) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(computed) == [False, False, False, True]


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\xff" * 64])
def test_a_damaged_file_is_computed_again(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    start_logps(tmp_path, {"start": "a"}, world, logps)
    (file,) = (tmp_path / "reference").glob("*.safetensors")
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found, computed = start_logps(tmp_path, {"start": "a"}, world, logps)
    assert computed
    assert same(found, logps())
    assert "damaged" in caplog.text


def test_one_changed_bit_is_noticed(tmp_path: Path) -> None:
    world = World()
    start_logps(tmp_path, {"start": "a"}, world, logps)
    (file,) = (tmp_path / "reference").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    found, computed = start_logps(tmp_path, {"start": "a"}, world, logps)
    assert computed
    assert same(found, logps())


def test_one_changed_letter_of_an_answer_is_noticed(tmp_path: Path) -> None:
    def answers() -> list[Answer]:
        return [Answer("2 + 2?", "four", "four", right=True, tokens=1, repetition=0.0)]

    start_answers(tmp_path, {"start": "a"}, World(), answers)
    (file,) = (tmp_path / "reference").glob("*.json")
    file.write_text(file.read_text().replace("four", "fuor"))
    found, computed = start_answers(tmp_path, {"start": "a"}, World(), answers)
    assert computed
    assert found == answers()
    assert start_answers(tmp_path, {"start": "a"}, World(), answers) == (answers(), False)


def test_a_failed_computation_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        start_logps(tmp_path, {"start": "a"}, World(), never)
    assert start_logps(tmp_path, {"start": "a"}, World(), logps)[1]


def test_answers_come_back_as_they_were(tmp_path: Path) -> None:
    given = [Answer("p", "ä\n", "x", True, 3, 0.25), Answer("q", "", None, None, 0, 0.0)]
    world = World()
    assert start_answers(tmp_path, {"start": "a"}, world, lambda: given) == (given, True)
    assert start_answers(tmp_path, {"start": "a"}, world, list) == (given, False)
