"""A SweepSpec as its file, every default written out; loading it gives the same SweepSpec."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import yaml

from orchestrator.spec.dimensions import Choice
from orchestrator.spec.numbers import BadScalar, plain
from orchestrator.spec.sweep import DOOR, SweepSpec


def dump(spec: SweepSpec) -> str:
    """The resolved sweep as YAML, in the order of the file's keys."""
    tree = spec.model_dump(mode="json")
    goal = tree.pop("goal")
    tree[goal["direction"]] = goal["metric"]
    tree["search"] = _search(spec)
    ordered = {key: tree[key] for key in DOOR if key in tree}
    return yaml.dump(ordered, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def spec_hash(spec: SweepSpec) -> str:
    """The sweep's identity: equal for equal sweeps, however their files were written."""
    return hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


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
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="'" if quoted else None)

    def represent_list_short(self, data: list[Any]) -> yaml.SequenceNode:
        """A list of scalars stays on one line."""
        flat = not any(isinstance(item, (dict, list)) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flat)


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(list, _Dumper.represent_list_short)
