"""`apply_params`: sampled settings applied to a base configuration; `config_paths`: all settings of a trial."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, cast, get_args, get_origin

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from orchestrator.errors import closest_match
from orchestrator.spec.loading.validation_errors import models_in
from orchestrator.spec.search.dimensions import Scalar
from trainer.config.loss_config import LossConfig
from trainer.config.trial import STORED, TrialConfig, flatten
from trainer.config.yaml_files import parse_scalar

LOSS_KIND = "loss.kind"
SEED = "training.seed"
"""Of the data order and of the initialisation of adapters."""
EQUIVALENT_PATHS = {"loss.gamma": "loss.gamma_beta_ratio", "loss.gamma_beta_ratio": "loss.gamma"}
"""Two names of one margin: setting one clears the other."""

_LOSS: TypeAdapter[Any] = TypeAdapter(LossConfig)


class UnknownPath(ValueError):
    """The path names no setting of the trial."""

    def __init__(self, path: str, known: Mapping[str, Any]) -> None:
        self.path = path
        under = [name for name in known if name.startswith(f"{path}.")]
        parent = path.rpartition(".")[0]
        self.hint = ""
        if under:
            self.problem = "is a group of settings, not a setting"
            self.hint = "its settings: " + ", ".join(under)
        elif parent in known and known[parent] is None:
            self.problem = f"there is no such setting, as {parent} is null"
            self.hint = f"give base.{parent} first"
        else:
            self.problem = "there is no such setting in a trial"
            near = closest_match(path, known)
            self.hint = f"did you mean {near}?" if near else ""
        super().__init__(f"{path}: {self.problem}" + (f" ({self.hint})" if self.hint else ""))


def default_loss(kind: str) -> dict[str, Any]:
    """Return the settings of the loss of this kind with their defaults."""
    return _LOSS.validate_python({"kind": kind}).model_dump()


def all_settings(config: TrialConfig) -> dict[str, Any]:
    """Return every setting as nested mappings, those too that are not dumped while unset (`LaterFields`)."""
    tree = config.model_dump()
    tree["data"] |= {name: getattr(config.data, name) for name in config.data.later}
    return tree


def apply_params(base: TrialConfig, params: Mapping[str, Scalar], *, is_new: bool = False) -> TrialConfig:
    """Return `base` with the settings `params`.

    Another loss.kind starts from that kind's defaults; setting gamma clears gamma_beta_ratio and the reverse.
    `is_new`: `params` come from a file or a command, so that values that are no longer allowed are refused; in a stored
    sweep they are accepted.

    Raises:
        UnknownPath: A path is no setting of a trial.
        ValidationError: The trial is invalid. Both are ValueErrors.
    """
    tree = all_settings(base)
    kind = params.get(LOSS_KIND)
    if isinstance(kind, str) and kind != base.loss.kind:
        tree["loss"] = default_loss(kind)
    known = flatten(tree)
    for path in params:
        if path not in known:
            raise UnknownPath(path, known)
    for path, value in params.items():
        equivalent = EQUIVALENT_PATHS.get(path)
        if equivalent is not None and value is not None and equivalent not in params:
            _set_path(tree, equivalent, None)
        _set_path(tree, path, read_list(path, value))
    return TrialConfig.model_validate(tree, context=None if is_new else STORED)


def _set_path(tree: dict[str, Any], path: str, value: Scalar) -> None:
    *groups, name = path.split(".")
    for group in groups:
        tree = tree[group]
    tree[name] = value


@cache
def config_paths() -> dict[str, tuple[FieldInfo, ...]]:
    """Return dotted path -> its fields, several where kinds of loss differ; lists and their contents are excluded."""
    found: dict[str, list[FieldInfo]] = {}
    _walk(TrialConfig, "", found)
    return {path: tuple(fields) for path, fields in found.items()}


@cache
def list_paths() -> frozenset[str]:
    """Return the paths of lists of groups: data.train, data.eval."""
    return frozenset(
        f"{section}.{name}"
        for section, outer in TrialConfig.model_fields.items()
        for model in models_in(outer.annotation)
        for name, field in model.model_fields.items()
        if models_in(field.annotation) and _is_list(field.annotation)
    )


# --- settings that are lists, as one value of a search ---------------------------------------------------------------

_WORD = re.compile(r"[A-Za-z_][\w.*/-]*")


@cache
def list_settings() -> frozenset[str]:
    """Return the settings whose value is a list, such as lora.target_modules. A searched value of them is one text."""
    return frozenset(path for path, fields in config_paths().items() if any(_is_list(f.annotation) for f in fields))


def list_as_text(path: str, value: Any) -> Any:
    """Return a list as the text that stands for it in a search, `[q_proj, v_proj]`; any other value unchanged.

    Optuna's tables and every table of trials hold plain values only.
    """
    if path not in list_settings() or not isinstance(value, list | tuple):
        return value
    items = list(cast(tuple[Any, ...], value))
    if any(isinstance(item, list | tuple | dict) for item in items):
        return value
    plain = all(not isinstance(item, str) or (_WORD.fullmatch(item) and parse_scalar(item) == item) for item in items)
    return "[" + ", ".join(map(str, items)) + "]" if plain and items else json.dumps(items)


def read_list(path: str, value: Any) -> Any:
    """Return the list that a searched text stands for; any other value unchanged."""
    if path not in list_settings() or not isinstance(value, str) or not (value[:1] == "[" and value[-1:] == "]"):
        return value
    if '"' in value or value == "[]":
        try:
            return tuple(json.loads(value))
        except ValueError:
            return value
    return tuple(parse_scalar(item.strip()) for item in value[1:-1].split(","))


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
