"""``foxnas search``: find, prove, explain and register the best network under a latency."""

from __future__ import annotations

import argparse
from typing import Any

from foxnas_mlflow.cli.parameters import Parameter

SUMMARY = "Find the most accurate network under a latency, with a proof, a report and registered models."

PARAMETERS = (
    Parameter("target", "rpi4", "Target: rpi4, edgetpu, cpu, gpu, or the path of a target YAML."),
    Parameter("latency_ms", 60.0, "Latency constraint in milliseconds.", float),
    Parameter("confidence", 0.95, "Probability in [0.5, 1) that a measurement meets the constraint.", float),
    Parameter("space", "", "Search space: cpu, tpu or the path of a YAML; empty: that of the predictors."),
    Parameter("image_size", "", "Image sizes in px, comma separated; empty: all that the predictors know."),
    Parameter("predictors", "", "Predictors: a JSON file or a model URI; empty: the target's reference predictors."),
    Parameter("supernet", "", "Model URI of a trained supernet, to give the found network weights."),
    Parameter("device", "", "Where to measure: local, ssh://user@host, docker://image; empty: the cost model."),
    Parameter("measurements", "", "Table of measured networks to draw in the report: measurements.csv."),
    Parameter(
        "algorithm",
        "annealing",
        "Searcher beside the exact method.",
        choices=("annealing", "annealing-unguided", "evolution", "random"),
    ),
    Parameter("evaluations", 1_000_000, "Budget of the searcher in evaluations.", int),
    Parameter("seed", 0, "Seed of the searcher.", int),
    Parameter("name", "foxnas", "Prefix of the registered models."),
)

COMPARISON_EVALUATIONS = 100_000


def run(args: argparse.Namespace) -> None:
    """Run the search and log everything that it found."""
    from foxnas_mlflow.core.errors import InvalidInputError
    from foxnas_mlflow.core.measurements import read_measurements
    from foxnas_mlflow.core.searchers import SEARCHERS, Objective, check_budget, search
    from foxnas_mlflow.core.space import get_space
    from foxnas_mlflow.core.targets import get_target

    for name in ("supernet", "device"):
        if getattr(args, name):
            raise InvalidInputError(
                f"{name} is not supported by search in this release",
                received=getattr(args, name),
                remedy=f"leave {name} empty: latency then comes from the cost model and is tagged so",
            )
    if args.seed < 0:
        raise InvalidInputError("seed must be 0 or more", received=args.seed)
    target = get_target(args.target)
    predictors, source = _predictors(args.predictors or target.predictors, target.name)
    if args.space and get_space(args.space).digest != predictors.space.digest:
        raise InvalidInputError(
            f"space must be that of the predictors, {predictors.space.name!r}",
            received=args.space,
            remedy="leave space empty, or bring predictors fitted in that space",
        )
    measurements = read_measurements(args.measurements) if args.measurements else []
    image_sizes = _image_sizes(args.image_size)
    # What can be refused at once is refused before there is a run.
    check_budget(args.latency_ms, args.evaluations)
    Objective(predictors, confidence=args.confidence, image_sizes=image_sizes)

    from foxnas_mlflow.tracking.run import entry_run
    from foxnas_mlflow.tracking.search import log_search

    # The run is open while the search works, so that SIGTERM finds it and ends it as KILLED.
    with entry_run(
        stage="search",
        params={key: value for key, value in vars(args).items() if key != "image_size"},
        target=target.name,
        space=predictors.space.name,
        latency_source="cost_model",
        tags={"foxnas.predictors": source},
    ) as run:
        outcome = search(
            predictors,
            args.latency_ms,
            confidence=args.confidence,
            image_sizes=image_sizes,
            algorithm=args.algorithm,
            evaluations=args.evaluations,
            seed=args.seed,
        )
        resolved = {"image_size": ",".join(map(str, outcome.objective.image_sizes))}
        run.log_params(resolved)
        budget = min(args.evaluations, COMPARISON_EVALUATIONS)
        comparisons = [
            searcher.search(outcome.objective, args.latency_ms, evaluations=budget, seed=args.seed)
            for searcher in SEARCHERS.values()
        ]
        log_search(
            run,
            outcome,
            comparisons,
            target=target,
            predictors=predictors,
            predictors_source=source,
            params=vars(args) | resolved,
            name=args.name,
            measurements=measurements,
        )


def _predictors(source: str, target: str) -> tuple[Any, str]:
    from foxnas_mlflow.core.errors import InvalidFormatError
    from foxnas_mlflow.core.predictors import PredictorSet, load_predictors, reference_predictors

    if source in ("", "reference"):
        return reference_predictors(target), "reference"
    if "://" in source or source.startswith(("models:/", "runs:/")):
        from foxnas_mlflow.flavor import load_model

        model = load_model(source)
        if not isinstance(model, PredictorSet):
            raise InvalidFormatError("predictors must be a model of kind 'predictors'", received=source)
        return model, source
    return load_predictors(source), source


def _image_sizes(text: str) -> list[int] | None:
    from foxnas_mlflow.core.errors import InvalidInputError

    if not text:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidInputError("image_size must be integers in px, comma separated", received=text) from None
