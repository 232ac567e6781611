"""Checks of a sweep's inputs that need neither network nor model: `plan`, `sweep`, `resume` and `doctor` call them.

What they find would otherwise end the sweep after Ray has started. Each raises one error with all that it found.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import DataError
from orchestrator.spec.estimates.input_sizes import RowCounts, check_models, count_rows, models_read
from orchestrator.spec.judge_config import no_answer_for_checker
from orchestrator.spec.search.corners import valid_corners
from orchestrator.spec.search.trial_params import apply_params
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.hub_cache import cached_file, is_offline
from trainer.config.trial import DataConfig, FileSource, GeneratedSource, TrainingConfig, TrialConfig
from trainer.results import ModelError, TrialError

_SIZES = ("data.", "training.pairs_per_update", "training.num_train_epochs", "training.max_steps")
"""Settings that decide whether there are enough pairs for an update."""
_SFT = "the sft stage: "
_SMALL_FILES = 8_000_000
"""Bytes of files that are read whole in about a second."""


def check_inputs(spec: SweepSpec, *, is_new: bool) -> None:
    """Check what a sweep reads, before it starts. `is_new`: no driver has begun it, else a judge is not refused again.

    Raises:
        ModelError: a file of a model is damaged, or a model is absent and may not be downloaded.
        DataError: there are fewer pairs than one update, or the judge's prompts cannot be read.
    """
    check_models(spec)
    check_offline_models(spec)
    check_pair_counts(spec)
    if is_new:
        check_judge_prompts(spec)


def check_pair_counts(spec: SweepSpec) -> int | None:
    """Check that each trial and the SFT stage have enough training pairs for one update, as far as rows can be counted.

    Where the count is too small for an update and the held-out rows are
    split off by prompt, the rows of local files are read and split as for training.

    Returns:
        The exact number of `base`'s training pairs, before any is left out as too long, where it was needed; else None.

    Raises:
        DataError: with the sizes, once for each distinct message.
    """
    from trainer.training.schedule import total_updates  # numpy

    exact: dict[str, int | None] = {}
    problems: list[str] = []
    for subject, data, training in _uses_of_data(spec):
        pairs = count_rows(data).train
        if pairs is None:
            continue
        try:
            total_updates(training, pairs)
        except TrialError:
            key = data.model_dump_json()
            if key not in exact:
                exact[key] = _most_training_pairs(data, pairs)
            try:
                total_updates(training, exact[key] or 0)
            except TrialError as error:
                problems.append(f"{subject}{error}")
    if problems:
        raise DataError("\n".join(dict.fromkeys(problems)))
    return exact.get(spec.base.data.model_dump_json())


def _uses_of_data(spec: SweepSpec) -> Iterator[tuple[str, DataConfig, TrainingConfig]]:
    for config in _configs(spec):
        yield "", config.data, config.training
    if spec.sft is not None:
        yield _SFT, spec.sft.data or spec.base.data, spec.sft.training


def _configs(spec: SweepSpec) -> Iterator[TrialConfig]:
    """Yield the trials that may differ in data or in the sizes of updates."""
    if any(path.startswith(_SIZES) for path in spec.search.paths):
        yield from (config for _, config in valid_corners(spec.search, spec.base))
    else:
        yield spec.base
    yield from (apply_params(spec.base, given) for given in spec.enqueue if any(p.startswith(_SIZES) for p in given))


def _most_training_pairs(data: DataConfig, counted: int) -> int:
    """Return the training pairs of these sources, at most as many as are left after the split by prompt."""
    if data.eval is not None or counted == data.max_train_rows:
        return counted
    if all(isinstance(source, (FileSource, GeneratedSource)) for source in data.train):
        from trainer.data.row_selection import select_rows

        return len(select_rows(data).train)
    whole = count_rows(data.model_copy(update={"eval": data.train})).train  # nothing held out
    return counted if whole is None else whole


def read_small_files(data: DataConfig) -> RowCounts | None:
    """Return the rows of both splits of small local files, read and divided as for training; None for other sources.

    Raises:
        DataError: as a sweep would with these rows, before they are tokenized.
    """
    sources = (*data.train, *(data.eval or ()))
    files = [Path(source.path) for source in sources if isinstance(source, FileSource)]
    if len(files) < len(sources) or sum(file.stat().st_size for file in files if file.is_file()) > _SMALL_FILES:
        return None
    from trainer.data.data_findings import raise_if_refused
    from trainer.data.row_selection import select_rows

    try:
        found = select_rows(data)
        raise_if_refused(
            found.findings.as_tuple(), len(found.invalid), found.checked_rows, data.bad_rows, data.max_bad_share
        )
    except TrialError as error:
        raise DataError(str(error)) from error
    return RowCounts(len(found.train), len(found.eval), exact=True)


def check_judge_prompts(spec: SweepSpec) -> None:
    """Check that a local file of prompts for the judge can be read, has prompts, and answers where only these judge.

    Raises:
        DataError: with the file and what is wrong with it.
    """
    judge = spec.judge
    source = None if judge is None else judge.prompts_from
    if judge is None or not isinstance(source, FileSource):
        return
    from trainer.evaluation.prompt_files import parse_prompts, read_prompt_rows

    try:
        rows = read_prompt_rows(source)
        parse_prompts(source, rows, as_dialogue=True)  # whether the sweep's rows are dialogues is found with the data
    except TrialError as error:
        raise DataError(f"judge.prompts_from: {error}") from error
    if judge.only_checker and all((row.fields or {}).get("answer") is None for row in rows):
        raise DataError(no_answer_for_checker(len(rows)))


def check_offline_models(spec: SweepSpec) -> None:
    """Check that every model of the hub is in the cache of this machine where HF_HUB_OFFLINE forbids to download it.

    Raises:
        ModelError: with all that are absent.
    """
    if not is_offline():
        return
    absent = [
        name
        for name, revision in models_read(spec)
        if not Path(name).exists() and cached_file(name, "config.json", revision) is None
    ]
    if absent:
        raise ModelError(
            f"{', '.join(absent)}: neither a folder here nor in the cache of this machine, and HF_HUB_OFFLINE is set; "
            "correct the name, unset HF_HUB_OFFLINE, or set HF_HOME to a cache that has it"
        )
