"""Probes against TensorFlow's own files: the same graph, built faster, and as fast to run.

    python benchmarks/probes.py [--architectures 10] [--rounds 60] [--threads 1]

Half of the architectures come from each space. Every one is converted by TensorFlow (random
weights, random calibration images) and written as a probe. Both files run in this process, in
turns of a few inferences, so that whatever disturbs the machine disturbs both; a ratio is the
median over the turns. Seconds to build a probe are those of the processor. Conversions are kept in
the cache directory.
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from side_by_side import side_by_side

from foxnas_mlflow.core.files import cache_directory, write_atomically
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.space import CPU_SPACE, TPU_SPACE
from foxnas_mlflow.data.preprocess import Normalization
from foxnas_mlflow.tflite import (
    convert,
    random_weights,
    read_tflite,
    write_probe,
)

SIZES = (128, 160, 192, 224)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--architectures", type=int, default=10)
parser.add_argument("--rounds", type=int, default=60)
parser.add_argument("--threads", type=int, default=1)
args = parser.parse_args()


def converted(network, key: str) -> tuple[bytes, float]:
    """TensorFlow's file, and the seconds that it took (0 from the cache)."""
    path = cache_directory() / "benchmarks" / f"probe-{key}.tflite"
    if path.exists():
        return path.read_bytes(), 0.0
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, network.image_size, network.image_size, 3), dtype=np.uint8)
    normalization = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    conversion = convert(network, random_weights(network, rng), images, normalization=normalization)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, conversion.data)
    return conversion.data, conversion.seconds


header = f"{'network':<12}{'operators':>10}{'same graph':>12}{'probe s':>9}{'TF s':>7}{'probe ms':>10}{'TF ms':>9}"
print(f"{header}{'ratio':>8}")
ratios, builds = [], []
rng = np.random.default_rng(0)
for i in range(args.architectures):
    space = (CPU_SPACE, TPU_SPACE)[i % 2]
    network = build_network(space, space.sample(rng, image_size=SIZES[i % len(SIZES)]))
    start = time.process_time()
    probe = write_probe(network)
    builds.append(time.process_time() - start)
    full, seconds = converted(network, f"{i}-{space.name}-{network.image_size}")
    ours, theirs = read_tflite(probe), read_tflite(full)
    same = ours.structure == theirs.structure and ours.parameter_bytes == theirs.parameter_bytes
    turns = side_by_side([probe, full], threads=args.threads, rounds=args.rounds)
    probe_ms, full_ms = np.median(turns, axis=0)
    ratios.append(float(np.median(turns[:, 0] / turns[:, 1])))
    print(
        f"{space.name + ' ' + str(network.image_size):<12}{len(ours.operators):>10}{'yes' if same else 'NO':>12}"
        f"{builds[-1]:>9.3f}{seconds:>7.1f}{probe_ms:>10.3f}{full_ms:>9.3f}{ratios[-1]:>8.4f}",
        flush=True,
    )
print(
    f"median ratio {np.median(ratios):.4f}, from {min(ratios):.4f} to {max(ratios):.4f}; "
    f"a probe takes {np.median(builds):.3f} s (at most {max(builds):.3f} s) to build"
)
