"""Every leaf that a trial can have, whatever its kind of loss: what may be searched and set."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from orchestrator.spec.problems import models_in
from trainer.config import TrialConfig


@cache
def leaves() -> dict[str, tuple[FieldInfo, ...]]:
    """Dotted path -> the fields it can be; lists and their contents are no leaves."""
    found: dict[str, list[FieldInfo]] = {}
    _walk(TrialConfig, "", found)
    return {path: tuple(fields) for path, fields in found.items()}


@cache
def lists() -> frozenset[str]:
    """Paths that hold lists of groups: data.train, data.eval."""
    return frozenset(
        f"{section}.{name}"
        for section, outer in TrialConfig.model_fields.items()
        for model in models_in(outer.annotation)
        for name, field in model.model_fields.items()
        if models_in(field.annotation) and _is_list(field.annotation)
    )


def _walk(model: type[BaseModel], prefix: str, found: dict[str, list[FieldInfo]]) -> None:
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        inner = models_in(field.annotation)
        if inner and not _is_list(field.annotation):
            for member in inner:
                _walk(member, f"{path}.", found)
        elif not inner:
            found.setdefault(path, []).append(field)


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple or any(_is_list(part) for part in get_args(annotation))
