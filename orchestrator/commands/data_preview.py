"""`orchestrate data`: loads the configuration of a sweep or trial file and selects the rows to show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import SpecError, SpecProblem
from orchestrator.folders import SweepFolder
from orchestrator.spec.loading.loader import load_with_notices
from orchestrator.spec.loading.overrides import parse_overrides
from orchestrator.spec.loading.validation_errors import read_document
from trainer.config.trial import TrialConfig
from trainer.config.yaml_files import load_trial

if TYPE_CHECKING:
    from trainer.data.row_preview import Preview, PreviewRow

SHOWN = 3
"""Rows shown without `--rows`."""


def config_of(file: Path, overrides: Sequence[str]) -> tuple[TrialConfig, list[str]]:
    """Return the configuration of the file with overrides, and notices about its loading.

    A file with `base` is a sweep file, any other with `model` or `data` a trial file, as for `python -m trainer`.

    Raises:
        SpecError: with all errors of the sweep file and the `--set` options.
        TrialError: the trial file is invalid.
    """
    document = read_document(file)
    value = document.value
    if isinstance(value, dict) and "base" not in value and ("model" in value or "data" in value):
        return load_trial(file, parse_overrides(overrides, "data.max_length=512")), []
    loaded = load_with_notices(file, overrides)
    notices = list(loaded.notices)
    searched = [path for path in loaded.spec.search.paths if path.startswith(("data.", "model."))]
    if searched:
        notices.append(
            f"the search varies {', '.join(searched)}; base is shown, --set {searched[0]}=... shows another value"
        )
    return loaded.spec.base, notices


def preview_here(config: TrialConfig, root: Path, *, trust_remote_code: bool = False) -> Preview:
    """Return the preview of this configuration's rows, using the cache of the runs folder `root`."""
    from trainer.data.row_preview import preview

    cache = SweepFolder(root, "data").cache
    scores = config.loss.needs_scores
    return preview(config.data, config.model, cache, trust_remote_code=trust_remote_code, needs_scores=scores)


def chosen_rows(
    preview: Preview, count: int | None, split: str | None = None, row: int | None = None
) -> tuple[list[PreviewRow], int]:
    """Return the rows to show, and the number of kinds of notices without an example among them.

    Args:
        preview: all rows.
        count: maximum number of rows: first an example of each kind of notice, most severe kinds first, then rows
            without notices; None for all rows in their order.
        split: only rows of `train` or `eval`.
        row: only rows with this number.

    Raises:
        SpecError: there is no such row.
    """
    rows = [item for item in preview.rows if split in (None, item.split) and row in (None, item.row)]
    if row is not None and not rows:
        of = f" of {split}" if split else ""
        read = "; ".join(
            f"{s.name}: {s.read:,} rows read, {s.drawn:,} used for {s.split}" for s in preview.report.sources
        )
        raise SpecError([SpecProblem(f"--row {row}", "", f"there is no such row{of} ({read})")])
    kinds = [finding.kind for finding in preview.report.findings]
    if count is None:
        return rows, 0
    picked: dict[int, PreviewRow] = {}
    for kind in dict.fromkeys(kinds):
        example = next((i for i, item in enumerate(rows) if any(n.kind == kind for n in item.notices)), None)
        if example is not None:
            picked.setdefault(example, rows[example])
    order = [*picked, *(i for i, item in enumerate(rows) if i not in picked and not item.notices)]
    order += [i for i in range(len(rows)) if i not in picked and rows[i].notices]
    shown = [rows[i] for i in order[:count]]
    shown_kinds = {notice.kind for item in shown for notice in item.notices}
    all_kinds = {notice.kind for item in rows for notice in item.notices}
    return shown, len(all_kinds - shown_kinds)
