"""Once-for-all's names and shapes, written out here, and its own package where it is installed."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.space import CPU_SPACE, PROXYLESS_SPACE, SearchSpace, make_divisible
from foxnas_mlflow.supernet import Supernet, load_init

SPACES = {"mbv3": CPU_SPACE, "proxyless": PROXYLESS_SPACE}
RELEASED = [("mbv3", 1.0), ("mbv3", 1.2), ("proxyless", 1.3)]


def shapes_of(family: str, width_mult: float) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published state dict."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, bn: str, out: int, inputs: int, k: int = 1) -> None:
        shapes[f"{name}.weight"] = (out, inputs, k, k)
        for statistic in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{bn}.{statistic}"] = (out,)
        shapes[f"{bn}.num_batches_tracked"] = ()

    def block(i: int, inputs: int, out: int, se: bool) -> None:
        name, hidden = f"blocks.{i}.conv", make_divisible(6 * inputs)
        conv(f"{name}.inverted_bottleneck.conv.conv", f"{name}.inverted_bottleneck.bn.bn", hidden, inputs)
        conv(f"{name}.depth_conv.conv.conv", f"{name}.depth_conv.bn.bn", hidden, 1, 7)
        shapes[f"{name}.depth_conv.conv.5to3_matrix"] = (9, 9)
        shapes[f"{name}.depth_conv.conv.7to5_matrix"] = (25, 25)
        if se:
            squeezed = make_divisible(hidden // 4)
            shapes[f"{name}.depth_conv.se.fc.reduce.weight"] = (squeezed, hidden, 1, 1)
            shapes[f"{name}.depth_conv.se.fc.reduce.bias"] = (squeezed,)
            shapes[f"{name}.depth_conv.se.fc.expand.weight"] = (hidden, squeezed, 1, 1)
            shapes[f"{name}.depth_conv.se.fc.expand.bias"] = (hidden,)
        conv(f"{name}.point_linear.conv.conv", f"{name}.point_linear.bn.bn", out, hidden)

    mbv3 = family == "mbv3"
    base = [24, 40, 80, 112, 160] if mbv3 else [24, 40, 80, 96, 192, 320]
    stem, first, *widths = (make_divisible(w * width_mult) for w in ([16, 16] if mbv3 else [32, 16]) + base)
    conv("first_conv.conv", "first_conv.bn", stem, 3, 3)
    conv("blocks.0.conv.depth_conv.conv", "blocks.0.conv.depth_conv.bn", stem, 1, 3)
    conv("blocks.0.conv.point_linear.conv", "blocks.0.conv.point_linear.bn", first, stem)
    i, inputs = 1, first
    for stage, width in enumerate(widths):
        for _ in range(1 if stage == 5 else 4):
            block(i, inputs, width, mbv3 and stage in (1, 3, 4))
            i, inputs = i + 1, width
    last = make_divisible(1280 * width_mult)
    if mbv3:
        expanded = make_divisible(960 * width_mult)
        conv("final_expand_layer.conv", "final_expand_layer.bn", expanded, inputs)
        shapes["feature_mix_layer.conv.weight"] = (last, expanded, 1, 1)
    else:
        conv("feature_mix_layer.conv", "feature_mix_layer.bn", last, inputs)
    shapes |= {"classifier.linear.weight": (1000, last), "classifier.linear.bias": (1000,)}
    return shapes


def weights_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Values that keep activations in range, and statistics that are not the first ones."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            values[name] = torch.tensor(7)
        elif name.endswith(("running_var", "bn.weight")):
            values[name] = 0.8 + 0.4 * noise.sigmoid()
        elif name.endswith("_matrix"):
            values[name] = torch.eye(shape[0]) + 0.1 * noise
        else:
            values[name] = noise * (2 / max(noise[0].numel(), 1)) ** 0.5 if len(shape) > 1 else 0.1 * noise
    return values


def save(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize(("family", "width_mult"), RELEASED)
def test_every_tensor_of_the_supernet_is_read(family: str, width_mult: float, tmp_path: Path) -> None:
    theirs = weights_of(shapes_of(family, width_mult))
    supernet = Supernet(SPACES[family].replace(width_mult=width_mult))
    # The published files have an older name of the blocks, and the state dict beside other things.
    old = {
        name.replace(".conv.", ".mobile_inverted_conv.", 1) if "blocks" in name else name: t
        for name, t in theirs.items()
    }
    read = load_init(save({"state_dict": old}, tmp_path / "net"), supernet)
    assert set(read.placed) == set(supernet.state_dict())
    ours = supernet.state_dict()
    for name, source in {
        "stem.conv.weight": "first_conv.conv.weight",
        "stage1.block0.depthwise.to5": "blocks.1.conv.depth_conv.conv.7to5_matrix",
        "stage3.block2.expand.norm.running_mean": "blocks.11.conv.inverted_bottleneck.bn.bn.running_mean",
        "stage5.block3.project.weight": "blocks.20.conv.point_linear.conv.conv.weight",
        "head.classifier.bias": "classifier.linear.bias",
    }.items():
        assert torch.equal(ours[name], theirs[source]), name


def test_smaller_kernels_are_once_for_all_s(tmp_path: Path) -> None:
    theirs = weights_of(shapes_of("mbv3", 1.0))
    supernet = Supernet(CPU_SPACE)
    load_init(save(theirs, tmp_path / "net"), supernet)
    source = "blocks.6.conv.depth_conv.conv"
    kernel = theirs[f"{source}.conv.weight"][:120]
    # Once-for-all: crop, flatten a channel's kernel to a row, apply y = x A' of the next matrix.
    for small in (5, 3):
        crop = kernel[:, 0, 1:-1, 1:-1].reshape(len(kernel), -1)
        kernel = (crop @ theirs[f"{source}.{small + 2}to{small}_matrix"].T).reshape(len(kernel), 1, small, small)
        subnet = supernet.extract(CPU_SPACE.uniform(128, depth=2, expansion=3, kernel=small))
        got = subnet.get_submodule("stage2.block1.depthwise").weight
        torch.testing.assert_close(got, kernel, rtol=1e-6, atol=1e-6)


def test_other_classes_and_grey_images_keep_what_fits(tmp_path: Path) -> None:
    theirs = weights_of(shapes_of("mbv3", 1.0))
    supernet = Supernet(CPU_SPACE.replace(in_channels=1, n_classes=7))
    before = supernet.get_submodule("head.classifier").weight.clone()
    read = load_init(save(theirs, tmp_path / "net"), supernet)
    assert torch.equal(supernet.get_submodule("head.classifier").weight, before)
    torch.testing.assert_close(
        supernet.get_submodule("stem.conv").weight, theirs["first_conv.conv.weight"].sum(1, keepdim=True)
    )
    text = "; ".join(read.differences)
    for part in ("7 classes", "one input channel", "h-swish"):
        assert part in text


def test_another_width_takes_a_prefix_and_other_blocks_are_refused(tmp_path: Path) -> None:
    theirs = weights_of(shapes_of("mbv3", 1.0))
    path = save(theirs, tmp_path / "net")
    for width_mult in (0.5, 1.2):
        supernet = Supernet(CPU_SPACE.replace(width_mult=width_mult))
        load_init(path, supernet)
        ours, source = (
            supernet.get_submodule("stage3.block2.project").weight,
            theirs["blocks.11.conv.point_linear.conv.conv.weight"],
        )
        n_out, n_in = min(len(ours), len(source)), min(ours.shape[1], source.shape[1])
        assert torch.equal(ours[:n_out, :n_in], source[:n_out, :n_in])
        assert not ours[:n_out, n_in:].any()
    with pytest.raises(InvalidInputError, match="first to differ is"):
        load_init(path, Supernet(PROXYLESS_SPACE))


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code was run",)


def test_files_that_are_no_checkpoints_are_refused_and_never_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = save(weights_of({"first_conv.conv.weight": (16, 3, 3, 3)}), tmp_path / "whole").read_bytes()[:700]
    for name, content in {
        "empty": b"",
        "text": b"no checkpoint",
        "torn": torn,
        "code": pickle.dumps(_Harmful()),
    }.items():
        (tmp_path / name).write_bytes(content)
    save({"state_dict": {"a": 3}}, tmp_path / "numbers")
    save([1, 2], tmp_path / "list")
    for name in ("empty", "text", "torn", "code", "numbers", "list", "absent"):
        with pytest.raises(InvalidInputError) as caught:
            load_init(tmp_path / name, Supernet(CPU_SPACE))
        assert "\n" not in str(caught.value)
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("family", "width_mult"), RELEASED)
def test_outputs_are_those_of_once_for_all_s_own_network(family: str, width_mult: float, tmp_path: Path) -> None:
    pytest.importorskip("ofa", reason="the package ofa is not installed (pip install --no-deps ofa)")
    from benchmarks.training import import_once_for_all

    networks = import_once_for_all()
    kind = networks.OFAMobileNetV3 if family == "mbv3" else networks.OFAProxylessNASNets
    theirs = kind(
        width_mult=width_mult, ks_list=[3, 5, 7], expand_ratio_list=[3, 4, 6], depth_list=[2, 3, 4], dropout_rate=0
    )
    assert {name: tuple(t.shape) for name, t in theirs.state_dict().items()} == shapes_of(family, width_mult)
    theirs.load_state_dict(weights_of(shapes_of(family, width_mult)))
    theirs.double().eval()
    # Activations and padding are theirs until training begins.
    space: SearchSpace = SPACES[family].replace(width_mult=width_mult, image_sizes=(64,), expansions=(3, 4, 6))
    supernet = Supernet(space)
    load_init(save(theirs.state_dict(), tmp_path / "net"), supernet)
    supernet.double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rng = np.random.default_rng(0)
    for architecture in (space.largest(), space.smallest(), *space.sample(rng, n=2)):
        depths = [stage.depth for stage in architecture.stages]
        # Blocks that are left out take part in no output, but have their place in the lists.
        blocks = [(*stage.blocks, *stage.blocks[-1:] * (4 - stage.depth)) for stage in architecture.stages]
        kernels = [b.kernel for stage in blocks for b in stage]
        expansions = [b.expansion for stage in blocks for b in stage]
        if family == "proxyless":
            kernels, expansions, depths = [*kernels, 3], [*expansions, 6], [*depths, 1]
        theirs.set_active_subnet(ks=kernels, e=expansions, d=depths)
        supernet.set_subnet(architecture)
        with torch.no_grad():
            expected, got = theirs(images), supernet(images)
        assert expected.std() > 1e-3
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
