"""A registered supernet's subnets, ready to be evaluated: here, or by several workers at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.parallel import one_at_a_time
from foxnas_mlflow.core.space import SearchSpace
from foxnas_mlflow.workflows._workflow import logger

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foxnas_mlflow.core.workers import Executor
    from foxnas_mlflow.data import Evaluation, ImageDataset
    from foxnas_mlflow.supernet import SubnetEvaluator
    from foxnas_mlflow.tracking.inputs import TrainedSupernet

_CACHED_BYTES = 2**30


def fitting_images(space: SearchSpace, image_sizes: Sequence[int], asked: int = 0) -> int:
    """How many images 1 GiB holds, at least one.

    Args:
        space: The space, for the channels.
        image_sizes: Sizes in pixels that each image is kept at.
        asked: No more than so many; 0: as many as it holds.
    """
    n_bytes = sum(size * size * space.in_channels for size in image_sizes)
    limit = max(_CACHED_BYTES // n_bytes, 1)
    return min(asked or limit, limit)


@dataclass(frozen=True)
class EvaluatorMaking:
    """All that an evaluator is made of, to be sent where it is made.

    Attributes:
        n_threads: Threads of a worker; None: PyTorch's own choice.
    """

    space: SearchSpace
    weights: Mapping[str, NDArray[Any]]
    dataset: ImageDataset
    validation_images: int
    seed: int
    n_threads: int | None = None

    def evaluator(self) -> SubnetEvaluator:
        """Evaluates the subnets, on a GPU where there is one."""
        import torch

        from foxnas_mlflow.supernet import SubnetEvaluator, Supernet

        return SubnetEvaluator(
            Supernet.from_weights(self.space, self.weights),
            self.dataset,
            validation_images=self.validation_images,
            seed=self.seed,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )

    def __call__(self) -> Callable[[Architecture], Evaluation]:
        import torch

        if self.n_threads is not None:
            torch.set_num_threads(self.n_threads)
        return self.evaluator().evaluate


def evaluator_making(
    trained: TrainedSupernet,
    *,
    image_sizes: Sequence[int],
    validation_images: int = 0,
    seed: int = 0,
    n_threads: int | None = None,
) -> EvaluatorMaking:
    """What an evaluator is made of.

    Args:
        trained: The supernet and its images.
        image_sizes: Image sizes in pixels that it will be asked for.
        validation_images: At most so many validation images, and no more than 1 GiB holds; 0: all.
        seed: Seed of the choice of calibration and validation images.
        n_threads: Threads of a worker; None: PyTorch's own choice.
    """
    images = fitting_images(trained.space, image_sizes, validation_images)
    return EvaluatorMaking(trained.space, trained.model.weights, trained.dataset, images, seed, n_threads)


@dataclass(frozen=True)
class Evaluators:
    """Evaluates subnets.

    Attributes:
        evaluate: Evaluates one; several threads may call it.
        n_images: Number of validation images behind an accuracy.
        weights: Inherited weights of one.
        n: How many can be evaluated at once.
    """

    evaluate: Callable[[Architecture], Evaluation]
    n_images: int
    weights: Callable[[Architecture], dict[str, NDArray[Any]]]
    n: int = 1


@contextlib.contextmanager
def supernet_evaluators(
    trained: TrainedSupernet,
    *,
    image_sizes: Sequence[int],
    validation_images: int = 0,
    seed: int = 0,
    n: int = 1,
    executor: Executor | None = None,
) -> Iterator[Evaluators]:
    """Evaluates a supernet's subnets, `n` at once.

    Args:
        trained, image_sizes, validation_images, seed: As for `evaluator_making`.
        n: How many workers.
        executor: Starts them; None: this process alone, one subnet at a time.
    """
    making = evaluator_making(
        trained,
        image_sizes=image_sizes,
        validation_images=validation_images,
        seed=seed,
        n_threads=None if executor is None else executor.threads(n),
    )
    evaluator, n_val = making.evaluator(), len(trained.dataset.val)
    n_asked = min(validation_images or n_val, n_val)
    if making.validation_images < n_asked:
        logger.warning(
            "accuracies are of %s validation images, not of %s: at image sizes of %s px the %.3g GiB that they are "
            "kept in hold no more",
            *(f"{evaluator.n_images:,}", f"{n_asked:,}", "/".join(map(str, image_sizes)), _CACHED_BYTES / 2**30),
        )
    if executor is None:
        yield Evaluators(one_at_a_time(evaluator.evaluate), evaluator.n_images, evaluator.weights)
        return
    fewest = evaluator.n_images

    def evaluated(architecture: Architecture) -> Evaluation:
        nonlocal fewest
        evaluation = shared(architecture)
        # What a worker skips it tells in a process of its own.
        if evaluation.n_images < fewest:
            fewest = evaluation.n_images
            logger.warning("%d validation images cannot be read any more", evaluator.n_images - fewest)
        return evaluation

    with executor.workers(making, n) as shared:
        yield Evaluators(evaluated, evaluator.n_images, evaluator.weights, n)
