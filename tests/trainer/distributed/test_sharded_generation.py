"""Generation of a model in slices: all its processes make the same number of passes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.support import sharded_generation
from tests.support.small_trials import MODEL, trial
from trainer.config.trial import ModelConfig
from trainer.data import prepare


def test_processes_whose_answers_end_apart_wait_for_each_other(tmp_path: Path) -> None:
    prepare(trial().data, ModelConfig.model_validate(MODEL), tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.set_inheritable(True)
        number, port = listening.fileno(), listening.getsockname()[1]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", sharded_generation.__name__, str(rank), str(port), str(number), str(tmp_path)],
                stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, pass_fds=[number],
            )
            for rank in range(2)
        ]  # fmt: skip
    try:
        messages = [process.communicate()[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    first, second = (json.loads(lines[-1]) for lines in messages)
    assert first["free"] == second["free"] == second["found"] == first["again"] == second["again"]
    assert first["found"] == [[], [], []]
    assert all(len(answer) == 12 for answer in first["free"])
