"""`plan --probe`: a few updates of the dearest trial on this machine, in a process of their own, with the trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from orchestrator.engine.cluster import Slots, worker_environment
from orchestrator.errors import DataError
from orchestrator.spec.probed import Update
from trainer.config import TrialConfig

_UNUSABLE, _OUT_OF_MEMORY = 2, 3
"""Exit codes of trainer/probe.py."""


class ProbeFailed(DataError):
    """The trainer could not make an update of this sweep's trials here."""


def measure(config: TrialConfig, cache: Path, slots: Slots, *, trust_remote_code: bool = False) -> Update:
    """The update as it runs here, with half the micro-batch as long as it is out of memory; down to one pair.

    ProbeFailed where it does not run, with the trainer's words.
    """
    pair = 2 * config.data.max_length
    while True:
        tokens = config.training.tokens_per_micro_batch
        done = _run(config, cache, slots, trust_remote_code)
        if done.returncode == 0:
            return Update(**json.loads(done.stdout.splitlines()[-1]), tokens_per_micro_batch=tokens)
        words = done.stderr.strip().splitlines()
        if done.returncode != _OUT_OF_MEMORY or tokens <= pair:
            told = "\n".join(words if done.returncode == _UNUSABLE else words[-3:])
            raise ProbeFailed(f"the probe did not get through one update (exit {done.returncode}): {told}")
        smaller = {"tokens_per_micro_batch": max(tokens // 2, pair)}
        config = config.model_copy(update={"training": config.training.model_copy(update=smaller)})


def _run(config: TrialConfig, cache: Path, slots: Slots, trust_remote_code: bool) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable]
    if slots.processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={slots.processes}"]
    environment = os.environ | worker_environment(slots.threads)
    if not slots.gpus:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trial.yaml"
        file.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
        command = [*launch, "-m", "trainer.probe", str(file), "--cache", str(cache)]
        if slots.share is not None:
            command += ["--gpu-share", str(slots.share)]
        if trust_remote_code:
            command.append("--trust-remote-code")
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
