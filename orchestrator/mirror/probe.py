"""Whether a mirror takes, gives and lets go: asked before anything is spent."""

from __future__ import annotations

import contextlib
from uuid import uuid4

from fsspec.registry import known_implementations

from orchestrator.errors import OrchestrateError, nearest
from orchestrator.mirror.store import Mirror, MirrorRefused

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
"""Which of this program's extras brings the library for a URL."""
_SAYS = b"prefsweep looks whether it may write here\n"


class MirrorError(OrchestrateError):
    """The mirror cannot be used as it stands; nothing was begun."""


def probe(url: str) -> None:
    """MirrorError where a small object cannot be written, read back and deleted under this URL."""
    protocol = url.partition("://")[0]
    if protocol not in known_implementations:
        near = nearest(protocol, known_implementations)
        raise MirrorError(f"mirror: {protocol}:// is not known{f'; did you mean {near}://?' if near else ''}")
    mirror, name = Mirror(url), f".probe-{uuid4().hex}"
    try:
        mirror.write(name, _SAYS)
        try:
            given = mirror.read(name)
        finally:
            with contextlib.suppress(MirrorRefused):  # what went wrong with the reading is what is told
                mirror.erase(name)
        if given != _SAYS:
            raise MirrorError(f"mirror: {url} does not give back what was written there")
        if mirror.read(name) is not None:
            raise MirrorError(f"mirror: {url} does not let go of what was written there: it may not delete")
    except MirrorRefused as why:
        if isinstance(why.__cause__, ImportError):
            raise MirrorError(f"mirror: {url} needs a library that is not installed: {_library(protocol)}") from why
        raise MirrorError(f"mirror: {why}; what must be possible there: write, read, list and delete") from why


def _library(protocol: str) -> str:
    said = str(known_implementations[protocol].get("err", f"install the fsspec library for {protocol}://"))
    extra = EXTRAS.get(protocol)
    names = {"s3": "s3fs", "gs": "gcsfs"}
    return said if extra is None else f"pip install 'prefsweep[{extra}]' (or pip install {names[extra]})"
