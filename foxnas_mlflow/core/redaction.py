"""Passwords and tokens, kept out of everything that is written."""

from __future__ import annotations

import os
import re
from urllib.parse import quote, unquote

MASK = "***"

_ENVIRONMENT = (
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "FOXNAS_WEBHOOK_SECRET",
)
_SHORTEST = 8
"""A shorter value of the environment may be an ordinary word of a text."""

# After user and colon whatever is no port (and no tag of a Docker image), up to the last @ of the host's part;
# or, where the password has a slash, up to the first @.
_PASSWORD = re.compile(
    r"""(?P<begin>\b(?!docker:)[a-z][a-z0-9+.-]*://[^\s:/@\['"<>]*):(?!\d+(?:[/\s?#'"<>]|$))"""
    r"""(?:[^\s/'"<>]*|[^\s@'"<>]*)@""",
    re.I,
)
_TOKEN = re.compile(r"""(?P<begin>\bhttps?://)[^\s:/@\['"<>]+@""", re.I)
_QUERY = re.compile(
    r"""(?P<begin>[?&;](?:x-amz-)?(?:password|passwd|pwd|sslpassword|token|security-token|secret|sig|signature|"""
    r"""credential|access_key|api_key)=)[^&;\s'"<>]+""",
    re.I,
)


def redacted(text: str) -> str:
    """A text without the passwords and tokens in it, which can be written as UTF-8; all else stays.

    What counts as one: the password of a URL (``scheme://user:password@host``), a token in the place of an http
    address's user, a password, token or signature in a query, and what the environment has for MLflow and S3.

    Bytes of a file's name that are no UTF-8 are shown as Python escapes them.

    Args:
        text: Any text: an address, a message, a whole page.
    """
    text = text.encode("utf-8", "backslashreplace").decode()
    for name in _ENVIRONMENT:
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST:
            for form in {value, quote(value, safe="")}:
                text = text.replace(form, MASK)
    if "://" in text:
        text = _PASSWORD.sub(rf"\g<begin>:{MASK}@", text)
        text = _TOKEN.sub(rf"\g<begin>{MASK}@", text)
    return _QUERY.sub(rf"\g<begin>{MASK}", text) if "=" in text else text


def hide_login() -> None:
    """Move user and password of ``MLFLOW_TRACKING_URI`` to the variables that MLflow has for them.

    MLflow prints and keeps that address in many places; without the login it may. For a token in the user's place it
    has no variable of the same meaning: the address stays, and its own lines with it are not printed.
    """
    scheme, _, rest = os.environ.get("MLFLOW_TRACKING_URI", "").partition("://")
    login, at, _ = rest.partition("/")[0].rpartition("@")
    user, _, password = login.partition(":")
    if scheme not in ("http", "https") or not at:
        return
    if not password:
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        return
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        if name in os.environ:
            os.environ[name] = os.environ[name].replace(f"{scheme}://{login}@", f"{scheme}://", 1)
    os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(user), unquote(password)
