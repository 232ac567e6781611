"""docs/service_api.md has every route of the service, with the role that it needs."""

import re
from pathlib import Path

import pytest

from orchestrator.service.access_tokens import Role
from tests.support.processes import environment
from tests.support.service_caller import Caller

PAGE = Path(__file__).parents[2] / "docs" / "service_api.md"
ROWS = re.findall(r"^\| (GET|POST|DELETE) \| `([^`]+)` \| (\w+) \| .+ \|$", PAGE.read_text(encoding="utf-8"), re.M)
CONTINUES = ("/events", "/logout")
"""Streams, which do not end, and what needs a browser's cookie."""


@pytest.fixture
def caller(fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Caller:
    for name, value in environment(fast_tmp_path).items():
        monkeypatch.setenv(name, value)
    return Caller(fast_tmp_path)


def test_the_table_has_every_route(caller: Caller) -> None:
    schema = caller.client.get("/api/v1/openapi.json").json()
    routes = {(method.upper(), path) for path, methods in schema["paths"].items() for method in methods}
    assert {(method, path) for method, path, _ in ROWS} == routes
    assert len(ROWS) == len(routes), "each once"
    caller.service.close()


def test_a_route_needs_the_role_of_the_table(caller: Caller) -> None:
    for method, path, role in ROWS:
        url = path.format(name="x", trial=0, digest="0" * 64)
        stranger = caller.client.request(method, url).status_code
        if role == "anyone":
            assert stranger != 401 or path.endswith("/login"), path
            continue
        assert stranger == 401, path
        for mine in Role:
            if mine < Role[role.upper()]:
                answer = caller.client.request(method, url, headers={"authorization": f"Bearer {caller.as_role[mine]}"})
                assert answer.status_code == 403, path
                assert f"needs the role {role}" in answer.json()["detail"]
        if not url.endswith(CONTINUES):
            headers = {"authorization": f"Bearer {caller.as_role[Role[role.upper()]]}"}
            assert caller.client.request(method, url, headers=headers).status_code not in (401, 403, 500), path
    caller.service.close()
