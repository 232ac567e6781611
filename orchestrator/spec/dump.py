"""A SweepSpec as its file, every default written out; loading it gives the same SweepSpec."""

from __future__ import annotations

import hashlib
import json
from typing import Any, cast

import yaml
from pydantic import BaseModel

from orchestrator.spec.dimensions import Choice
from orchestrator.spec.numbers import BadScalar, plain
from orchestrator.spec.sweep import DOOR, SweepSpec

_LEFT_OUT = ("storage", "mirror", "notify", "judge")
"""Keys that are not written where the sweep has none of them."""


def dump(spec: SweepSpec, *, brief: bool = False) -> str:
    """The resolved sweep as YAML, in the order of the file's keys; `brief`: without what is at its default."""
    tree = _not_default(spec) if brief else spec.model_dump(mode="json")
    for name in ("goal", "also", *(unset for unset in _LEFT_OUT if getattr(spec, unset) is None)):
        tree.pop(name, None)
    if spec.tracking.artifacts is None and "tracking" in tree:
        tree["tracking"].pop("artifacts", None)
    for direction in ("maximize", "minimize"):
        metrics = [goal.metric for goal in spec.goals if goal.direction == direction]
        if metrics:
            tree[direction] = metrics if len(metrics) > 1 else metrics[0]
    tree["search"] = _search(spec)
    ordered = {key: tree[key] for key in DOOR if key in tree}
    return yaml.dump(ordered, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _not_default(model: BaseModel) -> dict[str, Any]:
    """The fields that differ from their defaults, and `kind`, by which a union's member is told."""
    tree = model.model_dump(mode="json")
    out: dict[str, Any] = {}
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if name != "kind" and not field.is_required() and value == field.get_default(call_default_factory=True):
            continue
        out[name] = _slim(value, tree[name])
    return out


def _slim(value: Any, dumped: Any) -> Any:
    if isinstance(value, BaseModel):
        return _not_default(value)
    if isinstance(value, tuple) and any(isinstance(item, BaseModel) for item in cast(tuple[Any, ...], value)):
        return [_slim(item, told) for item, told in zip(cast(tuple[Any, ...], value), dumped, strict=True)]
    return dumped


def spec_hash(spec: SweepSpec) -> str:
    """The sweep's identity: equal for equal sweeps, however written, whoever is told, judges or keeps copies."""
    tree = spec.model_dump(
        mode="json", exclude={"notify": True, "judge": True, "mirror": True, "tracking": {"artifacts"}}
    )
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _search(spec: SweepSpec) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path, dimension in spec.search.dimensions.items():
        body = dimension.model_dump(mode="json")
        when = body.pop("when")
        if isinstance(dimension, Choice) and not when:
            out[path] = list(dimension.choice)
        else:
            out[path] = {key: value for key, value in body.items() if value is not None} | (
                {"when": when} if when else {}
            )
    if spec.search.zipped:
        out["zip"] = [{path: list(listed) for path, listed in group.items()} for group in spec.search.zipped]
    return out


_LINE_ENDS = "\x85\u2028\u2029"
"""Line ends of YAML 1.1 that 1.2 reads as they are: only escaped do they survive both."""


class _Dumper(yaml.SafeDumper):
    """Writes what both YAML 1.1 and 1.2 read alike: 6.0e-07 with its point, and quotes around `no` and '6e-7'."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True

    def represent_text(self, data: str) -> yaml.ScalarNode:
        """Quoted wherever YAML 1.2 would read something else than text; 1.1's own cases are PyYAML's."""
        try:
            quoted = plain(data) != data
        except BadScalar:
            quoted = True
        style = '"' if any(line_end in data for line_end in _LINE_ENDS) else "'" if quoted else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def represent_list_short(self, data: list[Any]) -> yaml.SequenceNode:
        """A list of scalars stays on one line."""
        flat = not any(isinstance(item, (dict, list)) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flat)


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(list, _Dumper.represent_list_short)
