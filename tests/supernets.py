"""A supernet of few and narrow layers with random weights, registered as a trained one is."""

from __future__ import annotations

from foxnas_mlflow.core.space import CPU_SPACE, SearchSpace, StageSpec, Tail

MINI_SPACE: SearchSpace = CPU_SPACE.replace(
    name="cpu-mini",
    image_sizes=(8, 12, 16),
    stages=tuple(
        StageSpec(s.width, stride, s.block) for s, stride in zip(CPU_SPACE.stages, (1, 2, 1, 1, 2), strict=True)
    ),
    tail=Tail(conv_width=96),
    width_mult=0.15,
    in_channels=1,
    n_classes=10,
)

TRAINING = {"flip": False, "sampling": "balanced", "class_weights": [1.0] * 10}

METRICS = ("eval/top1_max", "eval/top1_min", "eval/top1_random")


def register_mini_supernet(name: str = "foxnas", space: SearchSpace = MINI_SPACE) -> str:
    """Register a supernet of a small space on the digits; its URI."""
    import torch

    from foxnas_mlflow.data import load_dataset
    from foxnas_mlflow.data.preprocess import Preprocessing
    from foxnas_mlflow.flavor import SupernetModel
    from foxnas_mlflow.supernet import Supernet
    from foxnas_mlflow.tracking.run import entry_run
    from foxnas_mlflow.tracking.supernet import log_supernet

    dataset = load_dataset("digits", seed=3, max_train=400)
    torch.manual_seed(0)
    model = SupernetModel(
        space,
        Supernet(space).numpy_weights(),
        {"data": "digits", "data_digest": dataset.digest, "max_train": 400, "seed": 3} | TRAINING,
        Preprocessing(max(space.image_sizes), 1, normalization=dataset.normalization),
        dataset.labels,
    )
    with entry_run(stage="supernet", params={}, space=space.name) as run:
        return log_supernet(run, model, dict.fromkeys(METRICS, 10.0), step=0, name=name)
