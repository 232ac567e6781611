"""Every command of README.md and docs/ runs, the README's YAML is a shipped sweep, links and named files exist."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from click import Context

from orchestrator.cli.command_line import cli
from orchestrator.spec.loading.loader import load_spec, load_spec_text
from orchestrator.spec.search.trial_params import config_paths
from orchestrator.spec.sweep_spec import SECTION_ORDER
from tests.support.processes import LIMIT_SECONDS, call
from tests.support.without_ray import without_ray
from trainer.config.trial import TrialConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
ORCHESTRATE = ["orchestrate"]
"""In this process and without Ray: starts cost seconds."""
PROCESS = [sys.executable, "-m", "orchestrator.cli"]
FEW_UPDATES = ["--set=training.max_steps=2", "--set=training.pairs_per_update=8", "--set=evaluation.prompts=2"]
FEW_UPDATES += ["--set=budget.concurrency=1"]  # each worker costs seconds
SMALL = [
    "--set=base.data.train=[{generated: instructions, rows: 64}]",
    "--set=base.data.eval=[{generated: instructions, split: eval, rows: 16}]",
    "--set=sft.training.max_steps=2",
    "--set=budget.trials=2",
    *FEW_UPDATES,
]
"""The same sweep, shortened: the whole one takes minutes."""


def commands() -> list[tuple[str, str]]:
    """Page and command of every `$ ...` line in console blocks, in order; one that is there again counts once."""
    found: dict[str, str] = {}
    for page in PAGES:
        for block in re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            for line in block.splitlines():
                if line.startswith("$ "):
                    found.setdefault(line.removeprefix("$ "), page.name)
    return [(page, command) for command, page in found.items()]


def test_the_table_of_commands_has_every_command_once() -> None:
    rows = README.split("| command | what it does |")[1].split("\n\n")[0].splitlines()[2:]
    named = [name for row in rows for name in re.findall(r"`([a-z]+)`", row.split("|")[1])]
    assert sorted(named) == sorted(cli.commands)


def test_the_table_of_keys_has_every_key_once_at_its_place() -> None:
    rows = README.split("| place | keys |")[1].split("\n\n")[0].splitlines()[2:]
    keys: dict[str, list[str]] = {"under `base:`": [], "under `search:`": [], "at the top:": []}
    for row in rows:
        _, place, listed, _ = row.split("|")
        (found,) = [start for start in keys if place.strip().startswith(start)]
        keys[found] += re.findall(r"`([\w.]+)`", listed)
    assert sorted(keys["under `base:`"]) == sorted(TrialConfig.model_fields)
    assert sorted(keys["at the top:"]) == sorted(SECTION_ORDER)
    assert set(keys["under `search:`"]) <= set(config_paths())


def run(words: list[str], where: Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run in `where`, or as a process in another folder, with the runs folder and the programs of `where`."""
    path = {"PATH": f"{where / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    if words[:1] == ORCHESTRATE:
        with contextlib.chdir(where), patch("huggingface_hub.constants.HF_HUB_OFFLINE", True), without_ray():
            return subprocess.CompletedProcess(words, *call(where / "runs", *words[1:], **path))
    env = {**os.environ, "ORCHESTRATE_HOME": str(where / "runs"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env |= path | {"PYTHONPATH": str(ROOT)}
    env.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.run(words, cwd=folder or where, env=env, capture_output=True, text=True, timeout=LIMIT_SECONDS)


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands name: sweeps, data, a trial, schedulers that keep what they get, a quickstart."""
    where = tmp_path_factory.mktemp("docs")
    (where / "sweeps").symlink_to(ROOT / "sweeps")
    quickstart = (ROOT / "sweeps" / "quickstart.yaml").read_text(encoding="utf-8")
    (where / "sweep.yaml").write_text(quickstart.replace("name: quickstart", "name: submitted"))
    (where / "trial.yaml").write_text(yaml.safe_dump(yaml.safe_load(quickstart)["base"]))
    rows = [
        {"prompt": f"Add {n} and 1.", "chosen": f"{n + 1}", "rejected": f"{n + 2}", "answer": f"{n + 1}"}
        for n in range(64)
    ]
    (where / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (where / "bin").mkdir()
    for scheduler in ("sbatch", "kubectl"):
        program = where / "bin" / scheduler
        program.write_text(f'#!/bin/sh\ncat > "{where}/submitted.txt"\necho submitted\n')
        program.chmod(0o755)
    done = run([*PROCESS, "sweep", "sweeps/quickstart.yaml", *SMALL], where)  # one with Ray
    assert done.returncode == 0, done.stderr
    assert "Best: trial" in done.stdout
    exported = run([*ORCHESTRATE, "best", "quickstart", "--export", "my-base"], where)
    assert exported.returncode == 0, exported.stderr
    own = (ROOT / "docs" / "own-model-and-data.md").read_text(encoding="utf-8")
    files = re.findall(r"```yaml\n# ([\w-]+\.yaml)\n(.*?)```", own, flags=re.DOTALL)
    assert len(files) == own.count("```yaml") == 5
    for name, text in files:
        (where / name).write_text(text, encoding="utf-8")
    return where


def test_there_are_commands() -> None:
    found = commands()
    assert {("README.md", "make quickstart"), ("README.md", "make test")} <= set(found)
    assert {page for page, _ in found} >= {"README.md", "getting-started.md", "reports.md", "clusters.md", "data.md"}


@pytest.mark.parametrize(("page", "command"), commands(), ids=[f"{page}: {command}" for page, command in commands()])
def test_the_command_runs(page: str, command: str, where: Path) -> None:
    program, *arguments = shlex.split(command.split(" > ")[0])
    if program == "make":
        done = run(["make", "-n", *arguments], where, ROOT)
        expected = {
            "quickstart": ["orchestrate sweep sweeps/quickstart.yaml"],
            "test": ["ruff check", "ruff format --check", "pyright", "lint-imports", "pytest"],
        }
        for part in expected[arguments[0]]:
            assert part in done.stdout, done.stderr
    elif program in (".venv/bin/orchestrate", "orchestrate"):
        done = run_orchestrate(arguments, where)
    else:
        raise AssertionError(f"{page}: no rule how to run {command}")
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr


def run_orchestrate(arguments: list[str], where: Path) -> subprocess.CompletedProcess[str]:
    """The command as it stands, but: whole sweeps are shortened, and what needs a cluster is parsed or faked."""
    match arguments:
        case [name, *rest] if "--address" in rest:  # no cluster here; its own tests start one
            words = [word.replace("sweep.yaml", str(ROOT)) for word in rest]
            # Click keeps the help option of the first context: it has the settings of the group.
            with cli.commands[name].make_context(name, words, parent=Context(cli, **cli.context_settings)):
                return subprocess.CompletedProcess(arguments, 0, "", "")
        case ["submit", *rest]:
            done = run([*ORCHESTRATE, *arguments], where)
            planned = run([*ORCHESTRATE, "plan", *rest], where)
            assert (where / "submitted.txt").read_text() == planned.stdout
            return done
        case ["advise", file] if file.startswith("sweeps/"):
            return run([*ORCHESTRATE, *arguments, *SMALL], where)
        case ["ui", name]:
            return run_until_the_url(["ui", name], r"http://127\.0\.0\.1:\d+/#/experiments/\d+/runs\?", where)
        case ["serve", *_]:
            return run_until_the_url(arguments, r"http://gpu1\.example:\d+/login/code/[\w-]+", where)
        case ["sweep", file] if file.startswith("sweeps/"):
            return run([*ORCHESTRATE, *arguments, *SMALL], where)
        case ["sweep", _]:
            return run([*ORCHESTRATE, *arguments, *FEW_UPDATES], where)
        case _:
            return run([*ORCHESTRATE, *arguments], where)


def run_until_the_url(arguments: list[str], pattern: str, where: Path) -> subprocess.CompletedProcess[str]:
    words = [*PROCESS, *arguments, "--port", "0"]
    env = {**os.environ, "ORCHESTRATE_HOME": str(where / "runs")}
    process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT_SECONDS)
    assert re.match(pattern, url), f"{url}{out}{err}"
    return subprocess.CompletedProcess(words, process.returncode, url + out, err)


@pytest.mark.parametrize(("head", "least"), [("threat | answer", 20), ("what fails | what happens", 8)])
def test_each_threat_to_the_service_names_tests_that_exist(head: str, least: int) -> None:
    page = (ROOT / "docs" / "service.md").read_text(encoding="utf-8")
    rows = page.split(f"| {head} | test |")[1].strip().partition("\n\n")[0].splitlines()[1:]
    written = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
    assert len(rows) >= least
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.rstrip("| ").rpartition("|")[2])
        assert named, row
        assert set(named) <= written, row


def test_the_exported_model_is_one(where: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(where / "my-model").config.model_type == "llama"
    assert "quickstart" in (where / "my-model" / "README.md").read_text(encoding="utf-8")


def test_the_yaml_is_the_shipped_sweep() -> None:
    """Search, objective and resources are the file's; of the base each setting that is shown."""
    block = re.search(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert block
    assert len(block.group(1).splitlines()) == 12
    shown, shipped = load_spec_text(block.group(1), ROOT), load_spec(ROOT / "sweeps" / "llama3-8b.yaml")
    assert (shown.search, shown.goal, shown.resources) == (shipped.search, shipped.goal, shipped.resources)
    assert shown.base.data.train == shipped.base.data.train
    ours, theirs = shown.base.flat_params(), shipped.base.flat_params()
    for path in shown.base.canonical_params():
        assert ours[path] == theirs[path], path


def test_links_and_pictures_exist() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
            if target.startswith("http"):
                continue
            other = (page.parent / target) if target else page
            assert other.exists(), f"{page.name}: {target}"
            if anchor and other.suffix == ".md":
                assert anchor in anchors(other), f"{page.name}: {target}#{anchor}"


def test_files_that_are_named_exist() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        for file in re.findall(r"`((?:tests|trainer|orchestrator|dashboards|benchmarks|docs)/[\w/]+\.py)`", text):
            assert (ROOT / file).is_file(), f"{page.name}: {file}"


def anchors(page: Path) -> set[str]:
    """GitHub's names of the page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
