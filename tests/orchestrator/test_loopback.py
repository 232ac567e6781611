"""Proxies of the environment are never asked for this machine."""

import ast
import os
import signal
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from orchestrator.judge.endpoint_client import EndpointClient, EndpointRefused
from orchestrator.loopback import bypass_proxies, client_options
from orchestrator.spec.judge_config import Endpoint
from tests.support.http_server import SilentHandler, serving
from tests.support.processes import LIMIT_SECONDS, orchestrate

ROOT = Path(__file__).parents[2]
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Generator[list[str]]:
    """What was asked of the proxy that all variables name."""
    asked: list[str] = []

    class Proxy(SilentHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(502)

        do_POST = do_CONNECT = do_GET

    with serving(Proxy) as url:
        for name in PROXIES:
            monkeypatch.setenv(name, url)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "")  # restored after `bypass_proxies`
        yield asked


def test_the_page_of_mlflow_comes_up_behind_proxies(proxy: list[str], tmp_path: Path) -> None:
    proxies = {name: os.environ[name] for name in PROXIES}
    proxies |= {name: proxies[name].replace("http:", "socks5:") for name in ("ALL_PROXY", "all_proxy")}
    ui = orchestrate(tmp_path, "ui", "--port", "0", **proxies)
    assert ui.stdout is not None
    page = ui.stdout.readline()
    ui.send_signal(signal.SIGINT)
    _, err = ui.communicate(timeout=LIMIT_SECONDS)
    assert page.startswith("http://127.0.0.1:"), err
    assert ui.returncode == 0
    assert proxy == []


def test_mlflow_and_the_hub_and_judges_on_this_machine_are_asked_directly(proxy: list[str]) -> None:
    import httpx2
    import requests

    class Here(SilentHandler):
        def do_GET(self) -> None:
            self.send_response(204)
            self.end_headers()

    bypass_proxies()
    with serving(Here) as url:
        assert requests.get(url, timeout=60).status_code == 204, "MLflow's client"
        assert httpx2.get(url, timeout=60).status_code == 204, "the hub's client"
        assert httpx2.get(url, timeout=60, **client_options(url)).status_code == 204
    assert proxy == []
    assert requests.get("http://example.invalid", timeout=60).status_code == 502, "others go by the proxy"
    assert proxy == ["http://example.invalid/"]


def test_a_judge_behind_a_socks_proxy_whose_package_is_missing_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    with pytest.raises(EndpointRefused, match=r"proxy of the environment.*SOCKS"):
        EndpointClient(Endpoint(url="http://judge.example/v1", model="m"), None)
    for url in ("http://127.0.0.1:8000/v1", "http://localhost:8000/v1", "http://[::1]:8000/v1"):
        EndpointClient(Endpoint(url=url, model="m"), None).close()


def test_names_that_the_user_exempted_stay_exempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://proxy:1")
    monkeypatch.setenv("NO_PROXY", "corp.example, localhost")
    monkeypatch.delenv("no_proxy", raising=False)
    bypass_proxies()
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "corp.example,localhost,127.0.0.1,::1"


def test_every_client_of_the_code_takes_these_options() -> None:
    without: list[str] = []
    for module in (ROOT / "orchestrator").rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
                options = [ast.unparse(k.value) for k in node.keywords if k.arg is None]
                if not any(option.startswith("client_options(") for option in options):
                    without.append(f"{module}:{node.lineno}")
    assert without == []


CALLS = {f"httpx2.{name}" for name in ("Client", "AsyncClient", "get", "post", "put", "request", "stream", "head")}
