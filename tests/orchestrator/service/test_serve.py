"""`orchestrate serve` as a process: found by its URL, refused where it would be open, ended without its drivers."""

import json
import os
import re
import signal
import socket
import ssl
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.folders import SweepFolder, lock_holder
from orchestrator.service.access_tokens import AccessTokens, Role
from orchestrator.service.hosting.queue_location import queue_url
from orchestrator.service.hosting.web_server import PortTaken, ServeOptions, ServeRefused, check_options, host_names
from orchestrator.service.hosting.web_server import serve as serve_here
from orchestrator.service.sweep_queue import SweepQueue
from orchestrator.spec.loading.serialization import dump_spec
from tests.support.processes import LIMIT_SECONDS, call, finished, orchestrate, wait_until
from tests.support.specs import make_spec


class Served:
    """A service on a free port, as its user sees it."""

    def __init__(self, root: Path, *options: str, **more: str) -> None:
        self.process = orchestrate(root, "serve", "--port", "0", *options, **more)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url, self.process.communicate()[1]
        self.address = self.url.partition("/login/")[0]

    def get(self, path: str, headers: dict[str, str] | None = None, **more: Any) -> tuple[int, Any, Any]:
        """Status, headers and body."""
        request = urllib.request.Request(self.address + path, headers=headers or {}, **more)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
                return answer.status, answer.headers, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read().decode()

    def ended(self, by: signal.Signals) -> str:
        """What it wrote to stderr, ended by a signal."""
        self.process.send_signal(by)
        out, err = self.process.communicate(timeout=LIMIT_SECONDS)
        assert (self.process.returncode, out) == (0, ""), err
        return err


@pytest.fixture
def root(fast_tmp_path: Path) -> Iterator[Path]:
    yield fast_tmp_path
    for process in psutil.process_iter(["cmdline", "environ"]):
        of_root = (process.info["environ"] or {}).get("ORCHESTRATE_HOME") == str(fast_tmp_path)
        if of_root and process.pid != os.getpid():
            process.kill()


def test_the_printed_url_logs_in_once_and_the_token_of_the_machine_is_in_its_file(root: Path) -> None:
    served = Served(root)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/login/code/[\w-]{20,}", served.url)
    path = served.url.removeprefix(served.address)
    status, headers, body = served.get(path)
    assert (status, 'content="0; url=/"' in body) == (200, True)
    cookie = SimpleCookie(headers["set-cookie"])["prefsweep_session"]
    assert (cookie["httponly"], cookie["samesite"], cookie["secure"]) == (True, "strict", "")
    assert json.loads(served.get("/api/v1/me", {"cookie": f"prefsweep_session={cookie.value}"})[2])["name"] == "local"
    assert served.get(path, {"cookie": f"prefsweep_session={cookie.value}"})[0] == 200, "it has logged in already"
    status, _, body = served.get(path)
    assert (status, 'href="/login"' in body) == (401, True), "the code was used"

    file = root / "service" / "token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    own = {"authorization": f"Bearer {file.read_text().strip()}"}
    assert json.loads(served.get("/api/v1/me", own)[2])["role"] == "admin"
    plan = json.dumps({"yaml": dump_spec(make_spec(2, name="a"))}).encode()
    status, _, body = served.get("/api/v1/plan", own | {"content-type": "application/json"}, data=plan)
    assert (status, json.loads(body)["name"]) == (200, "a"), body
    assert (root / "service" / "url").read_text() == f"{served.address}\n"
    assert served.get("/api/v1/me")[0] == 401
    assert served.get("/healthz", {"host": "evil.example"})[0] == 421
    code, _, err = call(root, "serve")
    assert code == 4, err
    assert " ".join(err.split()) == f"a service for {root} runs already: pid {served.process.pid}, at {served.address}"
    said = served.ended(signal.SIGTERM)
    assert said.rstrip().endswith("the service has ended")
    assert not (root / "service" / "url").exists()


def test_its_start_waits_for_no_library_that_it_does_not_need() -> None:
    """It listens within seconds: these take seconds each."""
    heavy = ("torch", "transformers", "ray", "mlflow", "datasets", "pandas", "scipy")
    code = f"import sys, orchestrator.service.hosting.web_server; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGHUP])
def test_its_drivers_outlive_it_and_work_in_an_empty_folder(root: Path, by: signal.Signals) -> None:
    queue = SweepQueue(queue_url(root))
    queue.submit("a", dump_spec(make_spec({"loss.beta": {"choice": [2.0]}}, name="a")), root / "a", owner="ann")
    queue.close()
    served = Served(root)
    folder = SweepFolder(root, "a")
    holder = wait_until(lambda: lock_holder(folder))
    driver = psutil.Process(int(holder.split()[1]))
    assert Path(driver.cwd()) == root / "service" / "work"
    assert list((root / "service" / "work").iterdir()) == []
    err = " ".join(served.ended(by).split())
    assert err.endswith("the service has ended; a continues")
    assert driver.is_running()
    assert lock_holder(folder) == holder


def test_a_port_in_use_is_named_with_the_remedy(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = call(root, "serve", "--port", str(port))
        with pytest.raises(PortTaken):
            serve_here(root, ServeOptions(port=port), lambda *_: None)
    assert code == 4
    found = " ".join(err.split())
    assert found == (
        f"port {port} of 127.0.0.1 is in use by another program; give another one: "
        f"`orchestrate serve --port {port + 1}`"
    )
    assert not (root / "service" / "url").exists()


def test_other_machines_reach_it_only_when_people_have_tokens(root: Path) -> None:
    for host in ("0.0.0.0", "::", ""):
        with pytest.raises(ServeRefused, match="no person has a token; create one first: `orchestrate token create"):
            check_options(root, ServeOptions(host))
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert check_options(root, ServeOptions(host)) == []
    AccessTokens(root / "service").create("ann", Role.VIEWER)
    (warning,) = check_options(root, ServeOptions("0.0.0.0"))
    assert "plain text" in warning
    assert check_options(root, ServeOptions("0.0.0.0", behind_proxy=True)) == []
    assert {"localhost", "gpu1", socket.gethostname()} <= set(host_names(ServeOptions("0.0.0.0", names=("gpu1",))))
    assert socket.gethostname() not in host_names(ServeOptions())


def test_two_commands_let_a_second_person_watch(root: Path) -> None:
    token = finished(root, "token", "create", "ann", "--role", "viewer")[0].strip()
    served = Served(root, "--host", "0.0.0.0", "--name", "gpu1.example")
    assert served.address.startswith("http://gpu1.example:")
    served.address = served.address.replace("gpu1.example", "127.0.0.1")
    ann = {"host": "gpu1.example", "authorization": f"Bearer {token}"}
    assert json.loads(served.get("/api/v1/me", ann)[2])["role"] == "viewer"
    assert json.loads(served.get("/api/v1/sweeps", ann)[2])["sweeps"] == []
    assert "plain text" in served.ended(signal.SIGTERM)


def test_wrong_options_are_refused_together(root: Path, tmp_path: Path) -> None:
    (root / "service").mkdir()
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    options = ServeOptions("0.0.0.0", certificate=broken, data_folders=(root.parent, root / "service"))
    with pytest.raises(ServeRefused) as caught:
        check_options(root, options)
    found = str(caught.value).splitlines()
    assert [line.split(":")[0].split()[0] for line in found] == [
        "--data-folder", "--data-folder", "--ssl-certfile", "--host"
    ]  # fmt: skip
    code, _, err = call(root, "serve", "--data-folder", str(tmp_path / "absent"))
    assert code == 2
    assert "absent" in err


def test_with_a_certificate_it_speaks_https(root: Path, tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make, *names], check=True, capture_output=True)
    served = Served(root, "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key))
    assert served.url.startswith("https://127.0.0.1:")
    trusting = ssl.create_default_context(cafile=str(certificate))
    with urllib.request.urlopen(served.url, context=trusting) as answer:
        assert SimpleCookie(answer.headers["set-cookie"])["prefsweep_session"]["secure"] is True
    served.ended(signal.SIGTERM)


def test_a_proxy_of_this_machine_names_the_client_and_the_scheme(root: Path) -> None:
    served = Served(root, "--behind-proxy", "--name", "sweeps.example")
    proxied = {"host": "sweeps.example", "x-forwarded-proto": "https", "x-forwarded-for": "203.0.113.7"}
    json_type = {"content-type": "application/json", "origin": "https://sweeps.example"}
    wrong = b'{"token": "guess"}'
    codes = [served.get("/api/v1/login", proxied | json_type, data=wrong)[0] for _ in range(11)]
    assert codes == [401] * 10 + [429]
    other = proxied | json_type | {"x-forwarded-for": "203.0.113.8"}
    assert served.get("/api/v1/login", other, data=wrong)[0] == 401, "another client is not slowed"
    served.ended(signal.SIGTERM)


def test_tokens_are_created_listed_and_revoked(root: Path) -> None:
    out, err = finished(root, "token", "create", "ann", "--role", "operator")
    token = out.strip()
    assert "ann (operator)" in err
    person = AccessTokens(root / "service").person(token)
    assert person is not None
    assert (person.name, person.role) == ("ann", Role.OPERATOR)
    code, listed, _ = call(root, "token", "list")
    assert (code, listed.split()[:2]) == (0, ["ann", "operator"])
    assert token not in listed
    (entry,) = json.loads(call(root, "token", "list", "--json")[1])["people"]
    assert (entry["name"], entry["role"]) == ("ann", "operator")
    assert call(root, "token", "create", "ann", "--role", "viewer")[0] == 2
    assert call(root, "token", "create", "bea", "--role", "owner")[0] == 2
    code, _, err = call(root, "token", "revoke", "anne")
    assert code == 2
    assert "did you mean 'ann'?" in err
    assert call(root, "token", "revoke", "ann")[0] == 0
    assert AccessTokens(root / "service").person(token) is None
    assert "no person has a token" in call(root, "token", "list")[2]
