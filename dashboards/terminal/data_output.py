"""Rows of preference data on a terminal; scored text is marked by color and by a label."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from trainer.data.row_preview import Preview, PreviewRow

_BAR = "  │ "
_COLORS = {"prompt": "bright_black", "chosen": "green", "rejected": "red"}
_DIRECTIONS = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))
"""Unicode characters that change the writing direction."""
_SEVERITY = {"fatal": "red", "bad_row": "red", "notice": "yellow"}


def print_data(made: Preview, rows: Sequence[PreviewRow]) -> None:
    """Print each row with notices, prompt and answers, then the summary of the data set."""
    console = Console(highlight=False)
    special = _special(made.special_tokens)
    for row in rows:
        _print_row(console, row, special)
    console.print("summary:", style="bold")
    for line in made.report.summary_lines():
        console.print(Text(f"  {_visible(line)}"), soft_wrap=not console.is_terminal)


def _print_row(console: Console, row: PreviewRow, special: re.Pattern[str] | None) -> None:
    left_out = "" if row.kept else ": left out"
    title = Text(_visible(f"{row.split} row {row.row} of {row.source}{left_out}"), style="bold")
    console.print(title, soft_wrap=not console.is_terminal)
    for notice in row.notices:
        severity = notice.severity.replace("_", " ")
        text = Text(f"  {severity}: {_visible(notice.text)} [{notice.kind}]", style=_SEVERITY[notice.severity])
        console.print(text, soft_wrap=not console.is_terminal)
    for name, text in (("prompt", row.prompt), ("chosen", row.chosen), ("rejected", row.rejected)):
        if text is None or row.lengths is None:
            continue
        tokens = row.lengths[name]
        scored = "not scored" if name == "prompt" else "scored"
        _line(console, Text(f"  {name}, {scored}, {tokens:,} token{'' if tokens == 1 else 's'}:", style="bold"))
        for line in text.split("\n"):
            _line(console, Text(_BAR) + _marked(line, _COLORS[name], special))
    console.print()


def _marked(line: str, color: str, special: re.Pattern[str] | None) -> Text:
    """Return the line in this color, with special tokens in reverse video."""
    out, at = Text(), 0
    for found in () if special is None else special.finditer(line):
        out.append(_visible(line[at : found.start()]), style=color)
        out.append(_visible(found.group()), style=f"{color} reverse")
        at = found.end()
    return out.append(_visible(line[at:]), style=color)


def _special(tokens: Sequence[str]) -> re.Pattern[str] | None:
    listed = sorted({token for token in tokens if token}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, listed))) if listed else None


def _visible(text: str) -> str:
    """Escape control characters: texts of the data must not control the terminal."""
    return "".join(_escaped(character) if _is_control(character) else character for character in text)


def _is_control(character: str) -> bool:
    return character != "\t" and (unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTIONS)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def _line(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True)  # only line breaks of the text itself
