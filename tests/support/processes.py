"""What the tests of clusters have in common."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def orchestrate(root: Path, *arguments: str) -> subprocess.Popen[str]:
    env = os.environ | {"ORCHESTRATE_HOME": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "orchestrator.cli", *arguments]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
