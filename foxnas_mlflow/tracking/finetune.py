"""A found network trained alone: what sharing its weights cost, and a version that may be better."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from foxnas_mlflow.core.errors import InvalidFormatError
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.data import ImageDataset, prepared_batches
from foxnas_mlflow.data.preprocess import Preprocessing
from foxnas_mlflow.flavor import SubnetModel, load_model, log_model
from foxnas_mlflow.supernet import (
    AUGMENTED_EPOCHS,
    Batches,
    PlainNetwork,
    Preset,
    finetune,
    plain_logits,
    subnet_weights,
)
from foxnas_mlflow.tracking.registry import find_version, register
from foxnas_mlflow.tracking.run import EntryRun
from foxnas_mlflow.tracking.supernet import log_dataset

LEARNING_RATE_SHARE = 0.1
"""Share of the preset's learning rate that a network starts with which is trained already."""


def finetuned(
    run: EntryRun,
    subnet_uri: str,
    dataset: ImageDataset,
    *,
    preset: Preset,
    epochs: int,
    seed: int,
    progress: Callable[[int, int, float], None],
    checkpoint: Path,
) -> dict[str, Any]:
    """Train a registered subnet alone, from the weights that it shared, and register the result.

    Args:
        run: The open run.
        subnet_uri: ``models:/name/version`` of a subnet with weights.
        dataset: The images that its supernet was trained on.
        preset: Learning rate and batch size.
        epochs: Passes over the training images.
        seed: Seed of the batches.
        progress: Called with steps done, all steps and the loss.
        checkpoint: File of this training; one that was killed goes on from it.

    Returns:
        run_id, model_uri of the new version, inherited_top1 and finetuned_top1 in percent, of float
        weights on the validation images.

    Raises:
        InvalidFormatError: If the model is not a subnet with weights.
    """
    model = load_model(subnet_uri)
    if not isinstance(model, SubnetModel) or model.weights is None or model.preprocessing is None:
        raise InvalidFormatError("only a subnet with weights can be trained further", received=subnet_uri)
    log_dataset(run, dataset, context="training")
    network = build_network(model.space, model.architecture)
    batches = Batches(
        dataset.train,
        normalization=dataset.normalization,
        image_size=model.architecture.image_size,
        batch_size=preset.batch_size,
        flip=dataset.channels == 3,
        augment=epochs > AUGMENTED_EPOCHS,
        seed=seed,
    )
    plain = finetune(
        PlainNetwork.from_weights(network, model.weights),
        batches,
        epochs=epochs,
        learning_rate=LEARNING_RATE_SHARE * preset.learning_rate,
        progress=progress,
        checkpoint=checkpoint,
    )
    better = SubnetModel(
        model.architecture,
        model.space,
        {**model.details, "finetuned_epochs": epochs, "finetuned_from": subnet_uri},
        subnet_weights(plain),
        model.preprocessing,
        model.labels,
    )
    before, after = (_top1(m, dataset, m.preprocessing or model.preprocessing) for m in (model, better))
    version = find_version(subnet_uri)
    info = log_model(better, name="subnet")
    figures = {
        "finetune/inherited_top1": before,
        "finetune/top1": after,
        "finetune/shared_weights_cost": after - before,
    }
    run.log_metrics(figures, model_id=info.model_id)
    kept = {key: value for key, value in version.tags.items() if not key.startswith("gate")}
    uri = register(
        info.model_uri,
        version.name,
        "subnet",
        tags={**kept, "finetuned_from": subnet_uri, "finetuned_epochs": epochs},
        facts={
            "trained alone from": f"{subnet_uri}, for {epochs} epochs",
            "float top-1, %": after,
            "with shared weights, %": before,
        },
        command=lambda uri: f"foxnas quantize --subnet {uri}",
    )
    print(
        f"Trained {subnet_uri} alone for {epochs} epochs: {before:.2f} % with shared weights, {after:.2f} % with "
        f"its own ({after - before:+.2f} points); registered {uri}."
    )
    return {"run_id": run.run_id, "model_uri": uri, "inherited_top1": before, "finetuned_top1": after}


def _top1(model: SubnetModel, dataset: ImageDataset, preprocessing: Preprocessing) -> float:
    """Top-1 of float weights in percent."""
    network = build_network(model.space, model.architecture)
    n_right = n_images = 0
    for images, targets in prepared_batches(dataset.val, preprocessing):
        logits = plain_logits(network, model.weights or {}, preprocessing.normalization(images))
        n_right += int((logits.argmax(axis=1) == targets).sum())
        n_images += len(targets)
    return 100 * n_right / n_images
