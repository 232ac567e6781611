"""A clone from a checkpoint: which one it is, and whether the clone can go on under it."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from uuid import uuid4

from orchestrator.commands.hands import CannotDo
from orchestrator.driving.forks import making
from orchestrator.study.reader import StudyReader
from orchestrator.study.records import Fork, TrialRecord
from trainer.config import TrialConfig
from trainer.storage.durable import write_text
from trainer.storage.manifest import pin
from trainer.training.schedule import total_updates

_SAMPLES = "samples.jsonl"


@contextmanager
def held_checkpoint(study: StudyReader, parent: TrialRecord, config: TrialConfig) -> Generator[Fork]:
    """The newest good checkpoint of `parent`, held for a trial with this configuration that is queued inside.

    Whatever goes wrong inside, it is let go of again; a killed process leaves it to the driver.
    """
    folder, name = study.folder, study.folder.name
    anew = "without --from-checkpoint the clone begins from the start model"
    if parent.state.finished:
        gone = "and the checkpoints of an ended trial are removed"
        raise CannotDo(f"trial {parent.number} of {name} is {parent.state}, {gone}; {anew}")
    runs = [folder.attempt(parent.number, attempt) for attempt in range(1, parent.attempts + 1)]
    if parent.fork is not None:
        runs.insert(0, folder.forks / parent.fork.place)
    to = folder.forks / uuid4().hex
    with making(folder), ExitStack() as undo:
        undo.callback(shutil.rmtree, to, ignore_errors=True)
        step, passed = pin(runs, to)
        if step is None:
            told = "; ".join(passed) or "the first is written after `training.save_steps` updates"
            raise CannotDo(f"trial {parent.number} of {name} has no good checkpoint yet: {told}; {anew}")
        _check_length(study, parent, config, step)
        answers = next((run / _SAMPLES for run in reversed(runs) if (run / _SAMPLES).is_file()), None)
        if answers is not None:
            write_text(to / _SAMPLES, answers.read_text(encoding="utf-8"))
        yield Fork(step, to.name)
        undo.pop_all()


def _check_length(study: StudyReader, parent: TrialRecord, config: TrialConfig, step: int) -> None:
    pairs = study.settled.train_pairs
    if pairs is None and config.training.max_steps is None:
        return
    total = total_updates(config.training, pairs or config.training.pairs_per_update)
    if total <= step:
        raise CannotDo(
            f"the newest checkpoint of trial {parent.number} is of update {step}, and the clone would have {total}: "
            f"set training.max_steps above {step}"
        )
