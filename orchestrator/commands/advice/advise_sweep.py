"""`advise_sweep`: advice on a sweep before training, from its settings and its pairs under the initial model.

Scores are kept in `cache/advice`, by the settings and the files that they depend on, so that `plan` can show advice
without running a model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from orchestrator.commands.advice.initial_scores import ScoringJob
from orchestrator.commands.model_sizing import parameters_of
from orchestrator.errors import DataError
from orchestrator.execution.local_cluster import worker_environment
from orchestrator.execution.slots import Slots, machine_gpus, plan_slots
from orchestrator.folders import SweepFolder
from orchestrator.gpu_locks import reserved_gpus
from orchestrator.redaction import redact
from orchestrator.spec.advice.advice_lines import (
    AdviceLine,
    data_advice,
    losses_of,
    settings_advice,
    trial_of,
    values_text,
)
from orchestrator.spec.advice.loss_advice import loss_advice, margin_table, weight_advice
from orchestrator.spec.advice.pair_scores import Distribution, MarginEffect, PairScores, length_bias
from orchestrator.spec.estimates.arrangement import arranged
from orchestrator.spec.estimates.input_checks import check_pair_counts
from orchestrator.spec.estimates.input_sizes import check_models, model_shape
from orchestrator.spec.samplers import StagedSampler, stage_paths
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.loss_config import DpoLoss, KtoLoss
from trainer.config.trial import DataConfig, FileSource, ModelConfig, TrialConfig, flatten
from trainer.probe import OUT_OF_MEMORY, UNUSABLE
from trainer.storage.atomic_files import digest_of, write_json

PROGRESS_DELAY = 2.0
"""Seconds before progress is shown."""
_POLL_SECONDS = 0.5
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class SweepAdvice:
    """The advice on a sweep. `counters`: what was computed and loaded for it; empty if the scores were kept."""

    name: str
    lines: tuple[AdviceLine, ...]
    scores: PairScores | None
    margins: tuple[MarginEffect, ...]
    notices: tuple[str, ...]
    counters: dict[str, int]

    @property
    def to_write(self) -> tuple[AdviceLine, ...]:
        """The lines that change a setting of the file; not those of a setting on which losses differ."""
        return tuple(line for line in self.lines if line.yaml is not None and line.setting not in self.disputed)

    @property
    def disputed(self) -> frozenset[str]:
        """Settings that several losses of the search share, with different advice."""
        found: dict[str, set[str | None]] = {}
        for line in self.lines:
            if line.setting is not None:
                found.setdefault(line.setting, set()).add(line.value)
        return frozenset(setting for setting, values in found.items() if len(values) > 1)

    def as_json(self) -> dict[str, Any]:
        """Return the advice as JSON values."""
        scores = self.scores
        pairs = None
        if scores is not None:
            desirable, undesirable = scores.labels
            pairs = {
                "split": scores.split,
                "scored": len(scores.chosen),
                "pairs_in_split": scores.pairs_in_split,
                "train_pairs": scores.train_pairs,
                "initial_model": scores.initial_model,
                "gaps": asdict(Distribution.of(scores.gaps)) if scores.paired else None,
                "right": scores.right if scores.paired else None,
                "lengths": asdict(length_bias(scores)) if scores.paired else None,
                "labels": None if scores.paired else {"desirable": desirable, "undesirable": undesirable},
                "near_duplicates": asdict(scores.repetition),
            }
        return {
            "name": self.name,
            "pairs": pairs,
            "margins": [asdict(effect) for effect in self.margins],
            "advice": [line.as_json() for line in self.lines],
            "notices": list(self.notices),
            "computed": self.counters,
        }


def free_advice(spec: SweepSpec, root: Path, train_pairs: int | None) -> SweepAdvice:
    """Return the advice that needs no model run: on settings, and on pairs that `advise` has scored before."""
    return _advice(spec, kept_scores(spec, root, None), train_pairs, (), {})


def advise_sweep(
    spec: SweepSpec,
    root: Path,
    *,
    rows: int | None = None,
    trust_remote_code: bool = False,
    on_progress: Callable[[str], None] = lambda _: None,
) -> SweepAdvice:
    """Return the advice; scores pairs under the initial model unless they were scored before.

    Args:
        spec: the sweep.
        root: the runs folder, whose cache the sweep shares.
        rows: score only this many pairs.
        trust_remote_code: whether Python code of the model's repository may run.
        on_progress: called with what is being done, at most twice a second.

    Raises:
        DataError: the model or the data cannot be used.
        SpecError: no trial fits this machine.
    """
    check_models(spec)
    check_pair_counts(spec)
    scores, counters = kept_scores(spec, root, rows), dict[str, int]()
    if scores is None:
        scores, counters = _score(spec, root, rows, trust_remote_code, on_progress)
        write_json(_kept_file(spec, root, rows if scores.is_sample else None), scores.as_json())
    made = _advice(spec, scores, scores.train_pairs, _notices(spec, scores), counters)
    shared = [f"{setting}: the losses of the search get different advice; not written" for setting in made.disputed]
    return replace(made, notices=(*made.notices, *sorted(shared)))


def _first_stages(spec: SweepSpec, lines: Sequence[AdviceLine]) -> Iterator[AdviceLine]:
    """Yield a line for each setting whose advised values lack the base's, with which earlier stages would train."""
    if not isinstance(spec.sampler, StagedSampler):
        return
    later = {path for stage in stage_paths(spec.sampler, spec.search)[1:] for path in stage}
    for line in lines:
        section, _, path = (line.setting or "").partition(".")
        if line.value is None or section != "search" or path not in later:
            continue
        current = flatten(spec.base.model_dump(mode="json")).get(path)
        advised = [float(value) for value in line.value.strip("[]").split(",")]
        if not isinstance(current, int | float) or current in advised:
            continue
        distances = [abs(value - current) for value in advised]
        nearest = advised[distances.index(min(distances))]
        text = f"the stages before that of {path} train with the base's {current:g}, which is not advised"
        reason = "a stage starts from the base, or the best trial so far"
        yield AdviceLine(
            line.topic, "change", text, reason, (), f"base.{path}", f"{current:g}", values_text([nearest], False)
        )


def _advice(
    spec: SweepSpec,
    scores: PairScores | None,
    train_pairs: int | None,
    notices: Sequence[str],
    counters: dict[str, int],
) -> SweepAdvice:
    lines = settings_advice(spec, _parameters(spec), train_pairs)
    margins: tuple[MarginEffect, ...] = ()
    if scores is not None:
        weights = weight_advice(spec, *scores.labels)
        lines = [*loss_advice(spec, scores), *weights, *lines, *data_advice(scores, losses_of(spec))]
        margins = margin_table(spec, scores)
    lines = [*lines, *_first_stages(spec, lines)]
    return SweepAdvice(spec.name, tuple(lines), scores, margins, tuple(notices), counters)


def _parameters(spec: SweepSpec) -> float | None:
    model = trial_of(spec).model
    shape = model_shape(model)
    if shape is not None:
        return float(shape.parameters)
    return None if model.name_or_path is None else parameters_of(model.name_or_path)


def _notices(spec: SweepSpec, scores: PairScores) -> list[str]:
    found: list[str] = []
    searched = [path for path in spec.search.paths if path.startswith(("data.", "model."))]
    if searched:
        found.append(f"the search varies {', '.join(searched)}: the advice is about the first point of the search")
    if scores.is_sample:
        found.append(
            f"{len(scores.chosen):,} of {scores.pairs_in_split:,} pairs were scored: shares and percentiles are of a "
            "sample, evenly spread; the sweep computes all"
        )
    return found


# --- kept scores -----------------------------------------------------------------------------------------------------


def kept_scores(spec: SweepSpec, root: Path, rows: int | None) -> PairScores | None:
    """Return scores that an earlier call has kept, of all pairs or of a sample of `rows`; None without any."""
    for sample in dict.fromkeys((None, rows)):
        file = _kept_file(spec, root, sample)
        if file.is_file():
            try:
                return PairScores.from_json(json.loads(file.read_bytes()))
            except (ValueError, KeyError, TypeError) as error:
                file.replace(file.with_name(f"{file.name}.damaged"))
                sys.stderr.write(f"{file} is damaged ({error}); renamed to .damaged\n")
    return None


def _kept_file(spec: SweepSpec, root: Path, rows: int | None) -> Path:
    trial, sft = trial_of(spec), spec.sft
    data = [trial.data, *([] if sft is None or sft.data is None else [sft.data])]
    files = [*(path for one in data for path in _data_files(one)), *_model_files(trial.model)]
    identity = {
        "format": _FORMAT,
        "split": _split(trial),
        "rows": rows,
        "bf16": trial.training.bf16,
        "data": trial.data.model_dump(mode="json"),
        "model": trial.model.model_dump(mode="json"),
        "sft": None if sft is None else sft.model_dump(mode="json"),
        "files": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files if path.is_file()],
    }
    return SweepFolder(root, spec.name).cache / "advice" / f"{digest_of(identity)[:32]}.json"


def _data_files(data: DataConfig) -> Iterator[Path]:
    for source in (*data.train, *(data.eval or ())):
        if isinstance(source, FileSource):
            yield Path(source.path)
    if data.chat_template is not None:
        yield Path(data.chat_template)


def _model_files(model: ModelConfig) -> Iterator[Path]:
    for name in (model.name_or_path, model.tokenizer):
        if name is not None and Path(name).is_dir():
            yield from sorted(path for path in Path(name).iterdir() if path.suffix in (".json", ".safetensors"))


def _split(trial: TrialConfig) -> str:
    """Return the split that a sweep scores anyway: training pairs for a reference, else held-out pairs."""
    loss = trial.loss
    compares = isinstance(loss, KtoLoss) or (isinstance(loss, DpoLoss) and any(t != "sft" for t, _ in loss.terms))
    return "train" if compares else "eval"


# --- the process that scores -----------------------------------------------------------------------------------------


def _score(
    spec: SweepSpec, root: Path, rows: int | None, trust_remote_code: bool, on_progress: Callable[[str], None]
) -> tuple[PairScores, dict[str, int]]:
    from orchestrator.driver.sft_stage import sft_config  # imports the study's libraries, which `plan` does not need

    spec, _ = arranged(spec, [machine_gpus()])
    slots, trial, sft = plan_slots(spec), trial_of(spec), sft_config(spec)
    if sft is not None and slots.processes > 1:
        raise DataError(
            f"the sft stage trains in {slots.processes} processes here, which advise does not start: run the sweep "
            "until its first trial, then advise again"
        )
    job = ScoringJob(
        trial.model_dump(mode="json"),
        None if sft is None else sft.model_dump(mode="json"),
        str(SweepFolder(root, spec.name).cache),
        "train" if _split(trial) == "train" else "eval",
        rows,
        trust_remote_code,
    )
    with tempfile.TemporaryDirectory() as folder, _gpus(spec.name, slots, on_progress):
        file, errors = Path(folder) / "job.json", Path(folder) / "stderr"
        file.write_text(json.dumps(asdict(job)), encoding="utf-8")
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [*_launcher(slots), "-m", "orchestrator.commands.advice.initial_scores", str(file)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=_environment(slots),
                encoding="utf-8",
            )
        try:
            last = _follow(process, on_progress)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        if last is None or process.returncode != 0:
            raise _failure(process.returncode, errors.read_text(encoding="utf-8", errors="replace"))
    return PairScores.from_json(last["scores"]), dict(last["counters"])


def _follow(process: subprocess.Popen[str], on_progress: Callable[[str], None]) -> dict[str, Any] | None:
    """Pass the progress on until the process has ended; return its last line, None without one."""
    lines: SimpleQueue[str | None] = SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    last, text = None, "starting"
    while True:
        try:
            line = lines.get(timeout=_POLL_SECONDS)
        except Empty:
            on_progress(text)
            continue
        if line is None:
            process.wait()
            return last
        found = json.loads(line)
        if "progress" in found:
            text = str(found["progress"])
            on_progress(text)
        else:
            last = found


def _failure(code: int, errors: str) -> DataError:
    lines = errors.strip().splitlines()
    if code == UNUSABLE:
        return DataError("\n".join(lines))
    what = "out of memory" if code == OUT_OF_MEMORY else f"exit {code}"
    return DataError(f"the initial model could not be scored ({what}): {redact(chr(10).join(lines[-3:]))}")


def _launcher(slots: Slots) -> list[str]:
    if slots.processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={slots.processes}"]


def _environment(slots: Slots) -> dict[str, str]:
    found = os.environ | worker_environment(slots.threads)
    return found if slots.gpus else found | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


def _gpus(name: str, slots: Slots, on_wait: Callable[[str], None]) -> AbstractContextManager[object]:
    """Reserve the GPUs of one trial."""
    least, _ = slots.gpus_needed
    return reserved_gpus(f"{name} (advise)", least, least, waits=True, on_wait=on_wait) if least else nullcontext()


class ProgressLine:
    """Writes progress to standard error after `PROGRESS_DELAY`: in a terminal one changing line, else each stage."""

    def __init__(self) -> None:
        self._began = self._written = time.monotonic()
        self._stage = self._width = ""

    def show(self, text: str) -> None:
        """Show what is being done."""
        now, stage = time.monotonic(), text.partition(":")[0]
        if now - self._began < PROGRESS_DELAY:
            return
        if sys.stderr.isatty():
            if now - self._written >= _POLL_SECONDS:
                line = f"{text} ({now - self._began:.0f} s)"
                sys.stderr.write(f"\r{line.ljust(len(self._width))}")
                sys.stderr.flush()
                self._width, self._written = line, now
        elif stage != self._stage:
            sys.stderr.write(f"{text}\n")
        self._stage = stage

    def close(self) -> None:
        """Remove the line from the terminal."""
        if self._width:
            sys.stderr.write(f"\r{' ' * len(self._width)}\r")
            sys.stderr.flush()
