"""Well-known int8 networks against networks found for this host, at equal ImageNet accuracy.

    python benchmarks/latency.py [--rounds 60] [--probes 20] [--plot latency.png]

Peers are built by Keras without weights (speed does not depend on them) at 224 px and converted by
TensorFlow to int8. For ours, a latency cost model of this host is fitted to probes of the CPU
space, and the exact front of predicted accuracy and latency gives the fastest network that is
predicted at least as accurate as the peer. Peers and ours then run side by side on the same
runtime, with one and with two threads.

Their accuracy is the published one of the int8 model, ours is predicted for the weight-shared
network (paper's table) before quantization: --margin asks for so many points more of ours.
Conversions are kept in the cache directory; the rest takes a few minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import time

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from side_by_side import side_by_side

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from foxnas_mlflow.core.cost import network_cost
from foxnas_mlflow.core.design import choose_samples
from foxnas_mlflow.core.files import cache_directory, write_atomically
from foxnas_mlflow.core.measurements import Measurement
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.predictors import fit_family, reference_predictors, widest_formula
from foxnas_mlflow.core.searchers import exact_front
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.tflite import read_tflite, write_probe

# Published ImageNet top-1 of the int8 models (percent):
# - MobileNetV2 1.0 224 quantized: TensorFlow Lite's hosted models, 70.8
# - MobileNetV3, 8 bit: github.com/tensorflow/models, research/slim/nets/mobilenet/README.md
# - EfficientNet-Lite0, int8: github.com/tensorflow/tpu, models/official/efficientnet/lite/README.md
PEERS = {
    "MobileNetV3-Small": 64.9,
    "MobileNetV2": 70.8,
    "MobileNetV3-Large": 73.9,
    "EfficientNet-Lite0": 74.4,
}
SIZE = 224
THREADS = (1, 2)
MAX_COST_MODEL_ERROR = 15.0  # percent; searching on a worse model compares noise

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rounds", type=int, default=60)
parser.add_argument("--probes", type=int, default=20)
parser.add_argument("--margin", type=float, default=0.0)
parser.add_argument("--plot", default="latency.png")
args = parser.parse_args()
cache = cache_directory() / "benchmarks"
cache.mkdir(parents=True, exist_ok=True)


def efficientnet_lite0(tf, image):
    """EfficientNet-B0 without squeeze-excite, with ReLU6, fixed stem and head."""
    layers = tf.keras.layers

    def conv(x, channels: int, kernel: int = 1, stride: int = 1, activation: bool = True, depthwise: bool = False):
        layer = layers.DepthwiseConv2D if depthwise else layers.Conv2D
        size = (kernel,) if depthwise else (channels, kernel)
        x = layers.BatchNormalization()(layer(*size, strides=stride, padding="same", use_bias=False)(x))
        return layers.ReLU(6.0)(x) if activation else x

    x = conv(image, 32, 3, 2)
    for n, kernel, stride, expansion, channels in (
        (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
    ):  # fmt: skip
        for i in range(n):
            before, stride = x, stride if i == 0 else 1
            if expansion > 1:
                x = conv(x, x.shape[-1] * expansion)
            x = conv(conv(x, x.shape[-1], kernel, stride, depthwise=True), channels, activation=False)
            x = layers.Add()([before, x]) if i > 0 else x
    x = layers.GlobalAveragePooling2D()(conv(x, 1280))
    return tf.keras.Model(image, layers.Dense(1000)(x))


def peer(name: str) -> bytes:
    """The int8 file of a peer, converted once."""
    path = cache / f"{name}-{SIZE}-int8.tflite"
    if path.exists():
        return path.read_bytes()
    import tensorflow as tf

    image = tf.keras.layers.Input((SIZE, SIZE, 3), batch_size=1)
    options = {"weights": None, "input_tensor": image, "classifier_activation": None}
    applications = tf.keras.applications
    model = {
        "MobileNetV2": lambda: applications.MobileNetV2(**options),
        "MobileNetV3-Small": lambda: applications.MobileNetV3Small(**options, include_preprocessing=False),
        "MobileNetV3-Large": lambda: applications.MobileNetV3Large(**options, include_preprocessing=False),
        "EfficientNet-Lite0": lambda: efficientnet_lite0(tf, image),
    }[name]()
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 1, SIZE, SIZE, 3)).astype(np.float32)
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([x] for x in images)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    with contextlib.redirect_stdout(io.StringIO()):  # Keras lists every variable that it saves
        data = converter.convert()
    write_atomically(path, data)
    return data


def host_predictors(threads: int):
    """Packaged accuracy, and a latency cost model of this host from probes at the image sizes that it knows."""
    reference = reference_predictors("rpi4")
    formula = widest_formula("calibrated", "latency_ms", CPU_SPACE, len(reference.image_sizes))
    architectures = choose_samples(CPU_SPACE, [formula], args.probes, image_sizes=reference.image_sizes)
    probes = [write_probe(build_network(CPU_SPACE, a)) for a in architectures]
    # A low quantile: what disturbs a shared machine only ever adds time, and not to all probes alike.
    # Few rounds: probes with kernels that the runtime has no fast code for take 300 ms.
    rounds = max(args.rounds // 6, 5)
    milliseconds = np.quantile(side_by_side(probes, threads=threads, rounds=rounds), 0.2, axis=0)
    rows = [
        Measurement(a, latency_ms=float(ms), latency_source="measured")
        for a, ms in zip(architectures, milliseconds, strict=True)
    ]
    (fit,) = fit_family("calibrated", "latency_ms", rows, CPU_SPACE)
    print(
        f"{threads} thread(s): cost model of this host from {len(rows)} probes, "
        f"cross-validated error {fit.metrics['cv_mape']:.1f} %",
        flush=True,
    )
    if fit.metrics["cv_mape"] > MAX_COST_MODEL_ERROR:
        raise SystemExit("the machine is too busy to learn its latency from probes: run this when it is quiet")
    return dataclasses.replace(reference, target="cpu", latency=(fit.predictor,))


start = time.perf_counter()
files = {name: peer(name) for name in PEERS}
for name, data in files.items():
    model = read_tflite(data)
    if any(t.type.startswith("float") for t in model.tensors):
        raise SystemExit(f"{name} has float tensors")
    print(f"{name}: {dict(sorted(model.operator_counts.items()))}", flush=True)

results = {}
for threads in THREADS:
    front = exact_front(host_predictors(threads))
    ours = {}
    for name, top1 in PEERS.items():
        i = min(int(np.searchsorted(front.accuracy, top1 + args.margin)), len(front) - 1)
        ours[name] = (front.architecture(i), float(front.accuracy[i]))
    probes = [write_probe(build_network(CPU_SPACE, a)) for a, _ in ours.values()]
    turns = side_by_side([*files.values(), *probes], threads=threads, rounds=args.rounds)
    milliseconds = np.median(turns, axis=0)
    print(f"\n{threads} thread(s)")
    head = f"{'peer':<20}{'top-1 %':>8}{'ms':>8}  |{'ours px':>8}{'top-1 %':>9}{'M MACs':>8}{'M params':>9}{'ms':>8}"
    print(f"{head}{'faster':>8}")
    rows = []
    for j, (name, (architecture, accuracy)) in enumerate(ours.items()):
        theirs, mine = milliseconds[j], milliseconds[len(files) + j]
        faster = float(np.median(turns[:, j] / turns[:, len(files) + j]))
        cost = network_cost(build_network(CPU_SPACE, architecture))
        rows.append((name, PEERS[name], theirs, accuracy, mine))
        print(
            f"{name:<20}{PEERS[name]:>8.1f}{theirs:>8.2f}  |{architecture.image_size:>8}{accuracy:>9.2f}"
            f"{cost.macs / 1e6:>8.0f}{cost.params / 1e6:>9.2f}{mine:>8.2f}{faster:>7.2f}x",
            flush=True,
        )
    results[threads] = (rows, front)
print(f"\n{time.perf_counter() - start:.0f} s; load average {os.getloadavg()[0]:.1f}")

figure = Figure(figsize=(10, 4.2), layout="constrained")
FigureCanvasAgg(figure)
for axis, (threads, (rows, front)) in zip(figure.subplots(1, len(THREADS), sharey=True), results.items(), strict=True):
    axis.plot(front.latency_ms, front.accuracy, color="#7fb0e0", linewidth=1.5, label="our front, predicted")
    axis.plot([r[4] for r in rows], [r[3] for r in rows], "o", color="#1f5fa8", label="ours, measured")
    axis.plot([r[2] for r in rows], [r[1] for r in rows], "s", color="#c0392b", label="peers, measured")
    for name, top1, theirs, _, _ in rows:
        axis.annotate(name, (theirs, top1), textcoords="offset points", xytext=(7, -9), fontsize=8)
    longest = max(max(r[2], r[4]) for r in rows)
    axis.set(xlim=(0, 1.45 * longest), ylim=(64, 77), xlabel="latency of one int8 inference (ms)")
    axis.set_title(f"{threads} thread" + ("s" if threads > 1 else ""), fontsize=10)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
figure.axes[0].set_ylabel("ImageNet top-1 (%)")
figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
figure.savefig(args.plot, dpi=130)
print(f"wrote {args.plot}")
