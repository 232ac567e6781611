from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.loading.loader import load_spec_text
from orchestrator.spec.sweep_spec import SweepSpec
from trainer.config.trial import TrialConfig

ROWS = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3


@pytest.fixture
def base() -> TrialConfig:
    return TrialConfig.model_validate({"model": "org/model", "data": {"train": "rows.jsonl"}})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    return tmp_path


@pytest.fixture
def load_text(folder: Path) -> Callable[..., SweepSpec]:
    """A sweep from its text; `name` and `base` are filled in where the text has none."""

    def load(text: str, *sets: str) -> SweepSpec:
        if "base:" not in text:
            text += "\nbase: {model: org/model, data: {train: rows.jsonl}}\n"
        if not text.startswith("name:") and "\nname:" not in text:
            text += "\nname: a\n"
        return load_spec_text(text, folder, sets)

    return load


@pytest.fixture
def findings(load_text: Callable[..., SweepSpec]) -> Callable[..., list[str]]:
    """What is said of a text that must be refused."""

    def refused(text: str, *sets: str) -> list[str]:
        with pytest.raises(SpecError) as caught:
            load_text(text, *sets)
        return [str(finding) for finding in caught.value.problems]

    return refused
