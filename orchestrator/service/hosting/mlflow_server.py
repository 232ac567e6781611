"""`MlflowServer`: the MLflow UI of the runs folder, started by the first request for it; it ends with the service."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool

from orchestrator.errors import StorageRefused
from orchestrator.folders import SweepFolder
from orchestrator.loopback import client_options
from orchestrator.redaction import without_credentials
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.tracking.mlflow_client import tracking_uri
from orchestrator.tracking.mlflow_ui import UI_LOG, UiServer, launch_private_ui
from orchestrator.tracking.tracking_store import sweep_tracking_uri

if TYPE_CHECKING:
    import httpx2

MLFLOW_PATH = "/mlflow"
"""Below which the service answers with MLflow's pages."""
_CONNECT_SECONDS, _READ_SECONDS = 5.0, 120.0
_MOST_AT_ONCE = 32
"""Requests that MLflow answers at a time for all people."""


class MlflowStarting(Exception):
    """MLflow has been started, and does not answer yet."""


class MlflowBusy(Exception):
    """As many requests as are passed on at a time are not answered yet."""


@dataclass(frozen=True, slots=True)
class MlflowOptions:
    """Where people find MLflow, and what they may do there."""

    url: str = ""
    """Of an own server, as browsers reach it; "": the service starts one and shows it to those who have logged in."""
    edits: bool = False
    """Whether operators may rename, tag and delete runs and experiments there."""


class MlflowAnswer:
    """What MLflow answers: its head in `response`, its body as it was encoded. It must be closed."""

    def __init__(self, response: httpx2.Response, client: httpx2.AsyncClient, server: MlflowServer) -> None:
        self.response = response
        self._client, self._server, self._is_open = client, server, True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self.response.aiter_raw():
            yield chunk

    async def text(self) -> bytes:
        """Return the whole body, and close."""
        try:
            return await self.response.aread()
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """End the request, read or not."""
        if self._is_open:
            self._is_open = False
            await self.response.aclose()
            await self._server.release(self._client)


class MlflowServer:
    """MLflow's own server as a child of the service. Thread-safe."""

    def __init__(self, root: Path, options: MlflowOptions) -> None:
        """Start nothing yet. `root`: the runs folder."""
        self._root, self.options = root, options
        self._guard = threading.Lock()
        self._ui: UiServer | None = None
        self._answers, self._at_work = False, 0

    def close(self) -> None:
        """End the server if it was started."""
        with self._guard:
            if self._ui is not None:
                self._ui.stop()
                self._ui = None

    def url_of(self, folder: SweepFolder, spec: SweepSpec) -> str:
        """Return where a sweep's runs are: a path of the service, or an own server's URL; "" for other databases."""
        uri = sweep_tracking_uri(folder, spec.tracking.uri)
        if uri.startswith(("http://", "https://")):
            return self.options.url or without_credentials(uri)
        if uri != tracking_uri(self._root, None):
            return ""
        return self.options.url or MLFLOW_PATH

    def launched(self) -> UiServer:
        """Return the server, started where it does not run.

        Raises:
            StorageRefused: it has ended, or cannot be started; the next call tries again.
        """
        with self._guard:
            if self._ui is None:
                uri = tracking_uri(self._root, None)
                is_remote = uri.startswith(("http://", "https://"))
                if other := self.options.url or (without_credentials(uri) if is_remote else ""):
                    raise StorageRefused(f"MLflow is at {other}: this service starts no other one")
                self._ui, self._answers = launch_private_ui(self._root, uri, MLFLOW_PATH), False
            process = self._ui.process
            if process is not None and process.poll() is not None:
                self._ui.stop()
                self._ui = None
                raise StorageRefused(f"the MLflow server has ended; its output is in {self._root / UI_LOG}")
            return self._ui

    async def send(
        self, method: str, path: str, query: str = "", body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> MlflowAnswer:
        """Pass a request on; return the answer, which must be closed.

        Args:
            method: of the request.
            path: below MLFLOW_PATH, without its slash.
            query: as it is in the URL.
            body: of the request.
            headers: all that MLflow gets.

        Raises:
            MlflowStarting, MlflowBusy: the request may be sent again.
            StorageRefused: see `launched`; MLflow does not answer.
        """
        import httpx2

        ui = await run_in_threadpool(self.launched)
        if self._at_work >= _MOST_AT_ONCE:
            raise MlflowBusy
        limits = httpx2.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS)
        transport = httpx2.AsyncHTTPTransport(uds=str(ui.socket), verify=False)
        client = httpx2.AsyncClient(transport=transport, timeout=limits, **client_options(ui.base))
        self._at_work += 1
        try:
            if not self._answers:
                self._answers = await _is_up(client, ui)
                if not self._answers:
                    raise MlflowStarting
            url = httpx2.URL(f"{ui.base}/{path}", query=query.encode())
            request = client.build_request(method, url, content=body or None, headers=dict(headers or {}))
            return MlflowAnswer(await client.send(request, stream=True), client, self)
        except httpx2.HTTPError as error:
            await self.release(client)
            await run_in_threadpool(self.launched)  # raises if it has ended
            raise StorageRefused(f"the MLflow server does not answer: {type(error).__name__}") from error
        except BaseException:
            await self.release(client)
            raise

    async def release(self, client: httpx2.AsyncClient) -> None:
        """Count a request as answered."""
        self._at_work -= 1
        await client.aclose()


async def _is_up(client: httpx2.AsyncClient, ui: UiServer) -> bool:
    import httpx2

    with suppress(httpx2.HTTPError):  # it does not listen yet
        return (await client.get(f"{ui.base}/health")).is_success
    return False
