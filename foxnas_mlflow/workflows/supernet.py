"""Supernet: one set of weights for every network of a space, trained on labelled images and registered."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.processors import n_processors
from foxnas_mlflow.workflows._request import parameter
from foxnas_mlflow.workflows._training import TrainingRequest
from foxnas_mlflow.workflows._workflow import Result, Workflow, logger, progress_bar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from foxnas_mlflow.core.space import SearchSpace
    from foxnas_mlflow.data import ImageDataset
    from foxnas_mlflow.supernet import Batches, KnownSupernet, Preset, SubnetEvaluator, Teacher, TrainingState, Worker
    from foxnas_mlflow.tracking.run import EntryRun


@dataclass(frozen=True, kw_only=True)
class SupernetRequest(TrainingRequest):
    """What to train; see `run_supernet`."""

    space: str = parameter("cpu", "Search space: cpu, tpu, proxyless, lite or the path of a YAML.")
    strategy: Literal["sandwich", "progressive_shrinking"] = parameter("sandwich", "How to train.")
    batch_size: int = parameter(0, "Images a step on each process; 0: the preset's.", at_least=0)
    accumulate: int = parameter(
        1, "Parts that a step's batch is computed in, one after another, for the memory of one part.", at_least=1
    )
    learning_rate: float = parameter(0.0, "Peak learning rate on each process; 0: the preset's.", at_least=0)
    width_mult: float = parameter(0.0, "Width multiplier of all channels; 0: the preset's.", at_least=0)
    flip: Literal["auto", "yes", "no"] = parameter("auto", "Mirror half of the training images; auto: colour only.")
    augment: Literal["auto", "yes", "no"] = parameter(
        "auto",
        "Crop, colour and erase parts of training images at random; auto: where they are seen more than 12 times.",
    )
    ema: float = parameter(0.0, "Decay of averaged weights in [0, 1); 0: none.", at_least=0, below=1)
    resume: str = parameter("", "Run id, or path of a checkpoint, of a training to go on with.")
    seed: int = parameter(0, "Seed of split, initial weights, batches and subnets.", at_least=0)
    name: str = parameter("foxnas", "Prefix of the registered model.")


HEAD_FIRST = 0.05
"""Share of a training with known weights in which the head and the norms learn alone (docs/METHOD.md)."""

N_RANDOM = 10
"""Random subnets of the final evaluation; an epoch's takes the first two."""

_EPOCH_IMAGES = 256
_TRAINED_IMAGES = 5000
"""Training images between two evaluations; every training has at least three."""


@dataclass(frozen=True, kw_only=True)
class SupernetResult(Result):
    """A registered supernet.

    Attributes:
        model_uri: The registered supernet; empty from a process that only helped to train.
        metrics: ``eval/top1_max``, ``_min``, ``_random``: accuracies of its subnets in percent;
            ``eval/balanced_accuracy_max``, ``_min``, ``_random``: the mean of their classes' accuracies;
            ``eval/majority_share``: that of always answering the most frequent class.
    """

    model_uri: str
    metrics: Mapping[str, float]


def run_supernet(request: SupernetRequest, *, tags: Mapping[str, str] | None = None) -> SupernetResult:
    """Train, evaluate and register a supernet.

    Args:
        request: What to train.
        tags: Further tags of its run.

    Raises:
        InvalidInputError: If data, space or checkpoint cannot be used.
        TrainingError: If the loss is no number any more.
    """
    from foxnas_mlflow.core.errors import import_or_raise
    from foxnas_mlflow.core.space import get_space
    from foxnas_mlflow.data import load_dataset

    import_or_raise("torch", extra="train", feature="training a supernet")

    from foxnas_mlflow.supernet import get_preset, join_workers

    preset = get_preset(request.preset)
    base = get_space(request.space)
    dataset = load_dataset(
        request.data,
        seed=request.seed,
        max_train=request.max_train or None,
        sizes=preset.space(base, in_channels=3, n_classes=2).image_sizes,
        keep=True,
        digest=_begun_with(request.resume) if request.resume else "",
        background=request.background,
    )
    space = preset.space(base, in_channels=dataset.channels, n_classes=dataset.n_classes)
    if request.width_mult:
        space = space.replace(width_mult=request.width_mult)

    with join_workers() as worker:
        if worker.rank:
            _train_beside(request, preset, space, dataset, worker)
            return SupernetResult(run_id="", model_uri="", metrics={})

        from foxnas_mlflow.tracking.run import entry_run
        from foxnas_mlflow.tracking.supernet import is_checkpoint_here, log_dataset

        # Logged once they are resolved.
        resolved = ("epochs", "batch_size", "learning_rate", "width_mult", "strategy")
        given = {key: value for key, value in request.texts().items() if key not in resolved}
        with entry_run(stage="supernet", params=given, space=space.name, tags=tags) as run:
            for warning in log_dataset(run, dataset, context="training"):
                logger.warning("%s", warning)
            try:
                return _train_and_register(request, preset, space, dataset, worker, run)
            except BaseException:
                # A pipeline goes on by itself.
                if tags is None and is_checkpoint_here(run.run_id):
                    logger.info("Its checkpoint is kept: the same command with --resume %s goes on.", run.run_id)
                raise


def _begun_with(resume: str) -> str:
    """Digest of the data of the training that is gone on with."""
    import tempfile
    from pathlib import Path

    from foxnas_mlflow.supernet import begun_with
    from foxnas_mlflow.tracking.supernet import find_checkpoints

    with tempfile.TemporaryDirectory(prefix="foxnas-") as directory:
        found = [begun_with(place) for place in find_checkpoints(resume, Path(directory))]
    return next(filter(None, found), "")


def _train_and_register(
    request: SupernetRequest, preset: Preset, space: SearchSpace, dataset: ImageDataset, worker: Worker, run: EntryRun
) -> SupernetResult:
    import dataclasses
    import math
    import shutil
    import time

    from foxnas_mlflow.core.classification import class_table
    from foxnas_mlflow.flavor import SupernetModel
    from foxnas_mlflow.supernet import SubnetEvaluator, train_supernet
    from foxnas_mlflow.tracking.run import best_effort
    from foxnas_mlflow.tracking.supernet import CHECKPOINT_ARTIFACTS, local_checkpoints, log_supernet
    from foxnas_mlflow.workflows._evaluation import fitting_images

    size = max(space.image_sizes)
    data = dataset.in_memory(size) if _fits(dataset, space, size) else dataset
    teacher = _teacher(request, dataset, worker)
    state, batches = _begin(request, preset, space, data, len(dataset.train), worker, run.directory)
    planned = {"batch_size": batches.batch_size, "width_mult": space.width_mult}
    run.log_params(
        planned | {key: getattr(state.config, key) for key in ("strategy", "epochs", "learning_rate", "n_random")}
    )
    if request.resume:
        run.set_tags({"foxnas.resumed_from": request.resume, "foxnas.resumed_at_step": state.step})
    checkpoints = local_checkpoints(run.run_id)
    quick = SubnetEvaluator(
        state.supernet,
        dataset,
        calibration_images=_EPOCH_IMAGES,
        validation_images=_EPOCH_IMAGES,
        seed=request.seed,
        device=worker.device,
    )
    log_metrics = best_effort(run.log_metrics)
    log_artifact = best_effort(run.log_artifact)

    every = min(math.ceil(_TRAINED_IMAGES / len(data.train)), math.ceil(state.config.epochs / 4))

    def end_of_epoch(epoch: int) -> None:
        # After the last one all images tell.
        if epoch < state.config.epochs and epoch % every == 0:
            log_metrics(_accuracies(quick, space, request.seed, 2)[0], step=state.step, dataset=run.dataset)

    start = time.monotonic()
    with progress_bar("supernet", "step") as show:
        supernet = train_supernet(
            state,
            batches,
            checkpoints=checkpoints,
            log=lambda metrics, step: log_metrics(metrics, step=step),
            end_of_epoch=end_of_epoch,
            on_checkpoint=lambda path: log_artifact(path, CHECKPOINT_ARTIFACTS),
            progress=lambda done, total, loss: show(done, total, f"loss {loss:.3f}"),
            device=worker.device,
            teacher=teacher,
        )
    seconds = time.monotonic() - start
    n_images = fitting_images(space, (size,))
    evaluator = SubnetEvaluator(supernet, dataset, validation_images=n_images, seed=request.seed, device=worker.device)
    metrics, lines, counts = _accuracies(evaluator, space, request.seed, N_RANDOM)
    run.log_table(class_table(counts, dataset.labels), "tables/classes.json")
    lines += _class_lines(counts, dataset.labels)
    config = {
        "data": request.data,
        "data_digest": dataset.digest,
        "max_train": request.max_train,
        "preset": request.preset,
        "batch_size": batches.batch_size,
        "flip": batches.flip,
        "augment": batches.augment,
        "init": state.origin.get("init", ""),
        "teacher": request.teacher,
        "sampling": request.sampling,
        "background": request.background,
        **dataclasses.asdict(state.config),
    }
    run.log_params({"mode": state.config.mode})
    run.log_metrics({"train/seconds": seconds})
    model = SupernetModel(
        space,
        supernet.numpy_weights(),
        {**config, "metrics": metrics},
        dataset.preprocessing(size),
        dataset.labels,
    )
    uri = log_supernet(run, model, metrics, step=state.step, name=request.name)
    shutil.rmtree(checkpoints)
    summary = [
        f"Trained on {len(data.train):,} images of {request.data}: {state.step:,} steps in {seconds:.0f} s "
        f"({state.config.mode}, {worker.device}).",
        *lines,
        f"Registered {uri}; run {run.run_id}.",
        f"Next: foxnas sample --supernet {shlex.quote(uri)} --data {shlex.quote(request.data)}",
    ]
    return SupernetResult(run_id=run.run_id, model_uri=uri, metrics=metrics, summary="\n".join(summary))


def _train_beside(
    request: SupernetRequest, preset: Preset, space: SearchSpace, dataset: ImageDataset, worker: Worker
) -> None:
    """What a process does that does not log: train with the others."""
    import tempfile
    from pathlib import Path

    from foxnas_mlflow.supernet import train_supernet

    size = max(space.image_sizes)
    data = dataset.in_memory(size) if _fits(dataset, space, size) else dataset
    with tempfile.TemporaryDirectory(prefix="foxnas-") as directory:
        teacher = _teacher(request, dataset, worker)
        state, batches = _begin(request, preset, space, data, len(dataset.train), worker, Path(directory))
        train_supernet(state, batches, checkpoints=Path(directory), device=worker.device, teacher=teacher)


def _begin(
    request: SupernetRequest,
    preset: Preset,
    space: SearchSpace,
    data: ImageDataset,
    n_train: int,
    worker: Worker,
    directory: Path,
) -> tuple[TrainingState, Batches]:
    """A new training, or the one to resume, and its batches; `n_train` counts broken images too."""
    batches = _batches(request, preset, space, data, worker)
    if request.resume:
        state = _resumed_state(request.resume, space, directory)
    else:
        state = _new_state(request, preset, space, data, worker, len(batches))
    batches.augment = _augmented(request, state.config.epochs, data)
    origin = {
        "data": data.digest,
        "n_train": n_train,
        "batch_size": batches.batch_size,
        "flip": batches.flip,
        "augment": batches.augment,
        "world_size": worker.world_size,
        "seed": request.seed,
    }
    origin |= {key: getattr(request, key) for key in ("init", "teacher", "class_weights", "sampling", "background")}
    if request.resume:
        _check_same(request, state, origin, worker)
    else:
        state.origin = origin
    return state, batches


def _batches(
    request: SupernetRequest, preset: Preset, space: SearchSpace, data: ImageDataset, worker: Worker
) -> Batches:
    """The batches of a training, of which its epochs say whether they are augmented."""
    from foxnas_mlflow.supernet import Batches

    batches = Batches(
        data.train,
        normalization=data.normalization,
        image_size=max(space.image_sizes),
        batch_size=request.batch_size or preset.batch_size,
        flip=data.may_mirror if request.flip == "auto" else request.flip == "yes",
        balanced=request.sampling == "balanced",
        seed=request.seed,
        workers=max(n_processors() // worker.world_size - 1, 0),
        rank=worker.rank,
        world_size=worker.world_size,
        device=worker.device,
    )
    if request.accumulate > batches.batch_size // 2:
        raise InvalidInputError(
            f"each part of a batch needs two images at least, for batch norm; the batch has {batches.batch_size}",
            received=f"accumulate={request.accumulate}",
            remedy="give fewer parts, or a larger batch_size",
        )
    return batches


def _resumed_state(resume: str, space: SearchSpace, directory: Path) -> TrainingState:
    """The training to go on with: of its checkpoints the latest."""
    from foxnas_mlflow.supernet import load_checkpoint
    from foxnas_mlflow.tracking.supernet import find_checkpoints

    states = [load_checkpoint(place, space) for place in find_checkpoints(resume, directory / "resume")]
    return max(states, key=lambda state: state.step)


def _new_state(
    request: SupernetRequest, preset: Preset, space: SearchSpace, data: ImageDataset, worker: Worker, n_batches: int
) -> TrainingState:
    """A training that begins, with random weights or those that it is given."""
    import torch

    from foxnas_mlflow.supernet import Supernet, TrainConfig, TrainingState, load_init

    torch.manual_seed(request.seed)
    config = TrainConfig(
        strategy=request.strategy,
        epochs=request.epochs or preset.epochs_for(n_batches),
        learning_rate=(request.learning_rate or preset.learning_rate) * worker.world_size,
        weight_decay=preset.weight_decay,
        ema=request.ema,
        accumulate=request.accumulate,
        class_weights=_class_weights(request, data),
        head_first=HEAD_FIRST if request.init else 0.0,
        seed=request.seed,
    )
    supernet = Supernet(space)
    if request.init:
        read = load_init(_source(request.init), supernet, labels=data.labels)
        if worker.rank == 0:
            logger.info("Read %d tensors of %s. Different from there:", len(read.placed), read.family)
            for line in read.differences:
                logger.info("  %s", line)
            if read.sha256:
                logger.info("Its file has %s bytes and the SHA-256 %s.", f"{read.size_bytes:,}", read.sha256)
    return TrainingState(supernet, config)


def _check_same(request: SupernetRequest, state: TrainingState, origin: Mapping[str, Any], worker: Worker) -> None:
    """Refuse to go on with a training by other parameters than it was begun with."""
    # What is resumed has its weights: those that it began with need not be named again.
    compared = {*origin, *state.origin} - ({"init"} if not request.init else set())
    differing = sorted(key for key in compared if state.origin.get(key) != origin.get(key))
    if request.epochs not in (0, state.config.epochs):
        differing.append("epochs")
    if request.learning_rate not in (0, state.config.learning_rate / worker.world_size):
        differing.append("learning_rate")
    differing += [
        key for key in ("strategy", "accumulate", "ema") if getattr(request, key) != getattr(state.config, key)
    ]
    if differing:
        raise InvalidInputError(
            "a training is resumed with the parameters that it was begun with",
            received=f"other {', '.join(differing)}",
            remedy="repeat the first command and add resume",
        )


def _source(init: str) -> str | KnownSupernet:
    """What `load_init` reads: a name, a path, or the supernet behind a URI."""
    from foxnas_mlflow.supernet import KnownSupernet
    from foxnas_mlflow.tracking.inputs import is_uri

    if not is_uri(init):
        return init
    from foxnas_mlflow.tracking.teacher import open_init

    model = open_init(init)
    return KnownSupernet(model.space, model.weights, model.labels)


def _class_weights(request: SupernetRequest, data: ImageDataset) -> tuple[float, ...]:
    """Inverse to the classes' shares of the training images; their mean over the images is 1."""
    import numpy as np

    if request.class_weights == "none":
        return ()
    counts = np.bincount(data.train.targets, minlength=data.n_classes)
    return tuple(float(w) for w in len(data.train) / (data.n_classes * counts))


def _teacher(request: SupernetRequest, dataset: ImageDataset, worker: Worker) -> Teacher | None:
    """The teacher; one that only answers has answered two images of the training already."""
    if not request.teacher:
        return None
    import dataclasses

    import numpy as np
    import torch

    from foxnas_mlflow.core.network import build_network
    from foxnas_mlflow.data import prepared_batches
    from foxnas_mlflow.flavor import SupernetModel
    from foxnas_mlflow.supernet import PlainNetwork, SubnetEvaluator, Supernet, function_teacher, network_teacher
    from foxnas_mlflow.tracking.teacher import AnsweringTeacher, open_teacher

    opened = open_teacher(request.teacher, labels=dataset.labels, channels=dataset.channels)
    ours = dataset.normalization
    if isinstance(opened, AnsweringTeacher):
        teacher = function_teacher(opened.answer, ours=ours, image_size=opened.image_size, n_classes=dataset.n_classes)
        preprocessing = dataset.preprocessing(opened.image_size or 32)
        images, _ = next(prepared_batches(dataset.train, preprocessing, np.arange(2)))
        teacher(torch.from_numpy(ours(images)).permute(0, 3, 1, 2))
        return teacher
    its = ours if opened.preprocessing is None else opened.preprocessing.normalization
    if isinstance(opened, SupernetModel):
        # Its statistics are those of whatever network its last step trained.
        shown = dataclasses.replace(dataset, normalization=its)
        known = Supernet.from_weights(opened.space, opened.weights)
        plain = SubnetEvaluator(known, shown, seed=request.seed, device=worker.device).network(opened.space.largest())
    else:
        plain = PlainNetwork.from_weights(build_network(opened.space, opened.architecture), opened.weights or {})
    return network_teacher(plain, its=its, ours=ours)


def _augmented(request: SupernetRequest, epochs: int, data: ImageDataset) -> bool:
    from foxnas_mlflow.supernet import AUGMENTED_EPOCHS

    return epochs > AUGMENTED_EPOCHS and not data.drawn if request.augment == "auto" else request.augment == "yes"


def _accuracies(
    evaluator: SubnetEvaluator, space: SearchSpace, seed: int, n_random: int
) -> tuple[dict[str, float], list[str], NDArray[np.int64]]:
    """Accuracies of the largest, the smallest and random subnets, as metrics and as a table; the largest's answers."""
    import numpy as np

    from foxnas_mlflow.core.classification import majority_percent
    from foxnas_mlflow.core.random import Stream, listed_stream

    largest, smallest = evaluator.evaluate(space.largest()), evaluator.evaluate(space.smallest())
    drawn = space.sample(listed_stream(seed, Stream.SHOWN_SUBNETS), n=n_random)
    top1, balanced = np.array([(e.top1_percent, e.balanced_percent) for e in map(evaluator.evaluate, drawn)]).T
    metrics = {
        "eval/top1_max": largest.top1_percent,
        "eval/top1_min": smallest.top1_percent,
        "eval/top1_random": float(top1.mean()),
        "eval/balanced_accuracy_max": largest.balanced_percent,
        "eval/balanced_accuracy_min": smallest.balanced_percent,
        "eval/balanced_accuracy_random": float(balanced.mean()),
        "eval/majority_share": majority_percent(largest.counts),
    }
    lines = [
        f"  largest subnet      {largest.top1_percent:6.2f} % top-1 +- {largest.standard_error:.2f} "
        f"({largest.n_images:,} validation images)",
        f"  smallest subnet     {smallest.top1_percent:6.2f} % top-1 +- {smallest.standard_error:.2f}",
        f"  {n_random} random subnets   {top1.mean():6.2f} % top-1, from {top1.min():.2f} to {top1.max():.2f}",
    ]
    return metrics, lines, largest.counts


def _class_lines(counts: NDArray[np.int64], labels: Sequence[str]) -> list[str]:
    """How the largest subnet does class by class, and whether it is worth anything."""
    from foxnas_mlflow.core.classification import (
        balanced_percent,
        majority_percent,
        no_better_than_majority,
        worst_classes,
    )

    worst, useless = worst_classes(counts, labels), no_better_than_majority(counts, labels)
    if useless:
        logger.warning("the largest subnet: %s", useless)
    return [
        f"  largest, by class   {balanced_percent(counts):6.2f} % balanced (mean of the classes); always the most "
        f"frequent class: {majority_percent(counts):.2f} % top-1",
        *([f"  its worst classes   {worst}"] if worst else []),
        *([f"  {useless}"] if useless else []),
    ]


def _fits(dataset: ImageDataset, space: SearchSpace, size: int) -> bool:
    """Whether 2 GiB of memory hold all images at the size of training."""
    from foxnas_mlflow.workflows._evaluation import fitting_images

    return len(dataset.train) + len(dataset.val) <= 2 * fitting_images(space, (size,))


WORKFLOW = Workflow(
    "supernet",
    "Train a supernet on labelled images: one set of weights for every network of a search space.",
    SupernetRequest,
    run_supernet,
    torchrun=True,
)
