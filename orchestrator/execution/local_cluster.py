"""Ray on this machine: started silently, on loopback, with a token; logs are kept in the sweep's folder.

`check_ray_health` raises RayDied if the GCS server or the raylet has exited.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

import trainer
from orchestrator.errors import ExitCode, OrchestrateError
from orchestrator.execution import agent_stand_in
from orchestrator.execution.slots import PROCESS_RESOURCE, SLOT_RESOURCE, Slots, workers_before_trials
from orchestrator.execution.stop_reasons import SignalHandler, termination_blocked
from orchestrator.gpus import only_visible_in, visible_devices

_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
_BIG = str(1 << 32)
"""Bytes. Keeps glibc from returning large blocks to the system at each step and faulting them in again."""


@contextmanager
def local_cluster(folder: Path, slots: Slots, signals: SignalHandler) -> Generator[None]:
    """Run Ray on this machine within the context; its logs are copied to `folder`/logs."""
    _collect_logs(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Ray's session is in /tmp, since its sockets need a short path (AF_UNIX: 107 characters).
    session_folder = Path(tempfile.mkdtemp(prefix="prefsweep-", dir="/tmp"))
    (folder / "session").write_text(str(session_folder), encoding="utf-8")
    token = session_folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    os.environ |= {"RAY_AUTH_TOKEN_PATH": str(token), "TUNE_MAX_PENDING_TRIALS_PG": str(slots.max_count)}
    import ray

    prepare_ray_environment(folder)
    devices = visible_devices()
    if devices and devices[0].vendor == "amd":
        only_visible_in(_variable_of_ray())
    try:
        with starting_ray(signals), _only_needed_processes(worker_environment(slots.threads)):
            ray.init(
                address="local",
                num_cpus=workers_before_trials(slots),  # processes that Ray starts now; slots are counted for trials
                num_gpus=len(devices),
                resources={
                    SLOT_RESOURCE: float(slots.max_count),
                    PROCESS_RESOURCE: float(slots.max_count * slots.processes),
                },
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=str(session_folder),
            )
        log_ray_to_file(folder / "driver.log")  # again, as Ray resets its loggers at start
        with _no_runtime_environments(), signals.exit_when_lost(server_is_gone()):
            yield
    finally:
        _shut_down_ray()
        _collect_logs(folder)


_NOT_NEEDED = ("start_api_server", "start_monitor", "start_log_monitor")
"""Methods of Ray's node that start usage statistics (also without dashboard), the autoscaler's and the log monitor."""
_COMMAND = "_build_python_executable_command_memory_profileable"
"""Function of Ray's services that returns the interpreter with which one of Ray's Python processes starts."""
_PORTS_WITHOUT_DASHBOARD = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
"""Ports that the raylet reads from files, -1 where Ray is installed without its dashboard."""
_LOOPBACK = "127.0.0.1"


@contextmanager
def _only_needed_processes(environment: Mapping[str, str]) -> Generator[None]:
    """Have `ray.init` start the GCS server and the raylet alone; it would wait for some of the others.

    `environment`: variables of the raylet, which its workers inherit. As a runtime environment each worker would load
    Ray twice, and wait for an agent that loads it too.
    """
    from ray._private import ray_constants, services
    from ray._private.node import Node
    from ray._raylet import persist_port  # pyright: ignore[reportAttributeAccessIssue]

    def start_nothing(*_: Any, **__: Any) -> None:
        """Replace a method that starts a process."""

    def start_raylet(node: Any, *arguments: Any, **options: Any) -> None:
        """Start the raylet with stand-ins for its agents, whose ports it is given before."""
        for name in _PORTS_WITHOUT_DASHBOARD:
            persist_port(node._session_dir, node._node_id, name, -1)
        with socket.create_server((_LOOPBACK, 0)) as server:
            node._ray_params.runtime_env_agent_port = server.getsockname()[1]
        node._ray_params.env_vars = dict(environment)
        originals["start_raylet"](node, *arguments, **options)

    def command_of(component: str, *arguments: Any, **options: Any) -> list[str]:
        """Return the beginning of the command of one of Ray's Python processes."""
        if component in (ray_constants.PROCESS_TYPE_DASHBOARD_AGENT, ray_constants.PROCESS_TYPE_RUNTIME_ENV_AGENT):
            return [sys.executable, "-I", "-S", agent_stand_in.__file__]
        return originals[_COMMAND](component, *arguments, **options)

    replaced: list[tuple[Any, str, Any]] = [(Node, name, start_nothing) for name in _NOT_NEEDED]
    replaced += [(Node, "start_raylet", start_raylet), (services, _COMMAND, command_of)]
    originals = {name: getattr(owner, name) for owner, name, _ in replaced}
    for owner, name, new in replaced:
        setattr(owner, name, new)
    try:
        yield
    finally:
        for owner, name, _ in replaced:
            setattr(owner, name, originals[name])


@contextmanager
def _no_runtime_environments() -> Generator[None]:
    """Have Tune start its workers without a runtime environment: they inherit the raylet's variables."""
    from ray.tune.execution import class_cache

    stored = class_cache.DEFAULT_ENV_VARS, class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.DEFAULT_ENV_VARS, class_cache.ENV_VARS_TO_PROPAGATE = {}, set()
    try:
        yield
    finally:
        class_cache.DEFAULT_ENV_VARS, class_cache.ENV_VARS_TO_PROPAGATE = stored


def _shut_down_ray() -> None:
    """Shut Ray down, and kill its own processes and their children at once.

    `ray.shutdown` would wait a second for each to answer SIGTERM, which they have blocked (`termination_blocked`). The
    raylet's agents would wait a minute for the GCS server.
    """
    import ray
    from ray._private import worker

    node: Any = worker._global_node  # pyright: ignore[reportPrivateUsage]
    if node is not None:
        node.kill_all_processes = functools.partial(_kill_at_once, node)
    ray.shutdown()
    if node is not None:
        del node.kill_all_processes  # it keeps the node, and so a client whose threads look for the GCS server


def _kill_at_once(node: Any, **options: Any) -> None:
    children: list[psutil.Process] = []
    for _, process in node.live_processes():
        with suppress(psutil.NoSuchProcess):
            children += psutil.Process(process.pid).children(recursive=True)
    type(node).kill_all_processes(node, **options | {"allow_graceful": False})
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def _variable_of_ray() -> str:
    """Return the variable in which Ray gives each worker its AMD GPUs: HIP's where Ray finds AMD's library."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager: Any = get_accelerator_manager_for_resource("GPU")
    return str(manager.get_visible_accelerator_ids_env_var())


@contextmanager
def starting_ray(signals: SignalHandler) -> Generator[None]:
    """Block termination signals for processes that Ray starts in the context; reinstall the handlers after it."""
    from ray._private import utils

    def keep_own_handler(_: object) -> None:
        """Replace Ray's function, whose handler would end this process silently."""

    original = utils.set_sigterm_handler
    utils.set_sigterm_handler = keep_own_handler
    try:
        with termination_blocked():
            try:
                yield
            finally:
                signals.install()
    finally:
        utils.set_sigterm_handler = original


def server_is_gone() -> Callable[[], bool]:
    """Return a check whether Ray's GCS server accepts no connections, in which case calls into Ray never return."""
    import ray

    host, _, port = str(ray.get_runtime_context().gcs_address).rpartition(":")

    def is_gone() -> bool:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=1.0):
                return False
        except OSError:
            return True

    return is_gone


def prepare_ray_environment(folder: Path) -> None:
    """Prepare the start of Ray: re-read the token, log to `folder`/driver.log."""
    from ray._private import worker as printing
    from ray._raylet import AuthenticationTokenLoader  # pyright: ignore[reportAttributeAccessIssue]

    AuthenticationTokenLoader.instance().reset_cache()  # each cluster has its own token
    log_ray_to_file(folder / "driver.log")
    printing._worker_logs_enabled = False  # pyright: ignore[reportPrivateUsage]  would print to stdout


def propagate_no_secrets() -> None:
    """Have Tune store no secrets in the runtime environment of its workers, which inherit them."""
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(_SECRETS)


def worker_environment(threads: int) -> dict[str, str]:
    """Return the environment variables of workers. Ray stores them, so that they must not contain secrets."""
    source = str(Path(trainer.__file__).resolve().parent.parent)
    others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != source]
    return {
        "PYTHONPATH": os.pathsep.join([source, *others]),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_MMAP_THRESHOLD_": _BIG,
        "MALLOC_TRIM_THRESHOLD_": _BIG,
    }


def log_ray_to_file(log: Path) -> None:
    """Redirect Ray's log from the terminal to a file."""
    handler = logging.FileHandler(log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger = logging.getLogger("ray")
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _collect_logs(folder: Path) -> None:
    """Copy the logs of the last Ray session and remove its folder, also after a killed driver."""
    pointer = folder / "session"
    if not pointer.is_file():
        return
    ray_folder = Path(pointer.read_text(encoding="utf-8"))
    for logs in sorted(ray_folder.glob("session_2*/logs")):
        shutil.copytree(logs, folder / "logs" / logs.parent.name, dirs_exist_ok=True, ignore_dangling_symlinks=True)
    if ray_folder.name.startswith("prefsweep-"):
        shutil.rmtree(ray_folder, ignore_errors=True)
    pointer.unlink()


_REQUIRED_PROCESSES = ("gcs_server", "raylet")


class RayDied(OrchestrateError):
    """The GCS server or the raylet exited, so that no worker can be reached. Ray must be restarted."""

    code = ExitCode.INTERNAL_ERROR

    def __init__(self, names: list[str]) -> None:
        super().__init__(f"Ray's own process{'es' if len(names) > 1 else ''} {' and '.join(names)} ended")


def check_ray_health() -> None:
    """Raise RayDied if the GCS server or the raylet of the local cluster has exited."""
    from ray._private import worker

    node: Any = worker._global_node  # pyright: ignore[reportPrivateUsage]
    ended = [] if node is None else [str(kind) for kind, _ in node.dead_processes() if kind in _REQUIRED_PROCESSES]
    if ended:
        raise RayDied(sorted(set(ended)))
