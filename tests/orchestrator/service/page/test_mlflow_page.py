"""MLflow's own page in a real Chromium, behind the service: it shows a sweep's runs, and reaches nothing else here."""

from pathlib import Path
from typing import Any

import pytest

from docs.chromium import Page, browser, installed
from docs.mlflow_looks import CARD, CLOSE, show
from orchestrator.service.access_tokens import Role
from orchestrator.service.hosting.mlflow_server import MLFLOW_PATH
from orchestrator.tracking.mlflow_client import connect, default_store
from orchestrator.tracking.run_metadata import run_page
from tests.dashboards.test_mlflow_view import tell
from tests.support.page_service import serving, wait_for
from tests.support.processes import environment
from tests.support.scripted_sweep import make_spec

REACHES_OTHER_PATHS = "fetch('/api/v1/me').then(() => 'reached', () => 'refused')"
REACHES_WINDOWS = """new Promise((done) => {
  const other = open('/');
  const look = () => {
    if (!other || other.closed) return done('separated');
    try {
      if (other.location.pathname === '/' && other.document.title) return done('reached');
    } catch { return done('separated'); }
    setTimeout(look, 50);
  };
  look();
})"""
POSTS_FORMS = """new Promise((done) => {
  document.addEventListener('securitypolicyviolation', (event) => done(event.effectiveDirective));
  const form = document.createElement('form');
  form.method = 'post';
  form.action = '/logout';
  document.body.append(form);
  form.submit();
})"""


def run_as_click(page: Page, expression: str) -> Any:
    """The value of an expression that a click of the person has begun."""
    found = page.call(
        "Runtime.evaluate", expression=expression, userGesture=True, awaitPromise=True, returnByValue=True
    )
    return found["result"].get("value")


@pytest.mark.browser
@pytest.mark.slow
def test_mlflow_shows_a_sweeps_runs_and_its_page_reaches_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed() is None:
        pytest.skip("no Chromium on the PATH")
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    tell(tmp_path, "done")
    client = connect(tmp_path, default_store(tmp_path))
    (experiment,) = (each for each in client.search_experiments() if each.name == make_spec("done").tracking.experiment)
    (trial,) = client.search_runs([experiment.experiment_id], "tags.`prefsweep.run` = '7'")

    with serving(tmp_path) as served, browser() as chromium:
        page = chromium.page()
        served.log_in(page, Role.VIEWER, "/sweeps/done", width=1600)
        page.run("[...document.querySelectorAll('a')].find((each) => each.textContent === 'MLflow').click()")
        wait_for(
            page, f"location.pathname === '{MLFLOW_PATH}/' && document.querySelectorAll('{CARD} .main-svg').length"
        )
        page.run(CLOSE)
        assert show(page, "Parallel Coordinates") == "drawn"
        address = f"{served.base}{MLFLOW_PATH}/#{run_page(experiment.experiment_id, trial.info.run_id)}"
        page.look(address, width=1600, ready="document.body.innerText.includes('loss.beta')")
        assert "trial 7 failed" in page.run("document.body.innerText")
        assert [error for error in page.seen.errors if "Content Security Policy" in error] == []
        refused = [error for error in page.seen.errors if "status of 403" in error]
        assert [error for error in refused if "/assistant/" not in error and "/gateway-proxy" not in error] == []
        assert [error for error in page.seen.errors if "status of 5" in error] == []
        assert [url for url in page.seen.requests if not url.startswith(f"{served.base}/")] == []

        assert page.run(f"fetch('{MLFLOW_PATH}/health').then((answer) => answer.text())") == "OK"
        assert page.run(REACHES_OTHER_PATHS) == "refused"
        assert run_as_click(page, REACHES_WINDOWS) == "separated"
        assert run_as_click(page, POSTS_FORMS) == "form-action"
