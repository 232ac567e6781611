import logging
import threading
from pathlib import Path

import pytest
import torch

from tests.support.processes import LIMIT_SECONDS
from trainer.distributed.processes import ProcessGroup
from trainer.evaluation.completions import Completion
from trainer.evaluation.reference_cache import cached_completions, cached_logps
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
