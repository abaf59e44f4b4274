"""Steps of a pipeline that are found again instead of done again.

A step is a nested run that carries the digest of everything that its result depends on. It counts
as done when its run is FINISHED, says what it made, and all of that is still there: versions with
their files, artifacts. A run that a kill left behind is ended and offered to the step, which goes on
from what it left (a checkpoint, measured rows); a version that it registered is withdrawn before.

| tag of a step's run   | meaning                                                          |
|-----------------------|------------------------------------------------------------------|
| foxnas.step_digest    | SHA-256 of name, inputs and format of the step                   |
| foxnas.step_outputs   | JSON: the versions that the step made or used; set when it is done |
| foxnas.step_artifacts | JSON: names at the root of the run's artifacts when it was done  |
| foxnas.process        | host, process id and its start: tells a running run from a dead  |

What the step returned is the artifact ``outputs.json``: a tag is cut off after 8,000 characters. Runs recorded before
have it in the tag ``foxnas.step_outputs`` itself, a JSON object.
"""

from __future__ import annotations

import functools
import json
import logging
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from foxnas_mlflow.core.files import json_digest
from foxnas_mlflow.tracking.claims import Claims
from foxnas_mlflow.tracking.process import PROCESS_TAG, is_here
from foxnas_mlflow.tracking.registry import has_files, is_version, withdraw
from foxnas_mlflow.tracking.run import EntryRun, best_effort, download_artifact

DIGEST_TAG = "foxnas.step_digest"
OUTPUTS_TAG = "foxnas.step_outputs"
ARTIFACTS_TAG = "foxnas.step_artifacts"
OUTPUTS_FILE = "outputs.json"

_WAIT_SECONDS = (1.0, 4.0)

logger = logging.getLogger("foxnas_mlflow")

_FORMAT = 2
"""Raised when what a step's inputs mean changes; results of earlier releases are then made anew."""


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: Its name.
        inputs: Everything that its result depends on, JSON values: parameters, content of data and
            of files, runs of the steps before it.
    """

    name: str
    inputs: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 that identifies the step's result."""
        return json_digest({"format": _FORMAT, "step": self.name, "inputs": dict(self.inputs)})


@dataclass(frozen=True)
class StepResult:
    """A step that is done.

    Attributes:
        name: Name of the step.
        run_id: Its run.
        outputs: What it made: names to URIs and figures.
        reused: Whether an earlier run did it.
        seconds: Time that it took in this process.
    """

    name: str
    run_id: str
    outputs: Mapping[str, Any]
    reused: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "name": self.name,
            "run_id": self.run_id,
            "outputs": dict(self.outputs),
            "reused": self.reused,
            "seconds": self.seconds,
        }


class Action(Protocol):
    """Does a step in one nested run and returns its outputs as JSON values, ``run_id`` among them."""

    def __call__(self, cut_off: Sequence[str], tags: Mapping[str, str]) -> Mapping[str, Any]:
        """Do it.

        Args:
            cut_off: Runs of the same step that did not come to its end, newest first.
            tags: Tags that its run must have.
        """
        ...


def run_step(
    parent: EntryRun, step: Step, action: Action, *, holds: Callable[[Mapping[str, Any]], bool] = lambda outputs: True
) -> StepResult:
    """Find a step's result, wait for the pipeline that works on it, or do it.

    Args:
        parent: The pipeline's run.
        step: The step.
        action: Does it.
        holds: Whether a finished result is still valid; a run whose result is not counts as cut off.
    """
    start = time.monotonic()
    client, digest = MlflowClient(), step.digest
    claims, told = Claims(parent.run_id, parent.experiment_id), ""
    while True:
        if (found := _find(client, parent, digest, holds)) is not None:
            return StepResult(step.name, *found, True, time.monotonic() - start)
        if (other := claims.take(digest)) is None:
            break
        if other.info.run_id != told:
            told = other.info.run_id
            host = other.data.tags.get(PROCESS_TAG, "").partition(" ")[0]
            logger.info("== %s: run %s on %s works on it; waiting for its result", step.name, told, host or "a host")
        # Of random length, so that two that stepped back before each other do not do it again.
        time.sleep(random.uniform(*_WAIT_SECONDS))
    try:
        # Another may have finished it between the look and the claim.
        if (found := _find(client, parent, digest, holds)) is not None:
            return StepResult(step.name, *found, True, time.monotonic() - start)
        # Who works on the step has claimed it, and the claim is this run's: what still runs was left behind.
        cut_off = _runs(client, parent, digest)
        for run in cut_off:
            if run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, "KILLED")
            _adopt(client, run, parent)
            if OUTPUTS_TAG not in run.data.tags:
                withdraw(run.info.run_id, is_used=functools.partial(_is_output, client, parent))
        outputs = dict(action([run.info.run_id for run in cut_off], {DIGEST_TAG: digest}))
        run_id = str(outputs["run_id"])
        client.log_dict(run_id, outputs, OUTPUTS_FILE)
        client.set_tag(run_id, ARTIFACTS_TAG, json.dumps(sorted(_names(client, run_id))))
        client.set_tag(run_id, OUTPUTS_TAG, json.dumps([text for text in _texts(outputs) if is_version(text)]))
    finally:
        # The end of this run ends the claim too, should the server be away now.
        best_effort(claims.release)()
    return StepResult(step.name, run_id, outputs, False, time.monotonic() - start)


def param_of(run_id: str, name: str) -> str:
    """What a step's run was given for one of its parameters."""
    value: str = MlflowClient().get_run(run_id).data.params.get(f"cfg.{name}", "")
    return value


def was_begun(parent: EntryRun, step: Step) -> bool:
    """Whether a pipeline began with the step, whatever became of it."""
    return bool(_runs(MlflowClient(), parent, step.digest))


def _runs(client: MlflowClient, parent: EntryRun, digest: str) -> list[Run]:
    """Runs of the step, the newest first."""
    return list(
        client.search_runs(
            [parent.experiment_id], f"tags.`{DIGEST_TAG}` = '{digest}'", order_by=["attributes.start_time DESC"]
        )
    )


def _find(
    client: MlflowClient, parent: EntryRun, digest: str, holds: Callable[[Mapping[str, Any]], bool]
) -> tuple[str, dict[str, Any]] | None:
    """Run and outputs of the step where it is done."""
    for run in _runs(client, parent, digest):
        outputs = _outputs(client, run)
        if outputs is not None and holds(outputs):
            _adopt(client, run, parent)
            return run.info.run_id, outputs
    return None


def _outputs(client: MlflowClient, run: Run) -> dict[str, Any] | None:
    """What a finished step made, or None when it is not finished or something of it was deleted."""
    text = run.data.tags.get(OUTPUTS_TAG)
    if run.info.status != "FINISHED" or text is None:
        return None
    try:
        expected = set(json.loads(run.data.tags.get(ARTIFACTS_TAG, "[]")))
        if not expected <= _names(client, run.info.run_id):
            return None
        outputs: dict[str, Any] = json.loads(text if text.startswith("{") else _outputs_file(run.info.run_id))
    except ValueError:
        # A tag that was cut off.
        return None
    return outputs if all(_exists(client, text) for text in _texts(outputs)) else None


def _outputs_file(run_id: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="foxnas-") as directory:
        return download_artifact(run_id, OUTPUTS_FILE, directory).read_bytes()


def _texts(value: object) -> Iterator[str]:
    """The texts in JSON values, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, Sequence):
        for one in value:
            yield from _texts(one)


def _exists(client: MlflowClient, value: str) -> bool:
    """Whether a registered version or an artifact that a result names is there; any other text always is."""
    if value.startswith("runs:/") and value.count("/") > 1:
        run_id, _, path = value.removeprefix("runs:/").partition("/")
        return any(file.path == path for file in client.list_artifacts(run_id, path.rpartition("/")[0] or None))
    return not is_version(value) or has_files(client, value)


def _is_output(client: MlflowClient, parent: EntryRun, uri: str) -> bool:
    """Whether a step that is done made or uses the version of a URI."""
    # Quotes end the text of a filter, and JSON escapes them and whatever is not ASCII.
    like = re.sub(r"[^\w:/. -]", "%", uri, flags=re.ASCII)
    runs = client.search_runs([parent.experiment_id], f"tags.`{OUTPUTS_TAG}` LIKE '%{like}%'")
    return any(json.dumps(uri) in run.data.tags[OUTPUTS_TAG] for run in runs)


def _names(client: MlflowClient, run_id: str) -> set[str]:
    return {file.path for file in client.list_artifacts(run_id)}


def _adopt(client: MlflowClient, run: Run, parent: EntryRun) -> None:
    """Show a step below this pipeline when the pipeline that it began in will never finish."""
    before = run.data.tags.get(MLFLOW_PARENT_RUN_ID)
    if before is None or before == parent.run_id:
        return
    try:
        status = client.get_run(before).info.status
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            return
        status = "FAILED"
    if status in ("FAILED", "KILLED"):
        client.set_tag(run.info.run_id, MLFLOW_PARENT_RUN_ID, parent.run_id)


def has_artifact(run_id: str, path: str) -> bool:
    """Whether a run has an artifact at a path of its artifact root."""
    return any(file.path == path for file in MlflowClient().list_artifacts(run_id))


def began_here(run_id: str) -> bool:
    """Whether a run's process was one of this host's."""
    return is_here(MlflowClient().get_run(run_id).data.tags.get(PROCESS_TAG, ""))
