"""Sample: accuracy and latency of subnets chosen to teach predictors most."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from foxnas_mlflow.workflows._addresses import where_measured
from foxnas_mlflow.workflows._executor import ExecutorRequest, open_executor
from foxnas_mlflow.workflows._request import chosen_device, compiler_image, energy_parameter, parameter
from foxnas_mlflow.workflows._workflow import Result, Workflow, logger, progress_bar

if TYPE_CHECKING:
    from pathlib import Path

    from foxnas_mlflow.core.architecture import Architecture
    from foxnas_mlflow.core.measurements import Measurement
    from foxnas_mlflow.core.space import SearchSpace
    from foxnas_mlflow.core.targets import Target
    from foxnas_mlflow.core.workers import Executor
    from foxnas_mlflow.tracking.inputs import TrainedSupernet
    from foxnas_mlflow.tracking.run import EntryRun

ENERGY = "energy_mj"
"""Column of the energy of an inference, in mJ."""


@dataclass(frozen=True, kw_only=True)
class SampleRequest(ExecutorRequest):
    """What to sample; see `run_sample`."""

    supernet: str = parameter("", "Model URI of a trained supernet; empty: the newest version of {name}-supernet.")
    data: str = parameter("", "The images that it was trained on, where they are now; empty: where they were.")
    target: str = parameter("rpi4", "Target: rpi4, edgetpu, cpu, gpu, or the path of a target YAML.")
    device: str = parameter(
        "",
        "Where to measure: local, ssh://user@host, docker://image, or several boards of one kind, comma separated; "
        "empty or none: the cost model.",
    )
    compiler_image: str = compiler_image()
    n_samples: int = parameter(60, "Subnets in all, those of resume included.", at_least=1)
    design: Literal["design", "random"] = parameter("design", "How to choose: D-optimal, or random as in the paper.")
    n_measurements: int = parameter(0, "Measure the latency (and energy) of only so many; 0: of all.", at_least=0)
    energy: str = energy_parameter("Measure the energy of an inference too, 20 s a network")
    image_size: tuple[int, ...] = parameter((), "Image sizes in px, comma separated; empty: all of the space.")
    validation_images: int = parameter(
        10000,
        "Evaluate on at most so many validation images, and no more than 1 GiB holds at all sizes; 0: all.",
        at_least=0,
    )
    stop_width: float = parameter(
        0.0, "Stop once accuracies along the front are known to so many points; 0: never.", at_least=0
    )
    resume: str = parameter("", "Rows to go on from: path or URI of measurements.csv, or the id of its run.")
    seed: int = parameter(0, "Seed of the choice of subnets and images.", at_least=0)
    name: str = parameter("foxnas", "Prefix of registered models.")


@dataclass(frozen=True, kw_only=True)
class SampleResult(Result):
    """A table of measured networks.

    Attributes:
        measurements: URI of ``measurements.csv``.
        n_samples: Its rows.
        n_latencies: Those of them that have a latency.
    """

    measurements: str
    n_samples: int
    n_latencies: int


def run_sample(request: SampleRequest, *, tags: Mapping[str, str] | None = None) -> SampleResult:
    """Choose subnets, evaluate their accuracy, measure their latency, and log the rows.

    Args:
        request: What to sample.
        tags: Further tags of its run.

    Raises:
        InvalidInputError: If there is no such supernet, or the images are not those of its training.
        DeviceError: If the device cannot be reached; finished rows are kept.
    """
    from foxnas_mlflow.core.errors import InvalidInputError, import_or_raise
    from foxnas_mlflow.core.targets import get_target

    target = get_target(request.target)
    request = request.replace(device=chosen_device(request.device))
    import_or_raise("torch", extra="train", feature="evaluating subnets")

    from foxnas_mlflow.tracking.inputs import open_supernet
    from foxnas_mlflow.tracking.run import entry_run

    supernet = open_supernet(request.supernet, data=request.data, name=request.name)
    unknown = sorted(set(request.image_size) - set(supernet.space.image_sizes))
    if unknown:
        raise InvalidInputError(
            f"image_size must be among those of the supernet, {list(supernet.space.image_sizes)} px", received=unknown
        )
    resolved = {"supernet": supernet.uri, "data": supernet.dataset.source}
    with (
        open_executor(request) as executor,
        entry_run(
            stage="sample",
            params=request.texts() | resolved,
            target=target.name,
            space=supernet.space.name,
            tags=tags,
        ) as run,
    ):
        sizes = list(request.image_size or supernet.space.image_sizes)
        return _sample(request, run, supernet, target, sizes, executor)


def _sample(
    request: SampleRequest,
    run: EntryRun,
    supernet: TrainedSupernet,
    target: Target,
    sizes: list[int],
    executor: Executor | None,
) -> SampleResult:
    import shutil

    from foxnas_mlflow.core.files import cache_directory, worked_on
    from foxnas_mlflow.core.measurements import read_finished, write_measurements
    from foxnas_mlflow.core.sampling import collect, unexplained
    from foxnas_mlflow.tracking.inputs import MEASUREMENTS, SPACE
    from foxnas_mlflow.tracking.run import best_effort
    from foxnas_mlflow.tracking.supernet import log_dataset
    from foxnas_mlflow.workflows._evaluation import supernet_evaluators
    from foxnas_mlflow.workflows._samples import SampleLog, log_samples
    from foxnas_mlflow.workflows._timers import open_timer

    space = supernet.space
    run.log_json(space.to_dict(), SPACE)
    log_dataset(run, supernet.dataset, context="evaluation")
    given = _given_rows(request, supernet, target, run.directory)
    plan = _plan(request, space, sizes, given)
    directory = cache_directory("samples", _digest(request, supernet, target, sizes, given))
    path = directory / MEASUREMENTS
    with (
        worked_on(directory / "lock", "the same samples"),
        open_timer(
            target,
            space,
            device=request.device,
            compiler_image=request.compiler_image,
            energy=request.energy,
            executor=executor,
            workers=request.workers,
        ) as timer,
        supernet_evaluators(
            supernet,
            image_sizes=sizes,
            validation_images=request.validation_images,
            seed=request.seed,
            n=request.workers,
            executor=executor,
        ) as evaluators,
    ):
        run.set_tags({"foxnas.latency_source": timer.source})
        several = (executor is not None and request.workers > 1) or timer.n_boards > 1
        finished = read_finished(path)
        known = {row.architecture for row in finished}
        # Together, so that the table has a column of each quantity that any of them has.
        before = [*finished, *(row for row in given if row.architecture not in known)]
        write_measurements(before, path, quantities=[ENERGY] if request.energy else [])
        log = SampleLog(run, path, timer, n_images=evaluators.n_images, before=before)
        try:
            with progress_bar("sample", "subnet") as show:

                def on_row(row: Measurement, n: int) -> None:
                    log.add(row, n)
                    show(n, len(plan), f"{row.accuracy:.2f} %")

                def doubt(rows: Sequence[Measurement]) -> list[Architecture]:
                    if timer.source != "measured" or log.emulated:
                        return []
                    doubted = unexplained(rows, space, seed=request.seed)
                    if doubted:
                        logger.info(
                            "Measuring %d networks again that were slower than the others explain.", len(doubted)
                        )
                    return doubted

                rows = collect(
                    plan,
                    path,
                    evaluate=lambda architecture: evaluators.evaluate(architecture).top1_percent,
                    time=log.time,
                    n_timed=request.n_measurements or None,
                    on_row=on_row,
                    stop=(lambda rows: log.narrow(rows, space, request.stop_width, request.seed))
                    if request.stop_width
                    else None,
                    doubt=doubt,
                    # The evaluations of the next networks and the measurements of those before them.
                    n_at_once=request.workers + timer.n_boards * (timer.source == "measured") if several else 1,
                    apart=several and timer.here,
                )
        finally:
            # However it ends, what is finished is where others can go on from.
            best_effort(log.upload)()
        _check_latencies(rows, space, request, log.problems.values())
        uri, summary = log_samples(run, rows, log, supernet=supernet, target=target)
        shutil.rmtree(directory)
    n_latencies = sum(row.latency_ms is not None for row in rows)
    return SampleResult(
        run_id=run.run_id, measurements=uri, n_samples=len(rows), n_latencies=n_latencies, summary=summary
    )


def _check_latencies(
    rows: Sequence[Measurement], space: SearchSpace, request: SampleRequest, problems: Collection[str]
) -> None:
    """Refuse to call a sampling done whose latencies no cost model can be fitted to.

    Raises:
        DeviceError: If too many were disturbed; the rows are kept, and the same command measures what is missing.
    """
    from foxnas_mlflow.core.errors import DeviceError
    from foxnas_mlflow.core.predictors import rows_needed
    from foxnas_mlflow.devices import what_helps

    if not request.device:
        return
    planned = min(request.n_measurements or len(rows), len(rows))
    n = sum(row.latency_ms is not None for row in rows)
    needed = rows_needed("latency_ms", space, sorted({row.architecture.image_size for row in rows}))
    if n < needed <= planned:
        raise DeviceError(
            f"a latency model needs {needed} networks that were measured without disturbance",
            received=f"{n} of {planned}" + "".join(f" ({problem})" for problem in list(problems)[-1:]),
            remedy=f"{what_helps(problems)}, and run the same command again: what is finished is kept",
        )


def _given_rows(
    request: SampleRequest, supernet: TrainedSupernet, target: Target, directory: Path
) -> list[Measurement]:
    """The rows to go on from.

    Raises:
        InvalidInputError: If they are known to be of another supernet or target, or have energy where the others shall
            have none, or none where those shall have it.
    """
    import re

    from foxnas_mlflow.core.errors import InvalidInputError
    from foxnas_mlflow.tracking.inputs import MEASUREMENTS, open_measurements, origin_of

    resume = request.resume
    if not resume:
        return []
    source = f"runs:/{resume}/{MEASUREMENTS}" if re.fullmatch("[0-9a-f]{32}", resume) else resume
    ours = {"supernet": supernet.uri, "target": target.name}
    origin = origin_of(source)
    for key in ours:
        its = origin.get(key, ours[key])
        if its != ours[key]:
            raise InvalidInputError(
                f"the rows to go on from must be of the same {key}, {ours[key]}", received=f"{source}, of {its}"
            )
    (directory / "resume").mkdir()
    rows, _ = open_measurements(source, directory / "resume")
    for row in rows:
        supernet.space.validate(row.architecture)
    if request.energy and any(row.latency_ms is not None and ENERGY not in row.quantities for row in rows):
        raise InvalidInputError(
            "rows to go on from must have the energy that the others shall have",
            received=f"{source}, with latencies without {ENERGY}",
            remedy="begin without --resume, or go on without --energy",
        )
    if request.device and not request.energy and any(ENERGY in row.quantities for row in rows):
        raise InvalidInputError(
            "networks measured beside rows with energy must have it too",
            received=f"{source}, with the column {ENERGY}",
            remedy="give --energy too, or remove the column",
        )
    return rows


def _plan(
    request: SampleRequest, space: SearchSpace, sizes: list[int], given: Sequence[Measurement]
) -> list[Architecture]:
    """All subnets in order: those of the rows to go on from, then the ones chosen beside them."""
    from foxnas_mlflow.core.design import choose_samples
    from foxnas_mlflow.core.predictors import widest_formula

    first = list(dict.fromkeys(row.architecture for row in given))
    n_possible = space.replace(image_sizes=sizes).n_architectures
    n_left = n_possible - sum(architecture.image_size in sizes for architecture in first)
    n = min(request.n_samples - len(first), n_left)
    if n < request.n_samples - len(first):
        logger.info("The space has %d networks of these image sizes: all are sampled.", n_possible)
    if n <= 0:
        return first
    formulas = [widest_formula("calibrated", quantity, space, len(sizes)) for quantity in ("accuracy", "latency_ms")]
    return first + choose_samples(
        space, formulas, n, method=request.design, measured=first, image_sizes=sizes, seed=request.seed
    )


def _digest(
    request: SampleRequest,
    supernet: TrainedSupernet,
    target: Target,
    sizes: list[int],
    given: Sequence[Measurement],
) -> str:
    """Of everything that the rows and their order depend on: the same command finds its own rows."""
    from foxnas_mlflow.core.files import json_digest
    from foxnas_mlflow.core.measurements import measurements_digest
    from foxnas_mlflow.workflows._timers import target_content

    inputs = {
        "supernet": supernet.digest,
        "target": target_content(target, supernet.space, request.device),
        "image_sizes": sizes,
        "given": measurements_digest(given),
        "device": where_measured(request.device),
        # Samplings that an earlier release began go on.
        **({"energy": request.energy} if request.energy else {}),
        **{key: getattr(request, key) for key in ("design", "n_measurements", "validation_images", "seed")},
    }
    return json_digest(inputs)[:32]


WORKFLOW = Workflow(
    "sample",
    "Choose subnets of a supernet, evaluate their accuracy and measure their latency, for predictors to learn from.",
    SampleRequest,
    run_sample,
)
