"""The process that prepares a sweep's data, in this one."""

from pathlib import Path

from trainer.config.trial import TrialConfig
from trainer.data import prepare


class PreparedHere:
    """Prepares at once and has no notices."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache

    def prepare(self, config: TrialConfig) -> str:
        return prepare(config.data, config.model, self._cache).report.model_dump_json()

    def notices(self, _: TrialConfig) -> list[str]:
        return []
