"""A deployment that follows an alias of the registry."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from foxnas_mlflow.core.errors import DeviceError, FoxNasError
from foxnas_mlflow.core.redaction import redacted
from foxnas_mlflow.deploy._client import EdgeDeploymentClient
from foxnas_mlflow.flavor import model_id_of

State = Literal["updated", "same", "refused", "away", "none"]

TAG = "foxnas.deployment."
"""Tag of a version that was deployed or refused, before the deployment's name."""

_REFUSALS = ("account", "bad_model", "missing", "numpy", "old_python", "service", "unit", "worker", "wrong_answer")
"""What a runner refuses again at the next look; the rest passes, as a full disk does."""

_PASSING = ("accelerator", "busy", "port", "settings", "system")
"""What passes when somebody does something, and is told meanwhile, as is a board that does not answer."""

_NO_ALIAS = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True)
class Followed:
    """What a look at the alias led to.

    Attributes:
        state: ``updated``; ``same``: the board had that version; ``refused``: it was tried, and the board keeps what it
            had; ``away``: the registry or the board did not answer, a later look may help; ``none``: the alias
            names no version.
        words: What happened, in one line.
    """

    state: State
    words: str


@dataclass
class Follower:
    """Keeps a deployment at the version that an alias names.

    What to deploy is asked of the registry at every look, never taken from a message: a look that is forged, late or
    repeated does no harm.

    Attributes:
        target: Target URI, ``edge://...``.
        deployment: Name of the deployment; it is made if there is none.
        model: Name of the registered model.
        alias: Its alias.
        config: Configuration of the deployment, see `target_help`.
    """

    target: str
    deployment: str
    model: str
    alias: str
    config: Mapping[str, str] = field(default_factory=dict)
    _refused: tuple[str, str | None] = field(default=("", None), init=False)
    _untold: tuple[str, str | None] = field(default=("", None), init=False)
    """What was begun to be deployed, while its tag does not say what came of it."""
    _waiting: tuple[str, str] = field(default=("", ""), init=False)

    def look(self, *, again: bool = False) -> Followed:
        """Deploy what the alias names, if the board has another version.

        Args:
            again: Try a version that was refused before too.
        """
        board = EdgeDeploymentClient(self.target)
        try:
            # A store of SQL is connected to at once.
            registry = MlflowClient()
            named = registry.get_model_version_by_alias(self.model, self.alias)
            version, model_id = str(named.version), model_id_of(named)
        except Exception as error:
            # Whatever it is, also of a library below MLflow's: a watch outlives it, and looks again.
            if isinstance(error, MlflowException) and error.error_code in _NO_ALIAS:
                return Followed("none", f"{self.model}@{self.alias} names no version; the board keeps what it has")
            return Followed("away", f"the registry did not tell what {self.model}@{self.alias} is: {_first(error)}")
        wanted = f"models:/{self.model}/{version}"
        if again:
            self._refused = ("", None)
        elif self._refused == (wanted, model_id):
            return Followed("same", f"{wanted} was refused before")
        try:
            new = False
            try:
                there = board.get_deployment(self.deployment)
                has = str(there["model_uri"])
            except MlflowException as error:
                new = error.error_code == "RESOURCE_DOES_NOT_EXIST"
                # Where the active version is damaged, deploying is the remedy.
                if not new and getattr(error.__cause__, "kind", "") != "damaged":
                    raise
                there, has = {}, "" if new else "a damaged version"
            # A model that was deleted and registered anew begins at version 1 again.
            if has == wanted and model_id in (None, there["model_id"]):
                # An update whose answer was lost is told now; what another board said stays.
                said = named.tags.get(TAG + self.deployment, "")
                if not said or self._untold == (wanted, model_id) or self._said(said):
                    self._note(registry, named, _deployed(self.target, there))
                return Followed("same", f"{self.deployment} has {wanted}")
            deploy = board.create_deployment if new else board.update_deployment
            self._untold = (wanted, model_id)
            done: dict[str, Any] = deploy(self.deployment, wanted, config=dict(self.config))
        except MlflowException as error:
            cause = error.__cause__
            kind = getattr(cause, "kind", "")
            lost = isinstance(cause, DeviceError) and kind not in _REFUSALS
            deployed = named.tags.get(TAG + self.deployment, "").startswith(f"deployed on {_place(self.target)} ")
            words = f"not yet on {_place(self.target)}: {_first(error)}"
            # A board that is off may have it already: what it said last stays.
            if (kind in _PASSING or (lost and not deployed)) and self._waiting != (wanted, words):
                # Once: boards that wait for different things would overwrite each other's words at every look.
                self._note(registry, named, words)
                self._waiting, self._untold = (wanted, words), (wanted, model_id)
            if lost or not isinstance(cause, FoxNasError):
                return Followed("away", f"{self.deployment} is not yet {wanted}: {_first(error)}")
            self._refused = (wanted, model_id)
            self._note(registry, named, f"refused on {_place(self.target)}: {_first(error)}")
            kept = f"{self.deployment} stays {has}" if has else "nothing is deployed"
            return Followed("refused", f"{wanted} is refused, {kept}: {_first(error)}")
        except Exception as error:
            # Of an artifact store's library, or of this host, whose disk is full: a later look may find them well.
            return Followed("away", f"{self.deployment} is not yet {wanted}: {_first(error)}")
        self._note(registry, named, _deployed(self.target, done))
        return Followed("updated", f"{self.deployment} is {wanted} now" + (f", before {has}" if has else ""))

    def _said(self, words: str) -> bool:
        """Whether a tag is of this target; edge://local is many boards."""
        place = _place(self.target)
        return place != "edge://local" and place in [word.rstrip(":") for word in words.split()[:4]]

    def _note(self, registry: MlflowClient, version: ModelVersion, words: str) -> None:
        tag, words = TAG + self.deployment, redacted(words)[:4000]
        # A registry that takes no tag stops no deployment.
        with contextlib.suppress(Exception):
            if version.tags.get(tag) != words:
                registry.set_model_version_tag(self.model, version.version, tag, words)
            self._untold = ("", None)


def _deployed(target: str, deployment: Mapping[str, Any]) -> str:
    return f"deployed on {_place(target)} as version {deployment['version']}"


def _first(error: Exception) -> str:
    return redacted((str(error).strip().splitlines() or [type(error).__name__])[0])


def _place(target: str) -> str:
    """A target without its options."""
    return target.partition("?")[0]
