from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from orchestrator.mirror import Mirror


@pytest.fixture(scope="module")
def s3() -> Iterator[object]:
    """A bucket of a server that speaks S3's protocol, on a free port of this machine."""
    from tests.support.s3_server import serving

    with serving() as server:
        yield server


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
