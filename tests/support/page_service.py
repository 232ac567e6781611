"""A service as a process that answers browsers; the sweeps in its runs folder are driven by the test.

`python -m tests.support.page_service ROOT` prints the port. No queued sweep is started: its supervisor stands still.
"""

import socket
import subprocess
import sys
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docs.chromium import Page
from orchestrator.folders import SweepFolder, sweep_lock
from orchestrator.service.access_tokens import AccessTokens, Role
from orchestrator.service.driver_supervisor import SERVICE_FOLDER
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.sweep_spec import SweepSpec
from orchestrator.study.study import Study
from orchestrator.study.trial_records import Trial
from tests.support.processes import environment, wait_until
from trainer.results import StepMetrics

TAB, ENTER = ("Tab", 9), ("Enter", 13)
FOCUSED = """(() => { const e = document.activeElement; if (!e || e === document.body) return null;
  const style = getComputedStyle(e);
  return { tag: e.tagName, name: e.name || e.id || e.textContent.trim().slice(0, 40),
    outline: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0 }; })()"""
LOST_BY_KEYBOARD = """[...document.querySelectorAll(
  'a[href], button, input:not([type=hidden]), select, textarea, summary')].filter((e) =>
  e.checkVisibility() && !e.disabled && !e.dataset.reached).map((e) => e.outerHTML.slice(0, 120))"""


@dataclass(frozen=True)
class ServedPages:
    """A running service."""

    base: str
    root: Path
    tokens: Mapping[Role, str]

    def log_in(self, page: Page, role: Role = Role.ADMIN, to: str = "/", *, width: int = 1280, **more: Any) -> None:
        """Log a browser in by the page's form, and look at `to`."""
        page.look(f"{self.base}/login", width=1280)
        page.run(f"document.getElementById('token').value = {self.tokens[role]!r}")
        page.run("document.querySelector('form').requestSubmit()")
        wait_for(page, "location.pathname === '/'")
        page.look(f"{self.base}{to}", width=width, **more)


@contextmanager
def serving(root: Path, roles: Iterable[Role] = Role) -> Generator[ServedPages]:
    """Serve a runs folder on a free port, with a token for each of these roles."""
    tokens = AccessTokens(root / SERVICE_FOLDER)
    by_role = {role: tokens.create(role.name.lower(), role) for role in roles}
    command = [sys.executable, "-m", "tests.support.page_service", str(root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(root))
    assert process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        assert port.isdecimal(), f"the service ended: {port}"
        yield ServedPages(f"http://localhost:{port}", root, by_role)
    finally:
        process.terminate()
        process.wait()


@contextmanager
def driving(root: Path, spec: SweepSpec) -> Generator[Study]:
    """Hold a sweep as its driver does, so that it runs; the test asks, reports and tells."""
    folder = SweepFolder(root, spec.name)
    if not Study.exists(folder):
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.spec.write_text(dump_spec(spec), encoding="utf-8")
    with sweep_lock(folder), Study.open(folder) if Study.exists(folder) else Study.create(folder, spec) as study:
        study.start_driving()
        yield study


def report(study: Study, trial: Trial, step: int, value: float) -> None:
    """Report an evaluation of a running trial."""
    metrics = {
        "eval_accuracies/logp": value,
        "eval_margins/logp": value - 0.4,
        "eval_logps_per_token/chosen": -1.0 - value / 10,
        "eval_logps_per_token/rejected": -1.4 - value / 5,
        "eval_loss": 1.0 - value / 2,
    }
    training = {"loss": 1.0 - value / 3, "grad_norm": 1.0 + value, "learning_rate": 1e-6} if step else {}
    study.report(trial, [StepMetrics(step, metrics | training)])


def wait_for(page: Page, expression: str) -> Any:
    """Wait until a JavaScript expression holds on a page that has loaded, also on the page that follows this one."""

    def value() -> Any:
        try:
            return page.run(f"document.readyState === 'complete' && ({expression})")
        except RuntimeError:  # one page is being replaced by the next
            return None

    return wait_until(value)


def press(page: Page, key: tuple[str, int], **more: Any) -> None:
    """Press and release a key."""
    name, code = key
    text = {"text": "\r"} if name == "Enter" else {}
    page.call("Input.dispatchKeyEvent", type="keyDown", key=name, code=name, windowsVirtualKeyCode=code, **text, **more)
    page.call("Input.dispatchKeyEvent", type="keyUp", key=name, code=name, windowsVirtualKeyCode=code, **more)


def lost_by_keyboard(page: Page) -> tuple[list[str], list[str]]:
    """What the Tab key does not reach, and what it reaches without showing it; both should be empty."""
    page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.run("(() => { const b = document.body; b.tabIndex = -1; b.focus(); b.removeAttribute('tabindex'); })()")
    count = page.run(
        "document.querySelectorAll('a[href], button, input, select, textarea, summary, [tabindex]').length"
    )
    unseen: list[str] = []
    for _ in range(count + 3):
        press(page, TAB)
        page.run("document.activeElement.dataset.reached = 'yes'")
        found = page.run(FOCUSED)
        if found is not None and not found["outline"]:
            unseen.append(f"{found['tag']} {found['name']}")
    return page.run(LOST_BY_KEYBOARD), unseen


def main() -> None:
    import uvicorn

    from orchestrator.service.http_app import Service

    service = Service(Path(sys.argv[1]))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        print(listening.getsockname()[1], flush=True)
        config = uvicorn.Config(service.app, lifespan="off", log_level="warning", timeout_graceful_shutdown=1)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run([listening])
    service.close()


if __name__ == "__main__":
    main()
