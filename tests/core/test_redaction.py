"""No password or token is left in a text, and nothing else is changed."""

from __future__ import annotations

import os

import pytest

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.redaction import hide_login, redacted

SECRET = "s3cr3t-W0rd"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"http://user:{SECRET}@host:5000/#/experiments/1", "http://user:***@host:5000/#/experiments/1"),
        (f"https://{SECRET}@host/path", "https://***@host/path"),
        (f"postgresql+psycopg2://me:a/{SECRET}@db:5432/mlflow", "postgresql+psycopg2://me:***@db:5432/mlflow"),
        (f"postgresql://me:{SECRET}@x@db/mlflow", "postgresql://me:***@db/mlflow"),
        (f"mysql://:{SECRET}@db", "mysql://:***@db"),
        (f"ssh://pi:1234{SECRET}@board:22?python=py", "ssh://pi:***@board:22?python=py"),
        ("ssh://pi:1234@board", "ssh://pi:***@board"),
        (f"a http://u:{SECRET}@h and ssh://v:{SECRET}@i.", "a http://u:***@h and ssh://v:***@i."),
        (f'<a href="http://u:{SECRET}@h/#/runs/1">', '<a href="http://u:***@h/#/runs/1">'),
        (f"s3://b/k?X-Amz-Signature={SECRET}&versionId=3", "s3://b/k?X-Amz-Signature=***&versionId=3"),
        (f"https://h/x?token={SECRET}", "https://h/x?token=***"),
    ],
)
def test_secrets_go(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown


def test_names_of_other_bytes_than_utf_8_can_be_written() -> None:
    name = os.fsdecode(b"caf\xe9/caf\xc3\xa9.png")
    assert redacted(name).encode() == b"caf\\udce9/caf\xc3\xa9.png"


@pytest.mark.parametrize(
    "text",
    [
        "ssh://pi@board.local:2222",
        "ssh://pi@[fe80::1]:22?key=/home/pi/@key",
        "http://127.0.0.1:5000/#/experiments/0/runs/models:/x@production",
        "http://[::1]:5000/x@y",
        "models:/foxnas-cpu@production",
        "docker://python:3.11-slim@sha256",
        "mail a@b, or x: y@z; token=yes",
        "sqlite:////tmp/a@b/mlflow.db",
        '{"uri": "http://host:5000", "who": "a@b"}',
    ],
)
def test_all_else_stays(text: str) -> None:
    assert redacted(text) == text


def test_what_the_environment_holds_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "p@ss word/1")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "model")  # a word of many texts
    assert redacted("x p@ss word/1, p%40ss%20word%2F1, model") == "x ***, ***, model"


def test_errors_carry_none() -> None:
    uri = f"ssh://pi:{SECRET}@board"
    error = InvalidInputError(f"{uri} is no device", received=uri, remedy=f"not {uri}")
    assert SECRET not in f"{error} {error.rule} {error.received} {error.remedy}"
    assert SECRET not in str(InvalidInputError("rule", received=[uri]))


@pytest.mark.parametrize(
    ("uri", "left", "user", "password"),
    [
        (f"http://me:{SECRET}%40@host:5000/p", "http://host:5000/p", "me", f"{SECRET}@"),
        ("http://host:5000/a@b", "http://host:5000/a@b", None, None),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db", None, None),
    ],
)
def test_the_login_of_a_tracking_server_moves_to_its_variables(
    monkeypatch: pytest.MonkeyPatch, uri: str, left: str, user: str | None, password: str | None
) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "of before")  # so that it is put back
        monkeypatch.delenv(name)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, uri)
    hide_login()
    assert os.environ["MLFLOW_TRACKING_URI"] == os.environ["MLFLOW_REGISTRY_URI"] == left
    assert os.environ.get("MLFLOW_TRACKING_USERNAME") == user
    assert os.environ.get("MLFLOW_TRACKING_PASSWORD") == password


def test_a_token_in_the_address_is_kept_from_mlflows_own_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    hide_login()
    assert os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] == "false"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{SECRET}@host:5000")
    hide_login()
    assert os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] == "true"
