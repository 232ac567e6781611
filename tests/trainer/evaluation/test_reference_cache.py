import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.support.local_driver import forked
from tests.support.processes import LIMIT_SECONDS
from trainer.distributed.processes import ProcessGroup
from trainer.evaluation.completions import Completion
from trainer.evaluation.reference_cache import cached_completions, cached_logps, shared_logps
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
    process_group = ProcessGroup()
    found, computed = cached_logps(tmp_path, {"start": "a"}, process_group, logps)
    again, computed_again = cached_logps(tmp_path, {"start": "a"}, process_group, never)
    assert (computed, computed_again) == (True, False)
    assert same(found, logps())
    assert same(again, logps())
    assert cached_logps(tmp_path, {"start": "b"}, process_group, logps)[1]


def test_simultaneous_trials_compute_it_once(tmp_path: Path) -> None:
    computed: list[bool] = []
    together = threading.Barrier(4)

    def trial() -> None:
        together.wait(LIMIT_SECONDS)
        computed.append(cached_logps(tmp_path, {"start": "a"}, ProcessGroup(), logps)[1])

    threads = [threading.Thread(target=trial) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(computed) == [False, False, False, True]


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\xff" * 64])
def test_a_damaged_file_is_computed_again(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    process_group = ProcessGroup()
    cached_logps(tmp_path, {"start": "a"}, process_group, logps)
    (file,) = (tmp_path / "reference").glob("*.safetensors")
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found, computed = cached_logps(tmp_path, {"start": "a"}, process_group, logps)
    assert computed
    assert same(found, logps())
    assert "damaged" in caplog.text


def test_one_changed_bit_is_noticed(tmp_path: Path) -> None:
    process_group = ProcessGroup()
    cached_logps(tmp_path, {"start": "a"}, process_group, logps)
    (file,) = (tmp_path / "reference").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    found, computed = cached_logps(tmp_path, {"start": "a"}, process_group, logps)
    assert computed
    assert same(found, logps())


def test_one_changed_letter_of_an_answer_is_noticed(tmp_path: Path) -> None:
    def completions() -> list[Completion]:
        return [Completion("2 + 2?", "four", "four", right=True, tokens=1, repetition=0.0)]

    cached_completions(tmp_path, {"start": "a"}, ProcessGroup(), completions)
    (file,) = (tmp_path / "reference").glob("*.json")
    file.write_text(file.read_text().replace("four", "fuor"))
    found, computed = cached_completions(tmp_path, {"start": "a"}, ProcessGroup(), completions)
    assert computed
    assert found == completions()
    assert cached_completions(tmp_path, {"start": "a"}, ProcessGroup(), completions) == (completions(), False)


def test_a_failed_computation_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        cached_logps(tmp_path, {"start": "a"}, ProcessGroup(), never)
    assert cached_logps(tmp_path, {"start": "a"}, ProcessGroup(), logps)[1]


def test_answers_come_back_as_they_were(tmp_path: Path) -> None:
    given = [Completion("p", "ä\n", "x", True, 3, 0.25), Completion("q", "", None, None, 0, 0.0)]
    process_group = ProcessGroup()
    assert cached_completions(tmp_path, {"start": "a"}, process_group, lambda: given) == (given, True)
    assert cached_completions(tmp_path, {"start": "a"}, process_group, list) == (given, False)


PARTS = [[3, 1], [0], [4, 2]]


def part(indexes: Sequence[int]) -> PairLogps:
    values = torch.tensor([-1.0 - i / 3 for i in indexes], dtype=torch.float64)
    counts = torch.tensor([i + 1 for i in indexes])
    return PairLogps(values, 2 * values, counts, counts + 1)


def shared(cache: Path, compute: Callable[[Sequence[int]], PairLogps]) -> tuple[PairLogps, bool, int]:
    return shared_logps(cache, {"start": "a"}, ProcessGroup(), PARTS, compute, lambda: None)


def test_processes_that_need_it_at_the_same_time_share_the_work(tmp_path: Path) -> None:
    computed: list[Sequence[int]] = []
    found: list[tuple[PairLogps, bool, int]] = []
    both_work = threading.Barrier(2)

    def compute(indexes: Sequence[int]) -> PairLogps:
        if len(computed) < 2:
            computed.append(indexes)
            both_work.wait(LIMIT_SECONDS)  # each has a part at this moment
        else:
            computed.append(indexes)
        return part(indexes)

    threads = [threading.Thread(target=lambda: found.append(shared(tmp_path, compute))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(list, computed)) == sorted(PARTS), "each part once"
    assert [same(logps, part(range(5))) for logps, _, _ in found] == [True, True]
    assert sorted(merged for _, merged, _ in found) == [False, True]
    assert sorted(count for _, _, count in found) == [1, 2]
    assert not list((tmp_path / "reference").glob("*.parts")), "the parts are removed when all are together"


def test_what_a_killed_process_had_computed_is_not_computed_again(tmp_path: Path) -> None:
    computed: list[Sequence[int]] = []

    def dies_in_the_second(indexes: Sequence[int]) -> PairLogps:
        if computed:
            os._exit(9)
        computed.append(indexes)
        return part(indexes)

    def goes_on(indexes: Sequence[int]) -> PairLogps:
        computed.append(indexes)
        return part(indexes)

    assert forked(lambda: shared(tmp_path, dies_in_the_second)) == 9
    logps, merged, count = shared(tmp_path, goes_on)
    assert (computed, merged, count) == (PARTS[1:], True, 2)
    assert same(logps, part(range(5)))


def test_a_damaged_part_and_a_damaged_whole_are_computed_again(tmp_path: Path) -> None:
    def dies_in_the_last(indexes: Sequence[int]) -> PairLogps:
        if indexes == PARTS[-1]:
            os._exit(9)
        return part(indexes)

    assert forked(lambda: shared(tmp_path, dies_in_the_last)) == 9
    (one, _) = sorted((tmp_path / "reference").glob("*.parts/*-of-3.safetensors"))
    one.write_bytes(b"rubbish")
    logps, _, count = shared(tmp_path, part)
    assert (count, same(logps, part(range(5)))) == (2, True)
    (whole,) = (tmp_path / "reference").glob("*.safetensors")
    whole.write_bytes(b"rubbish")
    logps, merged, _ = shared(tmp_path, part)
    assert (merged, same(logps, part(range(5)))) == (True, True)
    assert same(shared(tmp_path, part)[0], part(range(5)))
