"""The page behind the URL that `orchestrate serve` prints: it logs one browser in by the one-time code."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from orchestrator.service.access_tokens import SESSION_SECONDS, FailedLogins, LoginSessions
from orchestrator.service.request_guard import COOKIE

CODE_PATH = "/login/code"
"""Followed by `/` and the code."""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<meta name="viewport" content="width=device-width">{refresh}<title>prefsweep: log in</title></head>
<body><p>{text}</p></body></html>
"""
_LOGGED_IN = 'You are logged in: <a href="/">the sweeps</a>.'
_USED = (
    'This code was used or is too old. <a href="/login">Log in with a token</a>: your own, or that of the machine in '
    "<code>service/token</code> of its runs folder. Another code is printed when the service starts again."
)
_REFRESH = '<meta http-equiv="refresh" content="0; url=/">'


def code_login(sessions: LoginSessions, failed: FailedLogins, *, secure: bool) -> APIRouter:
    """Return the route of one-time codes. `secure`: whether browsers send the cookie by HTTPS only."""
    routes = APIRouter(include_in_schema=False)

    @routes.get(f"{CODE_PATH}/{{code}}")
    def log_in(request: Request, code: str) -> HTMLResponse:
        """Use the code up. The browser follows a page, as a cookie of SameSite=Strict is not sent after a redirect.

        A browser that has logged in stays so and uses no code: its history and its tabs open the printed URL again.
        """
        if request.state.person is not None:
            return HTMLResponse(_PAGE.format(refresh=_REFRESH, text=_LOGGED_IN))
        address = request.client.host if request.client else ""
        if wait := failed.wait_seconds(address):
            headers = {"retry-after": str(int(wait) + 1)}
            return _page("Too many failed logins; wait a minute.", HTTPStatus.TOO_MANY_REQUESTS, headers)
        begun = sessions.log_in_with_code(code)
        if begun is None:
            failed.add(address)
            return _page(_USED, HTTPStatus.UNAUTHORIZED)
        answer = HTMLResponse(_PAGE.format(refresh=_REFRESH, text=_LOGGED_IN))
        answer.set_cookie(COOKIE, begun[0], int(SESSION_SECONDS), httponly=True, samesite="strict", secure=secure)
        return answer

    return routes


def _page(text: str, status: HTTPStatus, headers: dict[str, str] | None = None) -> HTMLResponse:
    return HTMLResponse(_PAGE.format(refresh="", text=text), status, headers)
