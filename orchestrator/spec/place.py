"""A drawn point into a complete trial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from orchestrator.errors import nearest
from orchestrator.spec.dimensions import Scalar
from trainer.config import TrialConfig, flatten
from trainer.loss_config import LossConfig

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
