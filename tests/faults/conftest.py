from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from orchestrator.tracking.mlflow_ui import UiServer

MEMORY = Path("/dev/shm")


@pytest.fixture
def quick_path() -> Iterator[Path]:
    """In memory where the system has it: a kill is tested here, not the disk, and waiting for that takes minutes."""
    path = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def ui(runs: Path) -> Iterator[UiServer]:
    """MLflow's server over a store of its own."""
    from tests.support.mlflow_server import serving  # MLflow takes seconds to load

    with serving(runs) as ui:
        yield ui
