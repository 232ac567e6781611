"""The house's own rules: sizes of modules and folders, names that are not ambiguous, no swallowed errors."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(p for package in ("trainer", "orchestrator", "dashboards") for p in (ROOT / package).rglob("*.py"))
LONGEST_MODULE = 450  # lines
SHORTEST_MEDIAN = 130  # lines, without __init__
LARGEST_FOLDER = 14  # modules, without __init__


def lines(module: Path) -> int:
    return len(module.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("module", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_is_short_and_swallows_nothing(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    assert lines(module) <= LONGEST_MODULE
    assert not re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{module}:{node.lineno} catches everything"
            assert not all(isinstance(s, ast.Pass) for s in node.body), f"{module}:{node.lineno} swallows an error"


def test_the_median_module_is_worth_its_file() -> None:
    sizes = sorted(lines(m) for m in MODULES if m.name != "__init__.py")
    assert sizes[len(sizes) // 2] >= SHORTEST_MEDIAN


def test_no_folder_has_too_many_modules() -> None:
    folders = Counter(str(m.parent.relative_to(ROOT)) for m in MODULES if m.name != "__init__.py")
    assert {folder: count for folder, count in folders.items() if count > LARGEST_FOLDER} == {}


def test_a_module_name_occurs_once() -> None:
    names = Counter(m.name for m in MODULES if m.name not in ("__init__.py", "__main__.py"))
    assert [name for name, count in names.items() if count > 1] == []
