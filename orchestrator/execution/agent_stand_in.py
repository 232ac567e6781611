"""Stands for one of the two agents of Ray's raylet, each of which loads Ray before `ray.init` can return.

Run as a script, without Ray, with the path and the arguments of the agent. The dashboard agent serves metrics and a
dashboard that no sweep has: its stand-in waits for the raylet's end. The agent of runtime environments is needed by a
process that has one, as none of a sweep's has on this machine: its stand-in listens at the agent's port, and becomes
the agent when the raylet connects.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from collections.abc import Sequence

_POLL_SECONDS = 1.0
"""Seconds between two looks whether the raylet still runs."""


def main(arguments: Sequence[str]) -> None:
    """Wait until the raylet ends, or connects to the port `--runtime-env-agent-port`.

    Args:
        arguments: path of the agent, then its options.
    """
    options = dict(option.split("=", 1) for option in arguments[1:] if "=" in option)
    raylet = int(os.environ["RAY_RAYLET_PID"])
    listener = None
    if port := options.get("--runtime-env-agent-port"):
        listener = socket.create_server((options["--node-ip-address"], int(port)))
    while os.getppid() == raylet:
        if listener is None:
            time.sleep(_POLL_SECONDS)
        elif select.select([listener], [], [], _POLL_SECONDS)[0]:
            listener.close()  # the raylet tries again until the agent listens
            os.execv(sys.executable, [sys.executable, "-u", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
