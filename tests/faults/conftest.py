from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from orchestrator.tracking.mlflow_ui import UiServer


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def ui(runs: Path) -> Iterator[UiServer]:
    """MLflow's server over a store of its own."""
    from tests.support.mlflow_server import serving  # MLflow takes seconds to load

    with serving(runs) as ui:
        yield ui
