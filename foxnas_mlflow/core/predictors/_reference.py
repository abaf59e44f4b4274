"""The packaged reference predictors; ``scripts/build_reference`` rebuilds those of target ``rpi4``.

TABLE is the FOX-NAS authors' table of 300 subnets at 256 px (accuracy and latency on a Raspberry
Pi 4), COEFFICIENTS their published equation-2 coefficients at 192 px. What is shipped is derived
from them: fitted coefficients, covariance, diagnostics and provenance.

Accuracy at 192 px: the 256 px predictor with one affine map of its linear scale, fitted to the
authors' 192 px predictions of the 300 architectures, rather than their coefficients as they are.
Evidence (docs/METHOD.md): where the truth is known, at 256 px, an affine map onto equation-2
coefficients fitted to other rows has an error of 0.18 points, the coefficients themselves 0.29.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from foxnas_mlflow.core.errors import InvalidFormatError, OutOfDomainError
from foxnas_mlflow.core.files import file_digest
from foxnas_mlflow.core.measurements import read_measurements
from foxnas_mlflow.core.predictors._fit import fit_predictors
from foxnas_mlflow.core.predictors._formulas import FloatArray, get_formula
from foxnas_mlflow.core.predictors._linear import LinearPredictor, PredictorSet, load_predictors
from foxnas_mlflow.core.space import CPU_SPACE, SearchSpace
from foxnas_mlflow.core.targets import Target

IMAGENET_CEILING = 78.0
"""Ceiling of the accuracy (percent): the maximum of the likelihood lies at 77.75 to 78."""

_STEMS = {
    "tot_{w}": "D",
    "avg_e_{w}": "E_avg",
    "avg_k_{w}": "K_avg",
    "tot_e_{v}_{w}": "E_first",
    "tot_k_{v}_{w}": "K_first",
    "tot_e_{w}": "E_total",
    "tot_e_{w}:tot_{w}": "E_total:D",
    "avg_e_{w}:tot_{w}": "E_avg:D",
    "avg_k_{w}:tot_{w}": "K_avg:D",
}


_ACCURACY_SOURCE = "rpi4"
"""The target whose packaged predictors know accuracies."""


def reference_predictors(target: str) -> PredictorSet:
    """The packaged predictors of a target, with the packaged accuracies of its space where it has none of its own.

    Raises:
        OutOfDomainError: If none are packaged for it.

    Examples:
        >>> from foxnas_mlflow import reference_predictors
        >>> reference_predictors("rpi4").image_sizes
        (192, 256)
    """
    directory = importlib.resources.files("foxnas_mlflow") / "reference"
    file = directory / f"{target}.json"
    if not file.is_file():
        packaged = sorted(f.name.removesuffix(".json") for f in directory.iterdir() if f.name.endswith(".json"))
        raise OutOfDomainError(
            f"reference predictors are packaged for the targets {packaged} only",
            received=target,
            remedy="fit predictors from measurements on your target and give them with predictors=; "
            "a latency model comes from: foxnas device calibrate",
        )
    with importlib.resources.as_file(file) as path:
        predictors = load_predictors(path)
    return predictors if predictors.accuracy else with_packaged_accuracy(predictors)


def with_packaged_accuracy(predictors: PredictorSet) -> PredictorSet:
    """Predictors with the packaged ones of accuracy, if their space has some: accuracy depends on no board."""
    known = reference_predictors(_ACCURACY_SOURCE)
    if known.space.digest != predictors.space.digest:
        return predictors
    note = "Accuracy is that of the packaged predictors of this space: it does not depend on the board."
    accuracy = tuple(dataclasses.replace(p, notes=(note, *p.notes)) for p in known.accuracy)
    return dataclasses.replace(predictors, accuracy=accuracy)


def reference_latency(target: Target, space: SearchSpace) -> PredictorSet:
    """A target's latency cost model in any space: predictors of latency alone, with their notes.

    A cost model predicts networks by what they are made of, so the packaged one (or the one that
    a target file names in `Target.predictors`) serves a user's own space too. There it is an
    extrapolation: the intervals widen as they do at image sizes that were not fitted, and a note
    says so.

    Args:
        target: The target.
        space: The space whose networks are to be predicted.

    Raises:
        OutOfDomainError: If the target has no cost model, or one that holds in its own space only.

    Examples:
        >>> from foxnas_mlflow import get_space, get_target, reference_latency
        >>> predictors = reference_latency(get_target("rpi4"), get_space("tpu"))
        >>> predictors.accuracy, len(predictors.notes) > 0
        ((), True)
    """
    if not target.predictors:
        raise OutOfDomainError(
            "latency without a device needs a cost model of the target",
            received=f"target {target.name!r}, which has none",
            remedy="measure on the device with device=, or make a cost model with: foxnas device calibrate",
        )
    source = (
        reference_predictors(target.name) if target.predictors == "reference" else load_predictors(target.predictors)
    )
    if source.space.digest == space.digest:
        return dataclasses.replace(source, accuracy=())
    # Of the same stages: colours and classes are the first and the last layer's alone.
    alike = source.space.replace(in_channels=space.in_channels, n_classes=space.n_classes).digest == space.digest
    models = [p for p in source.latency if p.recipe.any_size and (alike or not p.own_space_only)]
    if not models:
        raise OutOfDomainError(
            f"the latency predictors of target {target.name!r} hold in space {source.space.name!r} only",
            received=space.name,
            remedy="measure on the device with device=, or make a cost model of your space with: "
            "foxnas device calibrate",
        )
    note = (
        f"The latency cost model of {target.name} comes from networks of another space or size "
        f"({source.space.name}): in this space ({space.name}) it extrapolates, and no measurement bears its bounds out."
    )
    model = dataclasses.replace(
        models[0], space=space, image_sizes=space.image_sizes, fitted_sizes=(), notes=(*models[0].notes, note)
    )
    return PredictorSet(source.target, space, (), (model,))


def authors_predictor(
    data: Mapping[str, Any], quantity: Literal["accuracy", "latency_ms"], space: SearchSpace = CPU_SPACE
) -> LinearPredictor:
    """One of the authors' published equation-2 predictors; it has no covariance, so no intervals.

    Raises:
        InvalidFormatError: If the coefficients are not those of equation 2.
    """
    published = dict(data[quantity]["coefficients"])
    columns, values = [], []
    before = space.first_width
    names = {}
    for stage in space.stages:
        for pattern, stem in _STEMS.items():
            names[f"{stem}_{stage.width}"] = pattern.format(v=before, w=stage.width)
        before = stage.width
    for column in get_formula("paper", quantity).columns(space)[:-1]:
        if names[column] not in published:
            raise InvalidFormatError(
                "published coefficients must be those of equation 2", received=f"no {names[column]}"
            )
        columns.append(column)
        values.append(float(published.pop(names[column])))
    if published:
        raise InvalidFormatError(
            "published coefficients must be those of equation 2", received=f"also {sorted(published)}"
        )
    size = int(data["image_size"])
    return LinearPredictor(
        formula="paper",
        quantity=quantity,
        space=space,
        image_sizes=(size,),
        fitted_sizes=(size,),
        columns=(*columns, "const"),
        coefficients=np.array([*values, float(data[quantity]["intercept"])]),
        covariance=None,
        sigma=0.0,
        dof=1,
        provenance={"source": "equation-2 coefficients published by the FOX-NAS authors"},
    )


def build_reference(table: str | Path, coefficients: str | Path) -> PredictorSet:
    """Fit the reference predictors of ``rpi4`` from the two published files."""
    rows = read_measurements(table)
    published = json.loads(Path(coefficients).read_text(encoding="utf-8"))
    sources = {
        "source": "FOX-NAS authors' measurements: 300 subnets at 256 px, TFLite int8 on a Raspberry Pi 4 (2021)",
        "sha256": {"table": file_digest(table), "coefficients": file_digest(coefficients)},
    }
    fit = fit_predictors(rows, CPU_SPACE, target="rpi4", ceiling=IMAGENET_CEILING, provenance=sources)
    architectures = [m.architecture for m in rows]
    size = int(published["image_size"])
    at_size = [
        CPU_SPACE.architecture(size, [[(b.expansion, b.kernel) for b in s.blocks] for s in a.stages])
        for a in architectures
    ]

    accuracy = fit.predictors.accuracy[0]
    latency = fit.predictors.latency[0]
    their_latency = authors_predictor(published, "latency_ms").predict(at_size)
    difference = latency.predict(at_size) / their_latency - 1
    transfer = float(np.sqrt(np.mean(difference**2)))
    latency = _replace(
        latency,
        transfer_sigma=transfer,
        metrics={
            **latency.metrics,
            f"transfer_{size}px_mean_percent": 100 * float(difference.mean()),
            f"transfer_{size}px_rms_percent": 100 * transfer,
            f"transfer_{size}px_mape": 100 * float(np.abs(difference).mean()),
        },
    )
    carried = _carry_accuracy(accuracy, architectures, at_size, authors_predictor(published, "accuracy"))
    latency_notes = (
        "Latency is that of the authors' setup of 2021 (TFLite int8 on a Raspberry Pi 4, batch 1); today's LiteRT "
        "with XNNPACK is several times faster. Calibrate from about ten probes on your board.",
        f"Latency was measured at 256 px. At other sizes the cost model carries it over: at {size} px it differs from "
        f"the authors' own predictor by {100 * transfer:.1f} % (root mean square), which widens the intervals there.",
    )
    accuracy_note = (
        "Accuracy is ImageNet top-1 of weight-shared subnets, known at 256 px (measured) and 192 px (carried over). "
        "Other image sizes have no published accuracy and are not searched."
    )
    return PredictorSet(
        "rpi4",
        CPU_SPACE,
        tuple(_replace(p, origin="packaged", notes=(accuracy_note,)) for p in (carried, accuracy)),
        (_replace(latency, origin="packaged", notes=latency_notes),),
    )


def _carry_accuracy(
    accuracy: LinearPredictor,
    architectures: Sequence[Any],
    at_size: Sequence[Any],
    theirs: LinearPredictor,
) -> LinearPredictor:
    """The accuracy predictor at another size: z' = a + b z, least squares to the authors' predictions."""
    ceiling = accuracy.ceiling
    if ceiling is None or accuracy.covariance is None:
        raise InvalidFormatError("only a calibrated accuracy predictor can be carried to another size")
    z = accuracy.design(architectures) @ accuracy.coefficients
    wanted = theirs.predict(at_size)
    b, a = np.polyfit(z, -np.log(ceiling - wanted), 1)
    got = ceiling - np.exp(-(a + b * z))
    coefficients: FloatArray = accuracy.coefficients * b
    coefficients[-1] += a
    residual = -np.log(ceiling - wanted) - (a + b * z)
    return _replace(
        accuracy,
        image_sizes=theirs.image_sizes,
        fitted_sizes=theirs.fitted_sizes,
        coefficients=coefficients,
        covariance=accuracy.covariance * b**2,
        # What is left after the map: the authors' own fit error and any effect of the size beside it.
        sigma=float(np.sqrt((accuracy.sigma * b) ** 2 + np.mean(residual**2))),
        metrics={
            "map_slope": float(b),
            "map_intercept": float(a),
            "map_rms_points": float(np.sqrt(np.mean((got - wanted) ** 2))),
        },
        provenance={
            **accuracy.provenance,
            "method": "affine map of the 256 px predictor's linear scale onto the authors' 192 px predictions",
        },
    )


def _replace(predictor: LinearPredictor, **changes: Any) -> LinearPredictor:
    return dataclasses.replace(predictor, **changes)
