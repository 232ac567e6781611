"""The tests of the CUDA paths: marked `gpu`, skipped with a word where no GPU is (`make test-gpu`).

`PREFSWEEP_GPU_TESTS_DEVICE=cpu` runs their bodies on the CPU, so that they do not break on their first GPU.
"""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DEVICE = os.environ.get("PREFSWEEP_GPU_TESTS_DEVICE", "cuda")
if DEVICE == "cpu":
    os.environ["ACCELERATE_USE_CPU"] = "true"


def _has_device() -> bool:
    import torch  # seconds

    return DEVICE == "cpu" or torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder, and skip it where its device is missing."""
    here = [item for item in items if item.path.is_relative_to(HERE)]
    skipped = None if not here or _has_device() else pytest.mark.skip(reason="no CUDA device")
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if skipped is not None:
            item.add_marker(skipped)


@pytest.fixture(scope="session")
def on_gpu() -> bool:
    return DEVICE == "cuda"


@pytest.fixture(scope="session")
def device() -> "torch.device":  # noqa: F821
    """Where the test's tensors are. Prints the card, since a figure counts with its name."""
    import torch

    if DEVICE == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    return torch.device(DEVICE)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and prepared data, made once for a module's tests."""
    return tmp_path_factory.mktemp("cache")
