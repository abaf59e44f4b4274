"""The service on a board against the bare interpreter: what one request costs over `invoke`.

    python benchmarks/service.py [--image-size 224] [--classes 10] [--rounds 15]

One client asks one after the other. Slices of some requests take turns with slices of bare calls on the same pixels or
the same JPEG, so that whatever else the machine does weighs on both alike. The overhead is the median of differences.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.serving import network, photograph
from foxnas_mlflow.core.architecture import Block
from foxnas_mlflow.data.preprocess import Preprocessing
from foxnas_mlflow.deploy._board import open_board
from foxnas_mlflow.deploy._bundle import Options, bundle
from foxnas_mlflow.flavor import TfliteModel
from foxnas_mlflow.runtime import Classifier

SLICE = 20


def timed_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="foxnas-service-"))
    path = directory / "model.tflite"
    path.write_bytes(network(args.image_size, args.classes, 2, Block(3, 3)))
    labels = tuple(map(str, range(args.classes)))
    model = TfliteModel(path, labels, Preprocessing(args.image_size), "logits")
    files = bundle(model, Options(), name="camera", kind="tflite", source="benchmark", model_id=None)
    classifier = Classifier(path, model.preprocessing.normalization, model.output)
    jpeg = photograph(0)
    pixels = model.preprocessing.decode(jpeg)
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    record = json.dumps({"dataframe_records": [{"image": base64.b64encode(jpeg).decode()}]}).encode()
    with open_board(f"edge://local?root={directory / 'board'}") as board:
        service = board.deploy("camera", files, {"serve": True}, new=True)["service"]
        try:
            connection = http.client.HTTPConnection(service["url"].removeprefix("http://"), timeout=60)
            with contextlib.closing(connection):

                def ask(kind: str, body: bytes) -> None:
                    connection.request("POST", "/invocations", body, {"Content-Type": kind})
                    answer = connection.getresponse()
                    if answer.status != 200:
                        raise RuntimeError(answer.read().decode())
                    answer.read()

                sides: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
                    "pixels (application/x-npy)": (
                        lambda: ask("application/x-npy", buffer.getvalue()),
                        lambda: classifier(pixels),
                    ),
                    "JPEG (image/jpeg)": (
                        lambda: ask("image/jpeg", jpeg),
                        lambda: classifier(model.preprocessing.decode(jpeg)),
                    ),
                    "JPEG in JSON (dataframe_records)": (
                        lambda: ask("application/json", record),
                        lambda: classifier(model.preprocessing.decode(jpeg)),
                    ),
                }
                for name, (served, bare) in sides.items():
                    rows = []
                    for _ in range(args.rounds + 1):
                        row = [[timed_ms(side) for _ in range(SLICE)] for side in (served, bare)]
                        rows.append([statistics.median(times) for times in row])
                    # The first round warms up.
                    over = statistics.median(a - b for a, b in rows[1:])
                    a, b = (statistics.median(side) for side in zip(*rows[1:], strict=True))
                    print(f"{name}: served {a:.2f} ms, bare {b:.2f} ms, overhead {over:.2f} ms")
        finally:
            board.call("delete", "camera")


if __name__ == "__main__":
    main()
