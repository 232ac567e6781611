"""A new study's database: everything that is settled when a sweep begins, in one transaction."""

from __future__ import annotations

import time
import uuid

from optuna.exceptions import DuplicatedStudyError
from optuna.study import StudyDirection
from sqlalchemy import insert

from orchestrator.errors import NameTaken
from orchestrator.folders import SweepFolder
from orchestrator.spec.sweep import SweepSpec
from orchestrator.study import specs
from orchestrator.study.given import Queue
from orchestrator.study.ledger import Ledger
from orchestrator.study.settled import SETTLED, Settled
from orchestrator.study.store import Store, choose_location, remember_location
from orchestrator.study.tables import SCHEMA, SWEEP


def create_store(folder: SweepFolder, spec: SweepSpec, settled: Settled, storage: str | None) -> Store:
    """The database of a sweep that begins, in `storage` or in its folder. NameTaken where there is one."""
    folder.path.mkdir(parents=True, exist_ok=True)
    store = Store(choose_location(folder, storage), create=True)
    if storage is not None:
        remember_location(folder, storage)
    ledger, queue = Ledger(folder.name), Queue(folder.name)
    directions = [StudyDirection[goal.direction.upper()] for goal in spec.goals]
    try:
        with store.writing() as c:
            if ledger.identity(c) is not None:
                raise NameTaken(folder.name, folder.path)
            study_id = store.storage.create_new_study(directions, folder.name)
            store.storage.set_study_user_attr(study_id, SETTLED, settled.as_json())
            row = {"id": uuid.uuid4().hex, "schema": SCHEMA, "study_id": study_id, "driver": 0}
            c.execute(insert(SWEEP).values(sweep=folder.name, created_at=time.time(), **row))
            ledger.add_spec(c, spec.model_dump_json(), specs.digest(spec))
            ledger.add_event(c, "created", f"sweep {folder.name}", None)
            for leaves in spec.enqueue:
                queue.add(c, leaves, "given in the file", by_hand=False)
    except DuplicatedStudyError:
        raise NameTaken(folder.name, folder.path) from None
    return store
