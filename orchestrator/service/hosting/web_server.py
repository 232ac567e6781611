"""`serve`: the service of one runs folder on a socket, until a signal ends it; its drivers continue."""

from __future__ import annotations

import errno
import ipaddress
import os
import signal
import socket
import ssl
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import uvicorn

import orchestrator
from orchestrator.errors import ExitCode, OrchestrateError, first_line
from orchestrator.service import DEFAULT_HOST, DEFAULT_PORT, LARGEST_MODEL_GB
from orchestrator.service.access_tokens import AccessTokens
from orchestrator.service.driver_supervisor import SERVICE_FOLDER, ServiceRuns
from orchestrator.service.hosting.code_login import CODE_PATH
from orchestrator.service.hosting.mlflow_server import MlflowOptions
from orchestrator.service.hosting.queue_location import move_queue, queue_problem
from orchestrator.service.http_app import LOOPBACK_NAMES, Service
from orchestrator.service.sweep_queue import QueueState
from trainer.storage.atomic_files import write_text

_WORK_FOLDER = "work"
_URL_FILE = "url"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE_SECONDS = 3
"""For which answers may continue after a signal."""
_MOST_CONNECTIONS = 2000


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How the service is reached, and what submitted sweeps may read."""

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    """0: a free one."""
    names: tuple[str, ...] = ()
    """Further names under which browsers reach the service."""
    certificate: Path | None = None
    key: Path | None = None
    """Its private key; None: in the same file."""
    behind_proxy: bool = False
    """Whether a reverse proxy on this machine speaks HTTPS for the service and names the clients."""
    data_folders: tuple[Path, ...] = ()
    at_once: int | None = None
    """Sweeps that run at a time; None: as many as there are GPUs, at least one."""
    largest_model: float = LARGEST_MODEL_GB
    """GB, of a model that a person sends with a sweep; 0: none."""
    mlflow: MlflowOptions = field(default_factory=MlflowOptions)
    queue: str | None = None
    """Where the queue shall be, see `move_queue`; None: where it is."""

    @property
    def is_secure(self) -> bool:
        """Whether browsers speak HTTPS."""
        return self.certificate is not None or self.behind_proxy


class ServeRefused(OrchestrateError):
    """The service cannot begin with these options; nothing was started."""


class PortTaken(OrchestrateError):
    """Another program listens on the port."""

    code = ExitCode.LOCKED

    def __init__(self, host: str, port: int) -> None:
        super().__init__(
            f"port {port} of {host} is in use by another program; give another one: "
            f"`orchestrate serve --port {port + 1 if port < 65535 else DEFAULT_PORT}`"
        )


def check_options(root: Path, options: ServeOptions) -> list[str]:
    """Check the options before anything is started; return warnings.

    Raises:
        ServeRefused: with all that is wrong with them.
    """
    problems, warnings = list[str](), list[str]()
    service = root / SERVICE_FOLDER
    for folder in options.data_folders:
        given = folder.resolve()
        if service.resolve().is_relative_to(given) or given.is_relative_to(service.resolve()):
            problems.append(f"--data-folder {folder}: the service's tokens are in it; give a folder of data only")
    if options.mlflow.url and not _is_web_address(options.mlflow.url):
        problems.append(f"--mlflow-url {options.mlflow.url}: is no http:// or https:// URL without a password")
    if options.mlflow.url and options.mlflow.edits:
        problems.append("--mlflow-edits: the server of --mlflow-url decides itself who may change runs")
    if options.key is not None and options.certificate is None:
        problems.append("--ssl-keyfile needs --ssl-certfile")
    if options.certificate is not None:
        if options.behind_proxy:
            problems.append("--behind-proxy: the proxy speaks HTTPS; leave out --ssl-certfile")
        problems += _certificate_problems(options.certificate, options.key)
    if options.queue is not None and (problem := queue_problem(options.queue)) is not None:
        problems.append(f"--queue: {problem}")
    if not _is_loopback(options.host):
        if not AccessTokens(service).people():
            problems.append(
                f"--host {options.host}: other machines could reach the service, and no person has a token; create one "
                "first: `orchestrate token create NAME --role operator`"
            )
        if not options.is_secure:
            warnings.append(
                f"--host {options.host} without --ssl-certfile: tokens and cookies cross the network in plain text"
            )
    if problems:
        raise ServeRefused("\n".join(problems))
    return warnings


def serve(root: Path, options: ServeOptions, show: Callable[[str, Sequence[str]], None]) -> list[str]:
    """Serve until SIGINT, SIGTERM or SIGHUP.

    Args:
        root: the runs folder.
        options: checked ones.
        show: receives the URL with a one-time code once the service listens, and remarks for people.

    Returns:
        The sweeps whose drivers continue.

    Raises:
        ServeRefused: the host cannot be listened on.
        PortTaken: another program has the port.
        ServiceRuns: another service has the runs folder.
        StorageRefused, QueueTaken, ExposedFile: the queue or the tokens cannot be used.
    """
    with ExitStack() as stack:
        service, moved = _open_service(root, options)
        stack.callback(service.close)
        listener = _listen(options.host, options.port)
        stack.callback(listener.close)
        port = listener.getsockname()[1]
        _enter_work_folder(root)
        config = uvicorn.Config(
            service.app,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="on",
            proxy_headers=options.behind_proxy,
            forwarded_allow_ips="127.0.0.1,::1",
            limit_concurrency=_MOST_CONNECTIONS,
            timeout_graceful_shutdown=_GRACE_SECONDS,
            ssl_certfile=options.certificate,
            ssl_keyfile=options.key,
        )
        url, file = service_url(options, port), root / SERVICE_FOLDER / _URL_FILE

        def listening() -> None:
            write_text(file, f"{url}\n")
            stack.callback(file.unlink, missing_ok=True)
            show(f"{url}{CODE_PATH}/{service.sessions.new_code()}", [*moved, *_remarks(root, options, url)])

        _Server(config, listening).run(sockets=[listener])
        return [sweep.name for sweep in service.queue.sweeps((QueueState.DRIVEN,))]


def service_url(options: ServeOptions, port: int) -> str:
    """Return the address of the service for a browser on this machine, or on another where it can be reached there."""
    host = options.host
    if host in ("0.0.0.0", "::", ""):
        host = (options.names or (socket.gethostname(),))[0]
    scheme = "https" if options.certificate is not None else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def host_names(options: ServeOptions) -> tuple[str, ...]:
    """Return the names under which browsers may reach the service: given ones, loopback, this machine's."""
    names = (*LOOPBACK_NAMES, *options.names)
    if _is_loopback(options.host):
        return (*names, options.host)
    addresses = [each.address.partition("%")[0] for found in psutil.net_if_addrs().values() for each in found]
    own = [address for address in addresses if _is_address(address)]
    return (*names, options.host, socket.gethostname(), *own)


class _Server(uvicorn.Server):
    """Says when it listens, and ends at a signal without raising it again."""

    def __init__(self, config: uvicorn.Config, listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._listening()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        before = {each: signal.signal(each, self.handle_exit) for each in _SIGNALS}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def _open_service(root: Path, options: ServeOptions) -> tuple[Service, list[str]]:
    """Return the service and a remark on its queue, if that was moved."""
    try:
        moved = "" if options.queue is None else move_queue(root, options.queue)
        service = Service(
            root,
            hosts=host_names(options),
            at_once=options.at_once,
            secure=options.is_secure,
            data_folders=options.data_folders,
            largest_model=options.largest_model,
            mlflow=options.mlflow,
        )
    except ServiceRuns as error:
        file = root / SERVICE_FOLDER / _URL_FILE
        if not file.is_file():
            raise
        raise ServiceRuns(root, f"{error.holder}, at {file.read_text(encoding='utf-8').strip()}") from None
    return service, [moved] if moved else []


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address. Raises ServeRefused, PortTaken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ServeRefused(f"--host {host}: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()  # two listeners on one port fail here, not at `bind`
    except OSError as error:
        listener.close()
        match error.errno:
            case errno.EADDRINUSE:
                raise PortTaken(host, port) from None
            case errno.EACCES:
                raise ServeRefused(f"--port {port}: needs root; give one above 1023") from None
            case _:
                raise ServeRefused(f"--host {host}: this machine cannot listen there: {error.strerror}") from None
    return listener


def _enter_work_folder(root: Path) -> None:
    """Make an empty folder the working directory of this process and of the drivers that it starts.

    In it no name of a model or data set on the hub is the path of a folder.
    """
    work = root / SERVICE_FOLDER / _WORK_FOLDER
    work.mkdir(mode=0o700, exist_ok=True)
    os.chdir(work)
    source = str(Path(orchestrator.__file__).parents[1])  # a checkout that is not installed is found there
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([source, *filter(None, [os.environ.get("PYTHONPATH")])]))


def _remarks(root: Path, options: ServeOptions, url: str) -> list[str]:
    opened = ", ".join(str(folder) for folder in options.data_folders) or "none (--data-folder adds one)"
    return [
        f"serving {root} at {url}; the line above logs one browser in, once, within 15 minutes",
        "further people: `orchestrate token create NAME --role viewer`",
        f"folders that submitted sweeps may read: {opened}",
        "Ctrl-C ends the service; sweeps that run continue",
    ]


def _certificate_problems(certificate: Path, key: Path | None) -> list[str]:
    def no_password() -> str:
        raise ValueError("the key has a password; give one without, readable by this user only")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        shown: Any = getattr(error, "strerror", None) or first_line(error)
        return [f"--ssl-certfile {certificate}: {shown}"]
    return []


def _is_loopback(host: str) -> bool:
    """Return whether only this machine reaches the service there."""
    try:
        found = {each[4][0] for each in socket.getaddrinfo(host or None, None, flags=socket.AI_PASSIVE)}
    except socket.gaierror:  # reported when the service listens
        return host == "localhost"
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def _is_web_address(text: str) -> bool:
    try:
        found = urlsplit(text)
    except ValueError:
        return False
    return found.scheme in ("http", "https") and bool(found.hostname) and found.username is found.password is None


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:  # of the network card itself
        return False
    return True
