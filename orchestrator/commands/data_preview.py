"""`orchestrate data`: the configuration in a sweep's or a trial's file, and which rows of its data are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import Finding, SpecError
from orchestrator.folders import SweepFolder
from orchestrator.spec.loading.loader import load_with_notices
from orchestrator.spec.loading.validation_errors import parse_document, read_document
from trainer.config.trial import TrialConfig
from trainer.config.yaml_files import Document, load_trial

if TYPE_CHECKING:
    from trainer.data.row_preview import Preview, PreviewRow

SHOWN = 3
"""Rows shown where nobody says how many."""


def config_of(file: Path, sets: Sequence[str]) -> tuple[TrialConfig, list[str]]:
    """Return the configuration whose data is meant, and what to say about how it was read.

    A file with `base` is a sweep's, any other with `model` or `data` a trial's, as for `python -m trainer`.

    Raises:
        SpecError: The file or a `--set` is wrong, with every finding.
        TrialError: A trial's file is wrong.
    """
    document = read_document(file)
    value = document.value
    if isinstance(value, dict) and "base" not in value and ("model" in value or "data" in value):
        return load_trial(file, _changes(sets)), []
    loaded = load_with_notices(file, sets)
    notices = list(loaded.notices)
    searched = [path for path in loaded.spec.search.paths if path.startswith(("data.", "model."))]
    if searched:
        notices.append(f"the search varies {', '.join(searched)}; shown is the base, --set {searched[0]}=... another")
    return loaded.spec.base, notices


def _changes(sets: Sequence[str]) -> list[tuple[str, Any]]:
    """What `--set` replaces in a trial's file."""
    changes: list[tuple[str, Any]] = []
    findings: list[Finding] = []
    for one in sets:
        path, equals, text = one.partition("=")
        if not equals or not path.strip():
            findings.append(Finding(f"--set {one}", "", "must be PATH=VALUE, such as data.max_length=512"))
            continue
        try:
            value: Document | None = parse_document(text, f"--set {one}") if text.strip() else None
        except SpecError as error:
            findings += error.findings
            continue
        changes.append((path.strip().removeprefix("base."), None if value is None else value.value))
    if findings:
        raise SpecError(findings)
    return changes


def preview_here(config: TrialConfig, root: Path, *, trust_remote_code: bool = False) -> Preview:
    """The rows of this configuration, with the cache of the sweeps under `root`."""
    from trainer.data.row_preview import preview

    cache = SweepFolder(root, "data").cache
    return preview(config.data, config.model, cache, trust_remote_code=trust_remote_code)


def chosen_rows(
    made: Preview, count: int | None, split: str | None = None, row: int | None = None
) -> tuple[list[PreviewRow], int]:
    """Return the rows to show, and how many kinds of notices have no example among them.

    Args:
        made: the whole preview.
        count: how many rows at most: first an example of each kind of notice, the gravest kinds first, then rows
            without any; None for all rows in their order.
        split: `train` or `eval` alone.
        row: the rows of this number alone.

    Raises:
        SpecError: There is no such row.
    """
    rows = [each for each in made.rows if split in (None, each.split) and row in (None, each.row)]
    if row is not None and not rows:
        of = f" of {split}" if split else ""
        read = "; ".join(f"{s.name}: {s.read:,} rows read, {s.drawn:,} used for {s.split}" for s in made.report.sources)
        raise SpecError([Finding(f"--row {row}", "", f"there is no such row{of} ({read})")])
    kinds = [finding.kind for finding in made.report.findings]
    if count is None:
        return rows, 0
    picked: dict[int, PreviewRow] = {}
    for kind in dict.fromkeys(kinds):
        example = next((i for i, each in enumerate(rows) if any(n.kind == kind for n in each.notices)), None)
        if example is not None:
            picked.setdefault(example, rows[example])
    order = [*picked, *(i for i, each in enumerate(rows) if i not in picked and not each.notices)]
    order += [i for i in range(len(rows)) if i not in picked and rows[i].notices]
    shown = [rows[i] for i in order[:count]]
    message = {notice.kind for each in shown for notice in each.notices}
    there = {notice.kind for each in rows for notice in each.notices}
    return shown, len(there - message)
