"""Training steps of one subnet: images a second beside once-for-all's package, and peak memory.

    python benchmarks/training.py [--image-size 128] [--batch 32] [--threads 2] [--rounds 5] [--device cuda]
    python benchmarks/training.py --memory 16 32 64

The subnets are the largest of the cpu space (kernel 7, expansion 6, depth 4) and one in the middle
(5, 4, 3); both sides have the same kernels, expansions, depths, classes, batch and threads. A step
is forward, cross-entropy, backward and one SGD update. Steps of both sides alternate, and the
median over the rounds is printed, so that other work on the machine disturbs both alike. Ours runs
in the mode that `train_supernet` finds fastest; once-for-all's code as it is.

With --memory, one step of the largest network at 224 px in a process of its own for each batch.

Needs the package `ofa` (`pip install --no-deps ofa`); only its network modules are imported.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.supernet import Supernet, fastest_mode
from foxnas_mlflow.supernet._step import autocast, layout


def import_once_for_all() -> Any:
    """Once-for-all's module of supernets.

    `ofa.utils` also imports its data loaders, which need torchvision and a module that PyTorch
    dropped; an empty module in their place leaves the networks as they are.
    """
    sys.modules.setdefault("ofa.utils.my_dataloader", types.ModuleType("ofa.utils.my_dataloader"))
    import ofa.imagenet_classification.elastic_nn.networks as networks

    return networks


def step_of(network: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor, mode: Any) -> Callable[[], None]:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True, foreach=True)
    network.train()
    images = images.to(memory_format=layout(mode))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(mode, images):
            loss = F.cross_entropy(network(images).float(), targets)
        loss.backward()
        optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()

    return step


def compare(args: argparse.Namespace) -> None:
    space = CPU_SPACE.replace(expansions=(3, 4, 6), image_sizes=(args.image_size,))
    ours = Supernet(space).to(args.device)
    theirs = (
        import_once_for_all()
        .OFAMobileNetV3(ks_list=[3, 5, 7], expand_ratio_list=[3, 4, 6], depth_list=[2, 3, 4], dropout_rate=0)
        .to(args.device)
    )
    images = torch.randn(args.batch, 3, args.image_size, args.image_size, device=args.device)
    targets = torch.randint(space.n_classes, (args.batch,), device=args.device)
    mode = args.mode if args.mode != "auto" else fastest_mode(ours, images, targets, args.device)
    steps = {
        f"foxnas ({mode})": step_of(ours, images, targets, mode),
        "once-for-all": step_of(theirs, images, targets, "float32"),
    }
    where = torch.cuda.get_device_name() if images.is_cuda else f"{torch.get_num_threads()} threads"
    print(f"batch {args.batch}, {args.image_size} px, {where}, {args.rounds} rounds")
    for kernel, expansion, depth in ((7, 6, 4), (5, 4, 3)):
        ours.set_subnet(space.uniform(args.image_size, depth=depth, expansion=expansion, kernel=kernel))
        theirs.set_active_subnet(ks=kernel, e=expansion, d=depth)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(args.rounds + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if i:  # The first is for warming up.
                    seconds[name].append(time.perf_counter() - start)
        first, second = (np.median(values) for values in seconds.values())
        ratios = np.divide(*map(np.asarray, reversed(list(seconds.values()))))
        print(f"k {kernel}, e {expansion}, D {depth}:")
        for name, values in seconds.items():
            print(f"  {name:<24}{args.batch / np.median(values):8.2f} images/s")
        print(f"  ratio {second / first:.2f} (of single rounds: {ratios.min():.2f} to {ratios.max():.2f})", flush=True)


def one_step(args: argparse.Namespace) -> None:
    """One step of the paper preset's largest network; prints the peak of resident memory."""
    supernet = Supernet(CPU_SPACE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images, targets = torch.randn(args.batch, 3, 224, 224), torch.randint(1000, (args.batch,))
    step_of(supernet, images, targets, args.mode)()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"batch {args.batch}, 224 px, {args.mode}: peak {peak / 2**20:.2f} GiB, {before / 2**20:.2f} before the step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's choice")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--mode", default="auto", choices=("auto", "float32", "channels_last", "bfloat16"))
    parser.add_argument(
        "--memory", type=int, nargs="+", metavar="BATCH", help="measure memory at these batches instead"
    )
    parser.add_argument("--one-step", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.one_step:
        one_step(args)
    elif args.memory:
        mode = "channels_last" if args.mode == "auto" else args.mode
        for batch in args.memory:
            command = [sys.executable, __file__, "--one-step", "--batch", str(batch), "--mode", mode]
            subprocess.run([*command, "--threads", str(args.threads)], check=True)
    else:
        compare(args)


if __name__ == "__main__":
    main()
