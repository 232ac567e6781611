"""MLflow behind the service's login: what is passed on for whom, and what its pages and its process cannot do."""

import json
import os
import re
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer

import psutil
import pytest
from fastapi import HTTPException

from orchestrator.folders import RUNS_FILE, SweepFolder
from orchestrator.service.access_tokens import Role
from orchestrator.service.hosting import mlflow_proxy, mlflow_server
from orchestrator.service.hosting.mlflow_proxy import check_right
from orchestrator.service.hosting.mlflow_server import MLFLOW_PATH, MlflowOptions
from orchestrator.service.http_app import Service
from orchestrator.service.request_guard import COOKIE, CSRF_HEADER
from orchestrator.tracking.mlflow_client import default_store
from orchestrator.tracking.mlflow_receiver import MlflowReceiver
from orchestrator.tracking.mlflow_ui import UiServer
from orchestrator.tracking.outbox import Outbox
from tests.support.mlflow_server import begin as begin_runs
from tests.support.processes import LIMIT_SECONDS, environment, wait_until
from tests.support.service_caller import Caller, begin
from tests.support.service_process import RunningService
from tests.support.specs import make_spec
from trainer.results import StepMetrics

API = "ajax-api/2.0/mlflow"
SEARCH, UPDATE = f"{MLFLOW_PATH}/{API}/runs/search", f"{MLFLOW_PATH}/{API}/runs/update"


# --- what is passed on ------------------------------------------------------------------------------------------------


def refusal(
    method: str, path: str, role: Role = Role.ADMIN, body: bytes = b"", *, edits: bool = False
) -> tuple[int, str]:
    """Status and sentence of a request that is not passed on; (0, "") of one that is."""
    try:
        check_right(method, path, role, body, edits=edits)
    except HTTPException as error:
        return error.status_code, error.detail
    return 0, ""


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", f"{API}/runs/create"),
        ("POST", f"{API}/runs/log-metric"),
        ("POST", f"{API}/experiments/create"),
        ("POST", f"{API}/model-versions/create"),
        ("POST", f"{API}/upload-artifact"),
        ("PUT", "api/2.0/mlflow-artifacts/artifacts/x"),
        ("PATCH", f"{API}/registered-models/update"),
        ("DELETE", f"{API}/registered-models/delete"),
        ("GET", f"{API}/gateway-proxy"),
        ("POST", f"{API}/gateway-proxy"),
        ("GET", "ajax-api/3.0/mlflow/gateway/secrets/list"),
        ("GET", f"{API}/webhooks"),
        ("GET", "ajax-api/3.0/mlflow/assistant/sessions"),
        ("GET", "ajax-api/3.0/jobs/1"),
        ("GET", "gateway/x/mlflow/invocations"),
        ("GET", "graphql"),
        ("DELETE", "get-artifact"),
    ],
)
def test_what_is_not_in_the_lists_is_not_passed_on(method: str, path: str) -> None:
    for edits in (False, True):
        code, sentence = refusal(method, path, edits=edits)
        assert code == 403
        assert sentence == f"MLflow is shown to be read: the service does not pass on {method} {path}"


@pytest.mark.parametrize(
    "path", [f"{API}/runs/../gateway-proxy", "static-files/../x", "static-files//x", ".", "a b", "x%2f"]
)
def test_a_path_that_another_program_may_read_otherwise_is_not_passed_on(path: str) -> None:
    assert refusal("GET", path)[0] == 404


def test_graphql_reads_only() -> None:
    query = {"query": "query Q($run: String) { mlflowGetRun(input: {runId: $run}) { run { info { runName } } } }"}
    assert json.loads(check_right("POST", "graphql", Role.VIEWER, json.dumps(query).encode(), edits=False)) == query
    twice = b'{"query": "query { test }", "query": "mutation { testMutation }"}'
    for body in (twice, b'{"query": "fragment f on Q { x } subscription { y }"}', b'{"query": ["mutation"]}'):
        assert refusal("POST", "graphql", body=body)[0] == 403, body
    for body in (b"", b"[]", b"{}", b"\xff"):
        assert refusal("POST", "graphql", body=body)[0] == 422, body


def test_operators_change_runs_only_where_that_is_allowed() -> None:
    path = f"{API}/runs/set-tag"
    for role in Role:
        assert refusal("POST", path, role) == (
            403, "MLflow is shown to be read; `orchestrate serve --mlflow-edits` opens this to operators"
        )  # fmt: skip
    assert refusal("POST", path, Role.VIEWER, edits=True) == (
        403, "MLflow is shown to be read; this needs the role operator"
    )  # fmt: skip
    assert refusal("POST", path, Role.OPERATOR, edits=True) == (0, "")


def test_what_is_searched_by_post_are_requests_that_read() -> None:
    """Of the installed MLflow: a version with other ones is noticed here."""
    from mlflow.server.handlers import get_endpoints

    found = {
        (path.removeprefix("/"), handler.__name__)
        for path, handler, methods in get_endpoints()
        if "POST" in methods and refusal("POST", path.removeprefix("/"))[0] == 0
    }
    assert {name for _, name in found} == {
        "_batch_get_trace_infos", "_calculate_trace_filter_correlation", "_get_latest_versions", "_query_trace_metrics",
        "_search_evaluation_datasets_handler", "_search_experiments", "_search_issues", "_search_logged_models",
        "_search_runs", "_search_traces_v3",
    }  # fmt: skip
    editing = {
        handler.__name__
        for path, handler, methods in get_endpoints()
        if "POST" in methods and refusal("POST", path.removeprefix("/"), edits=True)[0] == 0
    }
    assert editing - {name for _, name in found} == {
        "_delete_experiment", "_delete_experiment_tag", "_delete_run", "_delete_tag", "_restore_experiment",
        "_restore_run", "_set_experiment_tag", "_set_tag", "_update_experiment", "_update_run",
    }  # fmt: skip


# --- a server that says what it got -----------------------------------------------------------------------------------


class Recorder(ThreadingMixIn, UnixStreamServer):
    """In place of MLflow."""

    daemon_threads = True

    def __init__(self, folder: str) -> None:
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        self.answer: tuple[int, Sequence[tuple[str, str]], bytes] = (200, [], b"{}")
        super().__init__(f"{folder}/mlflow.sock", _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Recorder
    protocol_version = "HTTP/1.0"  # without a length, the end of the connection ends the body

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        is_health = self.path == f"{MLFLOW_PATH}/health"
        if not is_health:
            self.server.got.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        status, headers, content = (200, [], b"OK") if is_health else self.server.answer
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    folder = tempfile.TemporaryDirectory()
    server = Recorder(folder.name)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    ui = UiServer(f"http://localhost{MLFLOW_PATH}", None, "", folder=folder)
    monkeypatch.setattr(mlflow_server, "launch_private_ui", lambda *_: ui)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_mlflow_gets_no_login_and_its_answers_set_none(caller: Caller, recorder: Recorder) -> None:
    foreign = [("set-cookie", f"{COOKIE}=stolen"), ("access-control-allow-origin", "*"), ("etag", "e")]
    recorder.answer = (200, [*foreign, ("content-type", "application/json")], b'{"runs": []}')
    cookie, csrf = caller.service.sessions.log_in(caller.as_role[Role.VIEWER]) or ("", "")
    origin = {"origin": "http://localhost:8787", "referer": "http://localhost:8787/x"}
    given = {"cookie": f"{COOKIE}={cookie}", "x-forwarded-for": "1.2.3.4", "content-type": "application/json"}
    answer = caller.client.post(f"{SEARCH}?a=b%2Fc", headers=origin | given, content=b'{"x": 1}')
    assert (answer.status_code, answer.json(), answer.headers["etag"]) == (200, {"runs": []}, "e")
    caller.answer("GET", f"{MLFLOW_PATH}/version", Role.VIEWER)
    (path, headers, body), (_, by_token, _) = recorder.got
    assert (path, body) == (f"{SEARCH}?a=b%2Fc", b'{"x": 1}')
    secrets = (cookie, csrf, caller.as_role[Role.VIEWER], "1.2.3.4", "8787")
    for got in (headers, by_token):
        assert not any(secret in value for value in got.values() for secret in secrets), got
    own = {"host", "connection", "user-agent"}
    assert headers.keys() - own == {"accept", "accept-encoding", "content-type", "content-length"}
    for name in ("set-cookie", "access-control-allow-origin"):
        assert name not in answer.headers


def test_an_answer_of_mlflow_is_bounded_and_leads_nowhere(
    caller: Caller, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_proxy, "LARGEST_ANSWER", 1 << 20)
    large = b"x" * ((1 << 20) + 1)
    path = f"{MLFLOW_PATH}/get-artifact"
    recorder.answer = (200, [("content-length", str(len(large)))], large)
    assert "more than 1 MiB" in caller.answer("GET", path, Role.VIEWER, 502).json()["detail"]
    recorder.answer = (200, [], large)
    with pytest.raises(RuntimeError, match="response already started"):  # the connection ends before the body's end
        caller.answer("GET", path, Role.VIEWER)
    recorder.answer = (302, [("location", "/api/v1/sweeps")], b"")
    assert "a redirection" in caller.answer("GET", path, Role.VIEWER, 502).json()["detail"]
    recorder.answer = (200, [("content-length", "3")], b"abc")
    monkeypatch.setattr(mlflow_server, "_MOST_AT_ONCE", 1)  # all others were given back
    assert caller.answer("GET", path, Role.VIEWER).content == b"abc"
    monkeypatch.setattr(mlflow_server, "_MOST_AT_ONCE", 0)
    assert caller.answer("GET", path, Role.VIEWER, 503).headers["retry-after"] == "1"


def test_a_page_of_mlflow_reaches_only_mlflow(caller: Caller, recorder: Recorder) -> None:
    recorder.answer = (200, [("content-type", "text/html"), ("content-security-policy", "default-src *")], b"<html>")
    headers = caller.answer("GET", f"{MLFLOW_PATH}/", Role.VIEWER).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    own = f"http://localhost:8787{MLFLOW_PATH}/"
    assert policy["connect-src"] == f"{own} data: blob:"
    assert policy["script-src"] == f"{own}static-files/ 'unsafe-eval'"
    assert (policy["form-action"], policy["default-src"], policy["frame-src"]) == ("'none'", "'none'", "blob:")
    assert "'self'" not in headers["content-security-policy"]
    assert headers["cross-origin-opener-policy"] == "unsafe-none", "another one than that of the service's pages"
    assert caller.answer("GET", "/", Role.VIEWER).headers["cross-origin-opener-policy"] == "same-origin"
    for path in ("get-artifact", "version", "static-files/x.js"):
        other = caller.answer("GET", f"{MLFLOW_PATH}/{path}", Role.VIEWER).headers
        assert other["content-security-policy"] == "default-src 'none'; sandbox; frame-ancestors 'none'"
    odd = {"host": "localhost:8787;x", "authorization": f"Bearer {caller.as_role[Role.VIEWER]}"}
    assert caller.client.get(f"{MLFLOW_PATH}/", headers=odd).status_code in (400, 421)


def test_a_browser_asks_mlflow_only_from_its_own_page(caller: Caller, recorder: Recorder) -> None:
    cookie, csrf = caller.service.sessions.log_in(caller.as_role[Role.ADMIN]) or ("", "")
    login = {"cookie": f"{COOKIE}={cookie}"}

    def code(path: str, **headers: str) -> int:
        return caller.client.post(path, headers=login | headers, json={}).status_code

    assert code(SEARCH) == 403
    assert code(SEARCH, **{CSRF_HEADER: csrf}) == 403
    assert code(SEARCH, origin="https://evil.example") == 403
    assert recorder.got == []
    assert code(SEARCH, origin="http://localhost:8787") == 200
    assert code("/api/v1/sweeps/x/stop", origin="http://localhost:8787") == 403, "other pages have their token"
    assert caller.client.post(SEARCH, json={}).status_code == 401
    page = caller.client.get(f"{MLFLOW_PATH}/", follow_redirects=False)
    assert page.headers["location"] == "/login?next=%2Fmlflow%2F"


def test_an_own_server_is_linked_and_none_is_started(fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(fast_tmp_path).items():
        monkeypatch.setenv(name, value)
    folder, spec = begin("s"), make_spec(3, name="s")
    own = Service(fast_tmp_path)
    assert own.mlflow.url_of(folder, spec) == MLFLOW_PATH
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@tracking.example/")
    assert own.mlflow.url_of(folder, spec) == "https://tracking.example/"
    own.close()
    service = Service(fast_tmp_path, mlflow=MlflowOptions("https://mlflow.example"))
    assert service.mlflow.url_of(folder, spec) == "https://mlflow.example"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    other = make_spec(3, name="s", tracking={"uri": f"sqlite:///{fast_tmp_path}/other.db"})
    assert service.mlflow.url_of(folder, other) == "", "a file that this service does not show"
    service.close()


def test_before_the_first_run_the_page_says_so(caller: Caller) -> None:
    begin("s")
    for path in (f"{MLFLOW_PATH}/", "/sweeps/s/mlflow"):
        page = caller.answer("GET", path, Role.VIEWER, 503)
        assert "nothing has been logged to MLflow yet" in page.text


# --- MLflow itself ----------------------------------------------------------------------------------------------------


def log_runs(root: Path, experiment: str) -> None:
    """A sweep's run and that of its trial 0, with a point and a file, as a driver logs them."""
    receiver = MlflowReceiver(root, uri=default_store(root), experiment=experiment, sweep_id="id", sweep="s")
    box = Outbox(root / "outbox", receiver)
    begin_runs(box)
    box.log_metrics("0", [StepMetrics(1, {"loss": 0.5})], at=2.0)
    box.end_run("0", status="FINISHED", tags={}, at=3.0)
    assert box.close(LIMIT_SECONDS) == 0


def server_tree(of: int) -> list[psutil.Process]:
    """The processes of MLflow below this one."""
    found: list[psutil.Process] = []
    for process in psutil.Process(of).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            found += [process] if "mlflow" in " ".join(process.cmdline()) else []
    return found


@pytest.fixture
def shown(caller: Caller) -> Caller:
    """A service that shows a real MLflow with a sweep's runs."""
    root = Path(os.environ["ORCHESTRATE_HOME"])
    spec = make_spec(3, name="s")
    begin("s")
    log_runs(root, spec.tracking.experiment)
    first = caller.answer("GET", f"{MLFLOW_PATH}/", Role.VIEWER, 202)
    assert 'http-equiv="refresh" content="2"' in first.text
    assert caller.answer("GET", f"{MLFLOW_PATH}/version", Role.VIEWER, 503).headers["retry-after"] == "2"
    headers = {"authorization": f"Bearer {caller.as_role[Role.VIEWER]}"}
    wait_until(lambda: caller.client.get(f"{MLFLOW_PATH}/health", headers=headers).status_code == 200)
    return caller


def test_a_person_reads_mlflow_and_changes_nothing(shown: Caller) -> None:
    root = Path(os.environ["ORCHESTRATE_HOME"])
    page = shown.answer("GET", f"{MLFLOW_PATH}/", Role.VIEWER)
    (script,) = re.findall(r'src="(static-files/[^"]+\.js)"', page.text)
    answer = shown.answer("GET", f"{MLFLOW_PATH}/{script}", Role.VIEWER)
    assert (answer.headers["content-type"].split(";")[0], len(answer.content) > 1 << 16) == ("text/javascript", True)
    found = shown.answer("GET", f"{MLFLOW_PATH}/{API}/experiments/search?max_results=10", Role.VIEWER).json()
    numbers = [each["experiment_id"] for each in found["experiments"]]
    runs = shown.answer("POST", SEARCH, Role.VIEWER, json={"experiment_ids": numbers}).json()["runs"]
    by_name = {run["info"]["run_name"]: run["info"] for run in runs}
    run = by_name["s 0"]
    history = f"{MLFLOW_PATH}/{API}/metrics/get-history?run_id={run['run_id']}&metric_key=loss"
    assert [point["value"] for point in shown.answer("GET", history, Role.VIEWER).json()["metrics"]] == [0.5]
    for role in Role:
        change = {"run_id": run["run_id"], "run_name": "changed"}
        refused = shown.answer("POST", UPDATE, role, 403, json=change).json()
        assert refused["detail"].startswith("MLflow is shown to be read")
    runs = shown.answer("POST", SEARCH, Role.VIEWER, json={"experiment_ids": numbers}).json()["runs"]
    assert {run["info"]["run_name"] for run in runs} == by_name.keys()

    tree = server_tree(os.getpid())
    assert len(tree) >= 2
    assert not [each for process in tree for each in process.net_connections("inet")], "it listens on no port"
    assert not any("mlflow.db" in word for process in tree for word in process.cmdline())
    ui = shown.service.mlflow.launched()
    assert ui.socket is not None
    assert ui.socket.parent.stat().st_mode & 0o077 == 0

    (SweepFolder(root, "s").path / RUNS_FILE).write_text(json.dumps({"0": run["run_id"]}))
    headers = {"authorization": f"Bearer {shown.as_role[Role.VIEWER]}"}

    def leads_to(path: str) -> str:
        return shown.client.get(path, headers=headers, follow_redirects=False).headers["location"]

    charts = leads_to("/sweeps/s/mlflow")
    assert charts.startswith(f"{MLFLOW_PATH}/#/experiments/{run['experiment_id']}/runs?")
    assert f"/runs/{run['run_id']}?" in leads_to("/sweeps/s/trials/0/mlflow")
    assert "/sweeps/s/mlflow" in shown.answer("GET", "/sweeps/s", Role.VIEWER).text
    shown.service.mlflow.close()
    wait_until(lambda: not server_tree(os.getpid()))
    assert not ui.socket.parent.exists()


def test_mlflow_ends_with_a_service_that_is_killed(fast_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(fast_tmp_path).items():
        monkeypatch.setenv(name, value)
    log_runs(fast_tmp_path, "e")
    service = RunningService(fast_tmp_path)
    assert service.ask("GET", f"{MLFLOW_PATH}/version").status == 503
    tree = wait_until(lambda: len(found := server_tree(service.process.pid)) >= 2 and found)
    service.process.send_signal(signal.SIGKILL)
    service.process.wait()
    wait_until(lambda: not [process for process in tree if process.is_running() and process.status() != "zombie"])
