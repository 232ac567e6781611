"""Ray on this machine: started quietly, on loopback, with a token; its logs kept with the sweep.

`check_ray_health` raises RayDied if the GCS server or the raylet has exited.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trainer
from orchestrator.errors import ExitCode, OrchestrateError
from orchestrator.execution.slots import PROCESS_RESOURCE, SLOT_RESOURCE, Slots, visible_gpus
from orchestrator.execution.stop_reasons import SignalHandler, deaf_to_sigterm

_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
_BIG = str(1 << 32)
"""glibc gives large blocks back at each step and faults them in again, unless told not to."""


@contextmanager
def local_cluster(folder: Path, slots: Slots, signals: SignalHandler) -> Generator[None]:
    """Ray while entered; its logs end up in `folder`/logs."""
    _collect_logs(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Ray's sockets need a short path (AF_UNIX takes 107 characters), so it lives in /tmp until it ends.
    ray_folder = Path(tempfile.mkdtemp(prefix="prefsweep-", dir="/tmp"))
    (folder / "session").write_text(str(ray_folder), encoding="utf-8")
    token = ray_folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    os.environ |= {"RAY_AUTH_TOKEN_PATH": str(token), "TUNE_MAX_PENDING_TRIALS_PG": str(slots.count)}
    import ray

    prepare_ray_environment(folder)
    try:
        with starting_ray(signals):
            ray.init(
                address="local",
                num_cpus=0,  # slots count; Ray would start idle workers for CPUs
                num_gpus=visible_gpus(),
                resources={SLOT_RESOURCE: float(slots.count), PROCESS_RESOURCE: float(slots.count * slots.processes)},
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                runtime_env={"env_vars": worker_environment(slots.threads)},
                _temp_dir=str(ray_folder),
            )
        log_ray_to_file(folder / "driver.log")  # again: starting, it cleared its loggers
        with signals.watching(server_is_gone()):
            yield
    finally:
        ray.shutdown()
        _collect_logs(folder)


@contextmanager
def starting_ray(signals: SignalHandler) -> Generator[None]:
    """What Ray starts while entered is never reached by SIGTERM, and this process's own handler holds afterwards."""
    from ray._private import utils

    def leave(_: object) -> None:
        """Instead of Ray's own, which would end this process without a word."""

    taken = utils.set_sigterm_handler
    utils.set_sigterm_handler = leave
    try:
        with deaf_to_sigterm():
            try:
                yield
            finally:
                signals.install()
    finally:
        utils.set_sigterm_handler = taken


def server_is_gone() -> Callable[[], bool]:
    """Whether Ray's own server (GCS) takes no more connections: then no call into Ray comes to an end."""
    import ray

    host, _, port = str(ray.get_runtime_context().gcs_address).rpartition(":")

    def gone() -> bool:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=1.0):
                return False
        except OSError:
            return True

    return gone


def prepare_ray_environment(folder: Path) -> None:
    """Before Ray starts: its token is read anew, its words go to `folder`/driver.log, no secret is propagated."""
    from ray._private import worker as printing
    from ray._raylet import AuthenticationTokenLoader  # pyright: ignore[reportAttributeAccessIssue]
    from ray.tune.execution import class_cache

    AuthenticationTokenLoader.instance().reset_cache()  # each cluster of a process has a token of its own
    log_ray_to_file(folder / "driver.log")
    printing._worker_logs_enabled = False  # pyright: ignore[reportPrivateUsage]  what it prints would be on our stdout
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(_SECRETS)  # workers inherit them; no need to write them down


def worker_environment(threads: int) -> dict[str, str]:
    """What a worker needs in its environment before it starts. Written down by Ray: never a secret."""
    source = str(Path(trainer.__file__).resolve().parent.parent)
    known = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != source]
    return {
        "PYTHONPATH": os.pathsep.join([source, *known]),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_MMAP_THRESHOLD_": _BIG,
        "MALLOC_TRIM_THRESHOLD_": _BIG,
    }


def log_ray_to_file(log: Path) -> None:
    """Ray's words go to a file, not to the user's terminal."""
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
    """Bring a session's logs home and remove the rest; also that of a driver that was killed."""
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
    """A process of Ray's own ended; no worker can be reached any more. The study has everything: begin again."""

    code = ExitCode.INTERNAL_ERROR

    def __init__(self, names: list[str]) -> None:
        super().__init__(f"Ray's own process{'es' if len(names) > 1 else ''} {' and '.join(names)} ended")


def check_ray_health() -> None:
    """RayDied where nothing more can be expected of this cluster."""
    from ray._private import worker

    node: Any = worker._global_node  # pyright: ignore[reportPrivateUsage]
    ended = [] if node is None else [str(kind) for kind, _ in node.dead_processes() if kind in _REQUIRED_PROCESSES]
    if ended:
        raise RayDied(sorted(set(ended)))
