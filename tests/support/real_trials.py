"""The trainer's own training session, in processes that can be told to die."""

import os
import signal
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

from trainer.config.trial import TrialConfig
from trainer.results import RunResult, StepMetrics


class MortalSession:
    """In the first attempt the process named in `die` kills itself after update 3, and the one named in `device` fails
    as if its GPU had."""

    def __init__(self, cache: Path) -> None:
        from trainer.training_session import TrainingSession

        self._session = TrainingSession(cache)
        self._root, self._rank = cache.parent, os.environ.get("RANK", "0")

    @property
    def counters(self) -> Mapping[str, int]:
        return self._session.counters

    def interrupt(self, *, checkpoint: bool = True) -> None:
        self._session.interrupt(checkpoint=checkpoint)

    def train(
        self, config: TrialConfig, folder: Path, earlier: Sequence[Path] = (), fork_folder: Path | None = None
    ) -> Generator[StepMetrics, None, RunResult]:
        if earlier:
            left = [pid for pid in (self._root / "pids").read_text().split() if is_alive(int(pid))]
            (self._root / f"left-{self._rank}").write_text(" ".join(left))
        else:
            with (self._root / "pids").open("a") as pids:
                pids.write(f"{os.getpid()}\n")
        run = self._session.train(config, folder, earlier, fork_folder)
        while True:
            try:
                step_metrics = next(run)
            except StopIteration as end:
                return end.value
            if step_metrics.step == 3 and not earlier:
                if self._is_named("die"):
                    os.kill(os.getpid(), signal.SIGKILL)
                if self._is_named("device"):
                    raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
            yield step_metrics

    def _is_named(self, file: str) -> bool:
        return (self._root / file).is_file() and (self._root / file).read_text() == self._rank


def is_alive(pid: int) -> bool:
    """Whether the process runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
