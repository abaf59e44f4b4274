"""Logging a network that was trained alone: its figures beside those of the weights that it shared, and its version."""

from __future__ import annotations

import dataclasses

from foxnas_mlflow.core.targets import Target
from foxnas_mlflow.data import Evaluation
from foxnas_mlflow.flavor import SubnetModel, log_model
from foxnas_mlflow.tracking.registry import find_version, register
from foxnas_mlflow.tracking.run import EntryRun
from foxnas_mlflow.tracking.search import quantize_command


def log_finetuned(
    run: EntryRun,
    trained: SubnetModel,
    *,
    subnet_uri: str,
    epochs: int,
    inherited: Evaluation,
    evaluated: Evaluation,
    target: Target | None,
) -> str:
    """Log a network and register it as a version of the model that it came from.

    Args:
        run: The open run.
        trained: The network with its own weights, and all that was known of it before.
        subnet_uri: The version that it came from.
        epochs: How long it was trained.
        inherited: What it answered with the shared weights.
        evaluated: What it answers now.
        target: Target of the search, where it is known.

    Returns:
        URI of the registered version.
    """
    version = find_version(subnet_uri)
    before, after = inherited.top1_percent, evaluated.top1_percent
    details = {
        **trained.details,
        "evaluated_accuracy": after,
        "evaluated_accuracy_standard_error": evaluated.standard_error,
        "finetuned_epochs": epochs,
        "finetuned_from": subnet_uri,
    }
    info = log_model(dataclasses.replace(trained, details=details), name="subnet")
    figures = {
        "finetune/inherited_top1": before,
        "finetune/top1": after,
        "finetune/shared_weights_cost": after - before,
    }
    run.log_metrics(figures, model_id=info.model_id, dataset=run.dataset)
    kept = {key: value for key, value in version.tags.items() if not key.startswith("gate")}
    return register(
        info.model_uri,
        version.name,
        "subnet",
        tags={**kept, "finetuned_from": subnet_uri, "finetuned_epochs": epochs},
        facts={
            "trained alone from": f"{subnet_uri}, for {epochs} epochs",
            "float top-1, %": after,
            "with shared weights, %": before,
        },
        command=lambda uri: quantize_command(uri, target),
    )
