"""Logging a training: its data, its checkpoints, and the registered supernet."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.exceptions import MlflowException

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.files import cache_directory
from foxnas_mlflow.core.redaction import redacted
from foxnas_mlflow.data import ImageDataset
from foxnas_mlflow.flavor import SupernetModel, log_model
from foxnas_mlflow.tracking.registry import is_away, register, registered_name, shortened
from foxnas_mlflow.tracking.run import EntryRun, download_artifact

CHECKPOINT_ARTIFACTS = "checkpoint"
"""Artifact directory of a training's checkpoints."""


def local_checkpoints(run_id: str) -> Path:
    """Where this machine keeps a run's checkpoints until its supernet is registered."""
    return cache_directory("checkpoints", run_id)


def has_checkpoint(run_id: str) -> bool:
    """Whether a run left a checkpoint, here or in its artifacts."""
    return is_checkpoint_here(run_id) or bool(MlflowClient().list_artifacts(run_id, CHECKPOINT_ARTIFACTS))


def is_checkpoint_here(run_id: str) -> bool:
    """Whether a run left a checkpoint on this machine."""
    return any((cache_directory("checkpoints") / run_id).glob("*.safetensors"))


def find_checkpoints(resume: str, destination: Path) -> list[Path]:
    """Directories or files that may hold the checkpoint to go on from.

    Args:
        resume: Path of a checkpoint or of its directory, or the id of a run.
        destination: Where artifacts of a run are downloaded to.

    Raises:
        InvalidInputError: If it is neither, or the run left no checkpoint.
        MlflowException: If this machine has none and the server does not answer.
    """
    path = Path(resume).expanduser()
    if path.exists():
        return [path]
    places = [local_checkpoints(resume)]
    reason = "no checkpoint"
    try:
        places.append(download_artifact(resume, CHECKPOINT_ARTIFACTS, destination))
    except (MlflowException, OSError) as error:
        # What lies here is enough.
        if is_away(error) and not any(places[0].glob("*.safetensors")):
            raise
        reason = str(error).strip().splitlines()[0]
    found = [place for place in places if any(place.glob("*.safetensors"))]
    if not any(places[0].iterdir()):
        places[0].rmdir()
    if not found:
        raise InvalidInputError(
            "resume must be the path of a checkpoint, or the id of a run that left one", received=f"{resume} ({reason})"
        )
    return found


def log_dataset(run: EntryRun, dataset: ImageDataset, *, context: str) -> list[str]:
    """Log a data set as an input of the run, with its digest (36 characters fit MLflow's column).

    It becomes the run's `dataset`, which its accuracies are logged with.

    ==========================  =====================================================================
    ``data_warnings.txt``       what a user should know of the data; tag ``foxnas.data_warnings``: how many
    ``unreadable.txt``          files that were left out, damaged or too large
    ``skipped.txt``             files that broke while the run lasted; metric ``data/skipped``: how many
    ==========================  =====================================================================

    Returns:
        What a user should know of the data.
    """
    name = redacted(dataset.source)
    source = CodeDatasetSource(tags={"mlflow.source.name": name})
    # MLflow documents this use of a class that it declares abstract.
    logged = MetaDataset(source=source, name=name, digest=dataset.digest[:36])  # type: ignore[abstract]
    mlflow.log_input(logged, context=context)
    run.dataset = logged
    run.log_params(
        {
            "data_digest": dataset.digest,
            "n_train": len(dataset.train),
            "n_val": len(dataset.val),
            "n_classes": dataset.n_classes,
            "channels": dataset.channels,
        }
    )
    if dataset.unreadable:
        run.log_text("\n".join(dataset.unreadable) + "\n", "unreadable.txt")
    warnings = dataset.warnings()
    if warnings:
        run.log_text("\n".join(warnings) + "\n", "data_warnings.txt")
        run.set_tags({"foxnas.data_warnings": len(warnings)})
    before = set(dataset.broken)

    def log_broken() -> None:
        broken = [name for name in dataset.broken if name not in before]
        if broken:
            run.log_metrics({"data/skipped": len(broken)})
            run.log_text("\n".join(broken) + "\n", "skipped.txt")

    run.at_end.append(log_broken)
    return warnings


def log_supernet(run: EntryRun, model: SupernetModel, metrics: Mapping[str, float], *, step: int, name: str) -> str:
    """Register a trained supernet with its figures.

    Args:
        run: The open run.
        model: The supernet.
        metrics: Accuracies of its subnets, in percent.
        step: Steps of its training: where its curves end.
        name: Prefix of the registered model.

    Returns:
        URI of the registered version.
    """
    info = log_model(model, name="supernet")
    run.log_metrics(metrics, step=step, model_id=info.model_id, dataset=run.dataset)
    return register(
        info.model_uri,
        registered_name(name, "supernet"),
        "supernet",
        tags={
            "weights": "trained",
            "space": model.space.name,
            "data": model.config["data"],
            "data_digest": model.config["data_digest"],
        },
        facts={
            "space": model.space.name,
            "images": model.config["data"],
            "labels": shortened(model.labels),
            "image sizes, px": ", ".join(map(str, model.space.image_sizes)),
            "largest subnet, % top-1": metrics["eval/top1_max"],
            "smallest subnet, % top-1": metrics["eval/top1_min"],
            "random subnets, % top-1": metrics["eval/top1_random"],
        },
        command=lambda uri: f"foxnas sample --supernet {shlex.quote(uri)}",
    )
