"""Finetune: a found network trained alone; what sharing its weights cost, and a version that may be better."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foxnas_mlflow.workflows._images import batches_of, class_weights_of, images_of
from foxnas_mlflow.workflows._request import PresetName, Request, parameter
from foxnas_mlflow.workflows._workflow import Result, progress_bar

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foxnas_mlflow.core.network import Network
    from foxnas_mlflow.core.targets import Target
    from foxnas_mlflow.data import Evaluation, ImageDataset
    from foxnas_mlflow.data.preprocess import Preprocessing
    from foxnas_mlflow.flavor import SubnetModel
    from foxnas_mlflow.tracking.run import EntryRun

LEARNING_RATE_SHARE = 0.1
"""Share of the preset's learning rate that a network starts with which is trained already."""


@dataclass(frozen=True, kw_only=True)
class FinetuneRequest(Request):
    """What to train further; see `run_finetune`. A step of `main`, no entry point of its own."""

    subnet: str = parameter("", "Model URI of a subnet with weights.")
    data: str = parameter("glyphs", "The images that its supernet was trained on.")
    preset: PresetName = parameter("tiny", "Learning rate and batch size.")
    epochs: int = parameter(1, "Passes over the training images.", at_least=1)
    max_train: int = parameter(0, "Train on at most so many images, drawn by class; 0: all.", at_least=0)
    target: str = parameter("", "Target of the search: a name or the path of a target YAML; empty: none.")
    seed: int = parameter(0, "Seed of the batches.", at_least=0)


@dataclass(frozen=True, kw_only=True)
class FinetuneResult(Result):
    """A network before and after training alone.

    Attributes:
        model_uri: The new version.
        subnet_uri: The one that it came from.
        inherited_top1: Top-1 of the shared weights in percent, float, on the validation images.
        finetuned_top1: Top-1 of its own weights.
    """

    model_uri: str
    subnet_uri: str
    inherited_top1: float
    finetuned_top1: float

    @property
    def better_uri(self) -> str:
        """The more accurate one of the two."""
        return self.model_uri if self.finetuned_top1 > self.inherited_top1 else self.subnet_uri


def run_finetune(
    request: FinetuneRequest, *, checkpoint: Path, tags: Mapping[str, str] | None = None
) -> FinetuneResult:
    """Train a registered subnet alone, from the weights that it shared, and register the result.

    Args:
        request: What to train.
        checkpoint: File of this training; one that was killed goes on from it.
        tags: Further tags of its run.

    Raises:
        InvalidInputError, InvalidFormatError: If the model is not a subnet with weights.
    """
    from foxnas_mlflow.core.targets import get_target
    from foxnas_mlflow.tracking.inputs import open_subnet
    from foxnas_mlflow.tracking.run import entry_run

    target = get_target(request.target) if request.target else None
    model, shared_weights, uri = open_subnet(request.subnet)
    request = request.replace(subnet=uri)
    size = model.architecture.image_size
    dataset = images_of(
        model, request.data, seed=request.seed, max_train=request.max_train or None, sizes=(size,), keep=True
    )
    with (
        entry_run(stage="finetune", params=request.texts(), target=target.name if target else None, tags=tags) as run,
        progress_bar("finetune", "step") as show,
    ):
        return _finetuned(
            run,
            request,
            target,
            model,
            shared_weights,
            dataset,
            checkpoint,
            lambda done, n, loss: show(done, n, f"loss {loss:.3f}"),
        )


def _finetuned(
    run: EntryRun,
    request: FinetuneRequest,
    target: Target | None,
    model: SubnetModel,
    shared_weights: Mapping[str, NDArray[Any]],
    dataset: ImageDataset,
    checkpoint: Path,
    progress: Callable[[int, int, float], None],
) -> FinetuneResult:
    import dataclasses

    from foxnas_mlflow.core.network import build_network
    from foxnas_mlflow.supernet import AUGMENTED_EPOCHS, PlainNetwork, finetune, get_preset, subnet_weights
    from foxnas_mlflow.tracking.finetune import log_finetuned
    from foxnas_mlflow.tracking.supernet import log_dataset

    subnet_uri, epochs, preset = request.subnet, request.epochs, get_preset(request.preset)
    preprocessing = model.preprocessing or dataset.preprocessing(model.architecture.image_size)
    log_dataset(run, dataset, context="training")
    network = build_network(model.space, model.architecture)
    batches = batches_of(
        model,
        dataset,
        batch_size=preset.batch_size,
        augment=epochs > AUGMENTED_EPOCHS and not dataset.drawn,
        seed=request.seed,
    )
    plain = finetune(
        PlainNetwork.from_weights(network, shared_weights),
        batches,
        epochs=epochs,
        learning_rate=LEARNING_RATE_SHARE * preset.learning_rate,
        class_weights=class_weights_of(model),
        progress=progress,
        checkpoint=checkpoint,
    )
    weights = subnet_weights(plain)
    inherited, evaluated = (_evaluated(network, w, dataset, preprocessing) for w in (shared_weights, weights))
    before, after = inherited.top1_percent, evaluated.top1_percent
    uri = log_finetuned(
        run,
        dataclasses.replace(model, weights=weights, preprocessing=preprocessing),
        subnet_uri=subnet_uri,
        epochs=epochs,
        inherited=inherited,
        evaluated=evaluated,
        target=target,
    )
    summary = (
        f"Trained {subnet_uri} alone for {epochs} epochs: {before:.2f} % with shared weights, {after:.2f} % with "
        f"its own ({after - before:+.2f} points); registered {uri}."
    )
    return FinetuneResult(
        run_id=run.run_id,
        model_uri=uri,
        subnet_uri=subnet_uri,
        inherited_top1=before,
        finetuned_top1=after,
        summary=summary,
    )


def _evaluated(
    network: Network, weights: Mapping[str, NDArray[Any]], dataset: ImageDataset, preprocessing: Preprocessing
) -> Evaluation:
    """What float weights answer to the validation images."""
    from foxnas_mlflow.data import evaluate, prepared_batches
    from foxnas_mlflow.supernet import plain_logits

    (evaluation,) = evaluate(
        prepared_batches(dataset.val, preprocessing),
        lambda images: plain_logits(network, weights, preprocessing.normalization(images)),
    )
    return evaluation
