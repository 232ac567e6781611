"""What a stranger's request, page or name cannot do, each through the real middleware; errors are problems."""

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient
from starlette.types import Message

from orchestrator.commands.request_commands import current_user
from orchestrator.errors import NoSuchSweep, SpecError, SpecProblem, StorageRefused
from orchestrator.service.access_tokens import AccessTokens, FailedLogins, LoginSessions, Role
from orchestrator.service.problem_details import add_error_answers
from orchestrator.service.request_guard import COOKIE, CSRF_HEADER, FORM_TYPE, RequestGuard, RequestRates, require

SECRET = "hunter2-hunter2"
ERRORS: dict[str, Exception] = {
    "none": NoSuchSweep("x", Path("/runs"), ["y"], "y"),
    "spec": SpecError([SpecProblem("sweep.yaml:3", "loss.beta", "must be above 0", "write 2.0")]),
    "disk": StorageRefused(f"the study refused: {SECRET}"),
    "full": OSError(errno.ENOSPC, "of the inside"),
    "io": OSError(errno.EIO, "of the inside"),
    "bug": ZeroDivisionError("of the inside"),
}


class Guarded:
    """An app behind the guard, and its client."""

    def __init__(self, folder: Path) -> None:
        self.tokens = AccessTokens(folder)
        self.sessions = LoginSessions(self.tokens)
        self.bodies = list[int]()
        app = FastAPI()
        add_error_answers(app)

        @app.api_route("/thing", methods=["GET", "POST"])
        async def thing(request: Request) -> dict[str, Any]:
            person = require(request, Role.VIEWER if request.method == "GET" else Role.OPERATOR)
            self.bodies.append(len(await request.body()))
            return {"name": person.name, "bytes": self.bodies[-1]}

        @app.get("/who")
        def who() -> str:
            return current_user()

        @app.get("/error/{kind}")
        def error(kind: str) -> None:
            raise ERRORS[kind]

        @app.get("/number/{number}")
        def number(number: int) -> int:
            return number

        self.guard = RequestGuard(
            app, tokens=self.tokens, sessions=self.sessions, failed=FailedLogins(), hosts=["localhost"], largest_body=50
        )
        self.client = TestClient(self.guard, base_url="http://localhost:8787", raise_server_exceptions=False)


@pytest.fixture
def guarded(tmp_path: Path) -> Guarded:
    return Guarded(tmp_path / "service")


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_only_a_token_of_a_sufficient_role_passes(guarded: Guarded) -> None:
    viewer, operator = (guarded.tokens.create(r.name.lower(), r) for r in (Role.VIEWER, Role.OPERATOR))
    get, post = guarded.client.get, guarded.client.post
    assert get("/thing").status_code == 401
    assert get("/thing", headers=bearer(viewer)).json()["name"] == "viewer"
    refused = post("/thing", headers=bearer(viewer))
    assert refused.status_code == 403
    assert refused.json()["detail"] == "this needs the role operator; viewer is viewer"
    assert post("/thing", headers=bearer(operator), content=b"x" * 50).json() == {"name": "operator", "bytes": 50}
    guarded.tokens.revoke("operator")
    assert post("/thing", headers=bearer(operator)).status_code == 401


def test_an_address_that_guesses_tokens_is_refused_unheard(guarded: Guarded) -> None:
    own = guarded.tokens.machine_token()
    codes = [guarded.client.get("/thing", headers=bearer(f"guess {n}")).status_code for n in range(12)]
    assert codes == [401] * 10 + [429] * 2
    last = guarded.client.get("/thing", headers=bearer(own))
    assert last.status_code == 429
    assert 0 < int(last.headers["retry-after"]) <= 60


def test_one_person_with_a_wrong_token_keeps_out_nobody_who_is_in(guarded: Guarded) -> None:
    """People behind one proxy, or of one machine, have one address."""
    ann = guarded.tokens.create("ann", Role.VIEWER)
    bob = guarded.tokens.create("bob", Role.VIEWER)

    def code(token: str) -> int:
        return guarded.client.get("/thing", headers=bearer(token)).status_code

    assert code(ann) == 200
    assert [code("guess") for _ in range(11)] == [401] * 10 + [429]
    assert code(ann) == 200
    assert code(bob) == 429, "of a token that was never used here it is not told whether it is valid"
    guarded.tokens.revoke("ann")
    assert [code(ann), code(ann)] == [401, 429]


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8787", "", "[::1", "127.0.0.1"])
def test_another_name_of_this_machine_is_refused(guarded: Guarded, host: str) -> None:
    """A page of evil.example whose name is made to point here."""
    answer = guarded.client.get("/thing", headers=bearer(guarded.tokens.machine_token()) | {"host": host})
    assert answer.status_code == 421


def test_a_page_of_another_site_cannot_use_a_login(guarded: Guarded) -> None:
    login = guarded.sessions.log_in_with_code(guarded.sessions.new_code())
    assert login is not None
    cookie, csrf = login
    own = {"cookie": f"{COOKIE}={cookie}", "origin": "http://localhost:8787", CSRF_HEADER: csrf}
    post = guarded.client.post
    assert post("/thing", headers=own).status_code == 200
    assert guarded.client.get("/thing", headers={"cookie": own["cookie"]}).status_code == 200
    wrong: list[dict[str, str]] = [
        {**own, "origin": "https://evil.example"},
        {**own, "origin": "http://localhost:9999"},
        {**own, "origin": "null"},
        {**own, CSRF_HEADER: "guess"},
        {key: value for key, value in own.items() if key != CSRF_HEADER},
        {key: value for key, value in own.items() if key != "origin"} | {"sec-fetch-site": "cross-site"},
    ]
    assert [post("/thing", headers=headers).status_code for headers in wrong] == [403] * len(wrong)
    assert post("/thing", headers={**own, "cookie": f"{COOKIE}=guess"}).status_code == 401


def test_a_large_body_is_refused_however_it_is_sent(guarded: Guarded) -> None:
    headers = bearer(guarded.tokens.machine_token())
    assert guarded.client.post("/thing", headers=headers, content=b"x" * 51).status_code == 413
    assert guarded.client.post("/thing", headers=headers, content=iter([b"x" * 26] * 2)).status_code == 413
    assert guarded.client.post("/thing", headers=headers | {"content-length": "-1"}).status_code == 413


@pytest.mark.parametrize("by_form", [True, False])
def test_half_a_body_is_no_request(guarded: Guarded, by_form: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The client leaves before it has sent the whole; its form is well-formed as far as it came."""
    token = guarded.tokens.machine_token()
    cookie, csrf = guarded.sessions.log_in(token) or ("", "")
    login = {"cookie": f"{COOKIE}={cookie}", "content-type": FORM_TYPE} if by_form else bearer(token)
    headers = {"host": "localhost", "content-length": "50", **login}
    scope = {"type": "http", "method": "POST", "path": "/thing", "scheme": "http", "query_string": b"", "headers": [
        (name.encode(), value.encode()) for name, value in headers.items()
    ]}  # fmt: skip
    coming: list[Message] = [
        {"type": "http.request", "body": f"csrf={csrf}".encode(), "more_body": True},
        {"type": "http.disconnect"},
    ]
    answers = list[Message]()

    async def receive() -> Message:
        return coming.pop(0)

    async def send(message: Message) -> None:
        answers.append(message)

    asyncio.run(guarded.guard(scope, receive, send))
    assert (guarded.bodies, coming, caplog.records) == ([], [], [])
    assert [answer["status"] for answer in answers if "status" in answer] == ([] if by_form else [400])


def test_errors_are_problems_with_the_sentences_of_the_command_line(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    answers = {kind: guarded.client.get(f"/error/{kind}") for kind in ERRORS}
    assert {kind: answer.status_code for kind, answer in answers.items()} == {
        "none": 404, "spec": 422, "disk": 503, "full": 503, "io": 500, "bug": 500
    }  # fmt: skip
    assert {answer.headers["content-type"] for answer in answers.values()} == {"application/problem+json"}
    assert answers["none"].json()["detail"] == str(ERRORS["none"])
    spec = answers["spec"].json()
    assert (spec["detail"], spec["exit_code"]) == ("sweep.yaml:3: loss.beta: must be above 0 (write 2.0)", 2)
    assert spec["problems"][0]["where"] == "sweep.yaml:3"
    assert answers["disk"].json()["detail"] == "the study refused: ***"
    assert "disk is full" in answers["full"].json()["detail"]
    assert not any("inside" in answer.text for answer in answers.values())
    for path, code in (("/number/x", 422), ("/nothing", 404)):
        assert guarded.client.get(path).json()["status"] == code


def test_every_answer_forbids_what_a_page_does_not_need(guarded: Guarded) -> None:
    for answer in (guarded.client.get("/thing"), guarded.client.get("/thing", headers={"host": "evil.example"})):
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"


def test_requests_are_limited_for_each_person_and_each_stranger(guarded: Guarded) -> None:
    now = [1000.0]
    rates = RequestRates(lambda: now[0], of_people=(3, 1.0), of_strangers=(2, 0.5))
    assert [rates.wait_seconds("ann", "a") for _ in range(4)] == [0, 0, 0, 1.0]
    assert rates.wait_seconds("bea", "a") == 0, "another person at the same address"
    assert [rates.wait_seconds("", "a") for _ in range(3)] == [0, 0, 2.0]
    assert rates.wait_seconds("", "b") == 0
    now[0] += 1.5
    assert [rates.wait_seconds("ann", "b") for _ in range(2)] == [0, 0.5]
    now[0] += 1000.0
    assert [rates.wait_seconds("ann", "a") for _ in range(4)] == [0, 0, 0, 1.0]

    codes = [guarded.client.get("/thing").status_code for _ in range(200)]
    assert codes[:100] == [401] * 100
    refused = guarded.client.get("/thing")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["detail"] == "too many requests at once"
    assert guarded.client.get("/thing", headers=bearer(guarded.tokens.machine_token())).status_code == 200


def test_what_is_stored_meanwhile_names_the_person(guarded: Guarded) -> None:
    answer = guarded.client.get("/who", headers=bearer(guarded.tokens.create("ann", Role.VIEWER)))
    assert answer.json().startswith("ann through ")
    assert not guarded.client.get("/who").json().startswith("ann")
