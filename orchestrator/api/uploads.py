"""Files of data that a sweep file names and that are here, sent to a service: `local_files`, `upload_file`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from orchestrator.api.service_client import ServiceClient, ServiceRefused, ServiceUnreachable
from orchestrator.errors import StorageRefused

_PART_BYTES = 1 << 20
_READ_BYTES = 1 << 20
_MOST_FAILURES = 5
"""Parts in a row that fail before an upload gives up; the next one continues where it ended."""
_SECTIONS = (("base", "data"), ("data",), ("sft", "data"), ("judge", "prompts_from"))
"""Where a sweep file names data. `base.` may be left out in `--set`."""


def local_files(tree: Any, overrides: Sequence[tuple[str, Any]], folders: Sequence[Path]) -> dict[str, Path]:
    """Return the files of data that exist here, by the names that they have in the sweep file.

    Args:
        tree: values of the file.
        overrides: changes of settings by path, which replace values of the file.
        folders: folders in which relative names are looked up, in this order.
    """
    values = [_at(tree, section) for section in _SECTIONS]
    values += [value for path, value in overrides if _is_data(tuple(path.split(".")))]
    found: dict[str, Path] = {}
    for name in (text for value in values for text in _texts(value)):
        path = next((path for folder in folders if _is_file(path := folder / Path(name).expanduser())), None)
        if path is not None:
            found[name] = path.resolve()
    return found


def upload_file(client: ServiceClient, path: Path, on_progress: Callable[[int, int], None] | None = None) -> str:
    """Send a file unless the service has it; return its digest and name, as a submission names it.

    An interrupted upload is continued by the same call.

    Args:
        client: of the service.
        path: the file.
        on_progress: called with the bytes that are there, and the file's.

    Raises:
        ServiceUnreachable: the service does not answer any more.
        StorageRefused: the file cannot be read, or was changed meanwhile.
        ServiceRefused: the service does not take it.
    """
    name, failures = _plain_name(path), 0
    try:
        size, digest = path.stat().st_size, _sha256(path)
        with path.open("rb", buffering=0) as content:
            found = _ask(client, digest, size, name)
            while not found["complete"]:
                if on_progress is not None:
                    on_progress(found["offset"], size)
                content.seek(found["offset"])
                part = content.read(_PART_BYTES)
                if not part and found["offset"] < size:  # no bytes: all of them are there, and are only to be checked
                    raise StorageRefused(f"{path} became shorter while it was sent")
                try:
                    where = {"size": size, "name": name, "offset": found["offset"]}
                    found, failures = client.post_bytes(f"files/{digest}", part, **where), 0
                except (ServiceUnreachable, ServiceRefused) as error:
                    failures += 1
                    if failures == _MOST_FAILURES or (isinstance(error, ServiceRefused) and error.status != 409):
                        raise
                    found = _ask(client, digest, size, name)
    except OSError as error:
        raise StorageRefused(f"{path} cannot be read: {error}") from error
    if on_progress is not None:
        on_progress(size, size)
    return f"{digest}/{name}"


def _plain_name(path: Path) -> str:
    """Return the file's name with `_` for characters that a service does not take."""
    allowed = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in path.name[-100:])
    return allowed.lstrip("._-") or "data"


def _ask(client: ServiceClient, digest: str, size: int, name: str) -> Any:
    return client.get(f"files/{digest}", size=size, name=name)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while data := content.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _at(tree: Any, path: Sequence[str]) -> Any:
    for part in path:
        tree = cast(Mapping[str, Any], tree).get(part) if isinstance(tree, Mapping) else None
    return tree


def _is_data(path: tuple[str, ...]) -> bool:
    return any(path[: len(section)] == section or section[: len(path)] == path for section in _SECTIONS)


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case Mapping():
            for inner in cast(Mapping[Any, Any], value).values():
                yield from _texts(inner)
        case Sequence():
            for inner in cast(Sequence[Any], value):
                yield from _texts(inner)
        case _:
            return


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a text that is no path
        return False
