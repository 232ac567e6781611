"""Errors as `application/problem+json` (RFC 9457), with the sentences of the command line."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
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
    closest_match,
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


PROBLEM_ANSWERS: Mapping[int | str, dict[str, Any]] = {
    "default": {
        "description": "An error: the sentence of the command line.",
        "content": {_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
}
"""What the OpenAPI document says of every route's errors."""
_TEXT = {"type": "string"}
_PROBLEM_SCHEMA = {
    "title": "Problem",
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": _TEXT,
        "title": _TEXT,
        "status": {"type": "integer"},
        "detail": _TEXT | {"description": "The sentence of the command line."},
        "exit_code": {"type": "integer", "description": "The exit code of the command line."},
        "error": _TEXT | {"description": "The name of the error's class in Python."},
        "problems": {
            "type": "array",
            "description": "Each error of a sweep file with its place, or of the request.",
            "items": {
                "type": "object",
                "required": ["path", "problem"],
                "properties": {"where": _TEXT, "path": _TEXT, "problem": _TEXT, "hint": _TEXT},
            },
        },
    },
}


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None, **more: Any) -> Response:
    """Return an answer with this error; secrets of the environment are masked in it."""
    secrets = secret_values()
    content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": int(status)}
    content |= {"detail": redact(detail, secrets), **redact_all(more, secrets)}
    # A sentence may quote text that is no Unicode: half of a pair of surrogates is written as its escape.
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")
    return Response(text, status, headers, media_type=_MEDIA_TYPE)


def error_status(error: OrchestrateError) -> HTTPStatus:
    """Return the HTTP status of an error; 422 for mistakes in what was sent."""
    found = next((status for kind, status in _STATUS if isinstance(error, kind)), None)
    return found or _STATUS_OF_CODES.get(error.code, HTTPStatus.UNPROCESSABLE_ENTITY)


def explain(request: Request, error: OrchestrateError) -> OrchestrateError:
    """Return the error that a person is to read, see `ServiceContext.explained`."""
    explained: Callable[[OrchestrateError], OrchestrateError] | None = getattr(request.app.state, "explained", None)
    return error if explained is None else explained(error)


def add_error_answers(app: FastAPI) -> None:
    """Let the app answer every error as a problem, and its OpenAPI document say so; a bug is only logged."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        schema = described()
        schema["components"]["schemas"]["Problem"] = _PROBLEM_SCHEMA
        return schema

    app.openapi = openapi
    app.add_exception_handler(OrchestrateError, _of_command)
    app.add_exception_handler(OSError, _of_system)
    app.add_exception_handler(ClientDisconnect, _of_client)
    app.add_exception_handler(TrialError, _of_trial)
    app.add_exception_handler(RequestValidationError, _of_request)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(Exception, _of_bug)


def only_known_parameters(request: Request) -> None:
    """Refuse a parameter of the URL that the route does not have: a misspelt one would be left out silently.

    Raises RequestValidationError.
    """
    operation = request.app.openapi()["paths"][request.scope["route"].path][request.method.lower()]
    known = [each["name"] for each in operation.get("parameters", ()) if each["in"] == "query"]
    mistakes = [
        {"type": "extra_forbidden", "loc": ("query", name), "msg": _unknown_parameter(name, known)}
        for name in dict.fromkeys(request.query_params)
        if name not in known
    ]
    if mistakes:
        raise RequestValidationError(mistakes)


def _unknown_parameter(name: str, known: Collection[str]) -> str:
    if nearest := closest_match(name, known):
        return f"there is no such parameter; did you mean {nearest}?"
    return "there is no such parameter" + (f" (there are {', '.join(known)})" if known else ": this route has none")


async def _of_command(request: Request, error: Exception) -> Response:
    assert isinstance(error, OrchestrateError)
    error = await run_in_threadpool(explain, request, error)
    more: dict[str, Any] = {"exit_code": int(error.code), "error": type(error).__name__}
    if isinstance(error, SpecError):
        more["problems"] = [
            {"where": found.where, "path": found.path, "problem": found.problem, "hint": found.hint}
            for found in error.problems
        ]
    return problem(error_status(error), str(error), **more)


async def _of_trial(_: Request, error: Exception) -> Response:
    return problem(HTTPStatus.UNPROCESSABLE_ENTITY, str(error), exit_code=int(ExitCode.USER))


async def _of_request(_: Request, error: Exception) -> Response:
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


async def _of_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, error.detail, error.headers)


async def _of_system(request: Request, error: Exception) -> Response:
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return await _of_command(request, StorageRefused("the service's disk is full: send the request again later"))
    raise error  # a bug


async def _of_client(_: Request, __: Exception) -> Response:
    """The client left before it had sent its request: nothing was done, and this answer is not read."""
    return Response(status_code=HTTPStatus.BAD_REQUEST)


async def _of_bug(request: Request, error: Exception) -> Response:
    _logger.error("%s %s", request.method, request.url.path, exc_info=error)
    return problem(
        HTTPStatus.INTERNAL_SERVER_ERROR, f"a bug ({type(error).__name__}); the service's log has its traceback"
    )
