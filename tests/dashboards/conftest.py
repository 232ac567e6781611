from pathlib import Path

import pytest


@pytest.fixture
def tmp_path(fast_tmp_path: Path) -> Path:
    return fast_tmp_path
