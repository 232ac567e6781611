"""What pages may not do: call the API beyond a person's role, accept foreign forms, lead to other sites."""

import ast
from pathlib import Path

import pytest
from fastapi import HTTPException
from starlette.testclient import TestClient

from dashboards import diagnosis
from dashboards.diagnosis.findings import SHORT_TITLES
from orchestrator.service.access_tokens import Person, Role
from orchestrator.service.http_app import Service
from orchestrator.service.page.page_rendering import own_path
from orchestrator.service.page.sweep_actions import ACTIONS
from orchestrator.service.request_guard import COOKIE


@pytest.fixture
def service(fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(fast_tmp_path))
    return Service(fast_tmp_path)


def test_each_action_is_a_route_with_the_role_that_the_api_demands(service: Service) -> None:
    roles = {action.label: service.api.role(action.method, action.path) for action in ACTIONS}
    assert roles["Pause"] is Role.OPERATOR
    assert roles["Delete"] is roles["Archive"] is Role.ADMIN
    assert min(roles.values()) is Role.OPERATOR
    with pytest.raises(HTTPException, match="needs the role admin"):
        service.api.call(Person("ann", Role.OPERATOR), "DELETE", "/sweeps/{name}", name="s")
    service.close()


def test_a_form_without_the_token_of_its_page_is_refused(service: Service) -> None:
    client = TestClient(service.app, base_url="http://localhost:8787", follow_redirects=False)
    begun = service.sessions.log_in(service.tokens.machine_token())
    assert begun is not None
    client.cookies.set(COOKIE, begun[0])
    for fields in ({}, {"csrf": "guessed"}):
        assert client.post("/logout", data=fields).status_code == 403
    assert client.get("/").status_code == 200
    assert client.post("/logout", data={"csrf": begun[1]}).status_code == 303
    assert client.get("/").headers["location"] == "/login"
    service.close()


@pytest.mark.parametrize(
    "path", ["//evil.example", "/\\evil.example", "https://evil.example", "/a b", "", "javascript:x"]
)
def test_a_login_leads_to_no_other_site(path: str) -> None:
    assert own_path(path) == "/"


def test_every_rule_of_the_diagnosis_has_a_title_of_three_words() -> None:
    rules = {
        node.args[0].value
        for module in Path(diagnosis.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "DiagnosisFinding"
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }
    assert rules == SHORT_TITLES.keys()
    assert all(len(title.split()) <= 3 for title in SHORT_TITLES.values())
