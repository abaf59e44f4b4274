"""A subnet trained alone goes on from the weights that it shared."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.data import ArrayImages, load_dataset
from foxnas_mlflow.supernet import Batches, PlainNetwork, finetune, get_preset, plain_logits, subnet_weights

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


def test_a_network_is_trained_further_as_its_supernet_drew_mirrored_and_weighed_images(
    tracking: str, tmp_path: Path
) -> None:
    import mlflow

    from foxnas_mlflow.flavor import SubnetModel, load_model, log_model
    from foxnas_mlflow.workflows import FinetuneRequest, run_finetune
    from foxnas_mlflow.workflows._images import batches_of, images_of

    every, dataset = load_dataset("digits"), load_dataset("digits", max_train=96)
    space = get_preset("tiny").space(CPU_SPACE, in_channels=1, n_classes=10)
    architecture = space.smallest(16)
    network = build_network(space, architecture)
    torch.manual_seed(0)
    # What no supernet of digits does by itself, so that it shows: mirrored, and of one class alone.
    weights = [1e-3] * 10
    weights[3] = 1e3
    training = {"max_train": 96, "flip": True, "sampling": "balanced", "class_weights": weights}
    subnet = SubnetModel(
        architecture,
        space,
        {"data": "digits", "data_digest": dataset.digest, "training": training, "evaluated_accuracy": 12.5},
        subnet_weights(PlainNetwork(network)),
        dataset.preprocessing(16),
        dataset.labels,
    )
    # Of class 0 four times as many as of all others together.
    of = [np.flatnonzero(every.train.targets == k)[: 2 if k else 72] for k in range(10)]
    images = ArrayImages(
        np.stack([every.train[i] for i in np.concatenate(of)]), every.train.targets[np.concatenate(of)]
    )
    seen = {}
    for told in (subnet, dataclasses.replace(subnet, details={})):
        unbalanced = dataclasses.replace(dataset, train=images)
        batches = batches_of(told, unbalanced, batch_size=90, augment=False, seed=0)
        (batch,) = batches.epoch(0)
        seen[batches.flip] = np.bincount(batch[1]).tolist()
    assert seen == {True: [9] * 10, False: [72, *[2] * 9]}

    # As many as the supernet was trained on, or other ones: normalised as it knows them.
    assert len(images_of(subnet, "digits").train) == len(dataset.train)
    others = images_of(subnet, "digits", max_train=None)
    assert len(others.train) == len(every.train)
    assert others.normalization == dataset.normalization != every.normalization

    with mlflow.start_run():
        info = log_model(subnet, name="subnet", registered_model_name="foxnas-subnet-cpu")
    uri = f"models:/foxnas-subnet-cpu/{info.registered_model_version}"
    board = tmp_path / "my board.yaml"
    board.write_text("name: my-board")
    request = FinetuneRequest(subnet=uri, data="digits", epochs=2, max_train=320, target=str(board))
    result = run_finetune(request, checkpoint=tmp_path / "checkpoint.safetensors")
    version = mlflow.MlflowClient().get_model_version("foxnas-subnet-cpu", "2")
    assert version.description.endswith(f"foxnas quantize --subnet {result.model_uri} --target '{board}'")
    model = load_model(result.model_uri)
    assert isinstance(model, SubnetModel)
    assert model.details["training"] == training
    # What is known of the shared weights is not said of its own.
    assert model.details["evaluated_accuracy"] == result.finetuned_top1
    assert model.weights is not None
    images = np.stack([dataset.preprocessing(16).resize(dataset.val[i]) for i in range(100)])
    assert (plain_logits(network, model.weights, dataset.normalization(images)).argmax(1) == 3).all()


@pytest.mark.parametrize("details", [{"data_seed": "7"}, {}])
def test_images_are_split_as_in_training_whatever_the_seed_of_a_later_step(details: dict[str, str]) -> None:
    from foxnas_mlflow.flavor import SubnetModel
    from foxnas_mlflow.workflows._images import images_of

    read = images_of(SubnetModel(CPU_SPACE.smallest(), CPU_SPACE, details), "digits", seed=3)
    split = load_dataset("digits", seed=int(details.get("data_seed", 3)))
    assert [read.val[i].tobytes() for i in range(len(read.val))] == [
        split.val[i].tobytes() for i in range(len(split.val))
    ]
