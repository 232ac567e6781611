"""Checks of the hub, gated models and data sets, the tracking server, the study's database and the mirror."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2

from orchestrator.commands.doctor.machine_checks import Check, CheckLevel
from orchestrator.errors import first_line
from orchestrator.loopback import client_options
from orchestrator.mirror import MirrorError, probe_mirror
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.tracking.tracking_store import store_problem
from trainer.config.hub_cache import cached_file, is_offline
from trainer.config.trial import HubSource

_TIMEOUT = 5.0
"""Seconds."""
_HTTP = {"http": 80, "https": 443}


def network_checks(root: Path, spec: SweepSpec | None) -> Iterator[Check]:
    """Yield the checks of access to hub, tracking server, database and object storage."""
    yield _token()
    if spec is not None:
        for kind, name in hub_names(spec):
            yield check_hub_access(kind, name)
    yield _tracking(root, spec)
    if spec is not None and spec.storage is not None:
        yield _database(spec.storage)
    for what, url in () if spec is None else (("mirror", spec.mirror), ("artifacts", spec.tracking.artifacts)):
        if url is not None:
            yield _check_storage(what, url)


def _token() -> Check:
    from huggingface_hub import get_token

    if get_token():
        return Check("hub token", CheckLevel.OK, "present")
    fix = "for gated models such as Llama: `hf auth login`, and accept the model's license on its page"
    return Check("hub token", CheckLevel.WARN, "none", fix)


def hub_names(spec: SweepSpec) -> list[tuple[str, str]]:
    """Return (kind, name) of the hub models and data sets that this sweep reads, including searched ones."""
    names: dict[tuple[str, str], None] = {}
    searched = spec.search.dimensions.get("model.name_or_path")
    models = [spec.base.model.name_or_path, spec.base.model.tokenizer, *getattr(searched, "choice", ())]
    for model in models:
        if isinstance(model, str) and not Path(model).exists():
            names["model", model] = None
    for data in (spec.base.data, *((spec.sft.data,) if spec.sft is not None and spec.sft.data is not None else ())):
        for source in (*data.train, *(data.eval or ())):
            if isinstance(source, HubSource):
                names["dataset", source.dataset] = None
    return list(names)


def check_hub_access(kind: str, name: str) -> Check:
    """Check that a model or data set can be downloaded, or is in the local cache."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError

    what = f"{kind} {name}"
    if kind == "model" and cached_file(name, "config.json") is not None:
        return Check(what, CheckLevel.OK, "in the cache of this machine")
    if is_offline():
        fix = "unset HF_HUB_OFFLINE, or download it on a machine with network and set HF_HOME to that cache"
        return Check(what, CheckLevel.FAIL, "not in the cache, and HF_HUB_OFFLINE is set", fix)
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    try:
        HfApi().auth_check(name, repo_type=kind)
    except GatedRepoError:
        return Check(
            what, CheckLevel.FAIL, "gated", f"accept its license at {page}, then `hf auth login` with that account"
        )
    except RepositoryNotFoundError:
        fix = "correct the name; a private repository needs a token with read access (`hf auth login`)"
        return Check(what, CheckLevel.FAIL, "not found, or private", fix)
    except (HTTPError, ImportError, OSError) as error:
        fix = f"check the network to {constants.ENDPOINT}, or copy its cache from another machine to HF_HOME"
        return Check(what, CheckLevel.WARN, f"the hub does not answer ({_name(error)})", fix)
    return Check(what, CheckLevel.OK, "can be downloaded")


def _name(error: Exception) -> str:
    """Return the error's type, as messages may contain the URL; a missing package, as for SOCKS proxies, by message."""
    return first_line(error) if isinstance(error, ImportError) else type(error).__name__


def _tracking(root: Path, spec: SweepSpec | None) -> Check:
    uri = (spec.tracking.uri if spec is not None else None) or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        return Check("tracking", CheckLevel.OK, f"MLflow in {root / 'mlflow.db'}")
    if (problem := store_problem(uri)) is not None:
        return Check("tracking", CheckLevel.FAIL, *problem)
    parts = urlsplit(uri)
    if parts.scheme not in _HTTP:
        return Check("tracking", CheckLevel.OK, f"a {parts.scheme or 'file'} store")
    where = f"{parts.hostname}:{parts.port or _HTTP[parts.scheme]}"  # without user and password of the URL
    health = f"{parts.scheme}://{where}{parts.path.rstrip('/')}/health"
    fix = "start it, or set another (tracking.uri, MLFLOW_TRACKING_URI); until then metrics are queued on disk"
    try:
        response = httpx2.get(health, timeout=_TIMEOUT, follow_redirects=True, **client_options(health))
    except (httpx2.HTTPError, httpx2.InvalidURL, ImportError, OSError, ValueError) as error:
        return Check("tracking", CheckLevel.WARN, f"{where} does not answer ({_name(error)})", fix)
    status = response.status_code
    if response.is_success:
        return Check("tracking", CheckLevel.OK, f"MLflow at {where} answers")
    if status in (401, 403):
        return Check("tracking", CheckLevel.OK, f"{where} answers and requires authentication ({status})")
    return Check("tracking", CheckLevel.WARN, f"{where} answers {status}: is it MLflow?", fix)


def _database(url: str) -> Check:
    parts = urlsplit(url)
    if not parts.scheme.startswith("postgresql"):
        return Check("study", CheckLevel.OK, f"{parts.scheme.partition('+')[0]} database")
    where = (parts.hostname or "localhost", parts.port or 5432)
    try:
        with socket.create_connection(where, timeout=_TIMEOUT):
            return Check("study", CheckLevel.OK, f"PostgreSQL at {where[0]}:{where[1]} answers")
    except OSError as error:
        fix = "start it, or set another in `storage:`; put its password into ~/.pgpass"
        found = f"PostgreSQL at {where[0]}:{where[1]} does not answer ({error.strerror or type(error).__name__})"
        return Check("study", CheckLevel.FAIL, found, fix)


def _check_storage(what: str, url: str) -> Check:
    """Write, read and delete an object, which is the only reliable check of permissions."""
    try:
        probe_mirror(url)
    except MirrorError as error:
        fix = "set the storage's credentials in the environment (AWS_PROFILE, ...)"
        return Check(what, CheckLevel.FAIL, str(error).removeprefix("mirror: "), fix)
    return Check(what, CheckLevel.OK, f"{url} can be written, read and deleted")
