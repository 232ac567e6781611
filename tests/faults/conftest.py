from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path += [str(HERE.parent / room) for room in ("engine", "study", "trainer", "tracking")]
sys.path.append(str(HERE.parent.parent))

MEMORY = Path("/dev/shm")


@pytest.fixture
def quick_path() -> Iterator[Path]:
    """In memory where the system has it: a kill is tested here, not the disk, and waiting for that takes minutes."""
    place = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
    yield place
    shutil.rmtree(place, ignore_errors=True)
