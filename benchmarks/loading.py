"""Reading pictures for training: images a second beside plain Pillow, OpenCV and torchvision, and memory of many files.

    python benchmarks/loading.py [--images 400] [--size 224] [--processes 1 2] [--rounds 5]
    python benchmarks/loading.py --index 1280000
    python benchmarks/loading.py --memory 100000

The pictures are JPEGs of 500 x 375 pixels. Every reader decodes, cuts out a random part of 60 to 100 %, scales it to
the size and mirrors half of them, in as many processes of PyTorch's loader, and gives batches of 64 as bytes. Ours
changes colours, erases parts and normalises too; "Pillow, colours" changes the same colours. Rounds of all readers
alternate, and the median of each reader's rate over plain Pillow's of the same round is printed, and over that of
Pillow with colours, which does what ours does but for erasing and normalising. "kept" reads the pixels that the first
step of a project keeps.

--index: resident memory of that many made-up paths with their classes, facts and split. --memory: an epoch over so many
names of files (links to a few pictures), and resident memory of the process and its readers every fifth of it.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch.utils.data import DataLoader, Dataset

from foxnas_mlflow.data import load_dataset
from foxnas_mlflow.supernet import Batches

BATCH, LEAST = 64, 0.6
Reader = Callable[[str, tuple[float, ...], bool, int], NDArray[np.uint8]]


def write_pictures(root: Path, n: int, distinct: int = 50) -> None:
    """Pictures with shapes and some noise, about 100 kB each."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(n // 2):
            path = root / name / f"{i}.jpg"
            if i >= distinct:
                os.link(root / name / f"{i % distinct}.jpg", path)
                continue
            low = Image.fromarray(rng.integers(0, 256, (12 + k, 16, 3), dtype=np.uint8)).resize((500, 375), 3)
            noise = rng.normal(0, 12, (375, 500, 3))
            Image.fromarray(np.clip(np.asarray(low) + noise, 0, 255).astype(np.uint8)).save(path, quality=85)


def with_pillow(path: str, box: tuple[float, ...], mirrored: bool, size: int) -> NDArray[np.uint8]:
    with Image.open(path) as opened:
        picture = opened.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box)
    if mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(picture)


def with_colours(path: str, box: tuple[float, ...], mirrored: bool, size: int) -> NDArray[np.uint8]:
    picture = Image.fromarray(with_pillow(path, box, mirrored, size))
    for change in (ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness):
        picture = change(picture).enhance(1.1)
    return np.asarray(picture)


def with_opencv(path: str, box: tuple[float, ...], mirrored: bool, size: int) -> NDArray[np.uint8]:
    import cv2

    cv2.setNumThreads(1)
    left, top, right, bottom = map(round, box)
    picture = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)[top:bottom, left:right]
    picture = cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(picture[:, ::-1]) if mirrored else picture


def with_torchvision(path: str, box: tuple[float, ...], mirrored: bool, size: int) -> NDArray[np.uint8]:
    from torchvision.io import ImageReadMode, read_image
    from torchvision.transforms.v2 import functional

    left, top, right, bottom = map(round, box)
    picture = read_image(path, ImageReadMode.RGB)
    picture = functional.resized_crop(picture, top, left, bottom - top, right - left, [size, size], antialias=True)
    return (functional.horizontal_flip(picture) if mirrored else picture).permute(1, 2, 0).numpy()


class Plain(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __init__(self, paths: list[str], reader: Reader, size: int) -> None:
        self.paths, self.reader, self.size = paths, reader, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng(index)
        pixels = np.empty((len(index), self.size, self.size, 3), np.uint8)
        for k, i in enumerate(index):
            side = 375 * np.sqrt(rng.uniform(LEAST, 1))
            left, top = 62 + rng.uniform(0, 375 - side), rng.uniform(0, 375 - side)
            box = (left, top, left + side, top + side)
            pixels[k] = self.reader(self.paths[i], box, bool(rng.random() < 0.5), self.size)
        return torch.from_numpy(pixels), torch.from_numpy(index)


def plain_epoch(paths: list[str], reader: Reader, size: int, workers: int) -> int:
    order = np.random.default_rng(0).permutation(len(paths))
    chosen = [order[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    loader: DataLoader[Any] = DataLoader(
        Plain(paths, reader, size), batch_size=None, sampler=chosen, num_workers=workers
    )
    return sum(len(x) for x, _ in loader)


def epoch_of(batches: Batches, i: int) -> int:
    return sum(len(x) for x, _ in batches.epoch(i))


def compare(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.environ["XDG_CACHE_HOME"] = f"{directory}/cache"
        root = Path(directory, "data")
        write_pictures(root, args.images)
        sets = [load_dataset(str(root), sizes=(args.size,), keep=keep, val_fraction=0.01) for keep in (False, True)]
        paths = [str(path) for path in sets[0].train.paths]  # type: ignore[attr-defined]
        paths = paths[: len(paths) // BATCH * BATCH]  # whole batches, as ours reads
        size = sum(os.path.getsize(path) for path in paths) / len(paths) / 1e3
        print(f"{len(paths)} JPEGs of {size:.0f} kB, 500 x 375 to {args.size} px, {args.rounds} rounds")
        readers = {"Pillow": with_pillow, "Pillow, colours": with_colours}
        if importlib.util.find_spec("cv2"):
            readers["OpenCV"] = with_opencv
        if importlib.util.find_spec("torchvision"):
            readers["torchvision"] = with_torchvision
        for workers in args.processes:
            ours = {
                name: Batches(
                    dataset.train,
                    normalization=dataset.normalization,
                    image_size=args.size,
                    batch_size=BATCH,
                    workers=workers,
                )
                for name, dataset in zip(("foxnas", "foxnas, kept"), sets, strict=True)
            }
            seconds: dict[str, list[float]] = {}
            for i in range(args.rounds):
                rounds: dict[str, Callable[[], int]] = {
                    name: functools.partial(plain_epoch, paths, reader, args.size, workers)
                    for name, reader in readers.items()
                }
                rounds |= {name: functools.partial(epoch_of, batches, i) for name, batches in ours.items()}
                for name, read in rounds.items():
                    start = time.perf_counter()
                    n = read()
                    seconds.setdefault(name, []).append((time.perf_counter() - start) / n)
            print(f"{workers} process(es)")
            for name, values in seconds.items():
                plain, alike = (np.median(np.divide(seconds[of], values)) for of in ("Pillow", "Pillow, colours"))
                rate = 1 / np.median(values)
                print(
                    f"  {name:<16}{rate:8.0f} images/s, {plain:.2f} of plain Pillow, {alike:.2f} with colours",
                    flush=True,
                )


def resident_mb(pid: int | str = "self") -> float:
    """Memory of a process that it shares with no other, in MB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private", "Pss:"))) / 2 / 1e3


def index_of(n: int) -> None:
    from foxnas_mlflow.data import FileImages
    from foxnas_mlflow.data._datasets import _subset, stratified_split
    from foxnas_mlflow.data._look import LOOKS
    from foxnas_mlflow.data._names import Names, Paths

    def status() -> tuple[float, float]:
        text = Path("/proc/self/status").read_text()
        return tuple(int(text.split(key)[1].split()[0]) / 1e3 for key in ("VmRSS:", "VmHWM:"))  # type: ignore[return-value]

    before = status()[0]
    names = Names(f"n{i // 1280:08d}/n{i // 1280:08d}_{i}.JPEG" for i in range(n))
    targets = np.arange(n) // 1280
    every = FileImages(Paths(Path("/data/imagenet/train"), names), targets, np.zeros(n, LOOKS))
    # Pages that are written count.
    every.facts["content"][:, 0] = every.facts["look"][:, 0] = np.arange(n)
    train, val = (_subset(every, index) for index in stratified_split(targets, 0.1, np.random.default_rng(0)))
    del every
    now, peak = status()
    print(f"{len(train) + len(val):,} files: {now - before:.0f} MB resident, {peak - before:.0f} MB at the most")


def memory_of(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.environ["XDG_CACHE_HOME"] = f"{directory}/cache"
        root = Path(directory, "data")
        write_pictures(root, args.memory)
        dataset = load_dataset(str(root), val_fraction=0.01)
        batches = Batches(
            dataset.train, normalization=dataset.normalization, image_size=args.size, batch_size=BATCH, workers=2
        )
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        for i, _ in enumerate(batches.epoch(0)):
            if i % (len(batches) // 5) == 2:
                own, others = resident_mb(), sum(resident_mb(pid) for pid in children.read_text().split())
                print(f"  after {i * BATCH:7,} files: {own:.0f} MB, readers {others:.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--index", type=int, metavar="FILES", help="measure the memory of an index instead")
    parser.add_argument("--memory", type=int, metavar="FILES", help="measure the memory of an epoch instead")
    args = parser.parse_args()
    if args.index:
        index_of(args.index)
    elif args.memory:
        memory_of(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
