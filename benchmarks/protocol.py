"""The benchmark protocol against LiteRT's own program: the same file, in turns.

    python benchmarks/protocol.py [--turns 5] [--runs 200]

`litert-benchmark` comes with the wheel of ai-edge-litert. Each turn is a fresh process of each. Printed are the ratios
of the medians of each turn, and that of the fastest runs of all turns, on which other work of the machine weighs least.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.devices import connect, measure
from foxnas_mlflow.tflite import write_probe


def in_turns(model: bytes, *, turns: int, runs: int) -> Iterator[np.ndarray]:
    """Median and fastest run of ours, then of theirs, in ms, shape (2, 2), a turn."""
    program = shutil.which("litert-benchmark")
    if program is None:
        raise SystemExit("litert-benchmark comes with ai-edge-litert 2.1 and newer")
    with tempfile.TemporaryDirectory() as name, connect("local") as here:
        path, result = Path(name, "model.tflite"), Path(name, "result.json")
        path.write_bytes(model)
        asked = ["--model", path, "--num_runs", runs, "--warmup_runs", 50, "--num_threads", 1, "--result_json", result]
        for _ in range(turns):
            subprocess.run([program, *map(str, asked)], check=True, capture_output=True)
            theirs = json.loads(result.read_text())["latency"]
            ours = measure(here, model, runs=runs, warmup=50, attempts=1).samples_ms
            yield np.array([[np.median(ours), min(ours)], [theirs["median_ms"], theirs["min_ms"]]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--runs", type=int, default=200)
    args = parser.parse_args()
    for size in (128, 224, 320):
        network = CPU_SPACE.replace(kernels=(3, 5)).smallest(size)
        model = write_probe(build_network(CPU_SPACE, network))
        found = np.array(list(in_turns(model, turns=args.turns, runs=args.runs)))
        medians, (ours, theirs) = found[:, 0, 0] / found[:, 1, 0], found[:, :, 1].min(axis=0)
        print(
            f"{size} px: median {np.median(medians):.3f} ({medians.min():.3f} to {medians.max():.3f}), "
            f"fastest run {ours / theirs:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
