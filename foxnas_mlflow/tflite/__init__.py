"""From a network and its weights to an int8 TensorFlow Lite file, checked and evaluated."""

from foxnas_mlflow.tflite._checks import check_classifier, check_int8
from foxnas_mlflow.tflite._convert import Conversion, convert, with_weights
from foxnas_mlflow.tflite._edgetpu_compiler import (
    INSTALL_HINT,
    CompilerOutput,
    CompilerReport,
    EdgeTpuCompiler,
    OperatorStatus,
    find_compiler,
    parse_log,
    require_compiler,
)
from foxnas_mlflow.tflite._edgetpu_readiness import Readiness, ReadinessIssue, edgetpu_readiness
from foxnas_mlflow.tflite._evaluate import FloatModel, QuantizationLoss, quantization_loss
from foxnas_mlflow.tflite._graph import Operator, lower
from foxnas_mlflow.tflite._grids import grids_of, one_scale_of
from foxnas_mlflow.tflite._int8 import Int8Model, LayerError, layer_errors
from foxnas_mlflow.tflite._keras import quiet_tensorflow
from foxnas_mlflow.tflite._model import OperatorInfo, TensorInfo, TfliteFile, read_tflite
from foxnas_mlflow.tflite._reference import reference_forward
from foxnas_mlflow.tflite._weights import FoldedWeights, fold_weights, random_weights, weight_shapes
from foxnas_mlflow.tflite._writer import write_probe

__all__ = [
    "INSTALL_HINT",
    "CompilerOutput",
    "CompilerReport",
    "Conversion",
    "EdgeTpuCompiler",
    "FloatModel",
    "FoldedWeights",
    "Int8Model",
    "LayerError",
    "Operator",
    "OperatorInfo",
    "OperatorStatus",
    "QuantizationLoss",
    "Readiness",
    "ReadinessIssue",
    "TensorInfo",
    "TfliteFile",
    "check_classifier",
    "check_int8",
    "convert",
    "edgetpu_readiness",
    "find_compiler",
    "fold_weights",
    "grids_of",
    "layer_errors",
    "lower",
    "one_scale_of",
    "parse_log",
    "quantization_loss",
    "quiet_tensorflow",
    "random_weights",
    "read_tflite",
    "reference_forward",
    "require_compiler",
    "weight_shapes",
    "with_weights",
    "write_probe",
]
