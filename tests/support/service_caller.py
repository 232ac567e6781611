"""A service in this process whose supervisor stands still, and a client of it with one token per role."""

import os
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from orchestrator.folders import SweepFolder, create_sweep_folder
from orchestrator.service.access_tokens import Role
from orchestrator.service.http_app import Service
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.study.study import Study
from tests.support.specs import make_spec


class Caller:
    """A client of a service whose supervisor stands still."""

    def __init__(self, root: Path) -> None:
        self.service = Service(root)
        self.client = TestClient(self.service.app, base_url="http://localhost:8787")
        self.as_role = {role: self.service.tokens.create(role.name.lower(), role) for role in Role}

    def answer(self, method: str, path: str, role: Role = Role.ADMIN, code: int = 200, **more: Any) -> Any:
        headers = {"authorization": f"Bearer {self.as_role[role]}", **more.pop("headers", {})}
        answer = self.client.request(method, path, headers=headers, **more)
        assert answer.status_code == code, answer.text
        return answer

    def call(self, method: str, path: str, role: Role = Role.ADMIN, code: int = 200, **more: Any) -> Any:
        return self.answer(method, f"/api/v1{path}", role, code, **more).json()

    def get(self, path: str, code: int = 200, **more: Any) -> Any:
        """What a viewer gets."""
        return self.call("GET", path, Role.VIEWER, code, **more)

    def post(self, path: str, code: int = 200, key: str = "", role: Role = Role.OPERATOR, **body: Any) -> Any:
        """What an operator gets."""
        return self.call("POST", path, role, code, json=body, headers={"idempotency-key": key})

    def submit(self, sweep: str, code: int = HTTPStatus.CREATED, key: str = "", **more: Any) -> Any:
        body = {"yaml": dump_spec(make_spec(2, name=sweep)), **more}
        return self.call("POST", "/sweeps", code=code, json=body, headers={"idempotency-key": key})


def root() -> Path:
    return Path(os.environ["ORCHESTRATE_HOME"])


def begin(name: str, trials: int = 3) -> SweepFolder:
    """A sweep that was begun by a command, and whose driver has ended."""
    folder, spec = SweepFolder(root(), name), make_spec(3, name=name)
    create_sweep_folder(folder, dump_spec(spec))
    Study.create(folder, spec).dispose()
    with Study.open(folder) as study:
        for _ in range(trials):
            study.ask()
    return folder
