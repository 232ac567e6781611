"""`RequestGuard`: who makes a request, and whether it may reach the service at all.

It refuses other hosts' names (DNS rebinding), other sites' pages (CSRF), large bodies and addresses that guess tokens,
before any route is called, and adds the headers that restrict what a page may do.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from secrets import compare_digest
from urllib.parse import parse_qs, urlsplit

from fastapi import HTTPException, Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.commands.request_commands import acting_for
from orchestrator.service.access_tokens import AccessTokens, FailedLogins, LoginSessions, Person, Role
from orchestrator.service.problem_details import problem

COOKIE = "prefsweep_session"
CSRF_HEADER = "x-csrf-token"
CSRF_FIELD = "csrf"
"""The same in a form of a page."""
FORM_TYPE = "application/x-www-form-urlencoded"
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_LARGEST_BODY = 1 << 20
"""Bytes."""
_NOT_FROM_HERE = "the request does not come from a page of this service"
_MOST_RATES = 10_000
"""People and addresses whose requests are counted; those that came longest ago are forgotten first."""
_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # with no-referrer, the Origin of a form is null
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(eq=False)
class _Refused(Exception):
    status: HTTPStatus
    detail: str
    retry_after: float = 0.0


class RequestGuard:
    """ASGI middleware; routes find the person in `request.state.person`, None for a request without a login."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        tokens: AccessTokens,
        sessions: LoginSessions,
        failed: FailedLogins,
        hosts: Collection[str],
        by_origin: Collection[str] = (),
        largest_body: int = _LARGEST_BODY,
        rates: RequestRates | None = None,
    ) -> None:
        """Arguments beside those of the logins.

        `hosts`: names under which the service is reached, without ports; `by_origin`: beginnings of paths whose pages
        have no CSRF token, so that a browser's Origin must say that the request is theirs; `largest_body`: in bytes.
        """
        self._rates = rates or RequestRates()
        self._app, self._tokens, self._sessions, self._failed = app, tokens, sessions, failed
        self._hosts = frozenset(host.lower() for host in hosts)
        self._largest, self._by_origin = largest_body, tuple(by_origin)
        self._too_large = f"a request may have at most {largest_body} bytes, and says how many"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)  # of the server's start and end
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            state = scope.setdefault("state", {})
            state["person"], state["cookie"], state["csrf"] = self._person(scope, headers)
            state["is_still_valid"] = partial(self._is_still_valid, headers)
            length = headers.get("content-length", "0")
            if not length.isdecimal() or int(length) > self._largest:
                raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self._too_large)
            person: Person | None = state["person"]
            if wait := self._rates.wait_seconds("" if person is None else person.name, _address(scope)):
                raise _Refused(HTTPStatus.TOO_MANY_REQUESTS, "too many requests at once", wait)
            receive = self._limited(receive)
            if state["cookie"] and scope["path"].startswith(self._by_origin) and scope["method"] not in _SAFE_METHODS:
                if "origin" not in headers:  # where it is another one, the request was refused
                    raise _Refused(HTTPStatus.FORBIDDEN, _NOT_FROM_HERE)
            elif state["cookie"] and scope["method"] not in _SAFE_METHODS:
                receive = await self._with_csrf_checked(headers, receive, state["csrf"])
            with acting_for("" if person is None else person.name):
                await self._app(scope, receive, send_with_headers)
        except _Refused as refused:
            retry = {"retry-after": str(math.ceil(refused.retry_after))} if refused.retry_after else {}
            await problem(refused.status, refused.detail, retry)(scope, receive, send_with_headers)
        except ClientDisconnect:  # no client waits for an answer
            return

    def _check_host(self, headers: Headers) -> None:
        host = _host_name(headers.get("host", ""))
        if host not in self._hosts:
            remedy = f"`orchestrate serve --name {host or 'NAME'}` adds it"
            raise _Refused(
                HTTPStatus.MISDIRECTED_REQUEST, f"this service is not served under the name {host!r}; {remedy}"
            )

    def _person(self, scope: Scope, headers: Headers) -> tuple[Person | None, str, str]:
        """Return who makes the request, the cookie by which that is certain, and its CSRF token; "" for a token."""
        address = _address(scope)
        if given := headers.get("authorization"):
            kind, _, token = given.partition(" ")
            token = token.strip()
            if wait := self._failed.wait_seconds(address, token):
                raise _Refused(HTTPStatus.TOO_MANY_REQUESTS, "too many failed logins from this address", wait)
            person = self._tokens.person(token) if kind.lower() == "bearer" else None
            if person is None:
                self._failed.add(address, token)
                raise _Refused(HTTPStatus.UNAUTHORIZED, "this token is not valid, or was revoked")
            self._failed.add_valid(address, token)
            return person, "", ""
        cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        found = self._sessions.person(cookie) if cookie else None
        if scope["method"] not in _SAFE_METHODS:
            self._check_origin(scope, headers)
        return (None, "", "") if found is None else (found[0], cookie, found[1])

    async def _with_csrf_checked(self, headers: Headers, receive: Receive, csrf: str) -> Receive:
        """Refuse a request without the token of the login's pages, in its header or in its form; keep the body."""
        given, body = headers.get(CSRF_HEADER, ""), None
        if not given and headers.get("content-type", "").partition(";")[0].strip().lower() == FORM_TYPE:
            try:
                body = await _whole_body(receive)
            except HTTPException as error:
                raise _Refused(HTTPStatus(error.status_code), error.detail) from error
            given = parse_qs(body.decode(errors="replace")).get(CSRF_FIELD, [""])[0]
        if not compare_digest(given.encode(), csrf.encode()):
            raise _Refused(HTTPStatus.FORBIDDEN, _NOT_FROM_HERE)
        if body is None:
            return receive
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return first.pop() if first else await receive()

        return again

    def _is_still_valid(self, headers: Headers) -> bool:
        """Return whether the login of a long answer has not ended meanwhile."""
        if given := headers.get("authorization"):
            return self._tokens.person(given.partition(" ")[2].strip()) is not None
        return self._sessions.person(cookie_parser(headers.get("cookie", "")).get(COOKIE, "")) is not None

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        """Refuse a page of another site; a program sends no Origin."""
        origin = headers.get("origin")
        if origin is None and headers.get("sec-fetch-site") in (None, "same-origin"):
            return
        if origin is None or origin.lower() != f"{scope['scheme']}://{headers.get('host', '')}".lower():
            raise _Refused(HTTPStatus.FORBIDDEN, "the request comes from another site")

    def _limited(self, receive: Receive) -> Receive:
        received = 0

        async def limited() -> Message:
            """Receive a part. Raises HTTPException: the body is longer than allowed."""
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._largest:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self._too_large)
            return message

        return limited


async def _whole_body(receive: Receive) -> bytes:
    """Return the body. Raises ClientDisconnect: the client left before it had sent all, which is no request."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


class RequestRates:
    """Requests of each person, and of each address without a login: a number at once, and so many a second after it."""

    def __init__(
        self,
        now: Callable[[], float] = time.monotonic,
        *,
        of_people: tuple[float, float] = (600.0, 60.0),
        of_strangers: tuple[float, float] = (100.0, 10.0),
    ) -> None:
        """`now`: seconds of a clock that never goes back; `of_*`: requests at once, and requests per second."""
        self._now, self._guard = now, threading.Lock()
        self._limits = {True: of_people, False: of_strangers}
        self._left: dict[tuple[bool, str], tuple[float, float]] = {}
        """Requests left, and when that was."""

    def wait_seconds(self, person: str, address: str) -> float:
        """Count a request; return how long it has to wait, 0 if it need not. `person`: "" without a login."""
        key, now = (bool(person), person or address), self._now()
        most, per_second = self._limits[bool(person)]
        with self._guard:
            left, at = self._left.pop(key, (most, now))
            left = min(most, left + (now - at) * per_second)
            self._left[key] = (left - 1 if left >= 1 else left, now)
            while len(self._left) > _MOST_RATES:
                del self._left[next(iter(self._left))]
        return 0.0 if left >= 1 else (1 - left) / per_second


def _address(scope: Scope) -> str:
    return scope["client"][0] if scope.get("client") else ""


def _host_name(header: str) -> str:
    """Return the name of a Host header, without the port."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def require(request: Request, role: Role) -> Person:
    """Return the person of a request. Raises HTTPException: it has no login, or the role is too low."""
    person: Person | None = request.state.person
    if person is None:
        raise HTTPException(
            HTTPStatus.UNAUTHORIZED, "log in, or send `Authorization: Bearer TOKEN`", {"www-authenticate": "Bearer"}
        )
    if person.role < role:
        raise HTTPException(
            HTTPStatus.FORBIDDEN,
            f"this needs the role {role.name.lower()}; {person.name} is {person.role.name.lower()}",
        )
    return person
