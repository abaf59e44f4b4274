"""Device: look at a machine that measures, or calibrate a cost model of it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from foxnas_mlflow.workflows._request import Request, parameter
from foxnas_mlflow.workflows._workflow import Result, Workflow, logger, progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from foxnas_mlflow.core.architecture import Architecture
    from foxnas_mlflow.core.measurements import Measurement
    from foxnas_mlflow.core.predictors import LinearPredictor
    from foxnas_mlflow.core.space import SearchSpace
    from foxnas_mlflow.core.targets import Target
    from foxnas_mlflow.devices import DeviceCheck


@dataclass(frozen=True, kw_only=True)
class DeviceRequest(Request):
    """What to do with a machine; see `run_device`."""

    action: Literal["check", "calibrate"] = parameter(
        "",
        "check: what the machine has, and what is missing. calibrate: measure probes, fit, write a target file.",
        positional=True,
    )
    device: str = parameter("local", "The machine: local, ssh://user@host[:port], docker://image.")
    target: str = parameter("rpi4", "calibrate: target whose space and threads the new one has: a name or a YAML.")
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

PREDICTORS, MEASUREMENTS, CHECKS = "predictors.json", "measurements.csv", "checks.csv"
"""What lies beside a target file, after its name and a dash."""


@dataclass(frozen=True, kw_only=True)
class DeviceResult(Result):
    """What a machine is, or the target that was made of it.

    Attributes:
        device: The machine.
        target: Path of the target file; empty after a check.
        outside_mape: Error in percent on random networks, each left out of the fit that predicts it.
        stated_confidence: Highest confidence of an upper bound that these networks bear out.
        cv_mape: Cross-validated error in percent.
        n_probes: Networks of the design that were measured.
    """

    device: str
    target: str = ""
    outside_mape: float | None = None
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
    from foxnas_mlflow.core.errors import DeviceError
    from foxnas_mlflow.devices import check, connect

    with connect(request.device) as connection:
        found = check(connection)
    if request.action == "check":
        logger.info(_found(found))
    if not found.ready:
        raise DeviceError(f"{found.connection} cannot measure yet: it lacks {'; '.join(found.missing)}")
    if request.action == "check":
        return DeviceResult(run_id="", device=found.device, summary=_next(request.device))
    return _calibrate(request, found)


def _calibrate(request: DeviceRequest, found: DeviceCheck) -> DeviceResult:
    import dataclasses
    from pathlib import Path

    import yaml

    from foxnas_mlflow.core.calibration import calibrate, choose_checks, choose_probes
    from foxnas_mlflow.core.errors import DeviceError, InvalidInputError
    from foxnas_mlflow.core.files import write_atomically
    from foxnas_mlflow.core.space import get_space
    from foxnas_mlflow.core.targets import BUILTIN_TARGETS, get_target

    if found.emulated:
        raise DeviceError(
            "only a real processor can be calibrated", received=found.device, remedy="give the board's address"
        )
    out = Path(request.out)
    if out.suffix not in (".yaml", ".yml") or not out.parent.is_dir():
        raise InvalidInputError("out must be the path of a .yaml file in a directory that exists", received=request.out)
    if out.stem in BUILTIN_TARGETS:
        raise InvalidInputError(
            "a target file is called by its target's name, and that of a built-in target is taken", received=request.out
        )
    base = get_target(request.target)
    if base.runtime != "litert":
        raise InvalidInputError(
            "a processor with LiteRT is calibrated; target says in which space",
            received=f"the target {base.name} with the runtime {base.runtime}",
            remedy="give a target with the runtime litert, such as rpi4",
        )
    space = get_space(base.space)
    target = dataclasses.replace(
        base,
        name=out.stem,
        description=f"{found.device}, {found.runtime}, {base.threads} thread(s), int8, batch {base.batch}",
        device=request.device,
        predictors=f"{out.stem}-{PREDICTORS}",
        latency_note=f"milliseconds of a cost model calibrated on {found.device} with {found.runtime}",
    )
    table = out.with_name(f"{out.stem}-{MEASUREMENTS}")
    sizes = list(request.image_size) or None
    rows = _measure(
        request,
        found,
        base,
        space,
        table,
        lambda measured: choose_probes(
            space, request.n_probes, measured=measured, image_sizes=sizes, seed=request.seed
        ),
    )
    checks = choose_checks(space, request.n_checks, image_sizes=sizes, seed=request.seed)
    outside = _measure(
        request,
        found,
        base,
        space,
        out.with_name(f"{out.stem}-{CHECKS}"),
        lambda measured: [architecture for architecture in checks if architecture not in measured],
    )
    predictors = calibrate(
        rows,
        space,
        target=target.name,
        notes=[
            f"Latency is calibrated on {found.device} with {found.runtime} from {len(rows) + len(outside)} "
            "measured networks."
        ],
        seed=request.seed,
        provenance={"device": found.device, "runtime": found.runtime, "threads": base.threads},
        outside=outside,
    )
    predictors.save(out.with_name(target.predictors))
    # Last: a target file that is there is whole.
    values = {key: value for key, value in dataclasses.asdict(target).items() if value != ""}
    write_atomically(out, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    latency = predictors.latency[0]
    metrics = latency.metrics
    return DeviceResult(
        run_id="",
        device=found.device,
        target=str(out),
        outside_mape=metrics["outside_mape"],
        stated_confidence=latency.stated_confidence,
        cv_mape=metrics["cv_mape"],
        n_probes=len(rows),
        summary=_calibrated(latency, [*rows, *outside], out, bool(predictors.accuracy)),
    )


def _measure(
    request: DeviceRequest,
    found: DeviceCheck,
    target: Target,
    space: SearchSpace,
    path: Path,
    choose: Callable[[list[Architecture]], list[Architecture]],
) -> list[Measurement]:
    """Measure networks beside those of a table; each row is on disk before the next one begins.

    Args:
        request: Of the command.
        found: The machine.
        target: The target.
        space: The space.
        path: The table; its rows count.
        choose: Networks to measure, given those that are.
    """
    from foxnas_mlflow.core.errors import DeviceError, InvalidInputError
    from foxnas_mlflow.core.measurements import Measurement, read_finished
    from foxnas_mlflow.workflows._timers import PROBE_SECONDS, open_device, remembered

    rows = read_finished(path)
    others = sorted({f"{row.device}, {row.runtime}" for row in rows} - {f"{found.device}, {found.runtime}"})
    if others:
        raise InvalidInputError(
            f"{path.name} must hold measurements of {found.device} with {found.runtime} alone",
            received=others[0],
            remedy="give another out, or move that file away",
        )
    for row in rows:
        space.validate(row.architecture)
    networks = choose([row.architecture for row in rows])
    unsteady: list[str] = []
    total = len(rows) + len(networks)
    opened = open_device(target, space, request.device, max_seconds=PROBE_SECONDS)
    with opened as timer, progress_bar("calibrate", "network") as show:
        time = remembered(timer, path).time
        for architecture in networks:
            timing = time(architecture)
            if timing.problems:
                unsteady.append("; ".join(timing.problems))
                continue
            rows.append(Measurement.of(architecture, timing))
            show(len(rows), total, f"{timing.latency_ms:.2f} ms")
    if len(rows) < total:
        raise DeviceError(
            f"{total} networks must be measured without disturbance",
            received=f"{len(rows)}, and {len(unsteady)} that were not steady ({unsteady[0]})",
            remedy="quiet and cool the machine, and run the same command again: what is finished is kept",
        )
    return rows


def _found(found: DeviceCheck) -> str:
    rows = [
        ("machine", f"{found.device}, {found.machine}"),
        ("system", found.system),
        ("Python", found.python),
    ]
    lines = [f"Found at {found.connection}:", *(f"  {key:<14}{text}" for key, text in rows)]
    lines += [f"  {finding}" for finding in found.findings]
    return "\n".join(lines)


def _next(device: str) -> str:
    # With its ?python= and ?key=, quoted: shells look for files at a question mark.
    return f"Next: foxnas device calibrate --device {shlex.quote(device)} --target rpi4"


def _calibrated(predictor: LinearPredictor, rows: list[Measurement], out: Path, searchable: bool) -> str:
    metrics = predictor.metrics
    times = sorted(row.latency_ms or 0.0 for row in rows)
    lines = [f"Calibrated {out.stem} from {len(rows)} networks between {times[0]:.2f} and {times[-1]:.2f} ms:"]
    for column, price in zip(predictor.columns, predictor.coefficients, strict=True):
        text = f"{price:.4f} ms" if column == "const" else f"{price:.4f} ns each"
        lines.append(f"  {column:<14}{text}")
    lines += [
        f"  error on {metrics['n_outside']:.0f} random networks, each left out {metrics['outside_mape']:.2f} % "
        f"(mean absolute; on average predicted {_bias(metrics['outside_bias'])})",
        f"  upper bounds  hold with up to {100 * predictor.stated_confidence:.0f} %: of these networks the formula's "
        f"own 95 % held for {metrics['formula_coverage']:.0f} %, so they are {_widened(predictor)}",
        f"  cross-validated error {metrics['cv_mape']:.2f} % (without a probe the others must tell its price)",
        f"  written       {out}, {', '.join(f'{out.stem}-{name}' for name in (PREDICTORS, MEASUREMENTS, CHECKS))}",
    ]
    if metrics["outside_mape"] > UNSURE_PERCENT:
        lines.append(
            f"UNSURE: above {UNSURE_PERCENT:g} % the search's budgets are not worth much. Quiet the machine and begin "
            f"anew without {out.stem}-{MEASUREMENTS} and {out.stem}-{CHECKS}, or go on with a greater --n-probes."
        )
    if searchable:
        stated = int(100 * predictor.stated_confidence) / 100
        sure = "" if stated >= 0.95 else f" --confidence {stated:g}"
        lines.append(f"Next: foxnas search --target {out} --latency-ms {times[len(times) // 2]:.3g}{sure}")
    else:
        lines.append(f"Next: foxnas sample --target {out}, for accuracies in this space")
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
