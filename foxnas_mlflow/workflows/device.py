"""Device: look at a machine that measures, or calibrate a cost model of it."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from foxnas_mlflow.workflows._request import Request, parameter
from foxnas_mlflow.workflows._workflow import Result, Workflow, logger, progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from foxnas_mlflow.core.architecture import Architecture
    from foxnas_mlflow.core.measurements import Measurement
    from foxnas_mlflow.core.predictors import LinearPredictor, PredictorSet
    from foxnas_mlflow.core.space import SearchSpace
    from foxnas_mlflow.core.targets import Target
    from foxnas_mlflow.devices import DeviceCheck
    from foxnas_mlflow.workflows._timers import Timer


@dataclass(frozen=True, kw_only=True)
class DeviceRequest(Request):
    """What to do with a machine; see `run_device`."""

    action: Literal["check", "calibrate"] = parameter(
        "",
        "check: what the machine has, and what is missing. calibrate: measure probes, fit, write a target file.",
        positional=True,
    )
    device: str = parameter("local", "The machine: local, ssh://user@host[:port], docker://image.")
    target: str = parameter(
        "rpi4", "calibrate: target whose space, runtime, threads and batch the new one has: a name or a YAML."
    )
    n_probes: int = parameter(12, "calibrate: networks to measure; more make the cost model surer.", at_least=1)
    n_checks: int = parameter(
        20,
        "calibrate: random networks to measure beside them, which bounds are held against; n bear out a "
        "confidence of n / (n + 1).",
        at_least=3,
    )
    image_size: tuple[int, ...] = parameter(
        (), "calibrate: image sizes in px, comma separated; empty: all of the space."
    )
    out: str = parameter("target.yaml", "calibrate: the target file; its name is the target's.")
    seed: int = parameter(0, "calibrate: seed of the choice of networks.", at_least=0)


UNSURE_PERCENT = 5.0
"""Error on other networks above which a calibration is not good."""

SURE_PERCENT = 3.0
"""Error on other networks up to which no network is measured again."""

REPEATED = 5
"""How often networks are measured again that could not be measured, or that a calibration does not explain."""

FASTER_PERCENT = 2.0
"""By how much faster a network must be when it is measured again to say that the machine had been disturbed."""

PREDICTORS, MEASUREMENTS, CHECKS = "predictors.json", "measurements.csv", "checks.csv"
"""What lies beside a target file, after its name and a dash."""


@dataclass(frozen=True, kw_only=True)
class DeviceResult(Result):
    """What a machine is, or the target that was made of it.

    Attributes:
        device: The machine.
        target: Path of the target file; empty after a check.
        outside_mape: Error in percent on random networks, each left out of the fit that predicts it.
        bound_width: Percent by which their upper bounds lie above the predictions on average.
        stated_confidence: Highest confidence of an upper bound that these networks bear out.
        cv_mape: Cross-validated error in percent.
        n_probes: Networks of the design that were measured.
    """

    device: str
    target: str = ""
    outside_mape: float | None = None
    bound_width: float | None = None
    stated_confidence: float | None = None
    cv_mape: float | None = None
    n_probes: int = 0


def run_device(request: DeviceRequest) -> DeviceResult:
    """Check a machine, or calibrate a cost model of it.

    Args:
        request: The action and the machine.

    Raises:
        DeviceError: If it cannot be reached, lacks something, or is disturbed; finished probes are kept.
    """
    from foxnas_mlflow.devices import check, connect

    if request.action == "calibrate":
        return _calibrate(request)
    with connect(request.device) as connection:
        found = check(connection)
    logger.info(_found(found))
    _require_ready(found)
    return DeviceResult(run_id="", device=found.device, summary=_next(request.device, emulated=found.emulated))


def _require_ready(found: DeviceCheck) -> None:
    from foxnas_mlflow.core.errors import DeviceError

    if not found.ready:
        raise DeviceError(f"{found.connection} cannot measure yet: it lacks {'; '.join(found.missing)}")


def _machine(request: DeviceRequest, base: Target) -> tuple[str, str]:
    """Name of the machine to calibrate, and its runtime with the target's threads.

    Raises:
        DeviceError: If it cannot be reached, lacks something, or is emulated.
    """
    from foxnas_mlflow.core.errors import DeviceError
    from foxnas_mlflow.devices import check, connect, with_threads
    from foxnas_mlflow.workflows._timers import this_gpu

    if base.runtime == "torch":
        return this_gpu(base, request.device)
    with connect(request.device) as connection:
        found = check(connection)
    _require_ready(found)
    if found.emulated:
        raise DeviceError(
            "only a real processor can be calibrated", received=found.device, remedy="give the board's address"
        )
    return found.device, with_threads(found.runtime, base.threads)


def _calibrate(request: DeviceRequest) -> DeviceResult:
    import dataclasses
    from pathlib import Path

    import yaml

    from foxnas_mlflow.core.calibration import calibrate, choose_checks, choose_probes
    from foxnas_mlflow.core.errors import InvalidInputError
    from foxnas_mlflow.core.files import write_atomically
    from foxnas_mlflow.core.space import get_space
    from foxnas_mlflow.core.targets import BUILTIN_TARGETS, get_target, named_beside
    from foxnas_mlflow.workflows._timers import open_device

    out = Path(request.out)
    if out.suffix not in (".yaml", ".yml") or not out.parent.is_dir():
        raise InvalidInputError("out must be the path of a .yaml file in a directory that exists", received=request.out)
    if out.stem in BUILTIN_TARGETS:
        raise InvalidInputError(
            "a target file is called by its target's name, and that of a built-in target is taken", received=request.out
        )
    base = get_target(request.target)
    if base.runtime == "edgetpu":
        raise InvalidInputError(
            "a processor with LiteRT or a GPU with PyTorch is calibrated; target says in which space",
            received=f"the target {base.name} with the runtime {base.runtime}",
            remedy="give a target with the runtime litert, such as rpi4, or torch, such as gpu",
        )
    space = get_space(base.space)
    device, runtime = _machine(request, base)
    target = dataclasses.replace(
        base,
        name=out.stem,
        space=named_beside(out, base.space),
        # A GPU's name has its batch.
        description=f"{device}, {runtime}, fp32"
        if base.runtime == "torch"
        else f"{device}, {runtime}, int8, batch {base.batch}",
        device=request.device,
        predictors=f"{out.stem}-{PREDICTORS}",
        latency_note=f"milliseconds of a cost model calibrated on {device} with {runtime}",
        machine=_pattern(base.machine, device),
    )
    probes = Table(out.with_name(f"{out.stem}-{MEASUREMENTS}"), (device, runtime), space)
    checks = Table(out.with_name(f"{out.stem}-{CHECKS}"), (device, runtime), space)
    sizes = list(request.image_size) or None
    probes.ask(choose_probes(space, request.n_probes, measured=list(probes.rows), image_sizes=sizes, seed=request.seed))
    checks.ask(choose_checks(space, request.n_checks, image_sizes=sizes, seed=request.seed))

    def fit() -> PredictorSet:
        return calibrate(
            list(probes.rows.values()),
            space,
            target=target.name,
            notes=[
                f"Latency is calibrated on {device} with {runtime} from "
                f"{len(probes.rows) + len(checks.rows)} measured networks."
            ],
            seed=request.seed,
            provenance={"device": device, "runtime": runtime, "threads": base.threads},
            outside=list(checks.rows.values()),
        )

    with open_device(base, space, request.device) as timer:
        predictors = measure_and_fit(timer, (probes, checks), fit)
    predictors.save(out.with_name(target.predictors))
    # Last: a target file that is there is whole.
    values = {key: value for key, value in target.to_dict().items() if value != ""}
    write_atomically(out, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    latency = predictors.latency[0]
    metrics = latency.metrics
    return DeviceResult(
        run_id="",
        device=device,
        target=str(out),
        outside_mape=metrics["outside_mape"],
        bound_width=metrics["bound_width"],
        stated_confidence=latency.stated_confidence,
        cv_mape=metrics["cv_mape"],
        n_probes=len(probes.rows),
        summary=_calibrated(
            latency,
            [*probes.rows.values(), *checks.rows.values()],
            out,
            predictors.image_sizes if predictors.accuracy else (),
        ),
    )


def _pattern(base: str, device: str) -> str:
    """Regular expression of the machines of a calibrated target.

    Those of the target that it was made from where the calibrated one is among them, else this kind alone: milliseconds
    of one machine say nothing of another.
    """
    return base if base and re.search(base, device) else f"^{re.escape(device)}$"


class Table:
    """Networks of a calibration, each row on disk before the next one is measured.

    Of a network that was measured again the least latency counts.

    Args:
        path: The table; its rows count.
        machine: Device and runtime (with threads) that every row must name.
        space: The space that the networks must be of.

    Attributes:
        rows: What was measured.
        missing: Networks that are to be measured.
        unsteady: Why measurements of some of them do not count.
    """

    def __init__(self, path: Path, machine: tuple[str, str], space: SearchSpace) -> None:
        from foxnas_mlflow.core.errors import InvalidInputError
        from foxnas_mlflow.core.measurements import fastest, read_finished

        self.missing: list[Architecture] = []
        self.unsteady: list[str] = []
        self._path = path
        rows = read_finished(path)
        others = sorted({(row.device, row.runtime) for row in rows} - {machine})
        if others:
            raise InvalidInputError(
                f"{path.name} must hold measurements of {' with '.join(machine)} alone",
                received=" with ".join(others[0]),
                remedy="give another out, or move that file away",
            )
        for row in rows:
            space.validate(row.architecture)
        self.rows = fastest(rows)

    def ask(self, networks: Iterable[Architecture]) -> None:
        """Have networks measured that are not."""
        self.missing = [architecture for architecture in networks if architecture not in self.rows]

    def doubt(self, latency: LinearPredictor) -> None:
        """Have those measured again that were slower than a fit to all explains."""
        from foxnas_mlflow.core.sampling import doubtful

        self.missing = doubtful(latency, self.rows.values(), UNSURE_PERCENT)

    def measure(self, architecture: Architecture, timer: Timer) -> float:
        """Latency in milliseconds; what was not steady stays missing, unless an earlier measurement counts."""
        from foxnas_mlflow.core.measurements import Measurement, append_measurement, fastest

        timing = timer.time(architecture)
        if timing.problems:
            self.unsteady.append("; ".join(timing.problems))
        else:
            row = Measurement.of(architecture, timing)
            append_measurement(row, self._path)
            self.rows = fastest([*self.rows.values(), row])
        if architecture in self.rows:
            self.missing.remove(architecture)
        return timing.latency_ms


def _ms(row: Measurement) -> float:
    return row.latency_ms or math.nan


def measure_and_fit(timer: Timer, tables: Sequence[Table], fit: Callable[[], PredictorSet]) -> PredictorSet:
    """Measure, fit, and measure again what was not steady and, while the fit is not sure, what it does not explain.

    Where measuring again makes nothing faster, the formula is what misses.

    Args:
        timer: Measures.
        tables: The networks.
        fit: A calibration from all rows, with the metric ``outside_mape`` in percent.

    Raises:
        DeviceError: If networks were unsteady each time; what is finished is kept.
    """
    from foxnas_mlflow.core.errors import DeviceError
    from foxnas_mlflow.devices import what_helps

    predictors = None
    for again in range(REPEATED + 1):
        asked = [(table, architecture) for table in tables for architecture in table.missing]
        before = [table.rows.get(architecture) for table, architecture in asked]
        with progress_bar("measured again" if again else "calibrate", "network") as show:
            for n, (table, architecture) in enumerate(asked, start=1):
                show(n, len(asked), f"{table.measure(architecture, timer):.2f} ms")
        if any(table.missing for table in tables):
            continue
        if predictors is not None and not any(
            row is None or _ms(table.rows[architecture]) < (1 - FASTER_PERCENT / 100) * _ms(row)
            for row, (table, architecture) in zip(before, asked, strict=True)
        ):
            break
        predictors = fit()
        (latency,) = predictors.latency
        if latency.metrics["outside_mape"] <= SURE_PERCENT:
            break
        for table in tables:
            table.doubt(latency)
    if predictors is None:
        unsteady = [problem for table in tables for problem in table.unsteady]
        n_done, n_missing = (sum(map(len, each)) for each in zip(*((t.rows, t.missing) for t in tables), strict=True))
        raise DeviceError(
            f"{n_done + n_missing} networks must be measured without disturbance",
            received=f"{n_done}, and {n_missing} that were not steady in {REPEATED + 1} goes ({unsteady[-1]})",
            remedy=f"{what_helps(unsteady)}, and run the same command again: what is finished is kept",
        )
    return predictors


def _found(found: DeviceCheck) -> str:
    rows = [
        ("machine", f"{found.device}, {found.machine}"),
        ("system", found.system),
        ("Python", found.python),
    ]
    lines = [f"Found at {found.connection}:", *(f"  {key:<14}{text}" for key, text in rows)]
    lines += [f"  {finding}" for finding in found.findings]
    return "\n".join(lines)


def _next(device: str, *, emulated: bool) -> str:
    if emulated:
        return (
            "Next: foxnas device check --device ssh://user@board, since an emulated processor has no times to calibrate"
        )
    # With its ?python= and ?key=, quoted: shells look for files at a question mark.
    return f"Next: foxnas device calibrate --device {shlex.quote(device)} --target rpi4"


def _calibrated(predictor: LinearPredictor, rows: list[Measurement], out: Path, image_sizes: Sequence[int]) -> str:
    metrics = predictor.metrics
    times = sorted(row.latency_ms or 0.0 for row in rows)
    lines = [f"Calibrated {out.stem} from {len(rows)} networks between {times[0]:.2f} and {times[-1]:.2f} ms:"]
    for column, price in zip(predictor.columns, predictor.coefficients, strict=True):
        text = f"{price:.4f} ms" if column == "const" else f"{price:.4f} ns each"
        lines.append(f"  {column:<14}{text}")
    # Rounded down: nobody saw more.
    stated = int(100 * predictor.stated_confidence)
    lines += [
        f"  error on {metrics['n_outside']:.0f} random networks, each left out {metrics['outside_mape']:.2f} % "
        f"(mean absolute; on average predicted {_bias(metrics['outside_bias'])})",
        f"  upper bounds  hold with up to {stated} %: of these networks the formula's "
        f"own 95 % held for {metrics['formula_coverage']:.0f} %, so they are {_widened(predictor)}, on average "
        f"{metrics['bound_width']:.1f} % above the prediction",
        f"  cross-validated error {metrics['cv_mape']:.2f} % (without a probe the others must tell its price)",
        f"  written       {out}, {', '.join(f'{out.stem}-{name}' for name in (PREDICTORS, MEASUREMENTS, CHECKS))}",
    ]
    if metrics["outside_mape"] > UNSURE_PERCENT:
        lines.append(
            f"UNSURE: above {UNSURE_PERCENT:g} % the search's budgets are not worth much. Quiet the machine and type "
            "the same again: what this does not explain is measured once more. Or give a greater --n-probes."
        )
    target = shlex.quote(str(out))
    if image_sizes:
        sure = "" if stated >= 95 else f" --confidence {stated / 100:g}"
        # What networks are sure to meet: the (geometric) middle of the bounds of the ends.
        ends = [end(size) for size in image_sizes for end in (predictor.space.smallest, predictor.space.largest)]
        bounds = predictor.upper_bound(ends, min(stated / 100, 0.95))
        limit_ms = math.sqrt(float(bounds.min()) * float(bounds.max()))
        lines.append(f"Next: foxnas search --target {target} --latency-ms {limit_ms:.3g}{sure}")
    else:
        lines.append(f"Next: foxnas sample --target {target}, for accuracies in this space")
    return "\n".join(lines)


def _bias(percent: float) -> str:
    return f"{abs(percent):.1f} % too {'slow' if percent > 0 else 'fast'}"


def _widened(predictor: LinearPredictor) -> str:
    """What the left-out networks did to the bound at the highest confidence that is at most 95 %."""
    import dataclasses

    confidence = min(0.95, predictor.stated_confidence)
    share = predictor.t_quantile(confidence) / dataclasses.replace(predictor, held_out=()).t_quantile(confidence)
    return "as the formula says" if share <= 1 else f"{share:.1f} times as wide"


WORKFLOW = Workflow(
    "device",
    "Look at a machine that measures (check), or make a target with a cost model of it (calibrate).",
    DeviceRequest,
    run_device,
    entry_point=False,
)
