"""A drawn point into a complete trial.

Every leaf that a trial can have, whatever its kind of loss: what may be searched and set.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, get_args, get_origin

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from orchestrator.errors import nearest
from orchestrator.spec.loading.validation_errors import models_in
from orchestrator.spec.search.dimensions import Scalar
from trainer.config.loss_config import LossConfig
from trainer.config.trial import TrialConfig, flatten

KIND = "loss.kind"
TWINS = {"loss.gamma": "loss.gamma_beta_ratio", "loss.gamma_beta_ratio": "loss.gamma"}
"""Two names of one margin: setting one clears the other."""

_LOSS: TypeAdapter[Any] = TypeAdapter(LossConfig)


class NoSuchLeaf(ValueError):
    """A path that names no leaf of the trial."""

    def __init__(self, path: str, leaves: Mapping[str, Any]) -> None:
        self.path = path
        under = [leaf for leaf in leaves if leaf.startswith(f"{path}.")]
        parent = path.rpartition(".")[0]
        self.hint = ""
        if under:
            self.problem = "is a group of leaves, not a leaf"
            self.hint = "its leaves: " + ", ".join(under)
        elif parent in leaves and leaves[parent] is None:
            self.problem = f"there is no such leaf, as {parent} is null"
            self.hint = f"give base.{parent} first"
        else:
            self.problem = "there is no such leaf in a trial"
            near = nearest(path, leaves)
            self.hint = f"did you mean {near}?" if near else ""
        super().__init__(f"{path}: {self.problem}" + (f" ({self.hint})" if self.hint else ""))


def of_kind(kind: str) -> dict[str, Any]:
    """The loss of this kind with its own defaults."""
    return _LOSS.validate_python({"kind": kind}).model_dump()


def place(base: TrialConfig, params: Mapping[str, Scalar]) -> TrialConfig:
    """`base` with these leaves. Another loss.kind starts from that kind's defaults; one of gamma and its ratio rules.

    Raises NoSuchLeaf for a path that is no leaf, and pydantic's ValidationError for an illegal trial (both ValueError).
    """
    tree = base.model_dump()
    kind = params.get(KIND)
    if isinstance(kind, str) and kind != base.loss.kind:
        tree["loss"] = of_kind(kind)
    leaves = flatten(tree)
    for path in params:
        if path not in leaves:
            raise NoSuchLeaf(path, leaves)
    for path, value in params.items():
        twin = TWINS.get(path)
        if twin is not None and value is not None and twin not in params:
            _put(tree, twin, None)
        _put(tree, path, value)
    return TrialConfig.model_validate(tree)


def _put(tree: dict[str, Any], path: str, value: Scalar) -> None:
    *groups, leaf = path.split(".")
    for group in groups:
        tree = tree[group]
    tree[leaf] = value


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
