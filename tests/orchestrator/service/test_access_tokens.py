"""Tokens are shown once, belong to a role, end at once when revoked; codes work once; guessing is slowed."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.service.access_tokens import (
    CODE_SECONDS,
    MACHINE,
    SESSION_SECONDS,
    AccessTokens,
    ExposedFile,
    FailedLogins,
    LoginSessions,
    Person,
    Role,
    TokenRefused,
)


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def tokens(tmp_path: Path) -> AccessTokens:
    return AccessTokens(tmp_path / "service")


def test_a_token_names_its_person_until_it_is_revoked(tokens: AccessTokens, tmp_path: Path) -> None:
    token = tokens.create("ann", Role.OPERATOR)
    assert tokens.person(token) == Person("ann", Role.OPERATOR)
    assert tokens.person(tokens.machine_token()) == Person(MACHINE, Role.ADMIN)
    for wrong in ("", token[:-1], token + "x", "\udcff", tokens.people()[0].digest):
        assert tokens.person(wrong) is None
    for name in ("ann", MACHINE, "../ann", ""):
        with pytest.raises(TokenRefused):
            tokens.create(name, Role.VIEWER)
    with pytest.raises(TokenRefused, match="did you mean 'ann'"):
        tokens.revoke("anne")
    again = AccessTokens(tmp_path / "service")
    again.revoke("ann")
    assert tokens.person(token) is None, "a service that runs notices it"
    assert again.create("ann", Role.ADMIN) != token


def test_files_of_tokens_are_private_and_hold_no_token_of_people(tokens: AccessTokens, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        token, own = tokens.create("ann", Role.VIEWER), tokens.machine_token()
    finally:
        os.umask(before)
    files = {path.name: path for path in (tmp_path / "service").iterdir()}
    assert {stat.S_IMODE(files[name].stat().st_mode) for name in ("token", "tokens.json")} == {0o600}
    assert stat.S_IMODE((tmp_path / "service").stat().st_mode) == 0o700
    assert not any(token in path.read_text() for path in files.values())
    assert AccessTokens(tmp_path / "service").machine_token() == own
    files["tokens.json"].chmod(0o644)
    with pytest.raises(ExposedFile, match="mode 644"):
        tokens.person(token)
    files["token"].unlink()
    files["token"].symlink_to(files["tokens.json"])
    with pytest.raises(ExposedFile, match="no regular file"):
        tokens.machine_token()


def test_a_one_time_code_works_once_and_soon(tokens: AccessTokens) -> None:
    clock = Clock()
    sessions = LoginSessions(tokens, clock)
    code, late = sessions.new_code(), sessions.new_code()
    with ThreadPoolExecutor(8) as threads:
        logins = [login for login in threads.map(lambda _: sessions.log_in_with_code(code), range(8)) if login]
    assert len(logins) == 1, "of eight at once one"
    cookie, csrf = logins[0]
    assert sessions.person(cookie) == (Person(MACHINE, Role.ADMIN), csrf)
    clock.seconds += CODE_SECONDS
    assert sessions.log_in_with_code(late) is None
    clock.seconds += SESSION_SECONDS
    assert sessions.person(cookie) is None


def test_a_login_ends_with_its_token(tokens: AccessTokens) -> None:
    sessions = LoginSessions(tokens)
    token = tokens.create("ann", Role.OPERATOR)
    assert sessions.log_in("wrong") is None
    first, second = sessions.log_in(token), sessions.log_in(token)
    assert first is not None
    assert second is not None
    assert len({*first, *second}) == 4
    sessions.log_out(first[0])
    assert sessions.person(first[0]) is None
    assert sessions.person(second[0]) == (Person("ann", Role.OPERATOR), second[1])
    tokens.revoke("ann")
    assert sessions.person(second[0]) is None
    tokens.create("ann", Role.ADMIN)
    assert sessions.person(second[0]) is None, "it belongs to the old token"


def test_an_address_that_guesses_has_to_wait() -> None:
    clock = Clock()
    failed = FailedLogins(clock)
    for _ in range(10):
        assert failed.wait_seconds("10.0.0.1") == 0
        failed.add("10.0.0.1")
        clock.seconds += 1
    assert failed.wait_seconds("10.0.0.1") == 50
    assert failed.wait_seconds("10.0.0.2") == 0
    clock.seconds += 50
    assert failed.wait_seconds("10.0.0.1") == 0
