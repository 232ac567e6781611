"""The README cannot lie: every command in it runs, its YAML loads, its links lead somewhere."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.spec.loading.loader import load_spec, load_spec_text

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ORCHESTRATE = [sys.executable, "-m", "orchestrator.cli"]
SMALL = [
    "--set=base.data.train=[{generated: instructions, rows: 64}]",
    "--set=base.data.eval=[{generated: instructions, split: eval, rows: 16}]",
    "--set=training.max_steps=2",
    "--set=training.pairs_per_update=8",
    "--set=sft.training.max_steps=2",
    "--set=evaluation.prompts=2",
    "--set=budget.trials=2",
]


def commands() -> list[str]:
    """Every `$ ...` line of the README's console blocks, in order."""
    blocks = re.findall(r"```console\n(.*?)```", README, flags=re.S)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def run(words: list[str], where: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "ORCHESTRATE_HOME": str(where / "runs"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


def test_there_are_commands() -> None:
    assert commands()[:2] == ["make quickstart", "make test"]


@pytest.mark.parametrize("command", commands())
def test_the_command_runs(command: str, where: Path) -> None:
    match command:
        case "make quickstart":
            requested = run(["make", "-n", "quickstart"], where)
            assert "orchestrate sweep sweeps/quickstart.yaml" in requested.stdout, requested.stderr
            # The same sweep, shortened: the whole one takes minutes.
            done = run([*ORCHESTRATE, "sweep", "sweeps/quickstart.yaml", *SMALL], where)
            assert "Best: trial" in done.stdout
        case "make test":
            done = run(["make", "-n", "test"], where)
            for tool in ("ruff check", "ruff format --check", "pyright", "lint-imports", "pytest"):
                assert tool in done.stdout
        case _ if " ui " in command:
            done = run_until_the_url(where)
        case _:
            words = shlex.split(command.replace("my-model", str(where / "my-model")))
            assert words[0] == ".venv/bin/orchestrate"
            done = run([*ORCHESTRATE, *words[1:]], where)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr


def run_until_the_url(where: Path) -> subprocess.CompletedProcess[str]:
    words = [*ORCHESTRATE, "ui", "quickstart"]
    env = {**os.environ, "ORCHESTRATE_HOME": str(where / "runs")}
    process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert re.match(r"http://127\.0\.0\.1:\d+/#/experiments/\d+/runs\?", url), f"{url}{out}{err}"
    return subprocess.CompletedProcess(words, process.returncode, url + out, err)


def test_the_exported_model_is_one(where: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(where / "my-model").config.model_type == "llama"
    assert "quickstart" in (where / "my-model" / "README.md").read_text(encoding="utf-8")


def test_the_yaml_is_the_shipped_sweep() -> None:
    block = re.search(r"```yaml\n(.*?)```", README, flags=re.S)
    assert block
    shown, shipped = load_spec_text(block.group(1), ROOT), load_spec(ROOT / "sweeps" / "llama3-8b.yaml")
    assert (shown.search, shown.goal, shown.resources) == (shipped.search, shipped.goal, shipped.resources)
    for path, value in shown.base.flat_params().items():
        if path not in ("training.eval_steps", "training.logging_steps"):
            assert shipped.base.flat_params()[path] == value, path


def test_links_and_pictures_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
