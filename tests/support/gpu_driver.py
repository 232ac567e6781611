"""A driver of which only the GPUs are real enough: a process that holds them, and its workers, to be killed by tests.

`python -m tests.support.gpu_driver SWEEP LEAST MOST [no-wait] [ray]` prints a line of JSON for whatever happens and
reads a line of input before it takes the GPUs and another before it ends.
"""

import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestrateError
from orchestrator.gpu_locks import reserved_gpus, use_own_gpus
from tests.support.fake_gpus import nvidia_list, write_nvidia_smi
from tests.support.processes import LIMIT_SECONDS

VISIBLE = "CUDA_VISIBLE_DEVICES"


def machine(folder: Path, gpus: int, **more: str) -> dict[str, str]:
    """The environment of processes on a machine with so many GPUs, whose locks are in a folder of its own."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    write_nvidia_smi(tools, nvidia_list(gpus))
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "ORCHESTRATE_GPU_LOCKS": str(folder / "locks")} | more
    if VISIBLE not in more:
        environment.pop(VISIBLE, None)
    return environment


class GpuDriver:
    """The process and what it says."""

    def __init__(
        self,
        environment: dict[str, str],
        sweep: str,
        least: int = 1,
        most: int = 1,
        *options: str,
        before: Sequence[str] = (),
    ) -> None:
        command = [sys.executable, "-m", "tests.support.gpu_driver", sweep, str(least), str(most), *options]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [*before, *command], env=environment, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )

    def go(self) -> None:
        """Take the GPUs, or end."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def says(self, what: str) -> Any:
        """The next thing that happens, which is this."""
        said = self._next()
        assert what in said, said
        return said[what]

    def _next(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], LIMIT_SECONDS)[0], "it says nothing"
        line = self.process.stdout.readline()
        assert line, self.process.communicate()
        return json.loads(line)

    def finally_holds(self) -> list[str]:
        """What it sees of its GPUs, however often it said before that it waits."""
        while True:
            said = self._next()
            if "waits" not in said:
                return said["holds"]

    def takes(self) -> list[str]:
        """Let it take its GPUs; return what it sees of them."""
        self.go()
        return self.says("holds")

    def ends(self) -> int:
        self.go()
        self.process.communicate(timeout=LIMIT_SECONDS)
        return self.process.returncode


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def main(sweep: str, least: str, most: str, *options: str) -> None:
    shown: list[str] = []

    def wait(sentence: str) -> None:
        if sentence not in shown[-1:]:
            shown.append(sentence)
            say(waits=sentence)

    sys.stdin.readline()
    with ExitStack() as stack:
        waits = "no-wait" not in options
        gpus = stack.enter_context(reserved_gpus(sweep, int(least), int(most), waits=waits, on_wait=wait))
        visible = os.environ.get(VISIBLE)
        say(holds=[gpu.index for gpu in gpus] if visible is None else visible.split(","))
        if "worker" in options:
            command = [sys.executable, "-m", "tests.support.gpu_driver", "worker"]
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert worker.stdout is not None
            worker.stdout.readline()
            say(worker=worker.pid)
        if "ray" in options:
            _start_ray(stack, Path(os.environ["ORCHESTRATE_HOME"]), len(gpus))
        sys.stdin.readline()


def _start_ray(stack: ExitStack, folder: Path, gpus: int) -> None:
    """A Ray cluster as a sweep starts it, with a worker on each GPU."""
    from orchestrator.execution.local_cluster import local_cluster
    from orchestrator.execution.slots import Slots
    from orchestrator.execution.stop_reasons import SignalHandler

    signals = stack.enter_context(SignalHandler(lambda: "farewell"))
    stack.enter_context(local_cluster(folder / "ray", Slots(count=gpus, gpus=1.0, threads=1), signals))
    import ray

    remote: Any = ray.remote
    workers = [remote(_Worker).options(num_cpus=0, num_gpus=1).remote() for _ in range(gpus)]
    say(ray=[ray.get(worker.open.remote()) for worker in workers], cluster=ray.cluster_resources()["GPU"])


class _Worker:
    def open(self) -> dict[str, Any]:
        use_own_gpus()
        return {"pid": os.getpid(), "visible": os.environ.get(VISIBLE), "hip": os.environ.get("HIP_VISIBLE_DEVICES")}


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        use_own_gpus()
        say(uses=True)
        sys.stdin.read()
        while True:  # the driver has ended; only a kill ends this process
            select.select([], [], [])
    try:
        main(*sys.argv[1:])
    except OrchestrateError as error:
        say(refused=str(error), code=int(error.code))
