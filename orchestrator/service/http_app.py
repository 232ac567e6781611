"""`Service`: the web application of one runs folder, and the thread that starts its drivers."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp

from orchestrator.errors import OrchestrateError, first_line
from orchestrator.redaction import redact
from orchestrator.service import LARGEST_MODEL_GB
from orchestrator.service.access_tokens import SESSION_SECONDS, AccessTokens, FailedLogins, LoginSessions, Role
from orchestrator.service.driver_supervisor import SERVICE_FOLDER, DriverSupervisor
from orchestrator.service.hosting.code_login import code_login
from orchestrator.service.hosting.mlflow_proxy import mlflow_links, mlflow_routes
from orchestrator.service.hosting.mlflow_server import MLFLOW_PATH, MlflowOptions, MlflowServer
from orchestrator.service.hosting.queue_location import open_queue
from orchestrator.service.page.api_calls import ApiCalls
from orchestrator.service.page.service_pages import ServicePages
from orchestrator.service.problem_details import PROBLEM_ANSWERS, add_error_answers, only_known_parameters
from orchestrator.service.request_guard import COOKIE, RequestGuard, require
from orchestrator.service.routes.event_routes import event_routes
from orchestrator.service.routes.file_routes import file_routes
from orchestrator.service.routes.report_routes import report_routes
from orchestrator.service.routes.service_routes import service_routes
from orchestrator.service.routes.sweep_routes import sweep_routes
from orchestrator.service.routes.trial_routes import trial_routes
from orchestrator.service.routes.verb_routes import verb_routes
from orchestrator.service.service_context import ListEntries, ServiceContext
from orchestrator.service.submissions import Submissions

_logger = logging.getLogger(__name__)
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
STEP_SECONDS = 1.0
"""Between two looks at the drivers and the queue."""


_COLLECTIONS = (5000, 10, 10)
"""Of Python's garbage collector: its default looks so often at what a study is read into that reading takes twice as
long."""


class Login(BaseModel):
    """A token, or the one-time code that the service printed when it started."""

    model_config = ConfigDict(extra="forbid")

    token: str = Field(default="", max_length=256)
    code: str = Field(default="", max_length=256)


class Service:
    """One runs folder's queue, supervisor, logins and application; `close` leaves the drivers running."""

    def __init__(
        self,
        root: Path,
        *,
        hosts: Collection[str] = LOOPBACK_NAMES,
        at_once: int | None = None,
        secure: bool = False,
        data_folders: Sequence[Path] = (),
        largest_model: float = LARGEST_MODEL_GB,
        mlflow: MlflowOptions = MlflowOptions(),  # noqa: B008 - frozen
    ) -> None:
        """Open the queue and take the runs folder.

        Args:
            root: the runs folder.
            hosts: names under which browsers reach the service.
            at_once: sweeps that run at a time, as for `DriverSupervisor`.
            secure: whether it speaks HTTPS, so that browsers send the cookie by it only.
            data_folders: folders whose files submitted sweeps may read.
            largest_model: in GB, of a model that a person sends; 0: none.
            mlflow: where MLflow is, and who may change runs there.

        Raises:
            ServiceRuns: another service has the folder.
            StorageRefused, QueueTaken, ExposedFile: the queue or the tokens cannot be used.
        """
        self.tokens = AccessTokens(root / SERVICE_FOLDER)
        self.tokens.machine_token()
        self.sessions, self.failed = LoginSessions(self.tokens), FailedLogins()
        self.queue = open_queue(root)
        self._supervisor = DriverSupervisor(root, self.queue, at_once=at_once)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self._problem, self._secure = "", secure
        app = FastAPI(
            title="prefsweep",
            docs_url=None,
            redoc_url=None,
            openapi_url="/api/v1/openapi.json",
            lifespan=self._lifespan,
            responses=dict(PROBLEM_ANSWERS),
        )
        add_error_answers(app)
        self.submissions = Submissions(root, data_folders, largest_model=largest_model)
        self.mlflow = MlflowServer(root, mlflow)
        self.context = ServiceContext(root, self.queue, ListEntries(root), self.submissions, self.mlflow)
        app.state.explained = self.context.explained
        # The first is for the OpenAPI document: RequestGuard checks.
        dependencies = [Depends(HTTPBearer(auto_error=False)), Depends(only_known_parameters)]
        routers = [
            routes(self.context)
            for routes in (sweep_routes, trial_routes, event_routes, report_routes, verb_routes, file_routes)
        ]
        for router in routers:
            app.include_router(router, dependencies=dependencies)
        self.api = ApiCalls(*routers)
        self._pages = ServicePages(
            self.context, self.api, self.sessions, self.failed, lambda: self._problem, secure=secure
        )
        self._pages.add_to(app)
        app.include_router(service_routes(self.context, app, lambda: self._problem))
        app.include_router(mlflow_links(self.mlflow, root))
        app.include_router(mlflow_routes(self.mlflow))
        app.include_router(code_login(self.sessions, self.failed, secure=secure))
        self._add_logins(app)
        self.app: ASGIApp = RequestGuard(
            app,
            tokens=self.tokens,
            sessions=self.sessions,
            failed=self.failed,
            hosts=hosts,
            by_origin=(f"{MLFLOW_PATH}/",),
        )

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncGenerator[None]:
        gc.set_threshold(*_COLLECTIONS)
        self._thread.start()
        try:
            yield
        finally:
            self.close()

    def close(self) -> None:
        """Stop supervising and give the folder free."""
        self._ends.set()
        if self._thread.is_alive():
            self._thread.join()
        self._pages.close()
        self.context.watchers.close()
        self.submissions.close()
        self.mlflow.close()
        self._supervisor.close()
        self.queue.close()

    def _supervise(self) -> None:
        """Start drivers until the service ends; a database or disk that refuses is asked again."""
        while not self._ends.is_set():
            try:
                self._supervisor.step()
                self._problem = ""
            except (OrchestrateError, OSError) as error:
                problem = redact(first_line(error))
                if problem != self._problem:
                    _logger.error("no sweep can be started: %s", problem)
                self._problem = problem
            self._ends.wait(STEP_SECONDS)

    def _add_logins(self, app: FastAPI) -> None:
        @app.get("/healthz")
        def healthz(response: Response) -> dict[str, Any]:
            """Return whether sweeps are started; what is wrong is for those who log in."""
            is_well = self._thread.is_alive() and not self._problem
            response.status_code = HTTPStatus.OK if is_well else HTTPStatus.SERVICE_UNAVAILABLE
            return {"status": "ok" if is_well else "failing"}

        @app.get("/api/v1/me")
        def me(request: Request) -> dict[str, Any]:
            """Return who is logged in, and what keeps sweeps from starting."""
            person = require(request, Role.VIEWER)
            return {"name": person.name, "role": person.role.name.lower(), "problem": self._problem}

        @app.post("/api/v1/login")
        def log_in(request: Request, response: Response, body: Login) -> dict[str, Any]:
            """Begin a browser's login by token or one-time code; the answer has the token of its forms."""
            address = request.client.host if request.client else ""
            if wait := self.failed.wait_seconds(address):
                raise HTTPException(
                    HTTPStatus.TOO_MANY_REQUESTS,
                    "too many failed logins from this address",
                    {"retry-after": str(int(wait) + 1)},
                )
            begun = self.sessions.log_in_with_code(body.code) if body.code else self.sessions.log_in(body.token)
            if begun is None:
                self.failed.add(address)
                raise HTTPException(
                    HTTPStatus.UNAUTHORIZED,
                    "this code was used or is too old" if body.code else "this token is not valid",
                )
            cookie, csrf = begun
            response.set_cookie(
                COOKIE, cookie, int(SESSION_SECONDS), httponly=True, samesite="strict", secure=self._secure
            )
            return {"csrf": csrf}

        @app.post("/api/v1/logout", status_code=HTTPStatus.NO_CONTENT)
        def log_out(request: Request, response: Response) -> None:
            """End a browser's login."""
            self.sessions.log_out(request.state.cookie)
            response.delete_cookie(COOKIE)
