import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

import sweeps
from orchestrator import cli
from orchestrator.cli import command_line, status_commands
from orchestrator.errors import NoTrialCompleted, StorageRefused, SweepHeld
from orchestrator.execution.stop_reasons import stop_signals_blocked
from orchestrator.folders import SweepFolder

SWEEPS = Path(sweeps.__file__).parent
QUICKSTART = str(SWEEPS / "quickstart.yaml")
HEAVY = ("torch", "transformers", "trl", "ray", "mlflow", "optuna", "datasets", "numpy")
pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def known(home: Path) -> SweepFolder:
    folder = SweepFolder(home, "known")
    folder.path.mkdir(parents=True)
    folder.spec.write_text("name: known\n")
    return folder


@pytest.fixture
def fake_commands(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the commands call: remembers its calls, answers with what the test put in."""
    answers: dict[str, Any] = {}

    def function(name: str) -> Any:
        def called(*arguments: Any, **named: Any) -> Any:
            answers.setdefault("calls", []).append((name, arguments, named))
            answer = answers.get(name)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return called

    fakes: dict[str, dict[str, str]] = {
        "orchestrator.cli.composition": {
            "start": "start",
            "resume": "resume",
            "serve_ui": "ui",
        },
        "orchestrator.cli.sweep_summary": {"watch_sweep": "watch"},
        "orchestrator.commands.status": {"status": "status", "best": "best"},
        "orchestrator.commands.model_export": {"export_best_model": "export"},
        "orchestrator.report_data": {"reasons_not_to_export": "reasons"},
    }
    for place, names in fakes.items():
        module = ModuleType(place)
        for name, told in names.items():
            setattr(module, name, function(told))
        monkeypatch.setitem(sys.modules, place, module)
    return answers


# --- weight ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["schema"], ["plan", "nothing.yaml"], ["data", "nothing.yaml"], ["status", "nothing"]],
    ids=lambda a: a[0],
)
def test_quick_commands_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from orchestrator.cli import main; main(sys.argv[1:]);"
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith("[]"), done.stderr


def test_plan_imports_no_framework() -> None:
    code = (
        "import sys; from orchestrator.cli import main; main(sys.argv[1:]);"
        f"print([m for m in {HEAVY[:-1]} if m in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "plan", QUICKSTART, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert json.loads(done.stdout)["trials"] == json.loads(done.stdout)["grid"]


def test_the_module_is_the_program() -> None:
    command = [sys.executable, "-m", "orchestrator.cli", "plan", "nothing.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"}, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "nothing.yaml: there is no such file\n"


# --- endings ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        (NoTrialCompleted("no trial completed"), 3, "no trial completed"),
        (SweepHeld("known", "process 7 on here"), 4, "process 7"),
        (StorageRefused("disk full"), 5, "disk full"),
        (OSError(28, "No space left on device", "/x/y"), 5, "disk error at /x/y: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("x"), 1, "internal error: "),
    ],
)
def test_every_ending_is_a_code_and_a_sentence(
    fake_commands: dict[str, Any],
    known: SweepFolder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ending: BaseException,
    code: int,
    said: str,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fake_commands["resume"] = ending
    assert cli.main(["resume", "known"]) == code
    out, err = capsys.readouterr()
    assert said in err
    assert "Traceback (most" not in out + err
    files = list(tmp_path.glob("orchestrate-*.traceback.txt"))
    assert len(files) == (1 if code == 1 else 0)
    assert all("ZeroDivisionError" in file.read_text() for file in files)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_commands_are_imported_ends_like_a_later_one(signum: signal.Signals) -> None:
    code = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'orchestrator.cli.options':\n"
        f"            os.kill(os.getpid(), {int(signum)})\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from orchestrator.cli import main\n"
        "sys.exit(main(['schema']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_python_starts_waits_where_the_starter_blocked_it(signum: signal.Signals) -> None:
    pipe = subprocess.PIPE
    with stop_signals_blocked():
        command = [sys.executable, "-m", "orchestrator.cli", "schema"]
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    process.send_signal(signum)
    assert (*process.communicate(), process.returncode) == ("", "interrupted\n", 130)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pln"], "No such command 'pln'"),
        (["plan"], "Missing argument"),
        (
            ["plan", QUICKSTART, "--set", "loss.bta=1"],
            "--set loss.bta=1: base.loss.bta: unknown key (did you mean beta?)",
        ),
        (["plan", QUICKSTART, "--name", "../x"], "--name ../x: name: "),
        (["status", "knwn"], "did you mean 'known'?"),
        (["stop", "a/b"], "cannot be a sweep's name"),
        (["best", "known", "--merge"], "--merge requires --export"),
    ],
)
def test_a_users_mistake_is_a_sentence(
    known: SweepFolder, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    before = sorted(known.root.rglob("*"))
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert "Traceback" not in err
    assert (out, sorted(known.root.rglob("*"))) == ("", before)


def test_no_summary_of_a_command_is_cut_on_80_columns() -> None:
    listed = CliRunner().invoke(command_line.cli, ["--help"], terminal_width=78).output.partition("Commands:")[2]
    assert len(listed.split("\n")) > len(command_line.cli.commands)
    assert "..." not in listed
    assert max(map(len, listed.split("\n"))) <= 80


def test_a_driver_that_runs_is_answered_with_how_to_see_and_how_to_stop_it() -> None:
    said = str(SweepHeld("known", "process 7 on here"))
    assert "`orchestrate attach known`" in said
    assert "`orchestrate stop known`" in said


# --- calls -----------------------------------------------------------------------------------------------------------
def test_sweep_starts_what_the_file_says(fake_commands: dict[str, Any], home: Path) -> None:
    fake_commands["start"] = 3
    arguments = ["sweep", QUICKSTART, "--set", "loss.beta=3.14159", "--name", "other", "--trust-remote-code"]
    assert cli.main(arguments) == 3
    ((_, (spec, where), named),) = fake_commands["calls"]
    assert (spec.name, spec.base.loss.beta, where) == ("other", 3.14159, home)
    assert named == {"resume_existing": False, "cluster_at": None, "trust_remote_code": True, "waits": True}
    assert "loss.beta" not in spec.search.paths


def test_the_other_commands_pass_on(
    fake_commands: dict[str, Any], known: SweepFolder, home: Path, tmp_path: Path
) -> None:
    fake_commands |= {"resume": 0, "ui": 0, "status": STATUS, "best": {"number": 1}, "export": tmp_path / "m"}
    fake_commands["reasons"] = []
    for arguments in (
        ["resume", "known", "--set", "budget.trials=9"],
        ["status", "known", "--watch"],
        ["best", "known", "--export", str(tmp_path / "m"), "--merge", "--json"],
        ["ui", "known", "--port", "5001", "--no-open"],
    ):
        assert cli.main(arguments) == 0
    assert fake_commands["calls"] == [
        (
            "resume",
            ("known", home, ("budget.trials=9",)),
            {"mirror": None, "cluster_at": None, "trust_remote_code": False, "retry_failed": False, "waits": True},
        ),
        ("watch", ("known", home), {}),
        ("best", ("known", home), {}),
        ("reasons", ("known", home, 1), {}),
        (
            "export",
            ("known", home, tmp_path / "m", True),
            {"compare": True, "trust_remote_code": False, "log": status_commands._log},  # pyright: ignore[reportPrivateUsage]
        ),
        ("ui", ("known", home, 5001), {"open_browser": False}),
    ]


STATUS = {
    "name": "known",
    "state": "running",
    "goal": {"metric": "eval_accuracies/logp", "direction": "maximize"},
    "best": 0,
    "trials": [
        {
            "number": 0,
            "state": "PRUNED",
            "reason": "loss is [nan]",
            "attempts": 1,
            "step": 3,
            "steps": 40,
            "run_id": None,
        }
        | {"params": {"loss.beta": 2.5}, "metrics": {"eval_accuracies/logp": 0.625}},
        {"number": 1, "state": "PAUSED", "reason": "", "params": {}, "metrics": {}, "step": 0, "steps": None},
    ],
}


def test_status_is_one_object_or_a_table(
    fake_commands: dict[str, Any], known: SweepFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_commands["status"] = STATUS
    assert cli.main(["status", "known", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS
    assert cli.main(["status", "known"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("known: running", "2.5", "0.625", "3/40", "loss is [nan]"))


def test_json_has_no_nan(fake_commands: dict[str, Any], known: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    fake_commands["best"] = {"number": 1, "metrics": {"loss": float("nan"), "grad_norm": [float("inf"), 1.0]}}
    assert cli.main(["best", "known", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == {"loss": None, "grad_norm": [None, 1.0]}


def test_plan_prints(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    assert cli.main(["plan", QUICKSTART, "--set", "loss.beta=2"]) == 0
    out = capsys.readouterr().out
    assert "loss.beta was searched and is now fixed" in out
    assert str(home / "quickstart" / "study.db") in out
    assert not home.exists()


def test_the_tracking_password_is_not_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter2@tracking.example/api")
    assert cli.main(["plan", QUICKSTART, "--json"]) == 0
    out = capsys.readouterr().out
    assert "https://tracking.example/api" in out
    assert "hunter2" not in out
