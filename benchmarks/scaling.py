"""How cost grows: fronts, limits, fits, workers, boards, logging, training processes; measured, modelled and drawn.

    python benchmarks/scaling.py [--only NAME ...] [--out DIR] [--rows 16000]

Every measurement is of seconds against a size n. The model is ``a + b n^p``, with p = -1 for workers, boards and
processes (Amdahl's law) and p = 1 for what is done n times. It is fitted by least squares of the logarithm to all sizes
but the largest and checked on the largest: the error is printed. Beyond what was measured the model is all there is to
go by. `scaling.json` and `scaling.png` are written to DIR; what was measured before stays there, so that single
measurements can be taken again.

The tables of made-up rows have a smooth accuracy with noise and the latency of the packaged cost model. Boards are
stand-ins that wait for a fixed time, so that the scheduling is measured and not this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.measurements import Measurement, Timing
from foxnas_mlflow.core.parallel import as_finished
from foxnas_mlflow.core.predictors import PredictorSet, fit_predictors, reference_latency, reference_predictors
from foxnas_mlflow.core.sampling import collect
from foxnas_mlflow.core.searchers import Limit, Objective, Problem, front_of, search_each, solve
from foxnas_mlflow.core.space import CPU_SPACE, SearchSpace
from foxnas_mlflow.core.targets import get_target
from foxnas_mlflow.core.workers import Executor, LocalExecutor
from foxnas_mlflow.workflows._boards import Boards, open_boards

BOARD_SECONDS = 0.1
QUANTITIES = ("latency_ms", "int8_size_bytes", "macs", "peak_activation_bytes")


def made_up(space: SearchSpace, n: int, seed: int = 0) -> list[Measurement]:
    """Rows of random networks."""
    rng = np.random.default_rng(seed)
    architectures = [space.sample(rng) for _ in range(n)]
    estimate = reference_latency(get_target("rpi4"), space)
    rows = []
    for a in architectures:
        work = sum(np.log(b.expansion * b.kernel) for s in a.stages for b in s.blocks) + 0.02 * a.image_size
        accuracy = 78 - 25 * np.exp(-work / 30) + rng.normal(0, 0.15)
        latency = float(estimate.of("latency_ms", a.image_size).predict([a])[0])
        rows.append(
            Measurement.of(a, Timing(latency * rng.normal(1, 0.006), "measured", "a board", "made up", 200), accuracy)
        )
    return rows


def fitted(space: SearchSpace, n: int = 400) -> PredictorSet:
    return fit_predictors(made_up(space, n), space, target="rpi4").predictors


def timed(work: Callable[[], object], repeats: int = 3) -> float:
    """The least of several wall times in seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def front_stages() -> Iterator[tuple[float, float]]:
    """Exact front of one size, against the stages of the space."""
    for n in (2, 3, 4, 5, 7, 9):
        # Those beyond the five of the CPU space are wider and leave the image as large as it is.
        further = (dataclasses.replace(s, width=s.width + 100, stride=1) for s in CPU_SPACE.stages)
        stages = (*CPU_SPACE.stages, *further)[:n]
        space = CPU_SPACE.replace(name=f"stages{n}", stages=stages, image_sizes=(224,))
        predictors = fitted(space, 60 * n)
        yield n, timed(lambda predictors=predictors: front_of(Objective(predictors, confidence=0.5)))


def front_options() -> Iterator[tuple[float, float]]:
    """Exact front of one size, against the options of a stage."""
    for depths, kernels in (((2, 3), (3, 5)), ((2, 3, 4), (3, 5)), ((2, 3), (3, 5, 7)), ((2, 3, 4), (3, 5, 7))):
        space = CPU_SPACE.replace(name="options", depths=depths, kernels=kernels, image_sizes=(224,))
        predictors = fitted(space)
        n = len(Objective(predictors, confidence=0.5).options.kinds)
        yield n, timed(lambda predictors=predictors: front_of(Objective(predictors, confidence=0.5)))


def front_sizes() -> Iterator[tuple[float, float]]:
    """Exact front against the image sizes."""
    sizes = tuple(range(128, 256, 16))
    predictors = fitted(CPU_SPACE.replace(name="sizes", image_sizes=sizes))
    for n in (1, 2, 4, 8):
        yield n, timed(lambda n=n: front_of(Objective(predictors, confidence=0.5, image_sizes=sizes[:n])))


def limits_at_once() -> Iterator[tuple[float, float]]:
    """A proven optimum against the quantities that are limited at once (a mean of ten problems)."""
    predictors = reference_predictors("rpi4")
    for n in (1, 2, 3, 4):
        objective = Objective(predictors, image_sizes=[256], quantities=QUANTITIES[:n])
        rng = np.random.default_rng(0)
        problems = []
        for _ in range(10):
            amounts = objective.amounts(objective.space.sample(rng, image_size=256))
            problems.append(Problem(objective, tuple(Limit(q, 1.1 * amounts[q]) for q in objective.quantities)))
        solve(problems[0])
        yield n, timed(lambda problems=problems: [solve(problem) for problem in problems], 1) / len(problems)


def limits_in_one_call() -> Iterator[tuple[float, float]]:
    """Latency limits in one call, each with proof and price, once the front is known."""
    predictors = reference_predictors("rpi4")
    for n in (5, 10, 25, 50, 100):
        limits = [float(ms) for ms in np.linspace(45, 140, n)]
        start = time.perf_counter()
        outcomes = search_each(predictors, limits, algorithm="exact")
        assert max(outcome.optimum.proof_gap for outcome in outcomes) < 1e-6
        yield n, time.perf_counter() - start - outcomes[0].front_seconds


def fit_rows(most: int) -> Iterator[tuple[float, float]]:
    """Fitting and judging predictors, against rows."""
    rows = made_up(CPU_SPACE, most)
    for n in (most // 64, most // 16, most // 4, most):
        yield n, timed(lambda n=n: fit_predictors(rows[:n], CPU_SPACE, target="rpi4"), 1)


def evaluation_workers() -> Iterator[tuple[float, float]]:
    """Evaluating 24 subnets with worker processes that are started, against workers."""
    from foxnas_mlflow.data import load_dataset
    from foxnas_mlflow.supernet import Supernet
    from foxnas_mlflow.workflows._evaluation import EvaluatorMaking

    dataset = load_dataset("digits")
    space = CPU_SPACE.replace(image_sizes=(32, 48), in_channels=1, n_classes=10)
    weights = Supernet(space).numpy_weights()
    subnets = space.sample(np.random.default_rng(0), n=24)
    answers: list[dict[Architecture, float]] = []
    for n in (1, 2):
        making = EvaluatorMaking(space, weights, dataset, 2000, 0, n_threads=1)
        with LocalExecutor().workers(making, n) as shared:
            # Each is made, and has had its turn.
            for _ in as_finished(shared, subnets[:n], n=n):
                pass
            start = time.perf_counter()
            answers.append({a: e.top1_percent for a, e in as_finished(shared, subnets, n=n)})
            yield n, time.perf_counter() - start
    assert all(answer == answers[0] for answer in answers)


def measurement_boards() -> Iterator[tuple[float, float]]:
    """A sampling of 48 networks on boards that take 100 ms each, rows on disk, against boards."""

    @contextlib.contextmanager
    def open_one(address: str) -> Iterator[Callable[[Architecture], Timing]]:
        def measure(architecture: Architecture) -> Timing:
            time.sleep(BOARD_SECONDS)
            return Timing(BOARD_SECONDS * 1000, "measured", "a stand-in", "none", 1)

        yield measure

    plan = list(dict.fromkeys(CPU_SPACE.sample(np.random.default_rng(0), n=48)))
    for n in (1, 2, 4, 8):
        with tempfile.TemporaryDirectory() as directory:
            devices = [f"ssh://board-{k}" for k in range(n)]
            opened = open_boards(open_one, devices, CPU_SPACE) if n > 1 else open_one(devices[0])
            with opened as boards:
                measure = boards.time if isinstance(boards, Boards) else boards
                start = time.perf_counter()
                path = Path(directory, "rows.csv")
                rows = collect(plan, path, evaluate=lambda architecture: 70.0, time=measure, n_at_once=n)
                yield n, time.perf_counter() - start
            assert [row.architecture for row in rows] == plan


def _tasks(executor: Executor) -> Iterator[tuple[float, float]]:
    # Makes the least that a worker can do, and can be read in a process that has not this module.
    with executor.workers(functools.partial(functools.partial, abs), 1) as shared:
        shared(0)
        for n in (10, 30, 100, 300):
            start = time.perf_counter()
            for i in range(n):
                shared(i)
            yield n, time.perf_counter() - start


def tasks_locally() -> Iterator[tuple[float, float]]:
    """Tasks that do nothing, one after another: what the executor adds to each."""
    yield from _tasks(LocalExecutor())


def tasks_on_ray() -> Iterator[tuple[float, float]]:
    """The same on a Ray cluster of this machine."""
    from foxnas_mlflow.workflows._ray import open_ray

    with open_ray("", workers=1) as executor:
        yield from _tasks(executor)


def logging_rows(most: int) -> Iterator[tuple[float, float]]:
    """Logging the rows of a sampling to a local store: a metric a row and the table, against rows."""
    import mlflow
    import pandas as pd

    from foxnas_mlflow.core.measurements import write_measurements
    from foxnas_mlflow.tracking.run import entry_run

    rows = made_up(CPU_SPACE, most)
    with tempfile.TemporaryDirectory() as directory:
        mlflow.set_tracking_uri(f"sqlite:///{directory}/mlflow.db")
        os.chdir(directory)
        for n in (most // 16, most // 4, most):
            path = Path(directory, f"{n}.csv")
            write_measurements(rows[:n], path)
            with entry_run(stage="sample", params={}) as run:
                start = time.perf_counter()
                for key in ("accuracy", "latency_ms"):
                    run.log_series(f"sample/{key}", {i: getattr(row, key) for i, row in enumerate(rows[:n])})
                run.log_artifact(path)
                run.log_table(pd.read_csv(path), "tables/measurements.json")
                yield n, time.perf_counter() - start


def training_processes() -> Iterator[tuple[float, float]]:
    """Training a supernet on the digits, 4 epochs, against processes of torchrun with a thread each."""
    for n in (1, 2):
        with tempfile.TemporaryDirectory() as directory:
            store = {"MLFLOW_TRACKING_URI": f"sqlite:///{directory}/mlflow.db", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
            command += ["-m", "foxnas_mlflow", "supernet", "--epochs", "4"]
            subprocess.run(command, check=True, env=os.environ | store, cwd=directory, stdout=subprocess.DEVNULL)
            import mlflow

            client = mlflow.MlflowClient(store["MLFLOW_TRACKING_URI"])
            (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
            yield n, run.data.metrics["train/seconds"]


def curve(n: np.ndarray, a: float, b: float, p: float) -> np.ndarray:
    return np.exp(a) + np.exp(b) * n**p


def model(points: np.ndarray, power: float | None) -> tuple[Callable[[np.ndarray], np.ndarray], str, float | None]:
    """A model of (n, seconds), its formula, and its error in percent on the largest n, which it has not seen.

    Args:
        points: Shape (n, 2).
        power: p where it is known; None: it is fitted too.
    """
    n_parameters = 2 if power is not None else 3
    known = points[:-1] if len(points) > n_parameters else points
    n, seconds = known.T
    slope = 1.0 if power is None else power

    def parameters(x: np.ndarray) -> list[float]:
        return [*x] if power is None else [*x, power]

    begin = [np.log(seconds.min() / 2), np.log(seconds.max()) - max(slope, 0.0) * np.log(n.max())]
    low, high = [-30.0, -30.0], [10.0, 10.0]
    if power is None:
        begin, low, high = [*begin, 1.0], [*low, 0.0], [*high, 6.0]
    start = np.clip(begin, low, high)
    found = least_squares(lambda x: np.log(curve(n, *parameters(x)) / seconds), start, bounds=(low, high)).x
    a, b, p = parameters(found)
    error = None if known is points else 100 * float(curve(points[-1:, 0], a, b, p)[0] / points[-1, 1] - 1)
    return lambda x: curve(x, a, b, p), f"{np.exp(a):.3g} + {np.exp(b):.3g} n^{p:.3g} s", error


MEASUREMENTS: Mapping[str, tuple[str, Callable[..., Iterator[tuple[float, float]]]]] = {
    "front_stages": ("stages", front_stages),
    "front_options": ("options of a stage", front_options),
    "front_sizes": ("image sizes", front_sizes),
    "limits_at_once": ("quantities limited at once", limits_at_once),
    "limits_in_one_call": ("latency limits in one call", limits_in_one_call),
    "fit": ("rows", fit_rows),
    "logging": ("rows", logging_rows),
    "evaluation": ("workers", evaluation_workers),
    "measurement": ("boards", measurement_boards),
    "training": ("processes", training_processes),
    "tasks": ("tasks", tasks_locally),
    "tasks_on_ray": ("tasks", tasks_on_ray),
}
POWERS = dict.fromkeys(("evaluation", "measurement", "training"), -1.0) | dict.fromkeys(
    ("front_sizes", "limits_in_one_call", "logging", "tasks", "tasks_on_ray"), 1.0
)
"""Of what is shared out, and of what is done so many times."""


def draw(results: Mapping[str, list[list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    names = [name for name in MEASUREMENTS if name in results]
    figure, axes = plt.subplots(-(-len(names) // 4), 4, figsize=(15, 3.2 * -(-len(names) // 4)), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for name, axis in zip(names, axes.flat, strict=False):
        points = np.array(results[name])
        curve, formula, error = model(points, POWERS.get(name))
        x = np.geomspace(points[0, 0], 4 * points[-1, 0], 50)
        axis.plot(x, curve(x), color="#999", linewidth=1, label=formula)
        axis.plot(*points.T, "o", color="#1f77b4")
        axis.set(xscale="log", yscale="log", xlabel=MEASUREMENTS[name][0], ylabel="seconds")
        for one in (axis.xaxis, axis.yaxis):
            # The default writes 2 x 10^0 beside 3 x 10^0, over each other.
            one.set_major_locator(LogLocator(subs=(1, 2, 5)))
            one.set_major_formatter(EngFormatter(sep="") if one is axis.xaxis else "{x:g}")
            one.set_minor_formatter(NullFormatter())
        axis.set_title(name.replace("_", " ") + ("" if error is None else f" (largest: {error:+.0f} %)"), fontsize=10)
        axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(MEASUREMENTS), default=list(MEASUREMENTS))
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--rows", type=int, default=16_000)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "scaling.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in args.only:
        label, measure = MEASUREMENTS[name]
        given = (args.rows,) if name in ("fit", "logging") else ()
        results[name] = [[float(n), seconds] for n, seconds in measure(*given)]
        _, formula, error = model(np.array(results[name]), POWERS.get(name))
        print(f"{name}: {', '.join(f'{n:g} {label}: {s:.3g} s' for n, s in results[name])}")
        print(
            f"  model {formula}" + ("" if error is None else f"; on the largest, which it has not seen, {error:+.1f} %")
        )
        path.write_text(json.dumps(results, indent=1))
    draw(results, out / "scaling.png")


if __name__ == "__main__":
    main()
