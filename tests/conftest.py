"""The files that start whole sweeps go first, so that two processes end together (`make pytest`)."""

from __future__ import annotations

from pathlib import Path

import pytest

_LONG = ("sweep", "engine", "driving", "docs", "faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files stay whole and in their order; only folders move."""
    here = Path(__file__).parent

    def path(item: pytest.Item) -> int:
        if item.path.name == "test_forks.py":
            return -1  # it forks this process, which other tests leave with threads
        folder = item.path.relative_to(here).parts[0] if item.path.is_relative_to(here) else ""
        return _LONG.index(folder) if folder in _LONG else len(_LONG)

    items.sort(key=path)
