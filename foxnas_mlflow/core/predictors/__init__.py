"""Predictors of accuracy and latency: linear models that a person can read."""

from foxnas_mlflow.core.predictors._effects import Effect, marginal_effects
from foxnas_mlflow.core.predictors._fit import (
    CrossValidation,
    FitReport,
    FitResult,
    cross_validate,
    fit_family,
    fit_formula,
    fit_predictors,
    has_measured_latency,
    refit_predictors,
    rows_needed,
)
from foxnas_mlflow.core.predictors._formulas import FORMULAS, Formula, get_formula, widest_formula
from foxnas_mlflow.core.predictors._linear import (
    LinearPredictor,
    Prediction,
    PredictorSet,
    check_confidence,
    load_predictors,
)
from foxnas_mlflow.core.predictors._reference import (
    authors_predictor,
    build_reference,
    reference_latency,
    reference_predictors,
    with_packaged_accuracy,
)

__all__ = [
    "FORMULAS",
    "CrossValidation",
    "Effect",
    "FitReport",
    "FitResult",
    "Formula",
    "LinearPredictor",
    "Prediction",
    "PredictorSet",
    "authors_predictor",
    "build_reference",
    "check_confidence",
    "cross_validate",
    "fit_family",
    "fit_formula",
    "fit_predictors",
    "get_formula",
    "has_measured_latency",
    "load_predictors",
    "marginal_effects",
    "reference_latency",
    "reference_predictors",
    "refit_predictors",
    "rows_needed",
    "widest_formula",
    "with_packaged_accuracy",
]
