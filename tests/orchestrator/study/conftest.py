import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.folders import SweepFolder
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from tests.support.specs import GRID, make_spec


@pytest.fixture
def tmp_path(fast_tmp_path: Path) -> Path:
    return fast_tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    return SweepFolder(tmp_path, "s")


@pytest.fixture
def create(
    tmp_path: Path, folder: SweepFolder, template: Callable[[Path, SweepSpec], SweepFolder]
) -> Iterator[Callable[..., Study]]:
    made: list[Study] = []

    def make(spec: SweepSpec | None = None) -> Study:
        assert template(tmp_path, spec or make_spec(GRID)) == folder
        made.append(Study.open(folder))
        return made[-1]

    yield make
    for study in made:
        study.dispose()


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, SweepSpec], SweepFolder]:
    """A study made by copying one that was made before: making tables costs half a second."""
    made: dict[str, SweepFolder] = {}
    root = tmp_path_factory.mktemp("templates")

    def copy(to: Path, spec: SweepSpec) -> SweepFolder:
        key = spec.model_dump_json()
        if key not in made:
            made[key] = SweepFolder(root / str(len(made)), "s")
            Study.create(made[key], spec).dispose()
        target = SweepFolder(to, "s")
        shutil.rmtree(target.path, ignore_errors=True)
        shutil.copytree(made[key].path, target.path)
        return target

    return copy
