"""What is printed: no full stop after a message that has one, no word glued to the next, nothing said twice."""

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import InvalidRunsFolder
from orchestrator.execution.stop_reasons import StopKind, StopReason
from tests.docs.test_house import MODULES, ROOT
from trainer.results import clause

FOREIGN = {"error", "reason", "reasons", "died", "cause", "message", "why", "failure", "refused", "stderr"}
"""Names of messages that others wrote: of libraries, of the system, of users."""
UNCHANGED = {"redact", "str", "first_line"}


def name_of(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Call(func=func, args=[first, *_]) if name_of(func) in UNCHANGED:
            return name_of(first)
        case _:
            return ""


def continued_messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Messages of others that an f-string ends with a full stop, or continues after a semicolon."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            for value, after in zip(node.values, node.values[1:], strict=False):
                continues = isinstance(after, ast.Constant) and str(after.value)[:1] in (".", ";")
                if continues and isinstance(value, ast.FormattedValue) and name_of(value.value) in FOREIGN:
                    yield value.lineno, ast.unparse(value)


def glued_words(module: Path) -> Iterator[tuple[int, str]]:
    """Strings that Python joins, of which the first ends and the second begins with a word."""
    before = ""
    with module.open(encoding="utf-8") as source:
        for token in tokenize.generate_tokens(source.readline):
            if token.type in (tokenize.NL, tokenize.COMMENT):
                continue
            text = token.string.strip("rRbBfFuU").strip("\"'") if token.type == tokenize.STRING else ""
            if " " in before and " " in text and re.search(r"[\w.,;:?!)]$", before) and re.match(r"[\w`(]", text):
                yield token.start[0], f"{before[-20:]}|{text[:20]}"
            before = text


def test_a_message_of_others_gets_no_second_full_stop() -> None:
    assert list(continued_messages(ast.parse("f'{path}: {error}. Give a folder'"))), "the kind is found"
    assert not list(continued_messages(ast.parse("f'{path}: {clause(error)}. Give a folder'")))
    found = {str(m.relative_to(ROOT)): list(continued_messages(ast.parse(m.read_text("utf-8")))) for m in MODULES}
    assert {module: at for module, at in found.items() if at} == {}
    assert clause("no such files..") == "no such files"
    assert ".;" not in str(InvalidRunsFolder("/runs", "It is a file."))


def test_no_two_words_are_glued_together(tmp_path: Path) -> None:
    module = tmp_path / "m.py"
    module.write_text("text = (\n    'a column of the question'\n    'Map it with columns'\n)\n")
    assert list(glued_words(module)), "the kind is found"
    found = {str(each.relative_to(ROOT)): list(glued_words(each)) for each in MODULES}
    assert {module: at for module, at in found.items() if at} == {}


@pytest.mark.parametrize("kind", StopKind)
def test_why_a_sweep_stopped_is_said_once(kind: StopKind) -> None:
    assert str(StopReason(kind)) == kind.value
    assert str(StopReason(kind, f"{kind.value} by `orchestrate stop`")) == f"{kind.value} by `orchestrate stop`"
    assert str(StopReason(kind, "enough (by me)")) == f"{kind.value}: enough (by me)"
