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


def test_training_alone_lowers_the_loss_and_can_be_repeated(tmp_path) -> None:
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
    # Killed in the second epoch, it goes on to the same weights.
    checkpoint, seen = tmp_path / "new" / "checkpoint.safetensors", []

    def stopped(stop_at: int) -> dict[str, np.ndarray]:
        def progress(done: int, total: int, loss: float) -> None:
            seen.append(done)
            if done == stop_at:
                raise KeyboardInterrupt

        plain = finetune(
            PlainNetwork.from_weights(network, start),
            batches,
            epochs=6,
            learning_rate=0.05,
            progress=progress,
            checkpoint=checkpoint,
            checkpoint_seconds=0,
        )
        return subnet_weights(plain)

    with pytest.raises(KeyboardInterrupt):
        stopped(6)
    resumed = stopped(0)
    assert seen == [*range(1, 7), *range(6, 19)]
    for name, value in weights.items():
        np.testing.assert_array_equal(value, resumed[name])
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    seen.clear()
    stopped(0)
    assert seen[0] == 1, "a torn checkpoint begins anew"
    with pytest.raises(InvalidInputError, match="epochs must be positive"):
        finetune(PlainNetwork.from_weights(network, start), batches, epochs=0, learning_rate=0.05)
