"""The evaluator ``foxnas`` of `mlflow.models.evaluate`: what an int8 classifier is worth on given images.

    mlflow.models.evaluate(
        "models:/foxnas-cpu/3", table, targets="label", model_type="tflite",
        evaluators="foxnas", evaluator_config={"device": "ssh://pi@board"},
    )

MLflow loads this module with its other evaluators: nothing of this package is imported at its top.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.models.evaluation.base import EvaluationResult, ModelEvaluator

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from foxnas_mlflow.devices import Benchmark
    from foxnas_mlflow.flavor import TfliteModel

_KINDS = ("tflite", "edgetpu")
_DEFAULTS: Mapping[str, Any] = {"device": "", "threads": 0, "runs": 200, "warmup": 10, "max_seconds": 120.0}
_CHUNK = 256


class FoxnasEvaluator(ModelEvaluator):
    """Accuracy, table of classes, confusion matrix, size, and latency on a device.

    All figures are named ``evaluation/...``: they are about the images and the device of this call,
    and do not replace those of ``foxnas quantize`` and ``foxnas benchmark``, which promotion reads.
    """

    @classmethod
    def can_evaluate(cls, *, model_type: str, evaluator_config: Mapping[str, Any], **kwargs: Any) -> bool:
        """Only the model types ``tflite`` and ``edgetpu``: MLflow asks every evaluator at every evaluation."""
        return model_type in _KINDS

    def evaluate(
        self,
        *,
        model_type: str,
        dataset: Any,
        run_id: str,
        evaluator_config: Mapping[str, Any],
        model: Any = None,
        model_id: str | None = None,
        **kwargs: Any,
    ) -> EvaluationResult:
        """Evaluate a model; the metrics become metrics of the run and of the logged model.

        Args:
            model_type: ``tflite`` or ``edgetpu``.
            dataset: Images in a column ``image`` (or an array of them), and their labels: names
                of the model's classes, or their indices.
            run_id: Run that gets the artifacts.
            evaluator_config: ``device``: ``local``, ``ssh://user@host[:port]``, or empty for no
                latency. ``threads`` (0: those of the target that the model was made for), ``runs``, ``warmup``,
                ``max_seconds``: as for ``foxnas benchmark``.
            model: The loaded pyfunc.
            model_id: Id of the logged model where MLflow knows it; it then logs the metrics.
            **kwargs: What MLflow passes to every evaluator.

        Raises:
            MlflowException: If the model is of another kind, the labels are not its own, a key of
                the configuration is unknown, or the device cannot measure.
        """
        import mlflow
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

        from foxnas_mlflow.core.errors import FoxNasError

        try:
            result = _evaluate(dataset, run_id, evaluator_config, model)
        except FoxNasError as error:
            raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from error
        if model_id is None:
            # SQL stores keep no model id with a version; the model's own description has it.
            mlflow.log_metrics(result.metrics, run_id=run_id, model_id=model.metadata.model_id)
        return result


def _evaluate(dataset: Any, run_id: str, evaluator_config: Mapping[str, Any], model: Any) -> EvaluationResult:
    import tempfile

    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.models.evaluation.artifacts import (
        CsvEvaluationArtifact,
        ImageEvaluationArtifact,
        JsonEvaluationArtifact,
    )
    from PIL import Image

    from foxnas_mlflow.core.classification import class_table, confusion
    from foxnas_mlflow.core.errors import InvalidInputError
    from foxnas_mlflow.report import draw_confusion_matrix
    from foxnas_mlflow.tracking.run import EntryRun

    config = {**_DEFAULTS, **evaluator_config}
    unknown = sorted(set(config) - set(_DEFAULTS))
    if unknown:
        raise InvalidInputError(f"evaluator_config has only the keys {sorted(_DEFAULTS)}", received=unknown)
    native = _native(model)
    if dataset.labels_data is None:
        raise InvalidInputError("an evaluation needs the right labels", remedy="name their column with targets=")
    truth = class_indices(dataset.labels_data, native.labels)
    if not len(truth):
        raise InvalidInputError("an evaluation needs at least one image")
    probabilities = _predict(model, dataset.features_data, len(truth))
    counts = confusion(truth, probabilities.argmax(axis=1), len(native.labels))
    table = pd.DataFrame(class_table(counts, native.labels))
    metrics = figures(counts, truth, probabilities)
    metrics["evaluation/size_bytes"] = float(native.path.stat().st_size)

    client = MlflowClient()
    artifacts: dict[str, Any] = {}
    root = client.get_run(run_id).info.artifact_uri
    with tempfile.TemporaryDirectory(prefix="foxnas-") as directory:
        picture, classes = Path(directory, "confusion_matrix.png"), Path(directory, "classes.csv")
        draw_confusion_matrix(counts, native.labels, picture)
        table.to_csv(classes, index=False)
        with Image.open(picture) as image:
            image.load()
        artifacts["confusion_matrix"] = ImageEvaluationArtifact(f"{root}/evaluation/{picture.name}", image)
        artifacts["classes"] = CsvEvaluationArtifact(f"{root}/evaluation/{classes.name}", table)
        if config["device"]:
            benchmark = _measure(native, config)
            # The same figures as foxnas benchmark logs, under the name of an evaluation.
            metrics |= {f"evaluation/{key.split('/')[1]}": value for key, value in benchmark.metrics().items()}
            client.log_dict(run_id, benchmark.to_dict(), "evaluation/benchmark.json")
            client.set_tag(run_id, "foxnas.device", benchmark.connection)
            client.set_tag(run_id, "foxnas.board", benchmark.device)
            artifacts["benchmark"] = JsonEvaluationArtifact(f"{root}/evaluation/benchmark.json", benchmark.to_dict())
        client.log_artifacts(run_id, directory, "evaluation")
        EntryRun(run_id, client.get_run(run_id).info.experiment_id, Path(directory)).log_table(
            table.assign(model_id=model.metadata.model_id), "tables/classes.json"
        )
    return EvaluationResult(metrics, artifacts, run_id)


def class_indices(labels: Any, names: Sequence[str]) -> NDArray[np.int64]:
    """Labels, given as names of classes or as their indices, as indices.

    Raises:
        InvalidInputError: If one is neither, or whole numbers may mean either: classes named 001 to 012 and the
            labels 1 to 12.
    """
    import numpy as np

    from foxnas_mlflow.core.errors import InvalidInputError

    # Names first: a model's classes may be called "0" to "9".
    known: dict[Any, int] = {name: k for k, name in enumerate(names)}
    numbered = {int(name): k for k, name in enumerate(names) if name.isdecimal()}
    indices = []
    for label in labels:
        if isinstance(label, int | np.integer) and numbered and numbered.get(int(label)) != label:
            raise InvalidInputError(
                "a whole number is no label where classes are named by other numbers than their indices",
                received=f"{label} for the classes {', '.join(names[:3])}, ...",
                remedy=f"give the names as text, for example {names[0]!r}",
            )
        value = known.get(str(label), numbered.get(int(label)) if isinstance(label, int | np.integer) else None)
        if value is None and isinstance(label, int | np.integer) and 0 <= label < len(names):
            value = int(label)
        if value is None:
            raise InvalidInputError(
                "a label must be the name of one of the model's classes, or its index",
                received=str(label),
                remedy=f"the classes are {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}",
            )
        indices.append(value)
    return np.asarray(indices, dtype=np.int64)


def figures(
    counts: NDArray[np.int64], truth: NDArray[np.int64], probabilities: NDArray[np.float64]
) -> dict[str, float]:
    """Accuracies in percent: top-1, top-5 where there are more than five classes, mean over the classes."""
    import numpy as np

    from foxnas_mlflow.core.classification import balanced_percent

    values = {
        "evaluation/top1": 100 * float(np.trace(counts)) / len(truth),
        "evaluation/top1_mean_of_classes": balanced_percent(counts),
        "evaluation/images": float(len(truth)),
    }
    if probabilities.shape[1] > 5:
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :5]
        values["evaluation/top5"] = 100 * float(np.mean((best == truth[:, None]).any(axis=1)))
    return values


def _native(model: Any) -> TfliteModel:
    """The native model inside a pyfunc."""
    from foxnas_mlflow.core.errors import InvalidInputError

    native: Any = model.get_raw_model() if hasattr(model, "get_raw_model") else None
    # Not isinstance: code that was logged with a model may have made another class of that name.
    if type(native).__name__ != "TfliteModel":
        raise InvalidInputError(
            "the evaluator foxnas takes models of kind tflite and edgetpu", received=type(native or model).__name__
        )
    found: TfliteModel = native
    return found


def _predict(model: Any, features: Any, n_images: int) -> NDArray[np.float64]:
    import numpy as np

    parts = []
    for start in range(0, n_images, _CHUNK):
        rows = slice(start, start + _CHUNK)
        part = features.iloc[rows] if hasattr(features, "iloc") else features[rows]
        parts.append(np.asarray(model.predict(part)["probabilities"].tolist(), dtype=np.float64))
    return np.concatenate(parts)


def _measure(model: TfliteModel, config: Mapping[str, Any]) -> Benchmark:
    from foxnas_mlflow.devices import connect, host_answer, measure

    with connect(str(config["device"])) as connection:
        return measure(
            connection,
            model.path,
            threads=int(config["threads"]) or int(model.details.get("threads", 0)) or 1,
            runs=int(config["runs"]),
            warmup=int(config["warmup"]),
            max_seconds=float(config["max_seconds"]),
            expected=host_answer(model.fallback or model.path),
            edgetpu=model.path.name.endswith("_edgetpu.tflite"),
        )
