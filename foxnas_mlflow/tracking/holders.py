"""Who holds a stage: aliases, stages where the store has them, and the history, kept in agreement.

The alias decides: setting it is one atomic step, so there is never more than one holder. Stages and
history follow it in `StageKeeper.settle`, which repeats until it reads a state with nothing to do.
When two promotions run at once, whichever process writes last also reads after its write, so what
is left at the end agrees, whoever won; no lock is needed, and none can be left behind by a crash.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from foxnas_mlflow.core.errors import PromotionError
from foxnas_mlflow.tracking.history import Entry, next_moment, read_history
from foxnas_mlflow.tracking.registry import lacks_right, list_versions, reason

STAGES: Mapping[str, str] = {"Production": "production", "Staging": "staging"}
"""Stages that one version holds, and their aliases."""

ARCHIVED = "Archived"

_ROUNDS = 50
_ATTEMPTS = 6
_NO_STAGES = ("unsupported", "not supported", "not implemented")


@dataclass(frozen=True, slots=True)
class _State:
    aliases: Mapping[str, str]
    tags: Mapping[str, str]
    stages: Mapping[str, str]

    def holder(self, stage: str) -> str | None:
        in_stage = [int(version) for version, current in self.stages.items() if current == stage]
        return self.aliases.get(STAGES[stage]) or (str(max(in_stage)) if in_stage else None)


class StageKeeper:
    """Moves the versions of one registered model between stages.

    Args:
        name: The registered model.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.has_stages = True
        self._client = MlflowClient()

    def holder(self, stage: str) -> str | None:
        """The version that holds a stage: the alias decides, the stage only where there is none."""
        return self._read().holder(stage)

    def history(self, stage: str) -> list[Entry]:
        """Who held a stage, in order of time."""
        return read_history(self._read().tags, STAGES[stage])

    def tag(self, version: str, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        for key, value in tags.items():
            self._do(self._client.set_model_version_tag, self.name, version, key, value)

    def move(self, version: str, stage: str, *, former: str | None, action: str, run_id: str) -> str | None:
        """Make a version the holder of a stage.

        Args:
            version: The version.
            stage: ``Production`` or ``Staging``.
            former: The holder that the caller compared it with.
            action: ``promote`` or ``rollback``, for the history.
            run_id: The caller's run.

        Returns:
            The holder once everything agrees: another version if another promotion came in between.

        Raises:
            PromotionError: If the registry refuses; what was moved is moved back.
        """
        alias = STAGES[stage]
        before = self._read()
        now = before.holder(stage)
        if now != former:
            raise PromotionError(
                "one promotion at a time moves a stage",
                received=f"version {now or 'none'} took {stage} in the meantime",
                remedy="nothing was moved; run the command again to compare with that version",
            )
        if former is not None and former != version:
            # One that was never noted here was promoted by other means, and can be rolled back to.
            self._note(alias, former, "outside", "")
        self._do(self._client.set_registered_model_alias, self.name, alias, version)
        try:
            self.settle(version, action=action, run_id=run_id)
        except PromotionError as error:
            try:
                self._restore(alias, version, before)
            except PromotionError:
                raise PromotionError(
                    "alias, stage and history of a version move together",
                    received=f"{error.received}, after the alias {alias!r} was set",
                    remedy="run the command again, or set the alias back in mlflow ui",
                ) from error
            raise
        return self._read().aliases.get(alias)

    def archive(self, version: str, *, run_id: str) -> None:
        """Take a version out of the stages that it holds."""
        for alias, held in self._read().aliases.items():
            if held == version and alias in STAGES.values():
                self._note(alias, version, "outside", "")
                self._do(self._client.delete_registered_model_alias, self.name, alias)
        self._transition(version, ARCHIVED, archive_existing=False)
        self.settle(None, action="archive", run_id=run_id)

    def settle(self, version: str | None, *, action: str, run_id: str = "") -> None:
        """Make stages and history follow the aliases, until a reading finds nothing to do.

        Args:
            version: The version that the caller moved, or None.
            action: What the caller did, for the history.
            run_id: The caller's run.
        """
        for _ in range(_ROUNDS):
            if not self._follow(self._read(), version, action, run_id):
                return
        raise PromotionError(
            "aliases, stages and history must come to agree",
            received=f"{self.name} changed {_ROUNDS} times meanwhile",
            remedy="see which other process moves its versions, and run the command again",
        )

    def _follow(self, state: _State, version: str | None, action: str, run_id: str) -> bool:
        """Do the first thing that is not as the aliases say; False if there is none."""
        production, staging = (state.aliases.get(alias) for alias in STAGES.values())
        if production is not None and production == staging:
            # A version has one stage: what went to production left staging.
            self._do(self._client.delete_registered_model_alias, self.name, "staging")
            return True
        for stage, alias in STAGES.items():
            holder = state.aliases.get(alias)
            in_stage = {number for number, current in state.stages.items() if current == stage}
            if self.has_stages and holder is not None and in_stage != {holder}:
                self._transition(holder, stage, archive_existing=True)
                return True
            entries = read_history(state.tags, alias)
            if (entries[-1].version if entries else None) != holder:
                mine = holder is None or holder == version
                self._note(alias, holder, action if mine else "outside", run_id if mine else "")
                return True
        return False

    def _note(self, alias: str, version: str | None, action: str, run_id: str) -> None:
        entries = read_history(self._read().tags, alias)
        if (entries[-1].version if entries else None) == version:
            return
        key, value = Entry(next_moment(entries), version, action, run_id).tag(alias)
        self._do(self._client.set_registered_model_tag, self.name, key, value)

    def _restore(self, alias: str, version: str, before: _State) -> None:
        """Undo a move that the registry took only half of."""
        now = self._read()
        if now.aliases.get(alias) == version:
            former = before.aliases.get(alias)
            if former is None:
                self._do(self._client.delete_registered_model_alias, self.name, alias)
            else:
                self._do(self._client.set_registered_model_alias, self.name, alias, former)
        if now.stages[version] != before.stages[version]:
            self._transition(version, before.stages[version], archive_existing=False)
        self.settle(None, action="restore")

    def _transition(self, version: str, stage: str, *, archive_existing: bool) -> None:
        if not self.has_stages:
            return

        def transition() -> None:
            with warnings.catch_warnings():
                # Stages are deprecated since MLflow 2.9; they follow the alias as long as a store has them.
                warnings.filterwarnings("ignore", ".*transition_model_version_stage.*", FutureWarning)
                self._client.transition_model_version_stage(self.name, version, stage, archive_existing)

        try:
            self._do(transition)
        except (PromotionError, NotImplementedError) as error:
            cause = error.__cause__ if isinstance(error, PromotionError) else error
            if isinstance(cause, MlflowException) and not any(word in str(cause).lower() for word in _NO_STAGES):
                raise
            self.has_stages = False

    def _read(self) -> _State:
        model = self._client.get_registered_model(self.name)
        return _State(
            {alias: str(version) for alias, version in model.aliases.items()},
            dict(model.tags),
            {str(v.version): v.current_stage or "" for v in list_versions(self.name)},
        )

    def _do(self, action: Callable[..., object], *args: object) -> None:
        """Change the registry; what a busy store or another client's same step refuses is tried again."""
        for attempt in range(_ATTEMPTS):
            try:
                with _quiet_store():
                    action(*args)
                return
            except MlflowException as error:
                refused = lacks_right(error)
                again = error.error_code in ("TEMPORARILY_UNAVAILABLE", "BAD_REQUEST") and not refused
                if again and attempt + 1 < _ATTEMPTS:
                    time.sleep(0.05 * 2**attempt)
                    continue
                if refused:
                    raise PromotionError(
                        "promoting needs the right to change the registered model",
                        received=f"{self.name}: {reason(error)}",
                        remedy="nothing was moved; ask for that right, or let someone who has it promote",
                    ) from error
                raise PromotionError(
                    "the registry must take the change", received=f"{self.name}: {reason(error)}"
                ) from error


@contextlib.contextmanager
def _quiet_store() -> Iterator[None]:
    """Keep MLflow's SQL store from logging a traceback for what is answered here in one line."""
    logger = logging.getLogger("mlflow.store.db.utils")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
