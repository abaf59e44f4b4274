"""``foxnas search``: find, prove, explain and register the best network under a latency."""

from __future__ import annotations

import argparse

from foxnas_mlflow.cli.parameters import COMPILER_IMAGE, Parameter

SUMMARY = "Find the most accurate network under a latency, with a proof, a report and registered models."

PARAMETERS = (
    Parameter("target", "rpi4", "Target: rpi4, edgetpu, cpu, gpu, or the path of a target YAML."),
    Parameter("latency_ms", 60.0, "Latency constraint in milliseconds.", float),
    Parameter("confidence", 0.95, "Probability in [0.5, 1) that a measurement meets the constraint.", float),
    Parameter("space", "", "Search space: cpu, tpu, proxyless or the path of a YAML; empty: that of the predictors."),
    Parameter("image_size", "", "Image sizes in px, comma separated; empty: all that the predictors know."),
    Parameter("predictors", "", "Predictors: a JSON file or a model URI; empty: the target's reference predictors."),
    Parameter("supernet", "", "Model URI of a trained supernet, to evaluate networks and give the found one weights."),
    Parameter("data", "", "The images that it was trained on, where they are now; empty: where they were."),
    Parameter("device", "", "Where to measure: local, ssh://user@host, docker://image; empty: the cost model."),
    COMPILER_IMAGE,
    Parameter("verify", 5, "Networks of the front to measure and evaluate before one is chosen.", int),
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


def run(args: argparse.Namespace) -> dict[str, str]:
    """Run the search, verify what it found, and log everything.

    Returns:
        run_id, and model_uri of the registered subnet.
    """
    from contextlib import nullcontext

    from foxnas_mlflow.cli.parameters import image_sizes
    from foxnas_mlflow.core.errors import InvalidInputError
    from foxnas_mlflow.core.searchers import SEARCHERS, Objective, check_budget, search
    from foxnas_mlflow.core.space import get_space
    from foxnas_mlflow.core.targets import get_target
    from foxnas_mlflow.tracking.inputs import open_measurements, open_predictors, open_supernet

    if args.seed < 0:
        raise InvalidInputError("seed must be 0 or more", received=args.seed)
    if args.verify < 1:
        raise InvalidInputError("verify must be positive", received=args.verify)
    if args.data and not args.supernet:
        raise InvalidInputError("data is that of a supernet", received=args.data, remedy="give supernet too")
    target = get_target(args.target)
    predictors, source = open_predictors(args.predictors or target.predictors, target.name)
    if args.space and get_space(args.space).digest != predictors.space.digest:
        raise InvalidInputError(
            f"space must be that of the predictors, {predictors.space.name!r}",
            received=args.space,
            remedy="leave space empty, or bring predictors fitted in that space",
        )
    sizes = image_sizes(args.image_size)
    # What can be refused at once is refused before there is a run.
    check_budget(args.latency_ms, args.evaluations)
    objective = Objective(predictors, confidence=args.confidence, image_sizes=sizes)
    supernet = open_supernet(args.supernet, data=args.data, name=args.name) if args.supernet else None
    if supernet is not None and supernet.space.digest != predictors.space.digest:
        raise InvalidInputError(
            f"the supernet must have the space of the predictors, {predictors.space.name!r}",
            received=f"{supernet.uri} with {supernet.space.name!r}",
            remedy="bring predictors fitted to samples of this supernet: foxnas sample, foxnas fit",
        )

    from foxnas_mlflow.tracking.run import entry_run
    from foxnas_mlflow.tracking.search import log_search
    from foxnas_mlflow.tracking.verification import kept_measurements, verified

    request = vars(args) | {
        "image_size": ",".join(map(str, objective.image_sizes)),
        "data": "" if supernet is None else supernet.dataset.source,
    }
    # The run is open while the search works, so that SIGTERM finds it and ends it as KILLED.
    with entry_run(
        stage="search",
        params=request,
        target=target.name,
        space=predictors.space.name,
        latency_source="cost_model",
        tags={"foxnas.predictors": source},
    ) as run:
        if supernet is not None:
            from foxnas_mlflow.tracking.supernet import log_dataset

            log_dataset(run, supernet.dataset, context="evaluation")
        measurements = open_measurements(args.measurements, run.directory)[0] if args.measurements else []
        outcome = search(
            predictors,
            args.latency_ms,
            confidence=args.confidence,
            image_sizes=sizes,
            algorithm=args.algorithm,
            evaluations=args.evaluations,
            seed=args.seed,
        )
        budget = min(args.evaluations, COMPARISON_EVALUATIONS)
        comparisons = [
            searcher.search(outcome.objective, args.latency_ms, evaluations=budget, seed=args.seed)
            for searcher in SEARCHERS.values()
        ]
        keeping = kept_measurements(predictors, target, request) if args.device else nullcontext(run.directory)
        with keeping as kept:
            verification = None
            if supernet is not None or args.device:
                outcome, verification = verified(
                    run,
                    outcome,
                    args.latency_ms,
                    target=target,
                    supernet=supernet,
                    device=args.device,
                    compiler_image=args.compiler_image,
                    n=args.verify,
                    kept=kept,
                )
            return log_search(
                run,
                outcome,
                comparisons,
                target=target,
                predictors=predictors,
                predictors_source=source,
                params=request,
                name=args.name,
                measurements=measurements,
                verification=verification,
            )
