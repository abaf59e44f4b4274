"""Promote: a registered version moves to a stage and its alias if its figures allow it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.workflows._request import Request, parameter
from foxnas_mlflow.workflows._workflow import Result, Workflow

if TYPE_CHECKING:
    from foxnas_mlflow.tracking.promotion import Promotion


@dataclass(frozen=True, kw_only=True)
class PromoteRequest(Request):
    """What to promote; see `run_promote`."""

    model: str = parameter(
        "", "Registered version: models:/name/3, models:/name@staging, models:/name or name (the newest)."
    )
    stage: str = parameter("Staging", "Stage to hold: Staging or Production; Archived withdraws the version.")
    max_latency_ms: float = parameter(
        0.0, "Largest 90th percentile of the measured latency in milliseconds; 0: any.", at_least=0
    )
    max_accuracy_drop: float = parameter(1.0, "Most points (percent) of top-1 that quantization may cost.", at_least=0)
    verify_key: str = parameter(
        "",
        "Public key (PEM) that the version and its measurement must be signed with, see foxnas sign; empty: none is "
        "asked for.",
    )
    rollback: bool = parameter(False, "Give the stage back to the version that held it before.")
    dry_run: bool = parameter(False, "Ask the gates, and move nothing.")
    history: bool = parameter(False, "Only tell which version held the stage when.")
    date: str = parameter("", "With history: who held it on this date (2026-11-25) or at this time, UTC.")

    def check(self) -> None:
        """A model must be named, and rollback and history have a stage."""
        if not self.model:
            raise InvalidInputError("model must be a registered model", remedy="give --model models:/NAME/VERSION")
        if self.stage.strip().lower() not in _STAGES:
            raise InvalidInputError("stage must be Staging, Production or Archived", received=self.stage)
        if self.stage_name == "Archived" and (self.rollback or self.history):
            raise InvalidInputError("rollback and history are of Staging or Production", received="stage Archived")

    @property
    def stage_name(self) -> str:
        """The stage as MLflow writes it."""
        return _STAGES[self.stage.strip().lower()]


_STAGES: Mapping[str, str] = {name.lower(): name for name in ("Staging", "Production", "Archived")}


@dataclass(frozen=True, kw_only=True)
class PromoteResult(Result):
    """What moved.

    Attributes:
        model_uri: The version that holds the stage now; empty where only the history was asked for.
        stage: The stage.
    """

    model_uri: str = ""
    stage: str = ""


def run_promote(request: PromoteRequest, *, tags: Mapping[str, str] | None = None) -> PromoteResult:
    """Promote, roll back, archive, or tell the history.

    Args:
        request: What to promote.
        tags: Further tags of its run.

    Raises:
        PromotionError: If a gate refuses; nothing moves.
        MlflowException: If there is no such version.
    """
    from foxnas_mlflow.tracking.registry import find_version

    version = find_version(request.model)
    if request.history:
        return PromoteResult(run_id="", summary=_history(version.name, request.stage_name, request.date))

    from pathlib import Path

    from foxnas_mlflow.tracking import promotion
    from foxnas_mlflow.tracking.run import entry_run

    stage = request.stage_name
    own = {"foxnas.promoted": f"{version.name} to {stage}"}
    with entry_run(stage="promote", params=request.texts(), tags={**own, **(tags or {})}) as run:
        if request.rollback:
            named = request.model.strip().removeprefix("models:/").strip("/") != version.name
            leaving = str(version.version) if named else None
            done = promotion.rollback(run, version.name, stage, leaving=leaving, dry_run=request.dry_run)
        elif stage == "Archived":
            done = promotion.archive(run, version, dry_run=request.dry_run)
        else:
            done = promotion.promote(
                run,
                version,
                stage,
                max_latency_ms=request.max_latency_ms,
                max_accuracy_drop=request.max_accuracy_drop,
                dry_run=request.dry_run,
                verify_key=Path(request.verify_key) if request.verify_key else None,
            )
        return PromoteResult(
            run_id=run.run_id, model_uri=done.uri, stage=done.stage, summary=_summary(request, done, run.run_id)
        )


def _summary(request: PromoteRequest, done: Promotion, run_id: str) -> str:
    from foxnas_mlflow.tracking.registry import aliases_of

    before, now = (f"version {number}" if number else "nobody" for number in (done.former, done.version))
    lines = []
    if done.dry_run:
        lines.append(f"  dry run       nothing was moved: {done.stage} would go from {before} to {now}")
    elif done.stage == "Archived":
        others = ", ".join(aliases_of(done.uri))
        lines.append(
            f"{done.name} version {done.version} is archived and holds no stage"
            + (f"; other aliases of it stay: {others}." if others else " and no alias.")
        )
    else:
        how = "alias and stage" if done.stages else "alias (this registry has no stages)"
        left = f"; {before} is archived" if done.stages and done.former not in (None, done.version) else ""
        lines.append(f"  {done.action:<14}{done.stage} is {now}: {how}{left}")
    lines.append(f"  run           {run_id}: promotion.json")
    alias = shlex.quote(f"models:/{done.name}@{done.stage.lower()}")
    asked = request.options("max_latency_ms", "max_accuracy_drop", "verify_key")
    following = {
        "Staging": f"foxnas promote --model {alias} --stage Production{asked}",
        "Production": f"mlflow models serve -m {alias} --env-manager local",
        "Archived": f"foxnas promote --history --model {shlex.quote(done.name)} --stage Production",
    }
    lines.append("Next: " + ("the same command without dry-run" if done.dry_run else following[done.stage]))
    return "\n".join(lines)


def _history(name: str, stage: str, date: str) -> str:
    from foxnas_mlflow.tracking.history import held_on, intervals
    from foxnas_mlflow.tracking.holders import StageKeeper

    entries = StageKeeper(name).history(stage)
    shown = held_on(entries, date) if date else intervals(entries)
    lines = [f"{stage} of {name}{f' on {date}' if date else ''} (UTC):"]
    if not shown:
        lines.append("  nobody" if date else "  no promotion was noted")
    for interval in shown:
        until = "now" if interval.until is None else f"{interval.until:%Y-%m-%d %H:%M:%S}"
        version = "nobody" if interval.version is None else f"version {interval.version}"
        how = f"{interval.action}, run {interval.run_id}" if interval.run_id else interval.action
        lines.append(f"  {version:<12}{interval.since:%Y-%m-%d %H:%M:%S} to {until:<21}{how}")
    holder = next((i.version for i in shown if i.until is None and i.version), None)
    back = f"foxnas promote --rollback --model {shlex.quote(name)} --stage {stage}"
    lines.append(f"Next: {back if holder else 'foxnas promote --help'}")
    return "\n".join(lines)


WORKFLOW = Workflow(
    "promote",
    "Move a registered version to a stage and its alias if the gates hold; roll back; tell the history.",
    PromoteRequest,
    run_promote,
)
