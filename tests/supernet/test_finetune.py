"""A subnet trained alone goes on from the weights that it shared."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.data import load_dataset
from foxnas_mlflow.supernet import Batches, PlainNetwork, finetune, get_preset, subnet_weights

pytestmark = pytest.mark.train


def test_training_alone_lowers_the_loss_and_can_be_repeated() -> None:
    dataset = load_dataset("digits", max_train=96).in_memory(16)
    space = get_preset("tiny").space(CPU_SPACE, in_channels=1, n_classes=10)
    network = build_network(space, space.smallest(16))
    torch.manual_seed(0)
    start = subnet_weights(PlainNetwork(network))
    batches = Batches(
        dataset.train, normalization=dataset.normalization, image_size=16, batch_size=32, flip=False, seed=0
    )

    def trained() -> tuple[dict[str, np.ndarray], list[float]]:
        losses: list[float] = []
        plain = finetune(
            PlainNetwork.from_weights(network, start),
            batches,
            epochs=6,
            learning_rate=0.05,
            progress=lambda done, total, loss: losses.append(loss),
        )
        assert not plain.training
        return subnet_weights(plain), losses

    (weights, losses), (again, _) = trained(), trained()
    assert len(losses) == 6 * 3
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    for name, value in weights.items():
        np.testing.assert_array_equal(value, again[name])
    with pytest.raises(InvalidInputError, match="epochs must be positive"):
        finetune(PlainNetwork.from_weights(network, start), batches, epochs=0, learning_rate=0.05)
