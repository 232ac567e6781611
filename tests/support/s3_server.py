"""moto's server: S3's protocol over HTTP on loopback, objects in memory; it can be told to fail."""

import logging
import os
import threading
import urllib.request
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import fsspec

from tests.support.processes import LIMIT_SECONDS

BUCKET = "prefsweep-test"
_SETTINGS = {
    "AWS_ACCESS_KEY_ID": "not-a-real-key",
    "AWS_SECRET_ACCESS_KEY": "not-a-real-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_ANSWER = b"<Error><Code>InternalError</Code><Message>injected</Message></Error>"


@dataclass
class Server:
    """`failing`: every request is answered with 500; while `speaks` is not set, none is answered."""

    url: str = f"s3://{BUCKET}"
    failing: bool = False
    speaks: threading.Event = field(default_factory=threading.Event)

    def around(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        def answer(environ: Any, start_response: Any) -> Iterable[bytes]:
            assert self.speaks.wait(LIMIT_SECONDS)
            if self.failing:
                start_response("500 Internal Server Error", [("Content-Type", "application/xml")])
                return [_ANSWER]
            return app(environ, start_response)

        return answer


@contextmanager
def serving() -> Generator[Server]:
    """An empty bucket; this process, and what it starts, finds the server by its environment."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = Server()
    server.speaks.set()
    http = make_server("127.0.0.1", 0, server.around(DomainDispatcherApplication(create_backend_app)), threaded=True)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    address, before = f"http://127.0.0.1:{http.server_port}", dict(os.environ)
    os.environ.update(_SETTINGS | {"AWS_ENDPOINT_URL": address})
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        os.environ.pop(name, None)
    try:
        bucket = urllib.request.Request(f"{address}/{BUCKET}", method="PUT")
        urllib.request.urlopen(bucket, timeout=LIMIT_SECONDS).close()
        yield server
    finally:
        http.shutdown()
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # they know this server's address
        os.environ.clear()
        os.environ.update(before)
