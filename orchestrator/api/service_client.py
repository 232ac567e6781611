"""`ServiceClient`: requests to a service's HTTP API, and its errors as the exceptions of a command here.

The token is sent over HTTPS, or to this machine, and is neither logged nor shown.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, urlsplit
from uuid import uuid4

from orchestrator import errors
from orchestrator.errors import ExitCode, OrchestrateError, SpecError, SpecProblem, first_line
from orchestrator.loopback import client_options, is_loopback
from trainer.results import clause

if TYPE_CHECKING:
    import httpx2

SERVER_VARIABLE, TOKEN_VARIABLE, TOKEN_FILE_VARIABLE = (
    "ORCHESTRATE_SERVER", "ORCHESTRATE_TOKEN", "ORCHESTRATE_TOKEN_FILE",
)  # fmt: skip
_CONNECT_SECONDS, _READ_SECONDS = 10.0, 60.0
_WAITS = (0.5, 2.0, 5.0)
"""Seconds before each repetition of a request that got no answer."""
_TRANSIENT = frozenset({429, 502, 503, 504})
_MOST_WAIT = 30.0
"""Seconds. What a service asks for above it ends the request."""


class ServiceUnreachable(OrchestrateError):
    """No service answers at the URL."""

    code = ExitCode.REFUSED


class ServiceRefused(OrchestrateError):
    """The service refused the request; `status` is the HTTP status, `code` the exit code of the same command there."""

    def __init__(self, status: int, detail: str, code: ExitCode = ExitCode.USER) -> None:
        self.status, self.code = status, code
        super().__init__(detail)


class InvalidServer(OrchestrateError):
    """The URL or the token cannot be used; nothing was sent."""


def find_token(url: str, runs: Path) -> str:
    """Return the token for a service: $ORCHESTRATE_TOKEN, the file $ORCHESTRATE_TOKEN_FILE, or this machine's own.

    Raises:
        InvalidServer: there is none, or its file cannot be read.
    """
    if token := os.environ.get(TOKEN_VARIABLE, "").strip():
        return token
    own = runs / "service" / "token"
    given = os.environ.get(TOKEN_FILE_VARIABLE)
    path = Path(given).expanduser() if given else own
    if not given and not (is_loopback(_host(url)) and own.is_file()):
        here = f" There is none in {own}; ORCHESTRATE_HOME names the runs folder." if is_loopback(_host(url)) else ""
        raise InvalidServer(
            f"{url} needs a token: set {TOKEN_VARIABLE}, or {TOKEN_FILE_VARIABLE} to a file that has it; an "
            f"administrator of the service makes one with `orchestrate token create`.{here}"
        )
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidServer(f"the token in {path} cannot be read: {error}") from error


class ServiceClient:
    """Requests to one service with one token. Not for several threads at once."""

    def __init__(self, url: str, token: str) -> None:
        """`url`: of the service, without `/api/v1`; `token`: of a person.

        Raises:
            InvalidServer: the URL is no http(s) URL, has a password, or would send the token unencrypted.
        """
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            hostname, _ = parts.hostname, parts.port
        except ValueError as error:
            raise InvalidServer(f"{url!r} is no URL: {error}") from error
        if parts.scheme not in ("http", "https") or not hostname:
            raise InvalidServer(f"{url!r} is no URL of a service, such as https://HOST:8787")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise InvalidServer(
                f"the URL of a service has no user, password or query; the token is in {TOKEN_VARIABLE}"
            )
        if parts.scheme == "http" and not is_loopback(hostname):
            raise InvalidServer(
                f"{hostname} is another machine and http:// would send the token unencrypted: use https://, or a "
                f"tunnel (`ssh -L 8787:localhost:8787 {hostname}`) and http://localhost:8787"
            )
        if not token.isascii() or not token.isprintable() or not token:
            raise InvalidServer("the token has characters that no token has")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._token = token
        self._http: httpx2.Client | None = None

    def __repr__(self) -> str:
        return f"ServiceClient({self.url!r})"

    def get(self, path: str, **query: Any) -> Any:
        """Return an answer's JSON. `query`: None is left out, lists are repeated."""
        return self._send("GET", path, query=query).json()

    def text(self, path: str, **query: Any) -> str:
        """Return an answer's text."""
        return self._send("GET", path, query=query).text

    def post(self, path: str, body: Mapping[str, Any], *, creates: bool = False) -> Any:
        """Send JSON and return the answer's JSON.

        `creates`: the request has an idempotency key, so that it is repeated where its answer is lost.
        """
        return self._send("POST", path, body=body, key=uuid4().hex if creates else "").json()

    def post_bytes(self, path: str, content: bytes, **query: Any) -> Any:
        """Send bytes and return the answer's JSON; not repeated where the answer is lost."""
        return self._send("POST", path, query=query, body=content).json()

    def delete(self, path: str, **query: Any) -> Any:
        """Send DELETE and return the answer's JSON."""
        return self._send("DELETE", path, query=query).json()

    def events(self, path: str, **query: Any) -> Iterator[tuple[str, Any]]:
        """Yield kind and data of server-sent events, until the service ends the stream."""
        import httpx2

        request = self._request("GET", path, query)
        try:
            response = self._client().send(request, stream=True)
            try:
                if response.status_code != 200:
                    response.read()
                    raise self._error(response)
                kind, data = "message", list[str]()
                for line in response.iter_lines():
                    name, _, value = line.partition(":")
                    if not line and data:
                        yield kind, json.loads("\n".join(data))
                        kind, data = "message", []
                    elif name == "event":
                        kind = value.strip()
                    elif name == "data":
                        data.append(value)
            finally:
                response.close()
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error

    def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            self._http.close()
            self._http = None

    # --- one request -------------------------------------------------------------------------------------------------

    def _client(self) -> httpx2.Client:
        import httpx2

        if self._http is None:
            self._http = httpx2.Client(
                headers={"authorization": f"Bearer {self._token}"},
                timeout=httpx2.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS),
                **client_options(self.url),
            )
        return self._http

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any],
        body: Mapping[str, Any] | bytes | None = None,
        key: str = "",
    ) -> httpx2.Request:
        params = [(name, each) for name, value in query.items() for each in _listed(value)]
        headers = {"idempotency-key": key} if key else {}
        content: Mapping[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
        return self._client().build_request(
            method, f"{self.url}/api/v1/{path}", params=params, headers=headers, **content
        )

    def _send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | bytes | None = None,
        key: str = "",
    ) -> httpx2.Response:
        """Return the answer to a request, which is repeated where that cannot do it twice.

        Raises:
            ServiceUnreachable, ServiceRefused, OrchestrateError: the class of the error there, where it is one of ours.
        """
        import httpx2

        for wait in (*_WAITS, None):
            request = self._request(method, path, query or {}, body, key)
            try:
                response = self._client().send(request)
            except httpx2.ConnectError as error:  # nothing was sent
                if wait is None:
                    raise self._unreachable(error) from error
            except httpx2.TransportError as error:
                if wait is None or (method != "GET" and not key):
                    raise self._unreachable(error) from error
            else:
                if response.is_success:
                    return response
                wait = self._wait_seconds(response, wait)
                if wait is None:
                    raise self._error(response)
            assert wait is not None
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _wait_seconds(self, response: httpx2.Response, wait: float | None) -> float | None:
        """Return the seconds before another try; None for an answer that will not change."""
        if wait is None or response.status_code not in _TRANSIENT or "exit_code" in _problem(response):
            return None
        given = response.headers.get("retry-after", "")
        asked = float(given) if given.isdecimal() else wait
        return max(wait, asked) if asked <= _MOST_WAIT else None

    def _unreachable(self, error: Exception) -> ServiceUnreachable:
        text = str(error)
        hint = "is `orchestrate serve` running there?"
        if "CERTIFICATE_VERIFY_FAILED" in text:
            hint = "SSL_CERT_FILE names the file of a certificate that is not signed by a public authority"
        return ServiceUnreachable(f"{self.url} cannot be reached: {clause(first_line(text))}; {hint}")

    def _error(self, response: httpx2.Response) -> OrchestrateError:
        found = _problem(response)
        status, detail = response.status_code, str(found.get("detail") or f"{self.url} answered {response.status_code}")
        if status == 401:
            return ServiceRefused(status, f"{self.url} does not accept the token: {detail}")
        problems = found.get("problems")
        if isinstance(problems, list) and found.get("error") == SpecError.__name__:
            listed = cast(list[Mapping[str, str]], problems)
            return SpecError([SpecProblem(p["where"], p["path"], p["problem"], p["hint"]) for p in listed])
        code = _exit_code(found.get("exit_code"))
        kind = _error_class(str(found.get("error") or ""))
        if kind is None:
            return ServiceRefused(status, detail, code)
        made = kind.__new__(kind)  # with the sentence of the service instead of what the class makes of its arguments
        Exception.__init__(made, detail)
        made.code = code
        return made


def sweep_path(name: str, *parts: str | int) -> str:
    """Return the path of a sweep in the API, or of what it has."""
    return "/".join(["sweeps", *(quote(str(part), safe="") for part in (name, *parts))])


def _host(url: str) -> str:
    return urlsplit(url if "://" in url else f"http://{url}").hostname or ""


def _listed(value: Any) -> Sequence[Any]:
    if value is None:
        return ()
    return cast(Sequence[Any], value) if isinstance(value, (list, tuple)) else (value,)


def _problem(response: httpx2.Response) -> Mapping[str, Any]:
    """Return a problem document; empty for another answer, as of a proxy."""
    try:
        found = response.json()
    except ValueError:
        return {}
    return cast(Mapping[str, Any], found) if isinstance(found, dict) else {}


def _exit_code(given: object) -> ExitCode:
    return ExitCode(given) if isinstance(given, int) and given in list(ExitCode) else ExitCode.USER


def _error_class(name: str) -> type[OrchestrateError] | None:
    """Return the class of `orchestrator.errors`, RequestRefused or NoSuchTrial, of this name."""
    if name in ("RequestRefused", "NoSuchTrial"):
        from orchestrator.commands.request_commands import NoSuchTrial, RequestRefused

        return NoSuchTrial if name == "NoSuchTrial" else RequestRefused
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, OrchestrateError) else None
