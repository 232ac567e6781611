from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.engine.cluster import Slots, cluster
from orchestrator.engine.stopping import Interrupt

SLOTS = Slots(count=2, gpus=0.0, threads=1)


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One Ray for a module's tests: starting it costs seconds."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # workers import `scripted`
    folder = tmp_path_factory.mktemp("ray")
    with Interrupt(lambda: "") as interrupt, cluster(folder, SLOTS, interrupt):
        yield folder
    patch.undo()
