"""``foxnas fit``: fit and register the predictors of a target from measurements."""

from __future__ import annotations

import argparse

from foxnas_mlflow.cli.parameters import Parameter

SUMMARY = "Fit accuracy and latency predictors from measured networks, judge them, and register them."

PARAMETERS = (
    Parameter(
        "measurements", "", "Path or URI of measurements.csv (runs:/RUN/measurements.csv), or the authors' table."
    ),
    Parameter("formula", "calibrated", "Formula to use.", choices=("calibrated", "paper", "auto")),
    Parameter("name", "foxnas", "Prefix of the registered model."),
    Parameter("target", "rpi4", "Target: rpi4, edgetpu, cpu, gpu, or the path of a target YAML."),
    Parameter(
        "space", "", "Search space of the rows: cpu, tpu or a YAML; empty: that logged with them, or the target's."
    ),
    Parameter("ceiling", 0.0, "Ceiling of the accuracy in percent; 0: the most likely one.", float),
    Parameter("seed", 0, "Seed of the cross-validation.", int),
)


def run(args: argparse.Namespace) -> dict[str, str]:
    """Fit, log and register.

    Returns:
        run_id, and model_uri of the registered predictors.
    """
    import tempfile
    from pathlib import Path

    from foxnas_mlflow.core.errors import InvalidInputError
    from foxnas_mlflow.core.predictors import fit_predictors, has_measured_latency, reference_latency
    from foxnas_mlflow.core.space import get_space
    from foxnas_mlflow.core.targets import get_target
    from foxnas_mlflow.tracking.fit import log_fit
    from foxnas_mlflow.tracking.inputs import noise_floor, open_measurements
    from foxnas_mlflow.tracking.run import entry_run

    if not args.measurements:
        raise InvalidInputError("measurements must be the path of a CSV file", remedy="give --measurements")
    target = get_target(args.target)
    with tempfile.TemporaryDirectory(prefix="foxnas-") as directory:
        rows, logged = open_measurements(args.measurements, Path(directory))
    space = get_space(args.space) if args.space else logged or get_space(target.space)
    # Without a measured latency there is nothing to fit: the target's cost model predicts it.
    measured = has_measured_latency(rows)
    latency = None if measured else reference_latency(target, space)
    with entry_run(
        stage="fit",
        params=vars(args) | {"space": args.space or space.name},
        target=target.name,
        space=space.name,
        latency_source="measured" if measured else "cost_model",
    ) as run:
        fit = fit_predictors(
            rows,
            space,
            target=target.name,
            formula=args.formula,
            ceiling=args.ceiling or None,
            seed=args.seed,
            provenance={"source": args.measurements},
            latency=latency,
        )
        floor = noise_floor(args.measurements)
        return log_fit(run, fit, rows, target=target, source=args.measurements, name=args.name, noise_floor=floor)
