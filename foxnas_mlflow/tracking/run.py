"""One MLflow run around one entry point.

`mlflow run` creates the run and hands it over in MLFLOW_RUN_ID; a plain `foxnas COMMAND` makes
its own. Either way the run ends in the state that its work ended in: FINISHED, FAILED after an
error, KILLED after SIGTERM or Ctrl-C.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import signal
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec

import mlflow
from mlflow import MlflowClient
from mlflow.data.dataset import Dataset
from mlflow.entities import Metric, Param, RunTag
from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils import name_utils

from foxnas_mlflow._version import __version__
from foxnas_mlflow.core.errors import InvalidInputError, MissingDependencyError
from foxnas_mlflow.core.files import in_turn
from foxnas_mlflow.core.redaction import redacted
from foxnas_mlflow.tracking.context import FoxnasRunContext
from foxnas_mlflow.tracking.process import PROCESS_TAG, is_dead, process_identity

_MAX_PARAM_CHARACTERS = 6000

P = ParamSpec("P")


class Terminated(BaseException):
    """SIGTERM arrived; a BaseException so that no handler of errors swallows it."""


class EntryRun:
    """A running MLflow run; a method is one round trip to the tracking server, or several for series and tables.

    No password goes there: parameters, tags and texts are written as `redacted` leaves them.

    Attributes:
        run_id: Id of the run.
        experiment_id: Id of its experiment.
        directory: A temporary directory for files to log, removed when the run ends.
        dataset: The images of the run, once they are logged.
        at_end: Called, in order, when the run ends, however it does; what the tracking server does not take is lost.
    """

    dataset: Dataset | None = None

    def __init__(self, run_id: str, experiment_id: str, directory: Path) -> None:
        self.run_id = run_id
        self.experiment_id = experiment_id
        self.directory = directory
        self.at_end: list[Callable[[], None]] = []
        self._client = MlflowClient()

    def log_metrics(
        self,
        metrics: Mapping[str, float],
        *,
        step: int | None = None,
        model_id: str | None = None,
        dataset: Dataset | None = None,
    ) -> None:
        """Log metrics; with `model_id` they also belong to that logged model, with `dataset` they are of it."""
        mlflow.log_metrics(dict(metrics), step=step, run_id=self.run_id, model_id=model_id, dataset=dataset)

    def log_series(self, key: str, values: Mapping[int, float]) -> None:
        """Log many steps of one metric in batches."""
        import time

        now = int(time.time() * 1000)
        rows = [Metric(key, float(value), now, step) for step, value in values.items()]
        for start in range(0, len(rows), 1000):
            self._client.log_batch(self.run_id, metrics=rows[start : start + 1000])

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log resolved values under ``cfg.``: MLflow itself logs what was typed, unresolved."""
        rows = [Param(f"cfg.{key}", redacted(str(value))[:_MAX_PARAM_CHARACTERS]) for key, value in params.items()]
        self._client.log_batch(self.run_id, params=rows)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags of the run."""
        self._client.log_batch(self.run_id, tags=[RunTag(key, redacted(str(value))) for key, value in tags.items()])

    def log_artifact(self, path: str | Path, artifact_dir: str | None = None) -> None:
        """Log one file."""
        self._client.log_artifact(self.run_id, str(path), artifact_dir)

    def log_artifacts(self, directory: str | Path, artifact_dir: str | None = None) -> None:
        """Log a directory of files."""
        self._client.log_artifacts(self.run_id, str(directory), artifact_dir)

    def log_json(self, value: Any, name: str) -> str:
        """Log a JSON artifact at the path `name`; returns its text."""
        return self.log_text(json.dumps(value, indent=2), name)

    def log_table(self, table: Any, name: str, *, dataset: str | None = None) -> None:
        """Log a table that MLflow's page shows and compares.

        Args:
            table: A pandas table, or values of equal length by column.
            name: Path of the artifact, ``tables/....json``.
            dataset: Log it as an input of the run too, under this name.
        """
        import pandas as pd
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.data.pandas_dataset import from_pandas

        frame = pd.DataFrame(table)
        # MLflow selects columns of pandas 2's type for text, at which pandas 3 warns.
        frame = frame.astype({c: object for c in frame if pd.api.types.is_string_dtype(frame[c].dtype)})
        self._client.log_table(self.run_id, frame, name)
        if dataset is not None:
            # An URI would be guessed at, with a warning: a source of this kind says what it is.
            source = CodeDatasetSource(tags={"mlflow.source.name": f"runs:/{self.run_id}/{name}"})
            # MLflow's own digest trips over the text columns of pandas 3.
            digest = hashlib.sha256(frame.to_csv(index=False).encode()).hexdigest()[:36]
            # At integers MLflow warns that they cannot tell what is missing.
            numbers = frame.astype({c: float for c in frame if pd.api.types.is_integer_dtype(frame[c].dtype)})
            mlflow.log_input(from_pandas(numbers, source=source, name=dataset, digest=digest), context=dataset)

    def log_text(self, text: str, name: str) -> str:
        """Log a text artifact at the path `name`; returns it without secrets, as it is kept."""
        kept = redacted(text)
        self._client.log_text(self.run_id, kept, name)
        return kept


@contextlib.contextmanager
def entry_run(
    *,
    stage: str,
    params: Mapping[str, Any],
    target: str | None = None,
    space: str | None = None,
    latency_source: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> Iterator[EntryRun]:
    """Start or adopt the MLflow run of an entry point.

    Args:
        stage: Name of the entry point, tag ``foxnas.stage``.
        params: Resolved parameters, logged as ``cfg.{name}``.
        target: Tag ``foxnas.target``.
        space: Tag ``foxnas.space``.
        latency_source: Tag ``foxnas.latency_source``: ``measured`` or ``cost_model``.
        tags: Further tags.

    Yields:
        The run. An exception ends it as FAILED, SIGTERM and Ctrl-C as KILLED.
    """
    values = {
        # A run that `mlflow run` has made began in a process without this package.
        **FoxnasRunContext().tags(),
        "foxnas.stage": stage,
        "foxnas.version": __version__,
        PROCESS_TAG: process_identity(),
        **({} if target is None else {"foxnas.target": target}),
        **({} if space is None else {"foxnas.space": space}),
        **({} if latency_source is None else {"foxnas.latency_source": latency_source}),
        **(tags or {}),
    }
    values = {key: redacted(value) for key, value in values.items()}
    # A run inside a run (the pipeline's steps) is nested. Tags are part of its creation: a kill
    # leaves no run without them.
    parent = mlflow.active_run()
    nested = parent is not None
    if not nested:
        _open_database_file(mlflow.get_tracking_uri())
        _check_system_metrics()
    # A run that `mlflow run` made has its name already.
    named = nested or "MLFLOW_RUN_ID" not in os.environ
    active = _started(_run_name(stage, target) if named else None, parent, values)
    if not named and _is_random(active.info.run_name):
        best_effort(MlflowClient().update_run)(active.info.run_id, name=_run_name(stage, target))
    if not nested:
        best_effort(end_dead_runs)(active.info.experiment_id)
    status = "FINISHED"
    try:
        with _sigterm_raises(), tempfile.TemporaryDirectory(prefix="foxnas-") as directory:
            run = EntryRun(active.info.run_id, active.info.experiment_id, Path(directory))
            run.log_params(params)
            try:
                yield run
            finally:
                for action in run.at_end:
                    best_effort(action)()
    except (Terminated, KeyboardInterrupt) as error:
        status = "KILLED"
        if isinstance(error, Terminated) and not nested:
            raise SystemExit(143) from None
        raise
    except BaseException:
        status = "FAILED"
        raise
    finally:
        mlflow.end_run(status)


def _started(name: str | None, parent: mlflow.ActiveRun | None, tags: Mapping[str, str]) -> mlflow.ActiveRun:
    """MLflow's own start of a run, in an experiment that others may make at the same moment.

    One inside another belongs to the experiment of that one, whatever the environment names.
    """
    start = functools.partial(
        mlflow.start_run,
        run_name=name,
        nested=parent is not None,
        experiment_id=None if parent is None else parent.info.experiment_id,
        tags=dict(tags),
    )
    try:
        return start()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return start()


def end_dead_runs(experiment_id: str) -> list[str]:
    """End the runs whose process is gone as KILLED, which a SIGKILL or a power cut leaves RUNNING."""
    client = MlflowClient()
    ended = []
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        if is_dead(run.data.tags.get(PROCESS_TAG, "")):
            client.set_terminated(run.info.run_id, "KILLED")
            ended.append(run.info.run_id)
    return ended


def _is_random(name: str | None) -> bool:
    """Whether MLflow drew a run's name from its words, as it does where nobody gives one: nebulous-cat-147."""
    found = re.fullmatch(r"([a-z]+)-([a-z]+)-\d{1,3}", name or "")
    words = (getattr(name_utils, f"_GENERATOR_{kind}", ()) for kind in ("PREDICATES", "NOUNS"))
    return found is not None and all(word in known for word, known in zip(found.groups(), words, strict=True))


def _run_name(stage: str, target: str | None) -> str:
    """A name that says what the run is, in place of MLflow's random words."""
    return stage if target is None else f"{stage} {target}"


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into `Terminated` in the main thread while the block runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _open_database_file(uri: str) -> None:
    """Let MLflow make the tables of a new SQLite file, one process at a time: two at once leave it half made for ever.

    Raises:
        InvalidInputError: If the file cannot be opened, which MLflow would try for 100 seconds.
    """
    if not uri.startswith("sqlite:///") or not (name := uri.removeprefix("sqlite:///").partition("?")[0]):
        return
    path = Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as store:
            store.execute("PRAGMA schema_version")
        lock = path.with_name(f".{path.name}.lock")
        with in_turn(lock):
            MlflowClient(uri)
            # Whoever still waits for the lock finds the tables made, and so does whoever makes a lock of that name.
            lock.unlink(missing_ok=True)
    except (OSError, sqlite3.Error) as error:
        raise InvalidInputError(
            f"the tracking store must be a database file that can be opened ({error})",
            received=f"{uri}: {path.absolute()}",
            remedy="check MLFLOW_TRACKING_URI and the rights of the directory",
        ) from None


def _check_system_metrics() -> None:
    """Refuse, before MLflow makes a run that it could not begin, system metrics without the package they need."""
    if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get() and importlib.util.find_spec("psutil") is None:
        raise MissingDependencyError(
            "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING needs the package 'psutil', which is not installed",
            remedy="install it with: pip install psutil, or unset that variable",
        )


def download_artifact(run_id: str, path: str, directory: str | Path) -> Path:
    """Download an artifact of a run, or a directory of them.

    MLflow's own function says the same of an artifact that is not there, a missing right and a server that fails.

    Args:
        run_id: The run.
        path: Path among its artifacts.
        directory: Where to put it; it is made if there is none.

    Raises:
        MlflowException: If it is not there, or the server refuses or fails.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    place = MlflowClient().get_run(run_id).info.artifact_uri
    return Path(get_artifact_repository(place).download_artifacts(path, str(directory)))


def best_effort(action: Callable[P, object]) -> Callable[P, None]:
    """Let hours of work survive a tracking server that is away: say so once and go on.

    For what can be done without (a metric of one step, a copy of a checkpoint that is on disk, a text).
    """
    told = False

    @functools.wraps(action)
    def attempt(*args: P.args, **kwargs: P.kwargs) -> None:
        nonlocal told
        try:
            action(*args, **kwargs)
        except (MlflowException, OSError) as error:
            if not told:
                told = True
                first = redacted(str(error).strip().splitlines()[0])
                print(
                    f"foxnas: the tracking server did not take everything: {first}; the work goes on.", file=sys.stderr
                )

    return attempt
