from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from foxnas_mlflow.core import processors
from foxnas_mlflow.core.errors import InvalidInputError, TrainingError, WorkerLostError
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.space import CPU_SPACE, LITE_SPACE, StageSpec
from foxnas_mlflow.data import ArrayImages, Normalization, load_dataset
from foxnas_mlflow.supernet import (
    PRESETS,
    Batches,
    PlainNetwork,
    SubnetEvaluator,
    Supernet,
    TrainConfig,
    TrainingState,
    get_preset,
    load_checkpoint,
    plain_logits,
    recalibrate,
    subnet_weights,
    train_supernet,
)
from foxnas_mlflow.supernet._distributed import GradientAverage
from foxnas_mlflow.supernet._modes import _fastest, _likely, fastest_workers, resolved
from foxnas_mlflow.supernet._optimizer import Sgd, learning_rate, sgd
from foxnas_mlflow.supernet._step import Workers, set_gradients
from foxnas_mlflow.supernet._strategy import ProgressiveShrinking, Sandwich
from foxnas_mlflow.workflows._request import PresetName

pytestmark = pytest.mark.train

SPACE = CPU_SPACE.replace(
    name="test",
    image_sizes=(8, 12),
    depths=(1, 2),
    stages=(StageSpec(16, 1, "mbconv"), StageSpec(24, 2, "mbconv_se")),
    width_mult=0.5,
    in_channels=1,
    n_classes=10,
)


@pytest.fixture(scope="module")
def digits():
    return few_digits()


def few_digits():
    """Eight batches of `batches_of`."""
    return load_dataset("digits", max_train=256)


def batches_of(dataset, **changes) -> Batches:
    values = {"image_size": 12, "batch_size": 32, "flip": False} | changes
    return Batches(dataset.train, normalization=dataset.normalization, **values)


def new_state(**changes) -> TrainingState:
    torch.manual_seed(0)
    config = TrainConfig(**{"epochs": 2, "mode": "float32"} | changes)
    return TrainingState(Supernet(SPACE), config)


def test_a_preset_trains_fewer_epochs_of_more_images() -> None:
    tiny = get_preset("tiny")
    assert tiny.epochs_for(22) == tiny.epochs
    assert tiny.epochs_for(312) == 8
    assert tiny.epochs_for(10**6) == 1
    assert get_preset("paper").epochs_for(10**6) == get_preset("paper").epochs


def test_every_preset_can_be_named() -> None:
    assert set(get_args(PresetName)) == set(PRESETS)


def test_a_preset_shrinks_built_in_spaces_and_leaves_ones_own_as_it_is() -> None:
    tiny = get_preset("tiny")
    assert tiny.space(CPU_SPACE, in_channels=1, n_classes=7).image_sizes == (12, 16, 20, 24)
    medium = get_preset("medium").space(LITE_SPACE, in_channels=3, n_classes=7)
    assert (medium.width_mult, medium.stages) == (LITE_SPACE.width_mult, LITE_SPACE.stages)
    assert tiny.space(SPACE, in_channels=3, n_classes=7) == SPACE.replace(in_channels=3, n_classes=7)


@pytest.fixture
def many_threads():
    """More threads than any quota of these tests leaves."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield 4
    torch.set_num_threads(before)


@pytest.mark.parametrize("asked", [False, True])
def test_no_more_threads_than_a_container_has_processors(digits, tmp_path, monkeypatch, many_threads, asked) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text("100000 100000\n")
    (tmp_path / "own").write_text("0::/\n")
    monkeypatch.setattr(processors, "CGROUPS", tmp_path)
    monkeypatch.setattr(processors, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", str(many_threads))
    SubnetEvaluator(Supernet(SPACE), digits)
    assert torch.get_num_threads() == (many_threads if asked else 1)
    torch.set_num_threads(many_threads)
    one_step(digits, tmp_path)
    assert torch.get_num_threads() == (many_threads if asked else 1)
    torch.set_num_threads(many_threads)
    network = build_network(SPACE, SPACE.smallest(8))
    plain_logits(network, subnet_weights(PlainNetwork(network)), np.zeros((1, 8, 8, 1), np.float32))
    assert torch.get_num_threads() == (many_threads if asked else 1)


def one_step(digits, directory, **changes) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters before and after one step with all images."""
    state = new_state(epochs=1, **changes)
    before = {name: p.detach().clone() for name, p in state.supernet.named_parameters()}
    after = train_supernet(state, batches_of(digits, batch_size=len(digits.train)), checkpoints=directory)
    return before, {name: p.detach() for name, p in after.named_parameters()}


def test_a_gradient_is_clipped_to_its_largest_norm(digits, tmp_path) -> None:
    before, after = one_step(digits, tmp_path, clip_norm=1e-3, weight_decay=0.0, learning_rate=0.1, momentum=0.9)
    change = torch.cat([(after[name] - p).flatten() for name, p in before.items()])
    # Nesterov's first step is 1 + momentum gradients.
    assert float(change.norm()) == pytest.approx(0.1 * 1.9 * 1e-3, rel=1e-3)


def test_weight_decay_shrinks_weights_and_neither_norms_nor_biases(digits, tmp_path) -> None:
    before, after = one_step(digits, tmp_path, clip_norm=1e-9, weight_decay=0.5, learning_rate=0.1, momentum=0.9)
    for name, p in before.items():
        if ".to" in name:
            # A transform of kernels that the step's subnets may not have used.
            continue
        factor = 1 - 0.1 * 1.9 * 0.5 if p.ndim > 1 else 1.0
        torch.testing.assert_close(after[name], p * factor, rtol=1e-5, atol=1e-7)
    assert any(name.endswith("norm.weight") for name in before)


def test_a_checkpoint_of_an_earlier_release_is_read(tmp_path) -> None:
    state, path = TrainingState(Supernet(SPACE), TrainConfig(epochs=3)), tmp_path / "a.safetensors"
    state.save(path)
    with safe_open(path, "pt") as file:
        saved = json.loads(file.metadata()["foxnas"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    saved["config"]["layer_decay"] = 1.0
    save_file(tensors, path, {"foxnas": json.dumps(saved)})
    assert load_checkpoint(path).config == state.config


def test_the_head_and_norms_learn_before_the_others(digits, tmp_path) -> None:
    before, after = one_step(digits, tmp_path, head_first=1.0, learning_rate=0.1)
    changed = {name for name, p in before.items() if not torch.equal(after[name], p)}
    assert {name for name in changed if before[name].ndim > 1} == {"head.hidden.weight", "head.classifier.weight"}
    assert {"head.classifier.bias", "stem.conv.norm.bias"} <= changed
    state = new_state(epochs=2, head_first=0.5)
    stem = state.supernet.stem.conv.weight.detach().clone()
    train_supernet(state, batches_of(digits), checkpoints=tmp_path)
    assert not torch.equal(state.supernet.stem.conv.weight, stem)


def test_parameters_move_as_pytorchs_optimizer_moves_them() -> None:
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.full((3,), float(i))) for i in range(4)] for _ in range(2))
    groups = [({"lr": 0.1, "weight_decay": 0.01}, slice(2)), ({"lr": 0.03, "weight_decay": 0.0}, slice(2, 4))]
    mine = Sgd([{"params": ours[part], **values} for values, part in groups], 0.9)
    reference = torch.optim.SGD(
        [{"params": theirs[part], **values} for values, part in groups], momentum=0.9, nesterov=True
    )
    # Gradients that are missing: of a layer that a step's networks skip, and of a whole group.
    for missing in ({1}, {2, 3}, set(), {1, 3}):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            gradient = None if i in missing else torch.randn(3)
            a.grad, b.grad = gradient, gradient if gradient is None else gradient.clone()
        mine.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_labels_are_smoothed(digits, tmp_path) -> None:
    space = SPACE.replace(image_sizes=(12,))
    losses = {}
    for smoothing in (0.0, 0.3):
        torch.manual_seed(0)
        config = TrainConfig("progressive_shrinking", epochs=1, label_smoothing=smoothing, mode="float32")
        state = TrainingState(Supernet(space), config)
        plain = state.supernet.train().extract(space.largest())
        batches = batches_of(digits)
        images, targets = next(batches.epoch(0))
        with torch.no_grad():
            expected = F.cross_entropy(plain(images), targets, label_smoothing=smoothing)
        seen: list[float] = []
        train_supernet(state, batches, checkpoints=tmp_path, progress=lambda i, n, loss, seen=seen: seen.append(loss))
        assert seen[0] == pytest.approx(float(expected), rel=1e-5)
        losses[smoothing] = seen[-1]
    assert losses[0.3] > losses[0.0]


def test_the_learning_rate_rises_and_falls_to_nothing() -> None:
    config = TrainConfig(learning_rate=0.2, warmup=0.1)
    rates = [learning_rate(config, step, 1000) for step in range(1000)]
    assert rates[:100] == pytest.approx([0.2 * (i + 1) / 100 for i in range(100)])
    assert rates[550] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[100:]))
    assert rates[-1] < 1e-5


def test_a_sandwich_has_both_ends_at_every_image_size() -> None:
    space = SPACE.replace(image_sizes=(8, 12, 16))
    seen: dict[str, set[int]] = {"largest": set(), "smallest": set()}
    for step in range(60):
        largest, *drawn, smallest = Sandwich(TrainConfig(n_random=2)).draw(space, 0, np.random.default_rng(step))
        assert largest == space.largest(largest.image_size)
        assert smallest == space.smallest(smallest.image_size)
        assert len(drawn) == 2
        seen["largest"].add(largest.image_size)
        seen["smallest"].add(smallest.image_size)
    assert seen == {"largest": {8, 12, 16}, "smallest": {8, 12, 16}}


def sandwich_gradients(n_workers: int, digits) -> tuple[float, list[torch.Tensor | None], dict[str, torch.Tensor]]:
    """Loss, gradients and statistics of one step's subnets."""
    state = new_state()
    state.supernet.double().train()
    images, targets = next(batches_of(digits).epoch(0))
    with Workers(state.supernet, n_workers) as workers:
        loss = set_gradients(state, images.double(), targets, workers)
    return float(loss), [p.grad for p in state.supernet.parameters()], dict(state.supernet.named_buffers())


def test_subnets_side_by_side_have_the_gradients_of_one_after_another(digits) -> None:
    state = new_state()
    supernet = state.supernet.double().train()
    images, targets = next(batches_of(digits).epoch(0))
    images = images.double()
    soft = None
    total = 0.0
    largest, *others = Sandwich(state.config).draw(SPACE, 0, np.random.default_rng([0, 3, 0]))
    for architecture in (largest, *others):
        supernet.set_subnet(architecture)
        x = F.interpolate(images, (architecture.image_size,) * 2, mode="bilinear", antialias=True)
        logits = supernet(images if architecture.image_size == 12 else x).float()
        loss = F.cross_entropy(logits, targets, label_smoothing=0.1)
        if soft is None:
            soft = logits.detach().softmax(1)
            statistics = {name: t.clone() for name, t in supernet.named_buffers()}
            loss = 4 * loss
        else:
            loss = loss + F.cross_entropy(logits, soft)
        (loss / 4).backward()
        total += float(loss.detach()) / 4
    for n_workers in (1, 3):
        mean, gradients, buffers = sandwich_gradients(n_workers, digits)
        assert mean == pytest.approx(total, rel=1e-6)
        for parameter, gradient in zip(supernet.parameters(), gradients, strict=True):
            assert (parameter.grad is None) == (gradient is None)
            if gradient is not None:
                # Logits are single precision, for the loss.
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(buffers, statistics)


def test_a_subnet_that_fails_ends_the_step(digits) -> None:
    state = new_state()
    images, targets = next(batches_of(digits).epoch(0))
    with Workers(state.supernet, 2) as workers, pytest.raises(RuntimeError, match="channels"):
        set_gradients(state, images.repeat(1, 2, 1, 1), targets, workers)


def test_a_short_training_times_nothing() -> None:
    class AskedError(Exception):
        pass

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        raise AskedError

    state = new_state()
    config = resolved(state, 99, batch, None, "cpu")
    assert (config.mode, config.workers) == ("float32", 1)
    with pytest.raises(AskedError):
        resolved(state, 100, batch, None, "cpu")
    # What was asked for is done.
    state.config = dataclasses.replace(state.config, mode="bfloat16", workers=2)
    assert resolved(state, 99, batch, None, "cpu") == state.config


def test_timing_of_workers_leaves_no_trace(digits, request) -> None:
    state = new_state()
    before = {name: t.clone() for name, t in state.supernet.train().state_dict().items()}
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)
    assert fastest_workers(state, *next(batches_of(digits).epoch(0)), None) in (1, 2)
    assert torch.get_num_threads() == 2
    torch.testing.assert_close(dict(state.supernet.state_dict()), before, rtol=0, atol=0)
    assert all(p.grad is None for p in state.supernet.parameters())


def test_the_fastest_is_chosen_and_what_is_far_slower_is_not_tried_in_full() -> None:
    assert _fastest(time.sleep, (0.1, 0.001), rounds=3) == 0.001
    assert _likely(time.sleep, (0.1, 0.001), rounds=2) == [0.001]
    assert _likely(time.sleep, (0.1, 0.09), rounds=2) == [0.1, 0.09]


@pytest.mark.parametrize("strategy", ["sandwich", "progressive_shrinking"])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(strategy, digits, tmp_path) -> None:
    whole: dict[int, float] = {}
    assert len(batches_of(digits)) < 9 < 2 * len(batches_of(digits)), "it is stopped in the second epoch"
    state = new_state(strategy=strategy)
    straight = train_supernet(
        state, batches_of(digits), checkpoints=tmp_path / "whole", progress=lambda i, n, loss: whole.update({i: loss})
    )
    resumed: dict[int, float] = {}

    def stop(i: int, n: int, loss: float) -> None:
        resumed[i] = loss
        if i == 9:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_supernet(new_state(strategy=strategy), batches_of(digits), checkpoints=tmp_path / "cut", progress=stop)
    state = load_checkpoint(tmp_path / "cut", SPACE)
    assert state.step == 9
    again = train_supernet(
        state, batches_of(digits), checkpoints=tmp_path / "cut", progress=lambda i, n, loss: resumed.update({i: loss})
    )
    assert resumed == pytest.approx(whole, rel=1e-5)
    for name, tensor in straight.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_an_ignored_signal_stays_ignored(digits, tmp_path) -> None:
    seen: list[int] = []

    def interrupt(i: int, n: int, loss: float) -> None:
        seen.append(i)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train_supernet(new_state(epochs=1), batches_of(digits), checkpoints=tmp_path, progress=interrupt)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(seen) == len(batches_of(digits))


@pytest.mark.parametrize("signalled", [False, True])
def test_what_ends_the_readers_ends_the_training_after_a_whole_step(signalled: bool, tmp_path) -> None:
    others = set(multiprocessing.active_children())

    class Ending(Batches):
        def epoch(self, epoch: int, *, start: int = 0):
            for batch in super().epoch(epoch, start=start):
                yield batch
                # The step is done, and the training waits for the next batch.
                for reader in set(multiprocessing.active_children()) - others:
                    reader.terminate()
                if signalled:
                    os.kill(os.getpid(), signal.SIGINT)

    images = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 1), dtype=np.uint8)
    batches = Ending(
        ArrayImages(images, np.arange(60) % 10),
        normalization=Normalization((0.5,), (0.5,)),
        image_size=64,
        batch_size=4,
        workers=1,
    )
    with pytest.raises(KeyboardInterrupt if signalled else WorkerLostError):
        train_supernet(new_state(epochs=1), batches, checkpoints=tmp_path)
    assert 1 <= load_checkpoint(tmp_path, SPACE).step < len(batches)


def test_a_torn_checkpoint_falls_back_to_the_other(digits, tmp_path) -> None:
    train_supernet(new_state(), batches_of(digits), checkpoints=tmp_path, checkpoint_seconds=0)
    steps = {p.name: load_checkpoint(p).step for p in tmp_path.iterdir()}
    assert sorted(steps) == ["a.safetensors", "b.safetensors"]
    newest = max(steps, key=steps.__getitem__)
    (tmp_path / newest).write_bytes((tmp_path / newest).read_bytes()[:1000])
    assert load_checkpoint(tmp_path).step == min(steps.values())
    with pytest.raises(InvalidInputError, match="whole checkpoint"):
        load_checkpoint(tmp_path / newest)
    with pytest.raises(InvalidInputError, match="space"):
        load_checkpoint(tmp_path, SPACE.replace(n_classes=9))


def test_nan_stops_and_keeps_the_last_good_checkpoint(digits, tmp_path) -> None:
    state = new_state()

    def poison(i: int, n: int, loss: float) -> None:
        if i == 5:
            with torch.no_grad():
                next(state.supernet.parameters()).fill_(float("nan"))

    train_supernet(new_state(epochs=1), batches_of(digits), checkpoints=tmp_path)
    with pytest.raises(TrainingError, match="at step 5"):
        train_supernet(state, batches_of(digits), checkpoints=tmp_path, progress=poison)
    assert all(np.isfinite(t.numpy()).all() for t in load_checkpoint(tmp_path).supernet.state_dict().values())


def test_batches_that_are_not_varied_are_the_images(digits) -> None:
    images = digits.in_memory(12).train
    plain = Batches(images, normalization=digits.normalization, image_size=12, batch_size=64, flip=False, augment=False)
    order = np.random.default_rng([0, 2]).permutation(len(images))[:64]
    x, targets = next(plain.epoch(2))
    np.testing.assert_allclose(
        x, digits.normalization(images.images[order]).transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(targets, images.targets[order])
    plain.augment = True
    assert not torch.equal(next(plain.epoch(2))[0], x)


def test_batches_depend_on_seed_epoch_and_index_only(digits) -> None:
    batches = batches_of(digits)
    whole = list(batches.epoch(3))
    rest = list(batches.epoch(3, start=4))
    assert len(whole) == len(batches)
    assert torch.equal(whole[4][0], rest[0][0])
    assert torch.equal(whole[4][1], rest[0][1])
    assert not torch.equal(whole[0][1], next(batches.epoch(4))[1])
    halves = [
        np.concatenate([t.numpy() for _, t in batches_of(digits, batch_size=16, rank=r, world_size=2).epoch(3)])
        for r in (0, 1)
    ]
    together = np.concatenate([t.numpy() for _, t in whole])
    assert sorted(np.concatenate(halves)) == sorted(together)


def test_recalibration_gives_the_mean_of_the_batches_statistics(digits) -> None:
    torch.manual_seed(0)
    supernet = Supernet(SPACE).eval()
    plain = supernet.extract(SPACE.largest())
    images = [torch.randn(n, 1, 12, 12) + n for n in (50, 50, 20)]
    recalibrate(plain, images)
    stem = plain.get_submodule("stem.conv")
    expected = []
    for batch in images:
        padded = torch.nn.functional.pad(batch, (0, 1, 0, 1))
        expected.append(torch.nn.functional.conv2d(padded, stem.weight, None, 2).mean((0, 2, 3)))
    # Images count alike, in a small last batch too.
    mean = torch.tensor([50.0, 50.0, 20.0]) @ torch.stack(expected) / 120
    torch.testing.assert_close(stem.norm.running_mean, mean, rtol=1e-4, atol=1e-6)
    assert not plain.training


def test_no_image_is_left_over_for_recalibration() -> None:
    """One image at one pixel has no variance."""
    space = SPACE.replace(image_sizes=(4,))
    images = ArrayImages(np.random.default_rng(0).integers(0, 256, (251, 4, 4, 1), dtype=np.uint8), np.arange(251) % 10)
    dataset = dataclasses.replace(few_digits(), train=images, val=images)
    evaluation = SubnetEvaluator(Supernet(space), dataset).evaluate(space.smallest())
    assert evaluation.n_images == 251


@pytest.mark.slow
def test_training_learns_digits_and_evaluation_counts_right_answers(tmp_path) -> None:
    digits = load_dataset("digits")
    state = new_state(epochs=2, n_random=1, learning_rate=0.2)
    supernet = train_supernet(state, batches_of(digits, batch_size=64), checkpoints=tmp_path)
    evaluator = SubnetEvaluator(supernet, digits)
    result = evaluator.evaluate(SPACE.largest())
    assert result.n_images == len(digits.val)
    assert result.top1_percent > 80
    share = result.top1_percent / 100
    assert result.standard_error == pytest.approx(100 * np.sqrt(share * (1 - share) / result.n_images))


_RANK = """
import sys, torch
from tests.supernet.test_train import batches_of, few_digits, gradients_of, new_state, new_step
from foxnas_mlflow.supernet import train_supernet
from pathlib import Path
rank, out = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
state, images, targets = new_step(2)
mine = slice(8 * rank, 8 * rank + 8)
torch.save(gradients_of(state, images[mine], targets[mine]), out / f"gradients.{rank}")
batches = batches_of(few_digits(), rank=rank, world_size=2)
net = train_supernet(new_state(epochs=1), batches, checkpoints=out / "checkpoints")
torch.save({name: p.detach() for name, p in net.named_parameters()}, out / f"weights.{rank}")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
assert "torch._dynamo" not in sys.modules, "a compiler of a second and a half was imported"
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """What two processes leave that compute the gradients of a step together, and then train."""
    directory = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-c", _RANK]
    ranks = [subprocess.Popen([*command, str(r), str(directory)], stderr=subprocess.PIPE) for r in (0, 1)]
    errors = [process.communicate(timeout=240)[1].decode() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    return directory


def gradients_of(state: TrainingState, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """A step's gradients, on this rank's images, with statistics as they are."""
    network = state.network.eval()
    with Workers(network, 1) as workers:
        average = GradientAverage(network) if torch.distributed.is_initialized() else None
        set_gradients(state, images, targets, workers, average=average)
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def new_step(accumulate: int) -> tuple[TrainingState, Tensor, Tensor]:
    """A state like every other of its seed, and a batch."""

    state = new_state(epochs=1, accumulate=accumulate, workers=1)
    return state, torch.randn(16, 1, 12, 12), torch.arange(16) % 10


def test_parts_of_a_batch_with_broken_pictures_have_two_images() -> None:
    state, images, targets = new_step(8)
    with Workers(state.network.train(), 1) as workers:
        # As many as are left of 16; at one pixel batch norm refuses a part of one.
        loss = set_gradients(state, images[:5, :, :4, :4], targets[:5], workers)
    assert loss.isfinite()


def test_sorted_channels_are_not_averaged_with_those_before() -> None:
    state = new_state(strategy="progressive_shrinking", ema=0.9)
    state.average = {name: p.detach().clone() for name, p in state.network.named_parameters()}
    strategy = ProgressiveShrinking(state.config)
    strategy.begin(3, state, sgd(state.network, state.config))
    for name, p in state.network.named_parameters():
        torch.testing.assert_close(state.average.get(name, p), p)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_gradients_of_parts_are_those_of_the_whole_batch(accumulate: int) -> None:
    whole = gradients_of(*new_step(1))
    parts = gradients_of(*new_step(accumulate))
    assert whole.keys() == parts.keys()
    assert max(float(t.abs().max()) for t in whole.values()) > 0.01
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)


def test_two_ranks_draw_the_same_networks_and_come_to_the_gradients_of_one_large_batch(two_ranks: Path) -> None:
    whole = gradients_of(*new_step(1))
    for rank in (0, 1):
        found = torch.load(two_ranks / f"gradients.{rank}")
        assert found.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_two_processes_keep_the_same_weights(two_ranks: Path) -> None:
    first, second = (torch.load(two_ranks / f"weights.{rank}") for rank in (0, 1))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert load_checkpoint(two_ranks / "checkpoints").step == len(few_digits().train) // 64
