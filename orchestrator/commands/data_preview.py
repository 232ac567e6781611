"""`orchestrate data`: loads the configuration of a sweep or trial file and selects the rows to show.

Also checks, before a sweep starts and in `plan`, whether its first rows need a decision on the chat template, and
whether rows of local files have what its losses and metrics read.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import DataError, SpecError, SpecProblem
from orchestrator.folders import SweepFolder
from orchestrator.spec.loading.loader import load_with_notices
from orchestrator.spec.loading.overrides import parse_overrides
from orchestrator.spec.loading.validation_errors import read_document
from orchestrator.spec.search.corners import corner_configs
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.hub_cache import model_file
from trainer.config.trial import DataConfig, FileSource, ModelConfig, TrialConfig
from trainer.config.yaml_files import Document, load_trial
from trainer.results import TrialError

if TYPE_CHECKING:
    from trainer.data.data_findings import FindingKind
    from trainer.data.formats import Preference
    from trainer.data.row_preview import Preview, PreviewRow

SHOWN = 3
"""Rows shown without `--rows`."""
_FIRST_ROWS = 8
"""Rows of each file that `check_rows` reads."""
_UNDECIDED: tuple[FindingKind, ...] = ("template_undecided", "needs_template")
"""Findings that `data.apply_template` answers."""


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
    """Return the preview of this configuration's rows, using the cache of the runs folder `root`.

    It is refused also where the rows are fewer than one update.
    """
    from trainer.data.row_preview import preview
    from trainer.training.schedule import total_updates

    cache = SweepFolder(root, "data").cache
    found = preview(config.data, config.model, cache, trust_remote_code=trust_remote_code, loss=config.loss)
    if found.refused is None:
        try:
            total_updates(config.training, found.report.train_rows)
        except TrialError as error:
            return replace(found, refused=error)
    return found


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


# --- before a sweep --------------------------------------------------------------------------------------------------


def check_rows(spec: SweepSpec, document: Document) -> None:
    """Check rows of local files: their columns, their templates, and their labels where they have one response each.

    Raises:
        DataError: a file cannot be opened, or lacks a column.
        SpecError: with the setting and its values.
    """
    _check_columns(spec)
    _check_templates(spec, document)
    _check_labels(spec, document)


def _check_columns(spec: SweepSpec) -> None:
    from trainer.data import UnreadableData
    from trainer.data.sources import first_rows, read_source

    stage = () if spec.sft is None or spec.sft.data is None else (spec.sft.data,)
    for source in (source for data in (spec.base.data, *stage) for source in (*data.train, *(data.eval or ()))):
        if not isinstance(source, FileSource):
            continue
        try:
            first_rows(source, _FIRST_ROWS)
        except UnreadableData:
            try:
                read_source(source)  # a later row may have the column
            except UnreadableData as error:
                raise DataError(str(error)) from error


def _check_templates(spec: SweepSpec, document: Document) -> None:
    """Check the first rows of local files for plain text of which only `data.apply_template` says how it is rendered.

    A sweep checks every row of all its sources; this finds the usual case before it starts, and in `plan`.

    Raises:
        SpecError: with the setting and its values.
    """
    problems: list[SpecProblem] = []
    parts = [("base", spec.base.data)]
    if spec.sft is not None and spec.sft.data is not None:
        parts.append(("sft", spec.sft.data))
    for section, data in parts:
        if data.apply_template is True or "data.apply_template" in spec.search.paths:
            continue
        plain = [row for source in (*data.train, *(data.eval or ())) for row in _plain_rows(source, data)]
        kind = next(_undecided(plain, data, spec.base.model), None) if plain else None
        if kind is not None:
            from trainer.data.data_findings import DataFinding, severity_of

            finding = DataFinding(kind=kind, severity=severity_of(kind), count=0, rows=())
            loc = (section, "data", "apply_template")
            where = document.location(loc)
            problems.append(SpecProblem(where, ".".join(loc), f"the rows {finding}", finding.advice))
    if problems:
        raise SpecError(problems)


def _check_labels(spec: SweepSpec, document: Document) -> None:
    """Check the text of all rows of local files where they have one response and a label, or where KTO reads them.

    A sweep checks this of hub data too, once it has read them.

    Raises:
        SpecError: settings that need pairs; rows that all have one label or one prompt.
    """
    data = spec.base.data
    are_local = all(isinstance(source, FileSource) for source in (*data.train, *(data.eval or ())))
    kinds = {spec.base.loss.kind, *spec.search.listed_values("loss.kind")}
    if not are_local or not ("kto" in kinds or has_labels(data)):
        return
    configs = (spec.base, *corner_configs(spec.search, spec.base))
    losses = list({config.loss.model_dump_json(): config.loss for config in configs}.values())
    from orchestrator.driver.data_stage import label_problems
    from trainer.data import UnreadableData
    from trainer.data.columns import PAIR
    from trainer.data.pair_dataset import check_counts
    from trainer.data.row_selection import select_rows

    confirmed = [] if spec.finalists is None else [data.model_copy(update={"eval_on": "confirm"})]
    try:
        first, *others = (select_rows(each) for each in (data, *confirmed))
    except UnreadableData as error:
        raise DataError(str(error)) from error
    problems: list[SpecProblem] = []
    if any(row.preference.is_single for row in (*first.train, *first.eval)):
        for path, message, hint in label_problems(spec):
            loc = tuple(path.split(".", 1) if path.startswith(("require.", "search.")) else path.split("."))
            problems.append(SpecProblem(document.location(loc), path, message, hint))
    for rows in (first.train, first.eval, *(other.eval for other in others)):
        sides = [sum(bool(getattr(row.preference, side)) for row in rows) for side in PAIR]
        several = len({row.key for row in rows}) > 1
        for loss in (loss for loss in losses if loss.kind == "kto" and rows):
            try:
                check_counts(loss, len(rows), *sides, several_prompts=several)
            except TrialError as error:
                problem = SpecProblem(document.location(("base", "data")), "base.data", str(error))
                problems += [problem] if problem not in problems else []
    if problems:
        raise SpecError(problems)


def has_labels(data: DataConfig) -> bool:
    """Return whether the first rows of a local file have one response and a label; what else they lack is not asked."""
    sources = (*data.train, *(data.eval or ()))
    return any(_has_labels(source) for source in sources if isinstance(source, FileSource))


def _has_labels(source: FileSource) -> bool:
    from trainer.data import UnreadableData
    from trainer.data.sources import first_rows

    try:
        rows = first_rows(source, _FIRST_ROWS)
    except UnreadableData:  # the data check says why
        return False
    return any("label" in row.fields for row in rows if row.fields is not None)


def _plain_rows(source: object, data: DataConfig) -> list[Preference]:
    """Return the first rows of a local file if all of them are plain text; what else they lack is not asked here."""
    if not isinstance(source, FileSource):
        return []
    from trainer.data import UnreadableData
    from trainer.data.chat_messages import InvalidRow
    from trainer.data.formats import to_preference
    from trainer.data.sources import first_rows

    try:
        rows = first_rows(source, _FIRST_ROWS)
    except UnreadableData:  # the data check says why
        return []
    found = [to_preference(row.fields, score=data.score) for row in rows if row.fields is not None]
    valid = [row for row in found if not isinstance(row, InvalidRow)]
    return valid if all(isinstance(row.prompt, str) for row in valid) else []


def _undecided(rows: Sequence[Preference], data: DataConfig, model: ModelConfig) -> Iterator[FindingKind]:
    """Yield the findings about these rows that `data.apply_template` answers.

    Rows that have a marker of the template by the tokenizer's files are rendered already, and need no tokenizer, which
    takes seconds to load.
    """
    undecided = data.apply_template is None and _has_template(model, data)
    markers = _turn_markers(model) if undecided and data.chat_template is None else ()
    if undecided and not all(any(marker in str(row.prompt) for marker in markers) for row in rows):
        from trainer.data import load_tokenizer
        from trainer.data.tokenization import PairTokenizer

        try:
            with tempfile.TemporaryDirectory() as cache:
                pairs = PairTokenizer(load_tokenizer(model, data, Path(cache)), data)(rows)
        except TrialError:  # the data check says why
            return
        notices = [notice for pair in pairs for notice in pair.notices]
    else:
        notices = [notice for row in rows for notice in row.notices]
    for kind in _UNDECIDED:
        if any(notice[0] == kind for notice in notices):
            yield kind


def _has_template(model: ModelConfig, data: DataConfig) -> bool:
    """Return whether the tokenizer has a chat template, by its files on this machine."""
    return data.chat_template is not None or model.generated is not None or _template(model) is not None


def _template(model: ModelConfig) -> str | None:
    """Return the text of the chat template in the tokenizer's files, None without one; of several as JSON."""
    if (file := _tokenizer_file(model, "chat_template.jinja")) is not None:
        return file.decode(errors="replace")
    found = _tokenizer_json(model, "tokenizer_config.json").get("chat_template")
    return found if isinstance(found, str) and found else json.dumps(found) if found else None


def _turn_markers(model: ModelConfig) -> tuple[str, ...]:
    """Return special tokens in the text of the tokenizer's template that it uses for nothing else, by its files.

    `PairTokenizer` looks for these and more.
    """
    if model.generated is not None:
        return ()
    template, named = _template(model) or "", set[str]()
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        found = _tokenizer_json(model, file)
        for token in (found.get(f"{name}_token") for name in ("bos", "eos", "pad", "unk", "mask")):
            named.add(str(token.get("content") if isinstance(token, dict) else token))
    added = _tokenizer_json(model, "tokenizer.json").get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    special = [str(token["content"]) for token in tokens if token.get("special") and token.get("content")]
    return tuple(text for text in special if text in template and text not in named)


def _tokenizer_json(model: ModelConfig, file: str) -> dict[str, Any]:
    try:
        found = json.loads(_tokenizer_file(model, file) or "{}")
    except (ValueError, RecursionError):  # loading the tokenizer says why
        return {}
    return found if isinstance(found, dict) else {}


def _tokenizer_file(model: ModelConfig, file: str) -> bytes | None:
    """Return the content of a file of the tokenizer on this machine, None without it; "" where it cannot be read."""
    name, revision = (model.tokenizer, None) if model.tokenizer else (str(model.name_or_path), model.revision)
    path = model_file(name, file, revision)
    try:
        return None if path is None else path.read_bytes()
    except OSError:  # loading the tokenizer says why
        return b""
