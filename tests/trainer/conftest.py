from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from trainer.training_session import TrainingSession


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and prepared data, made once for a module's tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def session(cache: Path) -> TrainingSession:
    from trainer.training_session import TrainingSession  # torch takes seconds to load

    return TrainingSession(cache)
