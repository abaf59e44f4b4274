"""``foxnas promote``: move a registered version to a stage and its alias if its figures allow it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from foxnas_mlflow.cli.parameters import Parameter

if TYPE_CHECKING:
    from foxnas_mlflow.tracking.promotion import Promotion

SUMMARY = "Move a registered version to a stage and its alias if the gates hold; roll back; tell the history."

PARAMETERS = (
    Parameter(
        "model", "", "Registered version: models:/name/3, models:/name@staging, models:/name or name (the newest)."
    ),
    Parameter("stage", "Staging", "Stage to hold: Staging or Production; Archived withdraws the version."),
    Parameter("max_latency_ms", 0.0, "Largest 90th percentile of the measured latency in milliseconds; 0: any.", float),
    Parameter("max_accuracy_drop", 1.0, "Most points (percent) of top-1 that quantization may cost.", float),
    Parameter("rollback", False, "Give the stage back to the version that held it before.", bool),
    Parameter("dry_run", False, "Ask the gates, and move nothing.", bool),
    Parameter("history", False, "Only tell which version held the stage when.", bool),
    Parameter("date", "", "With history: who held it on this date (2026-11-25) or at this time, UTC."),
)


def run(args: argparse.Namespace) -> dict[str, str | float]:
    """Promote, roll back, archive, or tell the history."""
    from foxnas_mlflow.core.errors import InvalidInputError

    stages = {name.lower(): name for name in ("Staging", "Production", "Archived")}
    stage = stages.get(args.stage.strip().lower())
    if stage is None:
        raise InvalidInputError("stage must be Staging, Production or Archived", received=args.stage)
    if not args.model:
        raise InvalidInputError("model must be a registered model", remedy="give --model models:/NAME/VERSION")
    for name in ("max_latency_ms", "max_accuracy_drop"):
        if getattr(args, name) < 0:
            raise InvalidInputError(f"{name} must be 0 or more", received=getattr(args, name))
    if stage == "Archived" and (args.rollback or args.history):
        raise InvalidInputError("rollback and history are of Staging or Production", received="stage Archived")

    from foxnas_mlflow.tracking.registry import find_version

    version = find_version(args.model)
    if args.history:
        _print_history(version.name, stage, args.date)
        return {}

    from foxnas_mlflow.tracking import promotion
    from foxnas_mlflow.tracking.run import entry_run

    tags = {"foxnas.promoted": f"{version.name} to {stage}"}
    with entry_run(stage="promote", params=vars(args), tags=tags) as run:
        if args.rollback:
            named = args.model.strip().removeprefix("models:/").strip("/") != version.name
            leaving = str(version.version) if named else None
            done = promotion.rollback(run, version.name, stage, leaving=leaving, dry_run=args.dry_run)
        elif stage == "Archived":
            done = promotion.archive(run, version, dry_run=args.dry_run)
        else:
            done = promotion.promote(
                run,
                version,
                stage,
                max_latency_ms=args.max_latency_ms,
                max_accuracy_drop=args.max_accuracy_drop,
                dry_run=args.dry_run,
            )
        _print_done(done, run.run_id)
        return {"run_id": run.run_id, "model_uri": done.uri, "stage": done.stage}


def _print_done(done: Promotion, run_id: str) -> None:
    before, now = (f"version {number}" if number else "nobody" for number in (done.former, done.version))
    if done.dry_run:
        print(f"  dry run       nothing was moved: {done.stage} would go from {before} to {now}")
    elif done.stage == "Archived":
        print(f"{done.name} version {done.version} is archived and holds no alias.")
    else:
        how = "alias and stage" if done.stages else "alias (this registry has no stages)"
        left = f"; {before} is archived" if done.stages and done.former not in (None, done.version) else ""
        print(f"  {done.action:<14}{done.stage} is {now}: {how}{left}")
    print(f"  run           {run_id}: promotion.json")
    alias = f"models:/{done.name}@{done.stage.lower()}"
    following = {
        "Staging": f"foxnas promote --model {alias} --stage Production",
        "Production": f"mlflow models serve -m {alias} --env-manager local",
        "Archived": f"foxnas promote --history --model {done.name} --stage Production",
    }
    print("Next: " + ("the same command without dry-run" if done.dry_run else following[done.stage]))


def _print_history(name: str, stage: str, date: str) -> None:
    from foxnas_mlflow.tracking.history import held_on, intervals
    from foxnas_mlflow.tracking.holders import StageKeeper

    entries = StageKeeper(name).history(stage)
    shown = held_on(entries, date) if date else intervals(entries)
    print(f"{stage} of {name}{f' on {date}' if date else ''} (UTC):")
    if not shown:
        print("  nobody" if date else "  no promotion was noted")
    for interval in shown:
        until = "now" if interval.until is None else f"{interval.until:%Y-%m-%d %H:%M:%S}"
        version = "nobody" if interval.version is None else f"version {interval.version}"
        how = f"{interval.action}, run {interval.run_id}" if interval.run_id else interval.action
        print(f"  {version:<12}{interval.since:%Y-%m-%d %H:%M:%S} to {until:<21}{how}")
    holder = next((i.version for i in shown if i.until is None and i.version), None)
    print(
        f"Next: foxnas promote --rollback --model {name} --stage {stage}" if holder else "Next: foxnas promote --help"
    )
