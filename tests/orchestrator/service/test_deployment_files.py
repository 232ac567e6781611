"""The systemd unit and the Compose file, to the byte. UPDATE_GOLDEN=1 writes the files anew."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.cli.command_line import cli
from orchestrator.service.hosting.deployment_files import arguments, render_compose, render_unit
from orchestrator.service.hosting.web_server import ServeOptions
from tests.support.processes import call

GOLDEN = Path(__file__).parents[2] / "golden" / "service"
ROOT, PROGRAM = Path("/srv/sweep runs"), Path("/opt/prefsweep/.venv/bin/orchestrate")
PLAIN = ServeOptions()
FULL = ServeOptions(
    "0.0.0.0",
    8443,
    ("gpu1.example", "gpu1"),
    Path("/etc/tls/50% of it.pem"),
    Path("/etc/tls/key.pem"),
    data_folders=(Path("/data/pairs"), Path("/data/models")),
    at_once=2,
    queue="postgresql+psycopg://ann@db.example/sweeps",
)
RENDERED = {
    "prefsweep.service": render_unit(PLAIN, ROOT, PROGRAM, "ann"),
    "prefsweep-https.service": render_unit(FULL, ROOT, PROGRAM, "ann"),
    "compose.yaml": render_compose(PLAIN, ROOT, "registry.example/prefsweep:1"),
    "compose-https.yaml": render_compose(FULL, ROOT, "registry.example/prefsweep:1"),
}


@pytest.mark.parametrize("name", RENDERED)
def test_to_the_byte(name: str) -> None:
    golden = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(RENDERED[name])
    assert RENDERED[name] == golden.read_text(), f"{name} differs; if that is meant, UPDATE_GOLDEN=1"


@pytest.mark.parametrize("options", [PLAIN, FULL, ServeOptions(behind_proxy=True)])
def test_the_options_in_a_file_are_the_options_given(options: ServeOptions) -> None:
    """Paths in them need not exist where the file is printed, so they are compared and not parsed."""
    command = cli.commands["serve"]
    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert {word for word in arguments(options) if word.startswith("--")} <= flags
    line = next(
        line for line in render_unit(options, ROOT, PROGRAM, "ann").splitlines() if line.startswith("ExecStart=")
    )
    words = shlex.split(line.removeprefix("ExecStart=").replace("%%", "%"))
    assert words == [str(PROGRAM), "serve", *arguments(options)]


@pytest.mark.parametrize("name", ["compose.yaml", "compose-https.yaml"])
def test_the_container_has_every_file_that_its_command_names(name: str) -> None:
    service: dict[str, Any] = yaml.safe_load(RENDERED[name])["services"]["prefsweep"]
    inside = {volume.split(":")[1] for volume in service["volumes"]}
    named = {word for word in service["command"] if word.startswith("/")}
    assert named | {"/runs"} == inside
    assert service["command"][2:4] == ["--host", "0.0.0.0"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "prefsweep.service"
    unit.write_text(render_unit(PLAIN, ROOT, Path(shutil.which("true") or "/bin/true"), "root"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert "prefsweep.service" not in done.stderr, done.stderr


def test_the_command_prints_them_and_starts_nothing(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    code, unit, err = call(root, "serve", "--print-unit", "--at-once", "3")
    assert (code, err) == (0, "")
    assert f"ORCHESTRATE_HOME={root}" in unit
    assert unit.rstrip().count("serve --at-once 3\n") == 1
    code, compose, _ = call(root, "serve", "--print-compose", "--image", "x/y:1", "--data-folder", str(tmp_path))
    assert (code, yaml.safe_load(compose)["services"]["prefsweep"]["image"]) == (0, "x/y:1")
    for wrong in (["--print-compose"], ["--image", "x"], ["--print-unit", "--port", "0"]):
        assert call(root, "serve", *wrong)[0] == 2
    assert not root.exists()
