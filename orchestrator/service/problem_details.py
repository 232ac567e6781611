"""Errors as `application/problem+json` (RFC 9457), with the sentences of the command line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from orchestrator.commands.request_commands import NoSuchTrial, RequestRefused
from orchestrator.errors import (
    ExitCode,
    NameTaken,
    NoSuchSweep,
    NoTrialCompleted,
    OrchestrateError,
    SpecChanged,
    SpecError,
    StorageRefused,
    SweepHeld,
)
from orchestrator.redaction import redact, redact_all, secret_values
from orchestrator.service.sweep_queue import KeyUsed, NotQueued, QueueRefused
from orchestrator.service.uploaded_files import DISK_FULL, OtherOffset
from trainer.results import TrialError

_logger = logging.getLogger(__name__)
_MEDIA_TYPE = "application/problem+json"
_STATUS: tuple[tuple[type[OrchestrateError], HTTPStatus], ...] = (
    (NoSuchSweep, HTTPStatus.NOT_FOUND),
    (NotQueued, HTTPStatus.NOT_FOUND),
    (NoSuchTrial, HTTPStatus.NOT_FOUND),
    (NameTaken, HTTPStatus.CONFLICT),
    (KeyUsed, HTTPStatus.CONFLICT),
    (QueueRefused, HTTPStatus.CONFLICT),
    (OtherOffset, HTTPStatus.CONFLICT),
    (RequestRefused, HTTPStatus.CONFLICT),
    (NoTrialCompleted, HTTPStatus.CONFLICT),
    (SpecChanged, HTTPStatus.CONFLICT),
    (SweepHeld, HTTPStatus.CONFLICT),
)
"""Of errors that are no mistake in what was sent."""
_STATUS_OF_CODES: Mapping[ExitCode, HTTPStatus] = {
    ExitCode.INTERNAL_ERROR: HTTPStatus.INTERNAL_SERVER_ERROR,
    ExitCode.LOCKED: HTTPStatus.CONFLICT,
    ExitCode.REFUSED: HTTPStatus.SERVICE_UNAVAILABLE,
}


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None, **more: Any) -> JSONResponse:
    """Return an answer with this error; secrets of the environment are masked in it."""
    secrets = secret_values()
    content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": int(status)}
    content |= {"detail": redact(detail, secrets), **redact_all(more, secrets)}
    return JSONResponse(content, status, headers, media_type=_MEDIA_TYPE)


def error_status(error: OrchestrateError) -> HTTPStatus:
    """Return the HTTP status of an error; 422 for mistakes in what was sent."""
    found = next((status for kind, status in _STATUS if isinstance(error, kind)), None)
    return found or _STATUS_OF_CODES.get(error.code, HTTPStatus.UNPROCESSABLE_ENTITY)


def explain(request: Request, error: OrchestrateError) -> OrchestrateError:
    """Return the error that a person is to read, see `ServiceContext.explained`."""
    explained: Callable[[OrchestrateError], OrchestrateError] | None = getattr(request.app.state, "explained", None)
    return error if explained is None else explained(error)


def add_error_answers(app: FastAPI) -> None:
    """Let the app answer every error as a problem; a bug is logged and not described to the client."""
    app.add_exception_handler(OrchestrateError, _of_command)
    app.add_exception_handler(OSError, _of_system)
    app.add_exception_handler(ClientDisconnect, _of_client)
    app.add_exception_handler(TrialError, _of_trial)
    app.add_exception_handler(RequestValidationError, _of_request)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(Exception, _of_bug)


async def _of_command(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OrchestrateError)
    error = await run_in_threadpool(explain, request, error)
    more: dict[str, Any] = {"exit_code": int(error.code), "error": type(error).__name__}
    if isinstance(error, SpecError):
        more["problems"] = [
            {"where": found.where, "path": found.path, "problem": found.problem, "hint": found.hint}
            for found in error.problems
        ]
    return problem(error_status(error), str(error), **more)


async def _of_trial(_: Request, error: Exception) -> JSONResponse:
    return problem(HTTPStatus.UNPROCESSABLE_ENTITY, str(error), exit_code=int(ExitCode.USER))


async def _of_request(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = [_mistake(found) for found in error.errors()]
    detail = "; ".join(
        f"{found['path']}: {found['problem']}" if found["path"] else found["problem"] for found in problems
    )
    return problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail, exit_code=int(ExitCode.USER), problems=problems)


def _mistake(found: Mapping[str, Any]) -> dict[str, str]:
    """Return place and sentence of a mistake in a request."""
    text, path = found["msg"], found["loc"][1:]
    match found["type"], path:
        case "json_invalid", (int() as place,):
            text, path = f"the body is no JSON: {found['ctx']['error']} at character {place + 1}", ()
        case (("model_attributes_type" | "missing"), ()):
            text = "the body has to be a JSON object, sent with `Content-Type: application/json`"
        case _:
            pass
    return {"path": ".".join(map(str, path)), "problem": text}


async def _of_http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, error.detail, error.headers)


async def _of_system(request: Request, error: Exception) -> Response:
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return await _of_command(request, StorageRefused("the service's disk is full: send the request again later"))
    raise error  # a bug


async def _of_client(_: Request, __: Exception) -> Response:
    """The client left before it had sent its request: nothing was done, and this answer is not read."""
    return Response(status_code=HTTPStatus.BAD_REQUEST)


async def _of_bug(request: Request, error: Exception) -> JSONResponse:
    _logger.error("%s %s", request.method, request.url.path, exc_info=error)
    return problem(
        HTTPStatus.INTERNAL_SERVER_ERROR, f"a bug ({type(error).__name__}); the service's log has its traceback"
    )
