"""Processes that train together, kept warm between trials: this module, run with NUMBER SIZE PORT CACHE.

Each line on stdin is a trial for all of them: its configuration, folder, older folders, and how many points to take.
Each answers with a line: points, ending, and what its training session has loaded.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trainer.config.trial import TrialConfig
from trainer.distributed.processes import join_rendezvous
from trainer.results import RunStatus

HERE = "127.0.0.1"


@dataclass(frozen=True)
class Ran:
    points: list[tuple[int, dict[str, float]]]
    kind: RunStatus | None
    counters: dict[str, int]


class Together:
    """The handle of a test on its processes."""

    def __init__(self, cache: Path, size: int = 2) -> None:
        with socket.create_server((HERE, 0)) as listening:
            # The first process takes the socket over, as a worker of the engine hands on none.
            listening.set_inheritable(True)
            port, number = listening.getsockname()[1], listening.fileno()
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.processes = [
                subprocess.Popen(
                    [sys.executable, "-m", __name__, str(rank), str(size), str(port), str(number), str(cache)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, pass_fds=[number],
                )
                for rank in range(size)
            ]  # fmt: skip

    def run(self, config: TrialConfig, folder: Path, earlier: Sequence[Path] = (), take: int | None = None) -> Ran:
        """Train in all processes, to the end or closed after `take` points; what the first one says."""
        self.begin(config, folder, earlier, take)
        messages = [json.loads(_out(process).readline()) for process in self.processes]
        assert len({json.dumps(s["points"]) for s in messages}) == 1, "every process tells the same"
        first = messages[0]
        history = [(int(step), metrics) for step, metrics in first["points"]]
        return Ran(history, RunStatus(first["kind"]) if first["kind"] else None, first["counters"])

    def begin(self, config: TrialConfig, folder: Path, earlier: Sequence[Path] = (), take: int | None = None) -> None:
        task = {
            "config": config.model_dump(mode="json"),
            "folder": str(folder),
            "earlier": [str(path) for path in earlier],
            "take": take,
        }
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


def _out(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout


def main(rank: int, size: int, port: int, number: int, cache: Path) -> None:
    join_rendezvous(rank, size, port, socket.socket(fileno=number) if rank == 0 else None)
    from tests.support.small_trials import without_speed
    from trainer.training_session import TrainingSession

    completions = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    session = TrainingSession(cache)
    for line in sys.stdin:
        task: dict[str, Any] = json.loads(line)
        config = TrialConfig.model_validate(task["config"])
        run = session.train(config, Path(task["folder"]), [Path(path) for path in task["earlier"]])
        history, kind = [], None
        while task["take"] is None or len(history) < task["take"]:
            try:
                history.append(next(run))
            except StopIteration as end:
                kind = end.value.status.value
                break
        run.close()
        messages = {"points": without_speed(history), "kind": kind, "counters": dict(session.counters)}
        completions.write(json.dumps(messages) + "\n")
        completions.flush()


if __name__ == "__main__":
    RANK, SIZE, PORT, NUMBER = map(int, sys.argv[1:5])
    main(RANK, SIZE, PORT, NUMBER, Path(sys.argv[5]))
