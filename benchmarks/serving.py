"""A served model against the bare interpreter: images a second, latency of one image, cold start.

    python benchmarks/serving.py [--clients 1,8] [--rounds 7] [--seconds 2] [--env-manager local] [--cold 3]

Both sides decode the same JPEGs. Slices of one second or two of either side take turns, and every
ratio is between neighbours, so that whatever else the machine does weighs on both alike. `bare` is
one interpreter in one thread; `bare, pool` has an interpreter and a thread for each processor. The
clients run on the same machine and take their share of it.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from foxnas_mlflow.core.architecture import Architecture, Block, Stage
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.processors import n_processors
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.data.preprocess import Preprocessing
from foxnas_mlflow.flavor import TfliteModel, save_model
from foxnas_mlflow.runtime import Classifier
from foxnas_mlflow.tflite import write_probe
from tests.servers import scoring_server

BATCH = 8

# A warm environment has its bytecode; an inherited PYTHONDONTWRITEBYTECODE would compile MLflow at every start.
SERVER_ENV = {"PYTHONDONTWRITEBYTECODE": ""}


def network(image_size: int, n_classes: int, depth: int, block: Block) -> bytes:
    """A network of the CPU space whose blocks are all alike, with random weights."""
    space = CPU_SPACE.replace(n_classes=n_classes)
    stages = tuple(Stage(stage.width, (block,) * depth) for stage in space.smallest(image_size).stages)
    return write_probe(build_network(space, Architecture(space.name, image_size, stages)))


def photograph(seed: int, *, height: int = 375, width: int = 500) -> bytes:
    """A JPEG with the spectrum, and so the size, of a photograph: about 70 kB."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    grey, *colours = rng.normal(size=(4, 2, *frequency.shape))
    channels = []
    for colour in colours:
        spectrum = (grey + 0.3 * colour) / frequency**1.35
        channel = np.fft.irfft2(spectrum[0] + 1j * spectrum[1], s=(height, width))
        channels.append(128 + 50 * (channel - channel.mean()) / channel.std())
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


class Client:
    """One connection that is kept open, as any HTTP client with a session does."""

    def __init__(self, url: str, images: list[bytes]) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
        records = [{"image": base64.b64encode(image).decode()} for image in images]
        self._body = json.dumps({"dataframe_records": records}).encode()

    def reconnect(self) -> None:
        """The server closes a connection that was idle for some seconds."""
        self._connection.close()

    def __call__(self) -> None:
        self._connection.request("POST", "/invocations", self._body, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(answer.decode())


class Bare:
    """The interpreter without a server: decode and classify."""

    def __init__(self, model: TfliteModel, images: list[bytes]) -> None:
        self._classifier = Classifier(model.path, model.preprocessing.normalization, model.output)
        self._decode = model.preprocessing.decode
        self._images = images

    def __call__(self) -> None:
        for image in self._images:
            self._classifier(self._decode(image))


def calls_per_second(callers: list[Callable[[], None]], seconds: float) -> float:
    """Calls that finish in a slice, all callers at once."""
    finished = itertools.count()
    deadline = time.perf_counter() + seconds

    def work(call: Callable[[], None]) -> None:
        while time.perf_counter() < deadline:
            call()
            next(finished)

    start = time.perf_counter()
    threads = [threading.Thread(target=work, args=(call,)) for call in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return next(finished) / (time.perf_counter() - start)


def timed_ms(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def throughput(model: TfliteModel, url: str, images: list[bytes], clients: int, args: argparse.Namespace) -> None:
    bare = [Bare(model, images)]
    pool = [Bare(model, images) for _ in range(n_processors())]
    served = [Client(url, images) for _ in range(clients)]
    rows = []
    for _ in range(args.rounds + 1):
        for client in served:
            client.reconnect()
        rows.append([BATCH * calls_per_second(side, args.seconds) for side in (bare, served, pool)])
    # The first round warms up.
    alone, over_http, pooled = np.array(rows[1:]).T
    print(
        f"  {clients} clients, batches of {BATCH}: bare {np.median(alone):.0f}, bare pool {np.median(pooled):.0f}, "
        f"served {np.median(over_http):.0f} images/s; "
        f"served / bare {np.median(over_http / alone):.0%}, served / bare pool {np.median(over_http / pooled):.0%}",
        flush=True,
    )


def latency(model: TfliteModel, url: str, image: bytes, n: int) -> None:
    bare, served = Bare(model, [image]), Client(url, [image])
    pairs = np.array([(timed_ms(bare), timed_ms(served)) for _ in range(n + 10)])[10:]
    print(
        f"  one image: bare {np.median(pairs[:, 0]):.1f} ms, served {np.median(pairs[:, 1]):.1f} ms, "
        f"over it {np.median(pairs[:, 1] - pairs[:, 0]):.1f} ms (median of {n} pairs)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="1,8")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a slice")
    parser.add_argument("--env-manager", default="local", help="local, uv, virtualenv or conda")
    parser.add_argument("--cold", type=int, default=3, help="cold starts to time")
    args = parser.parse_args()
    images = [photograph(seed) for seed in range(BATCH)]
    print(
        f"{n_processors()} processors, load {os.getloadavg()[0]:.1f}, "
        f"JPEGs of {np.mean([len(i) for i in images]):.0f} bytes"
    )
    networks = {
        "tiny, 128 px, 10 classes": (128, network(128, 10, 2, Block(2, 3))),
        "middle, 192 px, 10 classes": (192, network(192, 10, 3, Block(4, 5))),
        "middle, 192 px, 1000 classes": (192, network(192, 1000, 3, Block(4, 5))),
    }
    with tempfile.TemporaryDirectory() as directory:
        for k, (title, (size, flatbuffer)) in enumerate(networks.items()):
            path = Path(directory, f"{k}.tflite")
            path.write_bytes(flatbuffer)
            n_classes = int(title.split()[-2])
            model = TfliteModel(path, tuple(f"class {i}" for i in range(n_classes)), Preprocessing(size, 3, 0.875))
            saved = Path(directory, str(k))
            save_model(model, saved)
            print(title, flush=True)
            with scoring_server(
                str(saved), log=Path(directory, "log"), env_manager=args.env_manager, env=SERVER_ENV
            ) as url:
                latency(model, url, images[0], 20 * args.rounds)
                for clients in map(int, args.clients.split(",")):
                    throughput(model, url, images, clients, args)
        starts = []
        for _ in range(args.cold):
            start = time.perf_counter()
            with scoring_server(str(saved), log=Path(directory, "log"), env_manager=args.env_manager, env=SERVER_ENV):
                starts.append(time.perf_counter() - start)
        if starts:
            print(f"cold start, {args.env_manager}: median {statistics.median(starts):.1f} s of {len(starts)}")


if __name__ == "__main__":
    main()
