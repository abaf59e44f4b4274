"""Known weights compute in the supernet what they computed where they come from."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from torch import Tensor

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.space import CPU_SPACE, LITE_SPACE, SearchSpace, StageSpec
from foxnas_mlflow.data import load_dataset
from foxnas_mlflow.supernet import (
    Batches,
    InitReport,
    KnownSupernet,
    Supernet,
    TrainConfig,
    TrainingState,
    load_checkpoint,
    load_init,
    train_supernet,
)
from foxnas_mlflow.supernet._download import download

pytestmark = pytest.mark.train

SMALL = CPU_SPACE.replace(
    name="small",
    image_sizes=(16,),
    kernels=(3, 5),
    depths=(1, 2),
    stages=(StageSpec(16, 1, "mbconv"), StageSpec(24, 2, "mbconv_se")),
    width_mult=0.5,
    in_channels=1,
    n_classes=10,
)
LITE = LITE_SPACE.replace(image_sizes=(64,))

# Kernel, hidden channels, outputs, gate, stride, activation of the published blocks behind the first.
LARGE = [
    (3, 64, 24, False, 2, "relu"),
    (3, 72, 24, False, 1, "relu"),
    (5, 72, 40, True, 2, "relu"),
    (5, 120, 40, True, 1, "relu"),
    (5, 120, 40, True, 1, "relu"),
    (3, 240, 80, False, 2, "hardswish"),
    (3, 200, 80, False, 1, "hardswish"),
    (3, 184, 80, False, 1, "hardswish"),
    (3, 184, 80, False, 1, "hardswish"),
    (3, 480, 112, True, 1, "hardswish"),
    (3, 672, 112, True, 1, "hardswish"),
    (5, 672, 160, True, 2, "hardswish"),
    (5, 960, 160, True, 1, "hardswish"),
    (5, 960, 160, True, 1, "hardswish"),
]
LITE0 = [
    (k, e * c_in, c, False, s if i == 0 else 1, "relu6")
    for n, k, s, e, before, c in (
        (2, 3, 2, 6, 16, 24),
        (2, 5, 2, 6, 24, 40),
        (3, 3, 2, 6, 40, 80),
        (3, 5, 1, 6, 80, 112),
        (4, 5, 2, 6, 112, 192),
        (1, 3, 1, 6, 192, 320),
    )
    for i in range(n)
    for c_in in [before if i == 0 else c]
]


class Published:
    """MobileNetV3-Large or EfficientNet-Lite0 by their papers, with random weights under a library's names."""

    def __init__(self, blocks: list[tuple[Any, ...]], *, library: str, n_classes: int = 1000) -> None:
        self.blocks = blocks
        self.swish = blocks is LARGE
        self.tensorflow = library in ("efficientnet_pytorch", "tf_timm")
        self.library = library = library.removeprefix("tf_")
        self.epsilon = 1e-5 if library == "timm" and not self.tensorflow else 1e-3
        self.tensors: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(3)
        self.stem = 16 if self.swish else 32
        stem, first = self._names(0)
        self._conv(*stem[0], self.stem, 3, 3)
        self._conv(*first[0], self.stem, 1, 3)
        self._conv(*first[1], 16, self.stem, 1)
        inputs = 16
        for i, (k, hidden, out, gate, _, _) in enumerate(blocks):
            (expand, depthwise, project), gates = self._block_names(i)
            self._conv(*expand, hidden, inputs, 1)
            self._conv(*depthwise, hidden, 1, k)
            if gate:
                squeeze = {72: 24, 120: 32, 480: 120, 672: 168, 960: 240}[hidden]
                self._plain(gates[0], squeeze, hidden, 4)
                self._plain(gates[1], hidden, squeeze, 4)
            self._conv(*project, out, hidden, 1)
            inputs = out
        for (conv, norm), (out, of), dims in self._tail(n_classes):
            if norm:
                self._conv(conv, norm, out, of, 1)
            else:
                self._plain(conv, out, of, dims)

    def logits(self, x: Tensor) -> Tensor:
        swish = F.hardswish if self.swish else F.relu6
        stem, first = self._names(0)
        x = swish(self._run(x, *stem[0], stride=2))
        y = (F.relu if self.swish else F.relu6)(self._run(x, *first[0], groups=x.shape[1]))
        y = self._run(y, *first[1])
        x = x + y if self.stem == 16 else y
        for i, (_, hidden, out, gate, stride, name) in enumerate(self.blocks):
            activation = getattr(F, name)
            (expand, depthwise, project), gates = self._block_names(i)
            y = activation(self._run(x, *expand))
            y = activation(self._run(y, *depthwise, stride=stride, groups=hidden))
            if gate:
                z = F.relu(self._run(y.mean((2, 3), keepdim=True), gates[0]))
                y = y * F.hardsigmoid(self._run(z, gates[1]))
            y = self._run(y, *project)
            x = x + y if stride == 1 and x.shape[1] == out else y
        tail = self._tail(0)
        x = swish(self._run(x, *tail[0][0]))
        x = x.mean((2, 3), keepdim=True)
        for (conv, _), _, dims in tail[1:]:
            weight, bias = self.tensors[f"{conv}.weight"], self.tensors[f"{conv}.bias"]
            x = F.linear(x.flatten(1), weight.flatten(1), bias)
            if conv not in ("classifier.3", "classifier", "_fc"):
                x = swish(x)
            assert weight.ndim == dims
        return x

    def _run(self, x: Tensor, conv: str, norm: str = "", stride: int = 1, groups: int = 1) -> Tensor:
        weight, t = self.tensors[f"{conv}.weight"], self.tensors
        bias = None if norm else t[f"{conv}.bias"]
        missing = weight.shape[-1] - 1
        if stride == 2 and self.tensorflow:
            # TensorFlow's SAME of an even size: one pixel more at the end.
            x, missing = F.pad(x, ((missing - 1) // 2, missing // 2) * 2), 0
        y = F.conv2d(x, weight, bias, stride, missing // 2, 1, groups)
        if not norm:
            return y
        parts = (t[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, *parts, eps=self.epsilon)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def _conv(self, conv: str, norm: str, out: int, inputs: int, k: int) -> None:
        self.tensors[f"{conv}.weight"] = self._random(out, inputs, k, k) * (3 / (inputs * k * k)) ** 0.5
        self.tensors[f"{norm}.weight"] = 1 + 0.2 * self._random(out)
        self.tensors[f"{norm}.bias"] = 0.3 * self._random(out)
        self.tensors[f"{norm}.running_mean"] = 0.1 * self._random(out)
        self.tensors[f"{norm}.running_var"] = 0.3 + self._random(out).abs()
        self.tensors[f"{norm}.num_batches_tracked"] = torch.tensor(9)

    def _plain(self, name: str, out: int, inputs: int, dims: int) -> None:
        weight = self._random(out, inputs) / inputs**0.5
        self.tensors[f"{name}.weight"] = weight if dims == 2 else weight[:, :, None, None]
        self.tensors[f"{name}.bias"] = 0.3 * self._random(out)

    def _names(self, _: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        if self.library == "timm":
            p = "blocks.0.0"
            return [("conv_stem", "bn1")], [(f"{p}.conv_dw", f"{p}.bn1"), (f"{p}.conv_pw", f"{p}.bn2")]
        if self.library == "efficientnet_pytorch":
            p = "_blocks.0"
            convs = [(f"{p}._depthwise_conv", f"{p}._bn1"), (f"{p}._project_conv", f"{p}._bn2")]
            return [("_conv_stem", "_bn0")], convs
        p = "features.1.block"
        return [("features.0.0", "features.0.1")], [(f"{p}.{i}.0", f"{p}.{i}.1") for i in (0, 1)]

    def _block_names(self, i: int) -> tuple[list[tuple[str, str]], list[str]]:
        if self.library == "torchvision":
            p, gate = f"features.{i + 2}.block", self.blocks[i][3]
            convs = (0, 1, 3 if gate else 2)
            return [(f"{p}.{j}.0", f"{p}.{j}.1") for j in convs], [f"{p}.2.fc1", f"{p}.2.fc2"]
        if self.library == "efficientnet_pytorch":
            p = f"_blocks.{i + 1}"
            return [(f"{p}._{c}_conv", f"{p}._bn{n}") for n, c in enumerate(("expand", "depthwise", "project"))], []
        # timm's stages begin where the width or the stride changes.
        stage, block, last = 0, 0, (0, 0)
        for j in range(i + 1):
            width = (self.blocks[j][2], 0)
            stage, block, last = (stage, block + 1, last) if width == last else (stage + 1, 0, width)
        p = f"blocks.{stage}.{block}"
        names = [(f"{p}.conv_{c}", f"{p}.bn{n}") for c, n in (("pw", 1), ("dw", 2), ("pwl", 3))]
        return names, [f"{p}.se.conv_reduce", f"{p}.se.conv_expand"]

    def _tail(self, n_classes: int) -> list[tuple[tuple[str, str], tuple[int, int], int]]:
        if self.library == "torchvision":
            return [
                (("features.16.0", "features.16.1"), (960, 160), 4),
                (("classifier.0", ""), (1280, 960), 2),
                (("classifier.3", ""), (n_classes, 1280), 2),
            ]
        if self.swish:
            return [
                (("blocks.6.0.conv", "blocks.6.0.bn1"), (960, 160), 4),
                (("conv_head", ""), (1280, 960), 4),
                (("classifier", ""), (n_classes, 1280), 2),
            ]
        conv, norm, last = (
            ("conv_head", "bn2", "classifier") if self.library == "timm" else ("_conv_head", "_bn1", "_fc")
        )
        return [((conv, norm), (1280, 320), 4), ((last, ""), (n_classes, 1280), 2)]


def images(space: SearchSpace, n: int = 2) -> Tensor:
    size = space.image_sizes[-1]
    return torch.randn(n, space.in_channels, size, size, generator=torch.Generator().manual_seed(1))


def outputs(supernet: Supernet, report: InitReport, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the placed network: extracted, in the supernet, and of the largest subnet."""
    assert report.architecture is not None
    with torch.no_grad():
        plain = supernet.eval().extract(report.architecture)(x)
        supernet.set_subnet(report.architecture)
        shared = supernet(x)
        supernet.set_subnet(supernet.space.largest())
        return plain, shared, supernet(x)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@functools.cache
def published(kind: str) -> Published:
    if kind in ("timm", "torchvision"):
        return Published(LARGE, library=kind)
    return Published(LITE0, library=kind.replace("lite", "timm"))


@pytest.mark.parametrize("kind", ["timm", "torchvision", "lite", "tf_lite", "efficientnet_pytorch"])
def test_a_published_network_computes_the_same_inside_the_supernet(kind: str, tmp_path: Path) -> None:
    reference = published(kind)
    path = tmp_path / ("models--timm--tf_efficientnet_lite0.in1k" if kind == "tf_lite" else "net") / "model.safetensors"
    path.parent.mkdir()
    save_file({name: t.contiguous() for name, t in reference.tensors.items()}, path)
    space = CPU_SPACE.replace(image_sizes=(64,)) if reference.swish else LITE
    supernet = Supernet(space)
    report = load_init(path, supernet)
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.size_bytes == path.stat().st_size
    x = images(space)
    expected = reference.logits(x)
    for logits in outputs(supernet, report, x):
        same(logits, expected)
        assert float(F.cosine_similarity(logits, expected).min()) >= 0.999
    # Its values are in the range where activations and padding differ; TensorFlow's are ours.
    with torch.no_grad():
        supernet.style = supernet.style.at(0.0)
        supernet.set_subnet(report.architecture)
        near = torch.allclose(supernet(x), expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
        assert near == reference.tensorflow


def test_a_wider_space_with_other_classes_and_grey_images_keeps_the_features(tmp_path: Path) -> None:
    reference = published("timm")
    torch.save({"state_dict": reference.tensors}, tmp_path / "net.pth")
    space = CPU_SPACE.replace(image_sizes=(64,), width_mult=1.2, in_channels=1, n_classes=7)
    supernet = Supernet(space)
    report = load_init(tmp_path / "net.pth", supernet)
    assert report.new.count("head.classifier.weight") == 1
    assert "a new classifier for 7 classes, there 1000" in report.differences
    # The first classes of a classifier of one's own would be theirs.
    with torch.no_grad():
        classifier = supernet.get_submodule("head.classifier")
        classifier.weight.zero_()
        classifier.weight[:, :1280], classifier.bias = reference.tensors["classifier.weight"][:7], None
        classifier.register_parameter("bias", torch.nn.Parameter(reference.tensors["classifier.bias"][:7]))
    grey = images(space)
    expected = reference.logits(grey.expand(-1, 3, -1, -1))[:, :7]
    for logits in outputs(supernet, report, grey):
        same(logits, expected)


def test_a_narrower_space_says_so(tmp_path: Path) -> None:
    torch.save(published("timm").tensors, tmp_path / "net.pth")
    supernet = Supernet(CPU_SPACE.replace(image_sizes=(64,), width_mult=0.5))
    report = load_init(tmp_path / "net.pth", supernet)
    assert report.architecture is None
    assert any(line.startswith("narrower than there: stem.conv has the first 8 of 16") for line in report.differences)
    weight = published("timm").tensors["conv_stem.weight"]
    assert torch.equal(supernet.get_submodule("stem.conv").weight, weight[:8])


def test_another_architecture_names_the_first_layer_that_differs(tmp_path: Path) -> None:
    torch.save(published("timm").tensors, tmp_path / "large.pth")
    torch.save(published("lite").tensors, tmp_path / "lite.pth")
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pth")
    fused = CPU_SPACE.replace(stages=(StageSpec(24, 2, "fused"), *CPU_SPACE.stages[1:]))
    for name, space, layer in (
        ("large", LITE, "tail.block.expand"),
        ("lite", CPU_SPACE, "stage2.block0.se"),
        ("large", fused, "stage1.block0.depthwise"),
        ("large", CPU_SPACE.replace(stages=CPU_SPACE.stages[:4]), "stage5.block0.expand"),
        ("other", CPU_SPACE, "conv1.weight"),
    ):
        supernet = Supernet(space)
        before = {name: t.clone() for name, t in supernet.state_dict().items()}
        with pytest.raises(InvalidInputError, match=layer):
            load_init(tmp_path / f"{name}.pth", supernet)
        assert all(torch.equal(t, before[name]) for name, t in supernet.state_dict().items())


@pytest.mark.parametrize(
    ("names", "received"),
    [
        # torchvision's mobilenet_v2 and efficientnet_b0, timm's mobilenetv4_conv_small and ghostnet.
        (("features.0.0", "features.1.conv.0.0", "features.2.conv.0.0"), "other blocks, the first is features.1"),
        (("features.0.0", "features.1.0.block.0.0", "features.2.0.block.0.0"), "other blocks, the first is features.1"),
        (
            ("conv_stem", "blocks.0.0.conv", "blocks.2.0.dw_start.conv", "blocks.2.1.dw_start.conv", "conv_head"),
            "no tensor 'blocks.2.1.conv_pw.weight': other blocks",
        ),
        (("conv_stem", "blocks.0.0.ghost1.primary_conv.0", "conv_head"), "another first block"),
    ],
)
def test_a_network_of_blocks_that_are_not_known_is_refused(
    names: tuple[str, ...], received: str, tmp_path: Path
) -> None:
    torch.save({f"{name}.weight": torch.zeros(8, 8, 1, 1) for name in names}, tmp_path / "net.pth")
    with pytest.raises(InvalidInputError, match=rf"init must .*; received .*{re.escape(received)}"):
        load_init(tmp_path / "net.pth", Supernet(CPU_SPACE))


def test_a_safetensors_file_of_any_length_of_header_is_read(tmp_path: Path) -> None:
    path, tensors = tmp_path / "net.safetensors", published("lite").tensors
    # Where its length is a multiple of 256 and 128 more, it begins as a pickle does.
    for n in range(0, 256, 8):
        save_file(tensors, path, {"note": "x" * n})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert load_init(path, Supernet(LITE)).family == "timm's EfficientNet-Lite"


def test_a_supernet_begins_another_of_other_widths_kernels_depths_and_channels() -> None:
    torch.manual_seed(0)
    known = Supernet(SMALL)
    with torch.no_grad():
        for name, t in (*known.named_parameters(), *known.named_buffers()):
            if t.ndim == 1:
                t.copy_(t.abs() + 0.3 * torch.rand_like(t) if "var" in name else t + 0.3 * torch.randn_like(t))
    space = SMALL.replace(kernels=(3, 5, 7), depths=(1, 2, 3), width_mult=1.0, in_channels=3)
    supernet = Supernet(space)
    report = load_init(KnownSupernet(SMALL, known.numpy_weights()), supernet)
    grey = images(SMALL)
    with torch.no_grad():
        expected = known.eval()(grey)
    same(outputs(supernet, report, grey.expand(-1, 3, -1, -1))[0], expected)
    # The classes are others though they are as many.
    report = load_init(KnownSupernet(SMALL, known.numpy_weights(), ("a",) * 10), Supernet(space), labels=("b",) * 10)
    assert {"head.classifier.weight", "head.classifier.bias"} < set(report.new)


def test_a_smaller_kernel_is_the_supernet_s_own() -> None:
    torch.manual_seed(0)
    wide, small = SMALL.replace(kernels=(3, 5, 7)), SMALL.replace(kernels=(3, 5))
    known, supernet = Supernet(wide), Supernet(small)
    with torch.no_grad():
        for name, t in known.named_parameters():
            if ".to" in name:
                t.add_(0.1 * torch.randn_like(t))
    load_init(KnownSupernet(wide, known.numpy_weights()), supernet)
    for k in (3, 5):
        subnets = [n.extract(n.space.uniform(16, depth=2, expansion=6, kernel=k)) for n in (known, supernet)]
        weights = [n.get_submodule("stage1.block0.depthwise").weight for n in subnets]
        torch.testing.assert_close(*weights)


def test_activations_move_to_ours_and_a_resumed_training_has_the_same_losses(tmp_path: Path) -> None:
    digits = load_dataset("digits", max_train=40)
    space = CPU_SPACE.replace(image_sizes=(32,), in_channels=1, n_classes=10, depths=(2, 3, 4))
    batches = Batches(
        digits.train, normalization=digits.normalization, image_size=32, batch_size=5, flip=False, augment=False
    )
    torch.save(published("timm").tensors, tmp_path / "net.pth")

    def state() -> TrainingState:
        torch.manual_seed(0)
        supernet = Supernet(space)
        load_init(tmp_path / "net.pth", supernet)
        config = TrainConfig(epochs=1, n_random=1, learning_rate=0.01, mode="float32", workers=1, anneal=0.5)
        return TrainingState(supernet, config)

    shares: list[float] = []
    whole: list[float] = []
    first = state()

    def see(i: int, n: int, loss: float) -> None:
        shares.append(first.supernet.style.share)
        whole.append(loss)

    trained = train_supernet(first, batches, checkpoints=tmp_path / "a", progress=see)
    assert shares == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]
    assert not trained.style.activations

    class StopError(Exception):
        pass

    def stop(i: int, n: int, loss: float) -> None:
        if i == 3:
            raise StopError

    with pytest.raises(StopError):
        train_supernet(state(), batches, checkpoints=tmp_path / "b", progress=stop, checkpoint_seconds=0)
    resumed = load_checkpoint(tmp_path / "b")
    assert resumed.step == 2
    losses: list[float] = []
    train_supernet(resumed, batches, checkpoints=tmp_path / "b", progress=lambda i, n, loss: losses.append(loss))
    assert losses == pytest.approx(whole[2:], rel=1e-5)


def test_a_download_is_held_against_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()[:8]
    good, bad = tmp_path / f"net-{digest}.pth", tmp_path / "net-00000000.pth"
    for path in (good, bad):
        path.write_bytes(content)
    urls = {"timm:good": good.as_uri(), "timm:bad": bad.as_uri(), "timm:gone": (tmp_path / "gone-1.pth").as_uri()}
    assert download("timm:good", urls).read_bytes() == content
    good.unlink()
    assert download("timm:good", urls).read_bytes() == content, "kept"
    for name, message in (("timm:bad", "SHA-256"), ("timm:gone", "path"), ("timm:no", "one of")):
        with pytest.raises(InvalidInputError, match=message):
            download(name, urls)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv3_large_100", "efficientnet_lite0"])
def test_outputs_are_those_of_timm_s_own_module(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None:
        pytest.skip("timm and torchvision are not installed (pip install --no-deps timm torchvision)")
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model(name).eval()
    with torch.no_grad():
        for key, t in theirs.state_dict().items():
            if t.ndim == 1:
                t.copy_(t.abs() + 0.2 * torch.rand_like(t) if "var" in key else t + 0.2 * torch.randn_like(t))
    torch.save(theirs.state_dict(), tmp_path / "net.pth")
    space = LITE if "lite" in name else CPU_SPACE.replace(image_sizes=(64,))
    supernet = Supernet(space)
    report = load_init(tmp_path / "net.pth", supernet)
    x = images(space)
    with torch.no_grad():
        expected = theirs(x)
    for logits in outputs(supernet, report, x):
        same(logits, expected)
    assert np.isfinite(expected.numpy()).all()
