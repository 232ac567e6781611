from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.postgresql import postgresql_schemas
from tests.support.processes import environment
from tests.support.service_caller import Caller


@pytest.fixture
def caller(fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Caller]:
    """A service over an empty runs folder of a machine without GPUs."""
    for name, value in environment(fast_tmp_path).items():
        monkeypatch.setenv(name, value)
    caller = Caller(fast_tmp_path)
    yield caller
    caller.service.close()


@pytest.fixture(scope="session")
def new_postgresql() -> Iterator[Callable[[], str]]:
    with postgresql_schemas() as new:
        yield new
