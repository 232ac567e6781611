"""Case 19: while a sweep runs, Ray listens on loopback only, has no dashboard, and lets nobody in without the token."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from orchestrator.execution.local_cluster import local_cluster
from orchestrator.execution.slots import Slots
from orchestrator.execution.stop_reasons import SignalHandler

STRANGER = """
import sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
    print("inside", ray.get(ray.remote(lambda: 1).options(num_cpus=0).remote()))
except Exception as error:
    print(type(error).__name__, str(error)[:300])
"""


def stranger(address: str, environment: dict[str, str]) -> tuple[str, int | None]:
    """What somebody without the right token gets to see; Ray may knock for ever, which is no entry either."""
    command, pipe = [sys.executable, "-c", STRANGER, address], subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            return "".join(process.communicate(timeout=45)), process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            return "".join(process.communicate()), None


@pytest.mark.faults
def test_what_listens_and_who_gets_in(tmp_path: Path) -> None:
    with SignalHandler(lambda: "") as signals, local_cluster(tmp_path / "ray", Slots(1, 0.0, 1), signals):
        import ray

        address = ray.get_runtime_context().gcs_address
        below = psutil.Process().children(recursive=True)
        listening = [c.laddr for p in below for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert len(listening) > 2
        assert {path.ip for path in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        assert 8265 not in {path.port for path in listening}, "the dashboard"
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert token.stat().st_mode & 0o077 == 0
        secret = token.read_text()
        assert not any(secret in " ".join(p.cmdline()) for p in below), "every user may read arguments"
        base = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        wrong = tmp_path / "wrong"
        wrong.write_text("0" * 64)
        for more in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(wrong)}):
            messages, returned = stranger(address, base | more)
            assert "inside" not in messages, messages
            assert "auth" in messages.lower() or returned != 0
