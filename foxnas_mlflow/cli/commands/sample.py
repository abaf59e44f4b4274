"""``foxnas sample``: accuracy and latency of subnets chosen to teach predictors most."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from foxnas_mlflow.cli.parameters import COMPILER_IMAGE, Parameter

if TYPE_CHECKING:
    from pathlib import Path

    from foxnas_mlflow.core.architecture import Architecture
    from foxnas_mlflow.core.measurements import Measurement
    from foxnas_mlflow.core.space import SearchSpace
    from foxnas_mlflow.core.targets import Target
    from foxnas_mlflow.tracking.inputs import TrainedSupernet
    from foxnas_mlflow.tracking.run import EntryRun

SUMMARY = (
    "Choose subnets of a supernet, evaluate their accuracy and measure their latency, for predictors to learn from."
)

PARAMETERS = (
    Parameter("supernet", "", "Model URI of a trained supernet; empty: the newest version of {name}-supernet."),
    Parameter("data", "", "The images that it was trained on, where they are now; empty: where they were."),
    Parameter("target", "rpi4", "Target: rpi4, edgetpu, cpu, gpu, or the path of a target YAML."),
    Parameter("device", "", "Where to measure: local, ssh://user@host, docker://image; empty: the cost model."),
    COMPILER_IMAGE,
    Parameter("n_samples", 60, "Subnets in all, those of resume included.", int),
    Parameter("design", "design", "How to choose: D-optimal, or random as in the paper.", choices=("design", "random")),
    Parameter("n_measurements", 0, "Measure the latency of only so many of them; 0: of all.", int),
    Parameter("image_size", "", "Image sizes in px, comma separated; empty: all of the space."),
    Parameter("validation_images", 10_000, "Evaluate on at most so many validation images; 0: all.", int),
    Parameter("stop_width", 0.0, "Stop once accuracies along the front are known to so many points; 0: never.", float),
    Parameter("resume", "", "Rows to go on from: path or URI of measurements.csv, or the id of its run."),
    Parameter("seed", 0, "Seed of the choice of subnets and images.", int),
    Parameter("name", "foxnas", "Prefix of registered models."),
)


def run(args: argparse.Namespace) -> dict[str, str]:
    """Choose, evaluate, measure and log."""
    from foxnas_mlflow.cli.parameters import image_sizes
    from foxnas_mlflow.core.errors import InvalidInputError, import_or_raise
    from foxnas_mlflow.core.targets import get_target

    for name in ("n_measurements", "validation_images", "stop_width", "seed"):
        if getattr(args, name) < 0:
            raise InvalidInputError(f"{name} must be 0 or more", received=getattr(args, name))
    if args.n_samples < 1:
        raise InvalidInputError("n_samples must be positive", received=args.n_samples)
    target = get_target(args.target)
    sizes = image_sizes(args.image_size)
    import_or_raise("torch", extra="train", feature="evaluating subnets")

    from foxnas_mlflow.tracking.inputs import open_supernet
    from foxnas_mlflow.tracking.run import entry_run

    supernet = open_supernet(args.supernet, data=args.data, name=args.name)
    unknown = sorted(set(sizes or ()) - set(supernet.space.image_sizes))
    if unknown:
        raise InvalidInputError(
            f"image_size must be among those of the supernet, {list(supernet.space.image_sizes)} px", received=unknown
        )
    resolved = {"supernet": supernet.uri, "data": supernet.dataset.source}
    with entry_run(stage="sample", params=vars(args) | resolved, target=target.name, space=supernet.space.name) as run:
        return _sample(args, run, supernet, target, sizes or list(supernet.space.image_sizes))


def _sample(
    args: argparse.Namespace, run: EntryRun, supernet: TrainedSupernet, target: Target, sizes: list[int]
) -> dict[str, str]:
    import shutil

    from foxnas_mlflow.cli.progress import progress_bar
    from foxnas_mlflow.core.files import cache_directory, worked_on
    from foxnas_mlflow.core.measurements import append_measurement, read_finished
    from foxnas_mlflow.core.sampling import collect
    from foxnas_mlflow.tracking.inputs import MEASUREMENTS, SPACE
    from foxnas_mlflow.tracking.run import best_effort
    from foxnas_mlflow.tracking.sample import SampleLog, log_samples
    from foxnas_mlflow.tracking.supernet import log_dataset
    from foxnas_mlflow.tracking.timers import open_timer

    space = supernet.space
    run.log_json(space.to_dict(), SPACE)
    log_dataset(run, supernet.dataset, context="evaluation")
    given = _given_rows(args.resume, space, run.directory)
    plan = _plan(args, space, sizes, given)
    directory = cache_directory("samples", _digest(args, supernet, target, sizes, given))
    path = directory / MEASUREMENTS
    with (
        worked_on(directory / "lock", "the same samples"),
        open_timer(target, space, device=args.device, compiler_image=args.compiler_image) as timer,
    ):
        run.set_tags({"foxnas.latency_source": timer.source})
        evaluator = supernet.evaluator(image_sizes=sizes, validation_images=args.validation_images, seed=args.seed)
        known = {row.architecture for row in read_finished(path)}
        for row in given:
            if row.architecture not in known:
                append_measurement(row, path)
        log = SampleLog(run, path, timer, n_images=evaluator.n_images, n_before=len(read_finished(path)))
        try:
            with progress_bar("sample", "subnet") as show:

                def on_row(row: Measurement, n: int) -> None:
                    log.add(row, n)
                    show(n, len(plan), f"{row.accuracy:.2f} %")

                rows = collect(
                    plan,
                    path,
                    evaluate=lambda architecture: evaluator.evaluate(architecture).top1_percent,
                    time=log.time,
                    n_timed=args.n_measurements or None,
                    on_row=on_row,
                    stop=lambda rows: bool(args.stop_width) and log.narrow(rows, space, args.stop_width, args.seed),
                )
        finally:
            # However it ends, what is finished is where others can go on from.
            best_effort(log.upload)()
        outputs = log_samples(run, rows, log, supernet=supernet, target=target)
        shutil.rmtree(directory)
    return outputs


def _given_rows(resume: str, space: SearchSpace, directory: Path) -> list[Measurement]:
    """The rows to go on from."""
    import re

    from foxnas_mlflow.tracking.inputs import MEASUREMENTS, open_measurements

    if not resume:
        return []
    source = f"runs:/{resume}/{MEASUREMENTS}" if re.fullmatch("[0-9a-f]{32}", resume) else resume
    (directory / "resume").mkdir()
    rows, _ = open_measurements(source, directory / "resume")
    for row in rows:
        space.validate(row.architecture)
    return rows


def _plan(
    args: argparse.Namespace, space: SearchSpace, sizes: list[int], given: Sequence[Measurement]
) -> list[Architecture]:
    """All subnets in order: those of the rows to go on from, then the ones chosen beside them."""
    from foxnas_mlflow.core.design import choose_samples
    from foxnas_mlflow.core.predictors import widest_formula

    first = list(dict.fromkeys(row.architecture for row in given))
    n = args.n_samples - len(first)
    if n <= 0:
        return first
    formulas = [widest_formula("calibrated", quantity, space, len(sizes)) for quantity in ("accuracy", "latency_ms")]
    return first + choose_samples(
        space, formulas, n, method=args.design, measured=first, image_sizes=sizes, seed=args.seed
    )


def _digest(
    args: argparse.Namespace,
    supernet: TrainedSupernet,
    target: Target,
    sizes: list[int],
    given: Sequence[Measurement],
) -> str:
    """Of everything that the rows and their order depend on: the same command finds its own rows."""
    import dataclasses

    from foxnas_mlflow.core.files import json_digest
    from foxnas_mlflow.core.measurements import measurements_digest

    inputs = {
        "supernet": supernet.digest,
        "target": dataclasses.asdict(target),
        "image_sizes": sizes,
        "given": measurements_digest(given),
        **{key: getattr(args, key) for key in ("device", "design", "n_measurements", "validation_images", "seed")},
    }
    return json_digest(inputs)[:32]
