"""A folder elsewhere, by the URL that fsspec and MLflow know it by: s3://bucket/prefix, gs://, file:///shared."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

_URL = re.compile(r"[a-z][a-z0-9+.-]*://\S+")
_EXAMPLES = "s3://bucket/prefix, gs://bucket/prefix or file:///shared/folder"


def _elsewhere(url: str) -> str:
    if not _URL.fullmatch(url):
        raise ValueError(f"must be a URL such as {_EXAMPLES}")
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ValueError("holds a name or a password; credentials come from the environment")
    if parts.query or parts.fragment:
        raise ValueError(f"must be a plain URL such as {_EXAMPLES}, without ? and #")
    if parts.scheme == "memory":
        raise ValueError("memory:// ends with its process")
    if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
        raise ValueError("a folder of this machine has three slashes: file:///shared/folder")
    if ".." in parts.path.split("/"):
        raise ValueError("must not hold ..")
    return url.rstrip("/")


Elsewhere = Annotated[str, AfterValidator(_elsewhere)]
"""A URL without credentials and without a slash at its end."""
