"""Runs the code of a notebook in this process, one cell after the other, as a kernel does."""

import ast
import json
from pathlib import Path
from typing import Any


def run_notebook(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """The names that the cells leave, and what each code cell shows: the value of a last line that is an expression."""
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    names: dict[str, Any] = {"__name__": "__main__"}
    shown: list[Any] = []
    for number, cell in enumerate(content["cells"]):
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "a stored output is not what a reader gets"
            shown.append(_run_cell("".join(cell["source"]), f"{path.name}, cell {number}", names))
    return names, shown


def _run_cell(source: str, where: str, names: dict[str, Any]) -> Any:
    tree = ast.parse(source, where)
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr):
        exec(compile(tree, where, "exec"), names)
        return None
    exec(compile(ast.Module(tree.body[:-1], []), where, "exec"), names)
    return eval(compile(ast.Expression(last.value), where, "eval"), names)
