"""Inherited accuracy of subnets beside that of the same subnets trained alone for as many steps.

    python benchmarks/inherited.py models:/foxnas-supernet/1 [--subnets 3] [--seed 5]

Each subnet is trained from new weights on the supernet's own batches, with its schedule, label
smoothing, weight decay and clipping; both are evaluated with recalibrated batch norm on all
validation images.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.data import ImageDataset, load_dataset
from foxnas_mlflow.flavor import SupernetModel, load_model
from foxnas_mlflow.supernet import Batches, PlainNetwork, SubnetEvaluator, Supernet, TrainConfig, train_alone


def alone(model: SupernetModel, data: ImageDataset, architecture: Architecture) -> PlainNetwork:
    """A subnet with weights of its own, trained as its supernet was."""
    values = {name: model.config[name] for name in TrainConfig.__dataclass_fields__ if name in model.config}
    config = TrainConfig(**{**values, "strategy": "alone", "ema": 0.0, "workers": 1})
    torch.manual_seed(config.seed)
    batches = Batches(
        data.train,
        normalization=data.normalization,
        image_size=max(model.space.image_sizes),
        batch_size=model.config["batch_size"],
        flip=model.config["flip"],
        augment=model.config["augment"],
        seed=config.seed,
    )
    return train_alone(PlainNetwork(build_network(model.space, architecture)), batches, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("supernet", help="URI of a registered supernet")
    parser.add_argument("--subnets", type=int, default=3)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    model = load_model(args.supernet)
    size = max(model.space.image_sizes)
    data = load_dataset(
        model.config["data"], seed=model.config["seed"], max_train=model.config["max_train"] or None
    ).in_memory(size)
    evaluator = SubnetEvaluator(Supernet.from_weights(model.space, model.weights), data)
    differences = []
    for architecture in model.space.sample(np.random.default_rng(args.seed), n=args.subnets):
        inherited = evaluator.evaluate(architecture)
        start = time.monotonic()
        own = evaluator.accuracy(alone(model, data, architecture), architecture.image_size)
        differences.append(own.top1_percent - inherited.top1_percent)
        depths = "".join(str(stage.depth) for stage in architecture.stages)
        print(
            f"D {depths}, {architecture.image_size} px: inherited {inherited.top1_percent:.2f} %, "
            f"alone {own.top1_percent:.2f} % (+- {own.standard_error:.2f}), "
            f"alone - inherited {differences[-1]:+.2f} points, {time.monotonic() - start:.0f} s",
            flush=True,
        )
    print(f"mean of alone - inherited {np.mean(differences):+.2f} points, largest {max(differences):+.2f}")


if __name__ == "__main__":
    main()
