"""A bar on stderr for work that takes long enough to wonder about."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 2.0
"""Seconds before anything is shown."""


def chunks(items: Sequence[T], size: int, what: str) -> Iterator[Sequence[T]]:
    """`items` in pieces of `size`; says on stderr how far it is once it takes more than two seconds. Where stderr is
    no terminal it is one line.
    """
    from rich.console import Console
    from rich.progress import Progress

    started = time.monotonic()
    with ExitStack() as stack:
        bar: Progress | None = None
        task = None
        told = False
        for start in range(0, len(items), size):
            if not told and time.monotonic() - started > PATIENCE:
                told = True
                if sys.stderr.isatty():
                    bar = stack.enter_context(Progress(console=Console(stderr=True), transient=True))
                    task = bar.add_task(what, total=len(items), completed=start)
                else:
                    sys.stderr.write(f"{what}: {len(items):,} rows\n")
            yield items[start : start + size]
            if bar is not None and task is not None:
                bar.update(task, completed=min(start + size, len(items)))
