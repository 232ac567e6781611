from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted import SLOTS

from orchestrator.execution.local_cluster import local_cluster
from orchestrator.execution.stop_reasons import SignalHandler

sys.path.append(str(Path(__file__).parents[1] / "faults"))  # the driver as a process


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One Ray for a module's tests: starting it costs seconds."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # workers import `scripted`
    folder = tmp_path_factory.mktemp("ray")
    with SignalHandler(lambda: "") as signals, local_cluster(folder, SLOTS, signals):
        yield folder
    patch.undo()
