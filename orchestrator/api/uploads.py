"""Files of data and model folders that a sweep file names and that are here, sent to a service.

`local_files` finds them, `upload_file` and `upload_model` send them. A model is its configuration, its tokenizer and
its weights as safetensors; code and pickles, which run when they are read, are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

from orchestrator.api.service_client import ServiceClient, ServiceRefused, ServiceUnreachable
from orchestrator.errors import OrchestrateError, StorageRefused

Progress = Callable[[int, int], None]
"""Called with the bytes of a file that are there, and the file's."""
_PART_BYTES = 1 << 20
_READ_BYTES = 1 << 20
_MOST_FAILURES = 5
"""Parts in a row that fail before an upload gives up; the next one continues where it ended."""
_SECTIONS = (("base", "data"), ("data",), ("sft", "data"), ("judge", "prompts_from"))
"""Where a sweep file names data. `base.` may be left out in `--set`."""
_MODELS = ("model.name_or_path", "model.tokenizer")
"""Settings that name a model folder, also searched ones."""
CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer_config.json"
WEIGHTS = ".safetensors"
_SENT = frozenset({WEIGHTS, ".json", ".jinja", ".model", ".spm", ".tiktoken"})
_SENT_NAMES = frozenset({"vocab.txt", "merges.txt"})
_CODE = frozenset({".py", ".pyc", ".pyd", ".so", ".sh"})
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"})
_OF_TRAINING = ("training_args.", "optimizer.", "scheduler.", "scaler.", "rng_state")
"""Beginnings of the names of files that a training stores beside a model, and that loading it does not read."""


class ModelNotSent(OrchestrateError):
    """A model folder cannot be sent to a service; nothing of it was."""


def local_files(tree: Any, overrides: Sequence[tuple[str, Any]], folders: Sequence[Path]) -> dict[str, Path]:
    """Return the files of data and the model folders that exist here, by the names that they have in the sweep file.

    Args:
        tree: values of the file.
        overrides: changes of settings by path, which replace values of the file.
        folders: folders in which relative names are looked up, in this order.
    """
    values = [_at(tree, section) for section in _SECTIONS]
    values += [value for path, value in overrides if _is_data(tuple(path.split(".")))]
    found: dict[str, Path] = {}
    for name in (text for value in values for text in _texts(value)):
        path = _first(folders, name, Path.is_file)
        if path is not None:
            found[name] = path.resolve()
    for name in _model_names(tree, overrides):
        path = _first(folders, name, Path.is_dir)
        is_path = name.startswith(("./", "../", "/", "~"))
        if path is not None and (is_path or any((path / each).is_file() for each in (CONFIG_FILE, TOKENIZER_FILE))):
            found[name] = path.resolve()
    return found


def model_file_problem(name: str) -> str:
    """Return why a file of a model folder is not accepted by a service; "" if it is, or if loading does not need it."""
    suffix = Path(name).suffix.lower()
    if suffix in _CODE:
        return f"{name} is code, and a service runs no code of a model"
    if suffix in _PICKLES and not name.startswith(_OF_TRAINING):
        return f"{name} is a pickle, which can run code when it is read"
    if name == "adapter_config.json":
        return f"{name} names another model, which the service would read; an adapter is sent merged into its model"
    return ""


def is_model_file(name: str) -> bool:
    """Return whether loading a model may need a file of this name."""
    return (Path(name).suffix in _SENT or name in _SENT_NAMES) and not name.startswith((".", *_OF_TRAINING))


def model_problems(names: Sequence[str]) -> list[str]:
    """Return why a folder with files of these names is not accepted by a service as a model or a tokenizer."""
    problems = [problem for name in names if (problem := model_file_problem(name))]
    if CONFIG_FILE in names and not any(name.endswith(WEIGHTS) for name in names):
        problems.append(f"it has no weights as {WEIGHTS}: `model.save_pretrained(FOLDER)` of transformers writes them")
    elif CONFIG_FILE not in names and TOKENIZER_FILE not in names:
        problems.append(f"it has neither {CONFIG_FILE} nor {TOKENIZER_FILE}, so that it is no model and no tokenizer")
    return problems


def model_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the files of a model folder that are sent, and the names of those that loading it does not need.

    Raises:
        ModelNotSent: with everything that is wrong with the folder.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        others = sorted(f"{path.name}/" for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise ModelNotSent(f"{folder} cannot be read: {error}") from error
    if problems := model_problems([path.name for path in files]):
        raise ModelNotSent(
            f"{folder} cannot be sent: {'; '.join(problems)}. A folder with configuration, tokenizer and weights as "
            f"{WEIGHTS} only can be"
        )
    sent = [path for path in files if is_model_file(path.name)]
    return sent, [*(path.name for path in files if path not in sent), *others]


def upload_model(client: ServiceClient, folder: Path, on_progress: Progress | None = None) -> str:
    """Send the files of a model that the service does not have; return what a submission names it by.

    Raises:
        ModelNotSent: the folder has files that a service does not take, or lacks some.
        ServiceUnreachable, StorageRefused, ServiceRefused: as `upload_file`.
    """
    files = {path.name: path for path in model_files(folder)[0]}
    try:
        described = {name: {"sha256": _sha256(path), "size": path.stat().st_size} for name, path in files.items()}
    except OSError as error:
        raise StorageRefused(f"{folder} cannot be read: {error}") from error
    announced = {"name": _plain_name(folder), "files": described}
    found = client.post("files/models", announced)
    for name in found["missing"]:
        upload_file(client, files[name], on_progress)
    if found["missing"]:
        found = client.post("files/models", announced)
    if not found["complete"]:
        raise StorageRefused(f"{folder} was changed while it was sent: {', '.join(found['missing'])}")
    return found["model"]


def upload_file(client: ServiceClient, path: Path, on_progress: Progress | None = None) -> str:
    """Send a file unless the service has it; return its digest and name, as a submission names it.

    An interrupted upload is continued by the same call; a file that arrived damaged is sent once more.

    Args:
        client: of the service.
        path: the file.
        on_progress: called with the bytes that are there, and the file's.

    Raises:
        ServiceUnreachable: the service does not answer any more.
        StorageRefused: the file cannot be read, or was changed meanwhile.
        ServiceRefused: the service does not take it.
    """
    name, failures, was_damaged = _plain_name(path), 0, False
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
                    status = error.status if isinstance(error, ServiceRefused) else None
                    is_damaged = status == HTTPStatus.UNPROCESSABLE_ENTITY and _sha256(path) == digest
                    if failures == _MOST_FAILURES or (is_damaged and was_damaged):
                        raise
                    if not (is_damaged or status in (None, HTTPStatus.CONFLICT)):
                        raise
                    was_damaged = was_damaged or is_damaged
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


def _model_names(tree: Any, overrides: Sequence[tuple[str, Any]]) -> Iterator[str]:
    """Yield what a sweep file has as names of models and tokenizers."""
    sections = [_at(tree, ("base", "model")), _at(tree, ("judge", "reward_model"))]
    values = [section if isinstance(section, str) else _at(section, ("name_or_path",)) for section in sections]
    values.append(_at(tree, ("base", "model", "tokenizer")))
    values += [_at(tree, ("search", path)) for path in _MODELS]
    values += [value for path, value in overrides if path.removeprefix("base.") in ("model", *_MODELS)]
    for value in values:
        yield from _texts(value)


def _first(folders: Sequence[Path], name: str, test: Callable[[Path], bool]) -> Path | None:
    """Return the first path of this name that passes; None for a text that is no path, too."""
    try:
        return next((path for folder in folders if test(path := folder / Path(name).expanduser())), None)
    except (OSError, ValueError, RuntimeError):
        return None
