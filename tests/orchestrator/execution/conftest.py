from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.execution.local_cluster import local_cluster
from orchestrator.execution.stop_reasons import SignalHandler
from tests.support.fake_session import SLOTS


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One Ray for a module's tests: starting it costs seconds."""
    folder = tmp_path_factory.mktemp("ray")
    with SignalHandler(lambda: "") as signals, local_cluster(folder, SLOTS, signals):
        yield folder
