"""docs/configuration.md is what `make docs` writes, names every key, and its examples are valid sweep files."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.make_configuration import PAGE, make_page, read_examples
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.loading.serialization import schema

EXAMPLES = [(name, text) for name, texts in read_examples().items() for text in texts]
MINIMAL = {
    "name": "example",
    "base": {"model": "org/model", "data": {"train": "pairs.jsonl"}, "loss": {"kind": "simpo"}},
    "search": {"training.learning_rate": [3e-7, 1e-6], "loss.beta": [0.1, 2.0]},
    "budget": {"trials": 4},
}


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == make_page(), "docs/configuration.md is out of date: `make docs`"


def merged(tree: Any, more: Any) -> Any:
    """`more` over `tree`; what names its kind, its source or its model replaces the whole."""
    if not isinstance(tree, dict) or not isinstance(more, dict) or {"kind", "generated", "train"} & more.keys():
        return more
    return tree | {key: merged(tree.get(key), value) for key, value in more.items()}


@pytest.mark.parametrize(("section", "text"), EXAMPLES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(EXAMPLES)])
def test_an_example_is_a_valid_sweep(section: str, text: str, tmp_path: Path) -> None:
    for name in ("pairs", "sft", "alpaca_eval"):
        (tmp_path / f"{name}.jsonl").touch()
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    (tmp_path / "my-sft-model").mkdir()
    given = yaml.load(text, yaml.BaseLoader)  # noqa: S506  every value stays text: 6e-7 is what the file says
    minimal = MINIMAL if section not in ("search", "top") else {key: MINIMAL[key] for key in ("name", "base")}
    if "kind: simper" in text:  # it has no beta to search
        minimal = minimal | {"search": {"training.learning_rate": [3e-7, 1e-6]}}
    if given.get("base", {}).get("model", {}) and isinstance(given["base"]["model"], dict):
        minimal = minimal | {"base": {**MINIMAL["base"], "model": None}}  # type: ignore[dict-item]
    dumped = yaml.dump(merged(minimal, given))
    unquoted = re.sub(r"('[<>][^']*')|'", r"\1", dumped)  # the bounds of `require` begin with > and need their quotes
    assert load_spec_text(unquoted, tmp_path).name


def test_the_example_of_variables_and_shared_parts_is_a_valid_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pairs.jsonl").touch()
    for name in ("USER", "MODELS", "DATA"):
        monkeypatch.delenv(name, raising=False)
    text = (
        make_page().partition("## The file: variables, shared parts")[2].partition("```yaml\n")[2].partition("```")[0]
    )
    spec = load_spec_text(text, tmp_path)
    assert (spec.name, spec.base.model.name_or_path) == ("someone-simpo", "org/model")
    assert spec.sft is not None
    assert (spec.base.training.max_steps, spec.sft.training.max_steps) == (300, 300)


def test_every_key_is_in_an_example() -> None:
    shown = "\n".join(text for _, text in EXAMPLES)
    assert [key for key in keys(schema()) if not re.search(rf"\b{key}\b", shown)] == []


def keys(whole: dict[str, Any]) -> Iterator[str]:
    yield from whole["properties"]
    for model in whole["$defs"].values():
        yield from model.get("properties", ())
