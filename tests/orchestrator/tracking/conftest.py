from pathlib import Path

import pytest

from orchestrator.tracking.mlflow_client import connect


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables and nothing in them: making it takes seconds."""
    root = tmp_path_factory.mktemp("mlflow")
    connect(root, f"sqlite:///{root / 'mlflow.db'}")
    return root / "mlflow.db"
