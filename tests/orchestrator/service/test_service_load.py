"""The benchmark of the service in small: viewers, a driver and one who opens pages, each a process or a client."""

import pytest

from benchmarks.results import service
from benchmarks.service import ALL_SWEEPS, PAGES, SMALL, measure


@pytest.mark.slow
def test_viewers_receive_every_report_once_while_pages_are_opened() -> None:
    found = measure(SMALL)
    assert found["reports"] > 0
    assert (found["lost"], found["doubled"]) == (0, 0)
    assert found["event"]["count"] >= SMALL.viewers * found["reports"]
    assert set(found["pages"]) == {*PAGES, ALL_SWEEPS}
    table = service({**found, "machine": "a machine", "measured": "today"})
    assert table.count("\n| ") == 1 + 1 + len(PAGES) + 1 + 1 + 4
