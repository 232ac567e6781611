"""Connections to this machine, which never ask a proxy of the environment (HTTP_PROXY, ALL_PROXY)."""

from __future__ import annotations

import os
from ipaddress import ip_address
from typing import TypedDict
from urllib.parse import urlsplit

_NAMES = ("localhost", "127.0.0.1", "::1")


class ClientOptions(TypedDict):
    """Options of an httpx client or call."""

    trust_env: bool


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def client_options(url: str) -> ClientOptions:
    """Return the options of every httpx client: to this machine, no proxy of the environment.

    NO_PROXY is not enough: httpx loads the package of a SOCKS proxy even if no request uses it.
    """
    try:
        host = urlsplit(url).hostname
    except ValueError:  # the client reports it
        host = None
    return {"trust_env": host is None or not is_loopback(host)}


def bypass_proxies() -> None:
    """Exempt this machine from the proxies of the environment, for MLflow, Ray, the hub and all child processes."""
    if not any(name.lower().endswith("_proxy") and name.lower() != "no_proxy" for name in os.environ):
        return
    exempt = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    names = [name.strip() for name in exempt.split(",") if name.strip()]
    if "*" not in names:
        names += [name for name in _NAMES if name not in names]
    os.environ |= {"no_proxy": ",".join(names), "NO_PROXY": ",".join(names)}
