"""``foxnas device``: look at a machine that measures, or calibrate a cost model of it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from foxnas_mlflow.cli.parameters import Parameter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from foxnas_mlflow.core.architecture import Architecture
    from foxnas_mlflow.core.measurements import Measurement
    from foxnas_mlflow.core.predictors import LinearPredictor
    from foxnas_mlflow.core.space import SearchSpace
    from foxnas_mlflow.core.targets import Target
    from foxnas_mlflow.devices import DeviceCheck

SUMMARY = "Look at a machine that measures (check), or make a target with a cost model of it (calibrate)."

PARAMETERS = (
    Parameter(
        "action",
        "",
        "check: what the machine has, and what is missing. calibrate: measure probes, fit, write a target file.",
        choices=("check", "calibrate"),
        positional=True,
    ),
    Parameter("device", "local", "The machine: local, ssh://user@host[:port], docker://image."),
    Parameter("target", "rpi4", "calibrate: target whose space and threads the new one has: a name or a YAML."),
    Parameter("n_probes", 12, "calibrate: networks to measure; more make the cost model surer.", int),
    Parameter("image_size", "", "calibrate: image sizes in px, comma separated; empty: all of the space."),
    Parameter("out", "target.yaml", "calibrate: the target file; its name is the target's."),
    Parameter("seed", 0, "calibrate: seed of the choice of networks.", int),
)

UNSURE_PERCENT = 5.0
"""Error on other networks above which a calibration is not good."""

PREDICTORS, MEASUREMENTS, CHECKS = "predictors.json", "measurements.csv", "checks.csv"
"""What lies beside a target file, after its name and a dash."""


def run(args: argparse.Namespace) -> dict[str, str | float]:
    """Do the action."""
    from foxnas_mlflow.core.errors import DeviceError
    from foxnas_mlflow.devices import check, connect

    with connect(args.device) as connection:
        found = check(connection)
    if args.action == "check":
        print(_found(found))
    if not found.ready:
        raise DeviceError(f"{found.connection} cannot measure yet: it lacks {'; '.join(found.missing)}")
    if args.action == "check":
        return {"device": found.device}
    return _calibrate(args, found)


def _calibrate(args: argparse.Namespace, found: DeviceCheck) -> dict[str, str | float]:
    import dataclasses
    from pathlib import Path

    import yaml

    from foxnas_mlflow.cli.parameters import image_sizes
    from foxnas_mlflow.core.calibration import N_CHECKS, calibrate, choose_checks, choose_probes
    from foxnas_mlflow.core.errors import DeviceError, InvalidInputError
    from foxnas_mlflow.core.files import write_atomically
    from foxnas_mlflow.core.space import get_space
    from foxnas_mlflow.core.targets import get_target

    if found.emulated:
        raise DeviceError(
            "only a real processor can be calibrated", received=found.device, remedy="give the board's address"
        )
    out = Path(args.out)
    if out.suffix not in (".yaml", ".yml") or not out.parent.is_dir():
        raise InvalidInputError("out must be the path of a .yaml file in a directory that exists", received=args.out)
    base = get_target(args.target)
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
        device=args.device,
        predictors=f"{out.stem}-{PREDICTORS}",
        latency_note=f"milliseconds of a cost model calibrated on {found.device} with {found.runtime}",
    )
    table = out.with_name(f"{out.stem}-{MEASUREMENTS}")
    sizes = image_sizes(args.image_size)
    rows = _measure(
        args,
        found,
        base,
        space,
        table,
        lambda measured: choose_probes(space, args.n_probes, measured=measured, image_sizes=sizes, seed=args.seed),
    )
    checks = choose_checks(space, N_CHECKS, image_sizes=sizes, seed=args.seed)
    outside = _measure(
        args,
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
        notes=[f"Latency is calibrated on {found.device} with {found.runtime} from {len(rows)} measured networks."],
        seed=args.seed,
        provenance={"device": found.device, "runtime": found.runtime, "threads": base.threads},
        outside=outside,
    )
    predictors.save(out.with_name(target.predictors))
    # Last: a target file that is there is whole.
    values = {key: value for key, value in dataclasses.asdict(target).items() if value != ""}
    write_atomically(out, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    print(_calibrated(predictors.latency[0], rows, out, bool(predictors.accuracy)))
    metrics = predictors.latency[0].metrics
    return {
        "target": str(out),
        "outside_mape": metrics["outside_mape"],
        "cv_mape": metrics["cv_mape"],
        "n_probes": float(len(rows)),
    }


def _measure(
    args: argparse.Namespace,
    found: DeviceCheck,
    target: Target,
    space: SearchSpace,
    path: Path,
    choose: Callable[[list[Architecture]], list[Architecture]],
) -> list[Measurement]:
    """Measure networks beside those of a table; each row is on disk before the next one begins.

    Args:
        args: Of the command.
        found: The machine.
        target: The target.
        space: The space.
        path: The table; its rows count.
        choose: Networks to measure, given those that are.
    """
    from foxnas_mlflow.cli.progress import progress_bar
    from foxnas_mlflow.core.errors import DeviceError, InvalidInputError
    from foxnas_mlflow.core.measurements import Measurement, append_measurement, read_finished
    from foxnas_mlflow.tracking.timers import open_device

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
    with open_device(target, space, args.device) as timer, progress_bar("calibrate", "network") as show:
        for architecture in networks:
            timing = timer.time(architecture)
            if timing.problems:
                unsteady.append("; ".join(timing.problems))
                continue
            row = Measurement.of(architecture, timing)
            append_measurement(row, path)
            rows.append(row)
            show(len(rows), total, f"{timing.latency_ms:.2f} ms")
    if len(rows) < total:
        raise DeviceError(
            f"{total} networks must be measured without disturbance",
            received=f"{len(rows)}, and {len(unsteady)} that were not steady ({unsteady[0]})",
            remedy="quiet and cool the machine, and run the same command again: what is finished is kept",
        )
    return rows


def _found(found: DeviceCheck) -> str:
    temperature = "not told" if found.temperature_c is None else f"{found.temperature_c:.1f} C"
    rows = [
        ("machine", f"{found.device}, {found.machine}, {found.cores} processor(s)"),
        ("system", found.system),
        ("Python", found.python),
        ("NumPy", found.numpy or "missing"),
        ("runtime", found.runtime or "missing"),
        ("Pillow", found.pillow or "none"),
        ("Edge TPU", "answers" if found.edgetpu else "none"),
        ("governor", found.governor or "not told"),
        ("temperature", temperature),
        ("free disk", f"{found.free_bytes / 2**30:.1f} GiB"),
    ]
    lines = [f"Found at {found.connection}:", *(f"  {key:<14}{text}" for key, text in rows)]
    lines += [f"  missing       {text}" for text in found.missing]
    lines += [f"  note          {text}" for text in found.notes]
    if found.ready:
        lines.append(f"Next: foxnas device calibrate --device {found.connection} --target rpi4")
    return "\n".join(lines)


def _calibrated(predictor: LinearPredictor, rows: list[Measurement], out: Path, searchable: bool) -> str:
    metrics = predictor.metrics
    times = sorted(row.latency_ms or 0.0 for row in rows)
    lines = [f"Calibrated {out.stem} from {len(rows)} networks between {times[0]:.2f} and {times[-1]:.2f} ms:"]
    for column, price in zip(predictor.columns, predictor.coefficients, strict=True):
        text = f"{price:.4f} ms" if column == "const" else f"{price:.4f} ns each"
        lines.append(f"  {column:<14}{text}")
    lines += [
        f"  error on {metrics['n_outside']:.0f} other networks {metrics['outside_mape']:.2f} % (mean absolute)",
        f"  cross-validated error {metrics['cv_mape']:.2f} % (without a probe the others must tell its price)",
        f"  written       {out}, {', '.join(f'{out.stem}-{name}' for name in (PREDICTORS, MEASUREMENTS, CHECKS))}",
    ]
    if metrics["outside_mape"] > UNSURE_PERCENT:
        lines.append(
            f"UNSURE: above {UNSURE_PERCENT:g} % the search's budgets are not worth much. Quiet the machine and begin "
            f"anew without {out.stem}-{MEASUREMENTS} and {out.stem}-{CHECKS}, or go on with a greater --n-probes."
        )
    if searchable:
        lines.append(f"Next: foxnas search --target {out} --latency-ms {times[len(times) // 2]:.3g}")
    else:
        lines.append(f"Next: foxnas sample --target {out}, for accuracies in this space")
    return "\n".join(lines)
