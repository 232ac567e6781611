"""Preparation of a sweep's data in this process."""

from pathlib import Path

from orchestrator.folders import DATA_FILE, SweepFolder, create_sweep_folder
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.trial import TrialConfig
from trainer.data import prepare
from trainer.data.data_report import DataReport


class PreparedHere:
    """Prepares at once and has no notices."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache

    def prepare(self, config: TrialConfig) -> str:
        return prepare(config.data, config.model, self._cache).report.model_dump_json()

    def notices(self, _: TrialConfig) -> list[str]:
        return []

    def score_notice(self, _: TrialConfig) -> str:
        return ""


def prepared_sweep(root: Path, spec: SweepSpec) -> tuple[SweepFolder, DataReport]:
    """The sweep's folder, with the files and the data that a driver has before it creates the study."""
    folder = SweepFolder(root, spec.name)
    create_sweep_folder(folder, dump_spec(spec))
    report = prepare(spec.base.data, spec.base.model, folder.cache).report
    (folder.path / DATA_FILE).write_text(report.model_dump_json())
    return folder, report
