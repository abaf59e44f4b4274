"""Predictors of accuracy and latency: linear models that a person can read."""

from foxnas_mlflow.core.predictors._effects import Effect, marginal_effects
from foxnas_mlflow.core.predictors._fit import (
    CrossValidation,
    FitReport,
    FitResult,
    cross_validate,
    fit_formula,
    fit_predictors,
)
from foxnas_mlflow.core.predictors._formulas import FORMULAS, Formula, get_formula
from foxnas_mlflow.core.predictors._linear import (
    LinearPredictor,
    Prediction,
    PredictorSet,
    check_confidence,
    load_predictors,
)
from foxnas_mlflow.core.predictors._reference import authors_predictor, build_reference, reference_predictors

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
    "fit_formula",
    "fit_predictors",
    "get_formula",
    "load_predictors",
    "marginal_effects",
    "reference_predictors",
]
