"""A service that listens on a free port of this machine, in a thread of the test."""

import threading
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn

from orchestrator.service.http_app import Service
from tests.support.processes import wait_until


@contextmanager
def listening(service: Service, *, supervises: bool = False) -> Generator[str]:
    """Its URL. `supervises`: its queue's drivers are started."""
    lifespan = "on" if supervises else "off"
    config = uvicorn.Config(service.app, host="127.0.0.1", port=0, log_level="warning", lifespan=lifespan)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="service")
    thread.start()
    try:
        wait_until(lambda: server.started)
        (listener,) = server.servers
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        if not supervises:
            service.close()
