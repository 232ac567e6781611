"""Ranges of `search` as other tools write them, each with the form to write here; ranges of whole-number settings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, TypeGuard, cast, get_args

from orchestrator.spec.loading.right_forms import flow
from orchestrator.spec.search.dimensions import Dimension, LogUniform, Uniform, all_values
from orchestrator.spec.search.trial_params import config_paths

_LOG = re.compile(r"log(?!it)|exp")
_CALL = re.compile(r"(?:\w+\.)*(\w+)\((.*)\)")
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_EXCLUSIVE = ("randint", "lograndint", "qrandint", "qlograndint")
"""Ray's ranges whose upper end is never drawn; numpy's and W&B's randint alike."""
_LOW, _HIGH = ("min", "low", "lower", "start", "from"), ("max", "high", "upper", "end", "to")
_LISTS = ("values", "categorical", "grid_search", "grid", "options", "list", "items", "suggest_categorical")


def is_whole_number(path: str) -> bool:
    """Return whether the setting takes whole numbers and no others, for every kind of loss that has it."""
    fields = config_paths().get(path, ())
    types = {each for field in fields for each in _plain_types(field.annotation)}
    return int in types and float not in types


def fraction_problem(path: str, dimension: Dimension) -> tuple[str, str] | None:
    """Return message and hint where a range of a whole-number setting has values that are no whole numbers."""
    if not isinstance(dimension, Uniform | LogUniform) or not is_whole_number(path):
        return None
    values = all_values(dimension)
    if values is not None and all(float(cast(float, value)).is_integer() for value in values):
        return None
    low, high = dimension.uniform if isinstance(dimension, Uniform) else dimension.log_uniform
    kind = "log_uniform" if isinstance(dimension, LogUniform) else "uniform"
    form = _range(path, low, high, log=kind == "log_uniform")
    return f"takes whole numbers, and {kind} draws others too", f"write {form}"


def range_form(path: str, entry: Any) -> str:
    """Return the form to write for a range or list of another tool; "" if it is not understood.

    `entry`: the file's value, such as {min: 1, max: 3}, {loguniform: [1e-6, 1e-4]} or the text
    `tune.loguniform(1e-6, 1e-4)`.
    """
    if isinstance(entry, str):
        return _of_call(path, entry)
    if not isinstance(entry, dict):
        return ""
    body = cast(Mapping[str, Any], entry)
    for name in _LISTS:
        if isinstance(body.get(name), tuple | list):
            return f"write {path}: {flow(body[name])}"
    if "value" in body:
        return f"one value goes under base: {_in_base(path, body['value'])}"
    kind = str(next((body[key] for key in ("distribution", "type", "dist", "sampling") if key in body), "")).lower()
    log = _LOG.search(kind) is not None or body.get("log") is True
    ends = [next((body[key] for key in keys if key in body), None) for keys in (_LOW, _HIGH)]
    for name, given in body.items():
        if isinstance(given, tuple | list) and len(cast(tuple[Any, ...], given)) in (2, 3):
            return _of_numbers(path, name.lower(), list(cast(tuple[Any, ...], given)))
        if isinstance(given, dict) and not any(_is_number(end) for end in ends):
            return range_form(path, {"type": name, **cast(dict[str, Any], given)})
    low, high = ends
    if not _is_number(low) or not _is_number(high):
        return _no_such_distribution(kind)
    if kind in ("log_uniform", "q_log_uniform"):  # W&B's, whose ends are exponents of e
        low, high = float(f"{math.exp(low):.3g}"), float(f"{math.exp(high):.3g}")
    step = next((body[key] for key in ("q", "step") if _is_number(body.get(key))), None)
    whole = "int" in kind or is_whole_number(path)
    return f"write {_range(path, low, high, log=log, step=step, whole=whole)}"


def _of_call(path: str, text: str) -> str:
    """Return the form for a call such as `tune.choice([1, 2])` or `trial.suggest_float("x", 1, 2, log=True)`."""
    call = _CALL.fullmatch(text.strip())
    name = (call[1] if call else text).lower()
    numbers = [float(each) if "." in each or "e" in each.lower() else int(each) for each in _NUMBER.findall(text)]
    if call is None or not numbers:
        return ""
    if "choice" in name or "categorical" in name or "grid" in name:
        return f"write {path}: {flow(numbers)}"
    if re.search(r"log\s*=\s*[Tt]rue", text):
        name = f"log{name}"
    return _of_numbers(path, name, numbers)


def _of_numbers(path: str, name: str, numbers: list[Any]) -> str:
    if not all(map(_is_number, numbers)) or len(numbers) < 2 or "norm" in name or "randn" in name:
        return _no_such_distribution(name)
    low, high, *rest = numbers
    step = rest[0] if rest else None
    whole = "int" in name or is_whole_number(path)
    if name in _EXCLUSIVE:
        high = high - 1
    return f"write {_range(path, low, high, log=_LOG.search(name) is not None, step=step, whole=whole)}"


def _range(
    path: str, low: float, high: float, *, log: bool, step: float | None = None, whole: bool | None = None
) -> str:
    """Return the range as the file writes it: `loss.beta: {uniform: [1, 2]}`."""
    if is_whole_number(path) if whole is None else whole:
        ends = [math.ceil(low), math.floor(high)]
        if ends[0] >= ends[1]:
            return f"{path}: [{ends[0]}]" if ends[0] == ends[1] else f"{path}: [{round(low)}]"
        body: dict[str, Any] = {"int_uniform": ends}
        if log:
            body["log"] = True
        elif step and float(step).is_integer() and step > 1:
            body["step"] = int(step)
        return f"{path}: {flow(body)}"
    if log:
        return f"{path}: {flow({'log_uniform': [low, high]})}"
    return f"{path}: {flow({'uniform': [low, high]} | ({'step': step} if step else {}))}"


def _in_base(path: str, value: Any) -> str:
    tree: Any = value
    for part in reversed(path.split(".")):
        tree = {part: tree}
    return f"base: {flow(tree)}"


def _no_such_distribution(kind: str) -> str:
    return "normal distributions are not offered; write uniform or log_uniform: [low, high]" if "norm" in kind else ""


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain_types(annotation: Any) -> set[type]:
    if isinstance(annotation, type) and not get_args(annotation):
        return {annotation}
    return {each for part in get_args(annotation) for each in _plain_types(part)}
