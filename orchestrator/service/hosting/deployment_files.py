"""Renders a systemd unit and a Compose file that keep the service running."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from orchestrator.service import DEFAULT_HOST, DEFAULT_PORT, LARGEST_MODEL_GB
from orchestrator.service.hosting.web_server import ServeOptions

_PLAIN = re.compile(r"[\w@:,./=+-]+")
_RUNS, _DATA, _TLS = "/runs", "/data", "/tls"
"""Folders in the container."""
_UNIT = """\
# sudo cp THIS /etc/systemd/system/prefsweep.service && sudo systemctl enable --now prefsweep
# journalctl -u prefsweep shows the URL with the one-time code.
[Unit]
Description=prefsweep: the sweeps of {runs}
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
User={user}
Environment={home}
# HF_TOKEN=..., PGPASSWORD=... and the like for the drivers; readable by root only.
EnvironmentFile=-/etc/prefsweep.env
ExecStart={command}
# A stop or a restart ends the service only. Its drivers continue, and the service finds them again.
KillMode=process
Restart=on-failure
RestartSec=5
# Wrong options, and a runs folder or a port that another service has, are not tried again.
RestartPreventExitStatus=2 4
NoNewPrivileges=true

[Install]
WantedBy=multi-user.target
"""
_COMPOSE = """\
# docker compose up -d; docker compose logs shows the URL with the one-time code.
# First a person: docker compose run --rm prefsweep orchestrate token create NAME --role operator
# The drivers run in the container and end with it; the service resumes their sweeps when it starts again.
"""


def arguments(options: ServeOptions) -> list[str]:
    """Return the options of `orchestrate serve` that differ from the defaults."""
    found: list[str] = []
    if options.host != DEFAULT_HOST:
        found += ["--host", options.host]
    if options.port != DEFAULT_PORT:
        found += ["--port", str(options.port)]
    for name in options.names:
        found += ["--name", name]
    if options.certificate is not None:
        found += ["--ssl-certfile", str(options.certificate)]
    if options.key is not None:
        found += ["--ssl-keyfile", str(options.key)]
    if options.behind_proxy:
        found.append("--behind-proxy")
    for folder in options.data_folders:
        found += ["--data-folder", str(folder)]
    if options.at_once is not None:
        found += ["--at-once", str(options.at_once)]
    if options.largest_model != LARGEST_MODEL_GB:
        found += ["--largest-model", f"{options.largest_model:g}"]
    if options.mlflow.url:
        found += ["--mlflow-url", options.mlflow.url]
    if options.mlflow.edits:
        found.append("--mlflow-edits")
    if options.queue is not None:
        found += ["--queue", options.queue]
    return found


def render_unit(options: ServeOptions, root: Path, program: Path, user: str) -> str:
    """Return the unit of a service for `systemd`.

    Args:
        options: how the service is reached; its paths are absolute.
        root: the runs folder.
        program: the command `orchestrate`.
        user: who runs the service and its drivers.
    """
    command = " ".join(_quoted(word).replace("$", "$$") for word in (str(program), "serve", *arguments(options)))
    home = _quoted(f"ORCHESTRATE_HOME={root}")
    return _UNIT.format(runs=str(root).replace("%", "%%"), user=user, home=home, command=command)


def render_compose(options: ServeOptions, root: Path, image: str) -> str:
    """Return the Compose file of a service in a container with all GPUs.

    Args:
        options: how the service is reached; its paths are this machine's, and absolute.
        root: the runs folder on this machine.
        image: container image with prefsweep.
    """
    volumes = [f"{root}:{_RUNS}"]
    inside: list[Path] = []
    for number, folder in enumerate(options.data_folders):
        inside.append(Path(_DATA if len(options.data_folders) == 1 else f"{_DATA}/{number}"))
        volumes.append(f"{folder}:{inside[-1]}:ro")
    files: list[Path | None] = []
    for name, file in (("certificate.pem", options.certificate), ("key.pem", options.key)):
        files.append(None if file is None else Path(_TLS, name))
        volumes += [] if file is None else [f"{file}:{files[-1]}:ro"]
    published = options.host if options.host not in ("0.0.0.0", "::", "") else ""
    within = ServeOptions(
        "0.0.0.0",
        options.port,
        options.names or ("localhost",),
        files[0],
        files[1],
        options.behind_proxy,
        tuple(inside),
        options.at_once,
        options.largest_model,
        options.mlflow,
        options.queue,
    )
    variables: dict[str, str | None] = {"ORCHESTRATE_HOME": _RUNS}
    if options.queue is not None:
        variables["PGPASSWORD"] = None  # Compose takes its value from its own environment
    gpus = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    service: dict[str, Any] = {
        "image": image,
        "command": ["orchestrate", "serve", *arguments(within)],
        "environment": variables,
        "ports": [f"{f'{published}:' if published else ''}{options.port}:{options.port}"],
        "volumes": volumes,
        "init": True,
        "ipc": "host",
        "restart": "unless-stopped",
        "stop_grace_period": "5m",
        "deploy": {"resources": {"reservations": {"devices": [gpus]}}},
    }
    text = yaml.safe_dump({"services": {"prefsweep": service}}, sort_keys=False, width=120)
    return _COMPOSE + text.replace("$", "$$")  # Compose expands variables


def _quoted(word: str) -> str:
    """Return a word of a unit as text: quoted where it needs that, `%` is kept."""
    text = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return text if _PLAIN.fullmatch(word) else f'"{text}"'
