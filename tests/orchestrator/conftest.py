from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from orchestrator.mirror import Mirror


@pytest.fixture(params=["memory", "file", "s3"])
def mirror(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mirror]:
    match request.param:
        case "file":
            yield Mirror(f"file://{tmp_path / 'far away'}/sweep")
        case "s3":
            yield Mirror(f"{request.getfixturevalue('s3').url}/{tmp_path.name}/sweep")
        case _:
            yield Mirror("memory://bucket/sweep")
            fsspec.filesystem("memory").store.clear()
