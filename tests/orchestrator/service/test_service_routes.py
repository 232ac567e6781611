"""What the service says about itself: metrics for Prometheus, GPUs, and the page of its API."""

import os
import re
from pathlib import Path

import pytest

from orchestrator.gpus import forget_gpus
from orchestrator.service.access_tokens import Role
from tests.support.gpu_driver import GpuDriver, machine
from tests.support.service_caller import Caller, begin, root


def metrics(caller: Caller) -> dict[str, float]:
    text = caller.answer("GET", "/metrics", Role.VIEWER).text
    described = {line.split()[2]: line.split()[3] for line in text.splitlines() if line.startswith("# TYPE")}
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r'(([a-z_]+?)(?:_bucket|_sum|_count)?(?:\{[a-z]+="[A-Za-z0-9.+]+"\})?) (\S+)', line)
        assert match, line
        assert match[2] in described, line
        found[match[1]] = float(match[3])
    return found


def test_prometheus_gets_sweeps_queue_trials_and_the_time_of_reports(caller: Caller) -> None:
    begin("a")
    caller.submit("b")
    caller.submit("c")
    caller.post("/sweeps/c/withdraw")
    found = metrics(caller)
    assert (found["prefsweep_up"], found["prefsweep_event_streams"]) == (1, 0)
    assert found['prefsweep_sweeps{state="interrupted"}'] == 1
    assert found['prefsweep_queue_sweeps{state="waiting"}'] == found['prefsweep_queue_sweeps{state="withdrawn"}'] == 1
    assert found['prefsweep_trials{state="RUNNING"}'] == 3
    assert found["prefsweep_queue_longest_wait_seconds"] > 0
    assert found["prefsweep_report_seconds_count"] == 0
    caller.answer("GET", "/api/v1/sweeps/a/report", Role.VIEWER)
    caller.answer("GET", "/api/v1/sweeps/a/report", Role.VIEWER)
    found = metrics(caller)
    assert found["prefsweep_report_seconds_count"] == found['prefsweep_report_seconds_bucket{le="+Inf"}'] == 1
    assert caller.client.get("/metrics").status_code == 401


def test_gpus_are_shown_with_those_who_have_them(
    caller: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert caller.get("/gpus") == {"gpus": []}
    environment = machine(tmp_path, gpus=2)
    driver = GpuDriver(environment, "theirs")
    driver.go()
    assert driver.process.stdout is not None
    driver.process.stdout.readline()
    for name in ("PATH", "ORCHESTRATE_GPU_LOCKS"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    forget_gpus()
    try:
        held, free = caller.get("/gpus")["gpus"]
        assert (held["index"], held["sweep"], free["sweep"], free["holder"]) == ("0", "theirs", None, None)
        assert f"(pid {driver.process.pid}" in held["holder"]
        found = metrics(caller)
        assert found['prefsweep_gpus{use="held"}'] == found['prefsweep_gpus{use="free"}'] == 1
    finally:
        driver.process.kill()
        driver.process.communicate()
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        forget_gpus()


def test_the_page_of_the_api_needs_neither_scripts_nor_a_network(caller: Caller) -> None:
    answer = caller.answer("GET", "/api/v1/docs", Role.VIEWER)
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = answer.text
    assert not re.search(r"<script|<style|style=|\bon[a-z]+=|https?://", page)
    for part in ("DELETE", "/api/v1/sweeps/{name}/trials/{trial}/clone", "Idempotency-Key", "from_checkpoint"):
        assert part in page
    assert '<link rel="icon" href="data:,">' in page, "else a browser asks for one, and its console has an error"
    style = re.search(r'<link rel="stylesheet" href="([^"]+)">', page)
    assert style is not None
    assert caller.client.get(style[1]).headers["content-type"].startswith("text/css")


def test_the_openapi_document_says_how_errors_look(caller: Caller) -> None:
    document = caller.client.get("/api/v1/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            others = {code for code in operation["responses"] if not code.startswith("2")}
            assert others == {"default"}, f"{method} {path}"
    content = document["paths"]["/api/v1/sweeps"]["post"]["responses"]["default"]["content"]
    described = document["components"]["schemas"]["Problem"]
    assert content == {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    answer = caller.answer("POST", "/api/v1/sweeps", Role.OPERATOR, 422, json={"yaml": "base: {modle: x}"})
    assert answer.headers["content-type"] == "application/problem+json"
    assert set(described["required"]) <= set(answer.json()) <= set(described["properties"])
    items = described["properties"]["problems"]["items"]
    for each in answer.json()["problems"]:
        assert set(items["required"]) <= set(each) <= set(items["properties"])


def test_a_parameter_that_a_route_does_not_have_is_refused(caller: Caller) -> None:
    begin("a")
    refused = caller.call("DELETE", "/sweeps/a?keep-mlflow=true", Role.ADMIN, code=422)
    assert refused["detail"] == "keep-mlflow: there is no such parameter; did you mean keep_mlflow?"
    assert (root() / "a").is_dir(), "nothing is deleted"
    assert "(there are trial, attempt, tail)" in caller.get("/sweeps/a/log?lines=3", code=422)["detail"]
    assert "this route has none" in caller.get("/queue?owner=ann", code=422)["detail"]
    assert caller.get("/sweeps/a/log?tail=3")["lines"] is not None
