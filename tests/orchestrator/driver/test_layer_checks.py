"""What `model.kernels` and `model.compile` need is asked for before a sweep begins."""

import json
from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.driver import preflight
from orchestrator.driver.preflight import check_layers
from orchestrator.errors import SpecError
from orchestrator.execution.slots import Slots
from orchestrator.spec.loading.loader import load_spec_text

SWEEP = """
name: layers
base: {{model: {model}, data: {{train: {{generated: instructions, rows: 64}}}}, training: {{pairs_per_update: 8}}}}
search: {{loss.beta: [2.0]{search}}}
"""
GPU, CPU = Slots(1, 1.0, 1), Slots(1, 0.0, 1)


def problems(model: str, slots: Slots, folder: Path, search: str = "") -> str:
    spec = load_spec_text(SWEEP.format(model=model, search=search), folder)
    try:
        check_layers(spec, slots)
    except SpecError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("search", ["", ", model.kernels: [auto, liger]"])
def test_liger_kernel_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: str) -> None:
    monkeypatch.setattr(preflight, "_installed", lambda name: False)
    kernels = "auto" if search else "liger"
    told = problems(f"{{generated: {{}}, kernels: {kernels}}}", GPU, tmp_path, search)
    assert "liger needs liger-kernel, which is not installed: pip install 'prefsweep[liger]'" in told
    assert not problems("{generated: {}}", GPU, tmp_path)  # auto does without


def test_liger_kernel_needs_a_gpu_and_an_architecture_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_installed", lambda name: True)
    assert not problems("{generated: {}, kernels: liger}", GPU, tmp_path)
    assert "liger runs on a GPU" in problems("{generated: {}, kernels: liger}", CPU, tmp_path)
    for kind, refused in (("llama", False), ("gpt_neox", True)):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"text_config": {"model_type": kind}}))
        told = problems(f"{{name_or_path: {folder}, kernels: liger}}", GPU, tmp_path)
        assert (f"models of type {kind} are not among gemma" in told) is refused


def test_compiling_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = "{generated: {}, compile: true}"
    monkeypatch.setattr(preflight.shutil, "which", lambda name: name if name == "gcc" else None)
    assert not problems(model, CPU, tmp_path)
    monkeypatch.setattr(preflight.shutil, "which", lambda name: None)
    assert "base.model.compile: torch.compile needs a C++ compiler" in problems(model, CPU, tmp_path)
    assert not problems("{generated: {}}", CPU, tmp_path)


def test_the_command_refuses_before_a_name_is_taken(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(preflight, "_installed", lambda name: False)
    file = tmp_path / "layers.yaml"
    file.write_text(SWEEP.format(model="{generated: {}, kernels: liger}", search=""))
    assert cli.main(["sweep", str(file)]) == 2
    told = capsys.readouterr().err
    assert "base.model.kernels: liger needs liger-kernel" in told
    assert "Traceback" not in told
    assert not (home / "runs" / "layers").exists()
    assert not (home / "layers").exists()
