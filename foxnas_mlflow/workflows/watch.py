"""Watch: a board's deployment follows an alias of the registry, told by MLflow's webhooks."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.workflows._request import Request, parameter
from foxnas_mlflow.workflows._workflow import Result, Workflow, logger

SECRET = "FOXNAS_WEBHOOK_SECRET"  # noqa: S105
"""Variable with the webhook's secret: a command line is read by everybody on the machine."""


@dataclass(frozen=True, kw_only=True)
class WatchRequest(Request):
    """What to watch; see `run_watch`."""

    model: str = parameter("", "Registered model, without a version: foxnas-cpu.")
    alias: str = parameter("production", "Alias that the deployment follows.")
    target: str = parameter("", "Board: edge://user@host, edge://local; see mlflow deployments help -t edge.")
    deployment: str = parameter("", "Name of the deployment on the board; it is made if there is none.")
    config: str = parameter("", "Configuration of the deployment: key=value, ... as mlflow deployments takes with -C.")
    host: str = parameter("127.0.0.1", "Address to listen at for the registry's webhook.")
    port: int = parameter(5050, "Port to listen at.", at_least=0, below=65536)
    certificate: str = parameter("", "PEM file of a certificate and its key, for https; empty: http.")
    every_s: float = parameter(300.0, "The registry is asked every so many seconds besides; 0: never.", at_least=0)
    once: bool = parameter(False, "Only look once, and receive nothing: for a timer, where no webhook gets through.")

    def check(self) -> None:
        """Model, target and deployment must be named."""
        for name, value in (("model", self.model), ("target", self.target), ("deployment", self.deployment)):
            if not value:
                raise InvalidInputError(f"{name} must be given", remedy="see foxnas watch --help")
        if any(c in self.model.removeprefix("models:/") for c in "/@:"):
            raise InvalidInputError(
                "model must be a registered model's name, without version and alias",
                received=self.model,
                remedy="give the alias with --alias",
            )
        if not self.target.startswith("edge://"):
            raise InvalidInputError(
                "target must be a board, edge://...",
                received=self.target,
                remedy="edge://user@host is a board behind ssh, edge://local this machine",
            )
        self.settings()

    def settings(self) -> dict[str, str]:
        """The configuration by key."""
        parts = [part.strip().partition("=") for part in self.config.split(",") if part.strip()]
        if any(not equals or not key.strip() for key, equals, _ in parts):
            raise InvalidInputError("config must be key=value, key=value, ...", received=self.config)
        return {key.strip(): value.strip() for key, _, value in parts}


@dataclass(frozen=True, kw_only=True)
class WatchResult(Result):
    """The last look.

    Attributes:
        state: ``updated``, ``same``, ``refused``, ``away`` or ``none``.
    """

    state: str

    @property
    def exit_status(self) -> int:
        """2 where the board is not at the version that the alias names."""
        return 2 if self.state in ("refused", "away") else 0


def run_watch(request: WatchRequest, *, stop: threading.Event | None = None) -> WatchResult:
    """Keep a board's deployment at the version that an alias names, until stopped.

    Looks at the start, at every accepted webhook of the alias, and every ``every_s`` seconds. A version that fails its
    smoke test on the board, or cannot be served there, is rolled back: the one before goes on.

    Args:
        request: What to watch.
        stop: Ends it; none: an interrupt does.

    Raises:
        InvalidInputError: If there is no secret, or the receiver cannot listen.
    """
    import os
    from pathlib import Path

    from foxnas_mlflow.deploy.follow import Follower
    from foxnas_mlflow.deploy.webhook import receiving

    model = request.model.removeprefix("models:/")
    follower = Follower(request.target, request.deployment, model, request.alias, request.settings())
    if request.once:
        done = follower.look(again=True)
        return WatchResult(run_id="", state=done.state, summary=done.words + ".")
    secret = os.environ.get(SECRET, "")
    if len(secret) < 16:
        raise InvalidInputError(
            f"the webhook's secret must be in {SECRET}, 16 characters or more",
            received="none" if not secret else f"{len(secret)} characters",
            remedy='make one with: python -c "import secrets; print(secrets.token_urlsafe())"',
        )
    told, ended = threading.Event(), stop or threading.Event()

    def event(value: Any) -> str:
        if not _is_of(value, model, request.alias):
            return "not of this alias"
        told.set()
        return "taken"

    certificate = Path(request.certificate) if request.certificate else None
    with receiving(secret, request.host, request.port, event, certificate=certificate) as url:
        logger.info("receiving at %s for %s@%s on %s", url, model, request.alias, request.target.partition("?")[0])
        found, again = None, True
        while not ended.is_set():
            before, found = found, follower.look(again=again)
            if again or found != before:
                logger.info("%s", found.words)
            again = _wait(told, ended, request.every_s)
    return WatchResult(run_id="", state=found.state if found else "", summary="Stopped.")


def _wait(told: threading.Event, ended: threading.Event, seconds: float) -> bool:
    """Sleep until a webhook, the end, or for some seconds (0: without an end); whether it was a webhook."""
    left = seconds or float("inf")
    while not ended.is_set() and left > 0:
        if told.wait(min(left, 0.5)):
            told.clear()
            return True
        left -= 0.5
    return False


def _is_of(value: Any, model: str, alias: str) -> bool:
    """Whether a delivery is of the alias; its version is asked of the registry, which is the one to know."""
    data = value.get("data") if isinstance(value, dict) else None
    return (
        isinstance(data, dict)
        and value.get("entity") == "model_version_alias"
        and (data.get("name"), data.get("alias")) == (model, alias)
    )


WORKFLOW = Workflow(
    "watch",
    "Keep a board's deployment at the version that an alias names, told by MLflow's webhooks.",
    WatchRequest,
    run_watch,
    entry_point=False,
)
