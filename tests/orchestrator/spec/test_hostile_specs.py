"""Whatever a file says, the answer is a sweep or findings: never a traceback, never a side effect."""

from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import sweeps
from orchestrator.errors import SpecError
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.search.trial_params import config_paths
from orchestrator.spec.sweep_spec import SECTION_ORDER

HERE = Path(sweeps.__file__).parent
COMPLETE = (HERE / "quickstart.yaml").read_text()
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**20),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(
        ["", "no", "simpo", "dpo", "sigmoid", "hinge", "grid", "eval_loss", "a.jsonl", "../x", "\x00", "{x}"]
    ),
)
KEYS = st.sampled_from(
    [*SECTION_ORDER, *config_paths(), "zip", "choice", "uniform", "when", "step", "kind", "path", "model", "data", "0"]
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)


@given(st.lists(st.tuples(st.integers(0, 200), VALUES), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_values_in_any_place(changes: list[tuple[int, Any]]) -> None:
    tree: Any = yaml.safe_load(COMPLETE)
    for path, value in changes:
        groups = [tree, *_groups(tree)]
        group = groups[path % len(groups)]
        keys = [*group, *config_paths()]
        group[keys[path % len(keys)]] = value
    assert unexplained(yaml.safe_dump(tree)) == []


@given(
    st.integers(0, len(COMPLETE)),
    st.integers(0, 12),
    st.sampled_from(["", "\t", ":", "- ", "[", "}", "&a ", "*a", "!!str ", "#"]),
)
@settings(max_examples=60, deadline=None)
def test_a_file_cut_and_glued(start: int, length: int, glue: str) -> None:
    assert unexplained(COMPLETE[:start] + glue + COMPLETE[start + length :]) == []


@given(
    st.sampled_from([*config_paths(), *SECTION_ORDER, "search.loss.beta", "search.zip", "data.train.0.rows"]), VALUES
)
@settings(max_examples=60, deadline=None)
def test_any_override(path: str, value: Any) -> None:
    assert unexplained(COMPLETE, f"{path}={yaml.safe_dump(value, default_flow_style=True)}") == []


def _groups(tree: Any) -> list[dict[str, Any]]:
    inner = [value for value in tree.values() if isinstance(value, dict)]
    return [*inner, *(deep for value in inner for deep in _groups(value))]


def unexplained(text: str, *sets: str) -> list[str]:
    """What is wrong with the answer: nothing where it is a sweep, or findings with a place and a sentence each."""
    try:
        load_spec_text(text, HERE, sets)
    except SpecError as error:
        bad = [str(finding) for finding in error.problems if not (finding.where and finding.problem)]
        return bad if error.problems else ["refused without a finding"]
    return []
