"""Registered models: their names, versions, tags and figures."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import mlflow
from mlflow import MlflowClient
from mlflow.artifacts import list_artifacts
from mlflow.entities import Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models.model import MLMODEL_FILE_NAME

from foxnas_mlflow.core.addresses import UNKNOWN_HOST
from foxnas_mlflow.core.errors import InvalidInputError, RegistrationError
from foxnas_mlflow.core.redaction import redacted
from foxnas_mlflow.tracking.run import EntryRun, best_effort

logger = logging.getLogger("foxnas_mlflow")

_CODES = {"401": "UNAUTHENTICATED", "403": "PERMISSION_DENIED", "404": "RESOURCE_DOES_NOT_EXIST"}

_RIGHTS = ("permission", "readonly", "read-only", "denied", "privilege", "forbidden", "unauthor", "not authorized")

_ANSWER = re.compile(r"(\d{3}) (?:Client|Server) Error: (.*?) for url: \w+://[^/]*/(\S+?)(?:\. Response text: (.*))?$")
"""An HTTP answer about an artifact: status, its name, path, and what the server says."""


def registered_name(prefix: str, kind: str, target: str = "") -> str:
    """Name of the registered model of a kind.

    Args:
        prefix: The parameter ``name`` of every entry point, default ``foxnas``.
        kind: Kind of the model.
        target: Name of the target; a supernet has none.

    Raises:
        InvalidInputError: If the name has ``/`` or ``:``, which MLflow's URIs use.
    """
    parts = {
        "supernet": (prefix, "supernet"),
        "predictors": (prefix, "predictors", target),
        "subnet": (prefix, "subnet", target),
        "tflite": (prefix, target),
        "edgetpu": (prefix, target, "edgetpu"),
    }
    check_name(prefix)
    return check_name("-".join(parts[kind]))


def check_name(name: str) -> str:
    """Return a name that a registered model can have.

    Raises:
        InvalidInputError: If it cannot.
    """
    if not name.strip() or name != name.strip() or "/" in name or ":" in name:
        raise InvalidInputError(
            "a registered model's name is not empty, has no '/' or ':', and no space at its ends", received=repr(name)
        )
    return name


def register(
    model_uri: str,
    name: str,
    kind: str,
    *,
    tags: Mapping[str, object],
    facts: Mapping[str, object],
    command: Callable[[str], str],
) -> str:
    """Register a logged model as a new version that says what it is.

    Log its figures before: a registry may refuse, and what is logged stays.

    Args:
        model_uri: ``models:/<model id>`` (`ModelInfo.model_uri`).
        name: Name of the registered model; it is made if there is none.
        kind: Kind of the model.
        tags: Tags of the version.
        facts: Rows of its page, see `describe_version`.
        command: What to type next, given the version's URI.

    Returns:
        URI of the version.

    Raises:
        InvalidInputError: If the name cannot be one.
        RegistrationError: If the registry refuses.
    """
    check_name(name)
    values = {key: redacted(str(value)) for key, value in tags.items()}
    if (run := mlflow.active_run()) is not None:
        values[REGISTERED_BY] = run.info.run_id
    try:
        version = mlflow.register_model(model_uri, name, tags=values)
    except MlflowException as error:
        kept = f"the run is kept, and the model in it as {model_uri}"
        if lacks_right(error):
            raise RegistrationError(
                "registering a model needs the right to change the registered model of its name",
                received=f"{name}: {reason(error)}",
                remedy=f"{kept}; ask for that right, or register under another --name",
            ) from error
        raise RegistrationError(
            "the registry must take a finished model",
            received=f"{name}: {reason(error)}",
            remedy=f"{kept}; register it once the registry answers",
        ) from error
    uri = version_uri(name, version.version)
    describe_version(name, version.version, kind, facts=facts, command=command(uri))
    return uri


def withdraw(run_id: str, *, is_used: Callable[[str], bool]) -> None:
    """Delete the versions that a run registered before it was cut off: what does its work again registers its own.

    Their files stay, as models of the run. A version stays too that has an alias or a stage, or is used, and where
    this user may not delete it.

    Args:
        run_id: The run.
        is_used: Whether the version of a URI is part of a finished result.

    Raises:
        MlflowException: If the registry does not answer.
    """
    client = MlflowClient()
    try:
        for found in client.search_model_versions(f"tags.`{REGISTERED_BY}` = '{run_id}'"):
            uri = version_uri(found.name, found.version)
            # What a user registered again or copied is the user's; a copy has the tags of the version it is of.
            if not (found.source or "").startswith("models:/m-"):
                continue
            version = client.get_model_version(found.name, str(found.version))
            if version.aliases or (version.current_stage or "None") != "None" or is_used(uri):
                logger.info("%s stays: it was registered by a run that was cut off, and is in use", uri)
                continue
            client.delete_model_version(found.name, str(found.version))
            logger.info("%s is withdrawn: the run that registered it was cut off", uri)
    except MlflowException as error:
        if is_away(error):
            raise
        logger.info("versions of run %s, which was cut off, stay: %s", run_id, reason(error))


def check_rights(run: EntryRun, names: Mapping[str, str]) -> None:
    """Refuse before the work what the server would refuse after it: logging models, and registering under these names.

    A name that is free is made, without a version; one that is there is marked with the run.

    Args:
        run: The open run.
        names: Kinds of the registered models, by their names.

    Raises:
        RegistrationError: If the server keeps no logged models, or this user may not register.
    """
    client = MlflowClient()
    try:
        client.search_logged_models([run.experiment_id], max_results=1)
    except MlflowException as error:
        if is_away(error) or lacks_right(error):
            raise
        raise RegistrationError(
            "the tracking server must keep logged models, as MLflow 3 does",
            received=reason(error),
            remedy="update the server",
        ) from error
    for name, kind in names.items():
        try:
            if not _is_registered(client, name):
                _create(client, name, kind)
            _mark(client, name, run.run_id)
        except MlflowException as error:
            if not lacks_right(error):
                raise
            raise RegistrationError(
                "registering a model needs the right to change the registered model of its name",
                received=f"{name}: {reason(error)}",
                remedy="nothing was done; ask for that right, or register under another --name",
            ) from error


def _is_registered(client: MlflowClient, name: str) -> bool:
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def _mark(client: MlflowClient, name: str, run_id: str) -> None:
    try:
        client.set_registered_model_tag(name, "foxnas.last_run", run_id)
    except MlflowException as error:
        if lacks_right(error):
            raise
        # Of several that set a new tag at once, a SQL store refuses all but one; what is there can be set by all.
        client.set_registered_model_tag(name, "foxnas.last_run", run_id)


def _create(client: MlflowClient, name: str, kind: str) -> None:
    try:
        client.create_registered_model(name, description=_WHAT[kind])
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def code_of(error: Exception) -> str:
    """MLflow's code of a refusal; for artifacts its client raises the errors of HTTP answers, which have none."""
    answer = re.search(r"\b(40[134]) Client Error: ", str(error))
    return _CODES[answer[1]] if answer is not None else str(getattr(error, "error_code", ""))


def lacks_right(error: Exception) -> bool:
    """Whether a server refused because of who asks; some stores say so in words alone."""
    text = str(error).lower()
    if UNKNOWN_HOST in text:
        return False
    return code_of(error) in ("PERMISSION_DENIED", "UNAUTHENTICATED") or any(word in text for word in _RIGHTS)


def reason(error: Exception) -> str:
    """The first line of a refusal, without the address that a client asked and the status that it expected."""
    first, *others = redacted(str(error)).strip().splitlines()
    if first.startswith("The following failures occurred while downloading") and len(others) > 1:
        # A heading of each file, and what became of it.
        first = others[1]
    if (answer := _ANSWER.match(first)) is not None:
        status, name, path, said = answer.groups()
        asked = re.sub(r"^.*?\b(mlflow|mlflow-artifacts)/", "", path.partition("?")[0])
        return f"{asked}: HTTP {status}: {_said(said or '') or name}"
    if (missing := re.match(r"Failed to download artifacts from path '(.*?)'", first)) is not None:
        # MLflow says this of whatever happened when an artifact of a run was asked for.
        return f"{missing[1]} could not be downloaded: it is not there, or the server failed"
    found = re.fullmatch(r"API request to endpoint (\S+) failed with error code (\d+) .*Response body: '(.*)'", first)
    if found is not None:
        return f"{found[1].rpartition('/mlflow/')[2]}: HTTP {found[2]}: {found[3]}"
    found = re.match(r"API request to (\S+) failed with exception (.*)", first)
    if found is None:
        return first
    asked = re.sub(r"^\w+://[^/]*(/\S*?)?/(mlflow|mlflow-artifacts)/", "", found[1].partition("?")[0])
    if (status := re.search(r"too many (\d+) error responses", found[2])) is not None:
        return f"{asked}: HTTP {status[1]}, also when asked again"
    cause = re.search(r"Connection (refused|reset|aborted)|timed out|Name or service not known", found[2])
    return first if cause is None else f"{asked}: {cause[0]}"


def _said(body: str) -> str:
    """What the body of an answer says, if it is a line of text or MLflow's JSON."""
    try:
        return str(json.loads(body)["message"])
    except (ValueError, TypeError, KeyError):
        return "" if body.startswith(("<", "{")) else body


def is_away(error: Exception) -> bool:
    """Whether a server failed, or was not reached, rather than refused: asked later it may do it."""
    failed = r"failed with exception|failed with error code 5\d\d|\b5\d\d Server Error"
    return re.search(failed, str(error)) is not None


def find_version(model: str) -> ModelVersion:
    """The registered version that a user means.

    Args:
        model: ``models:/name/3``, ``models:/name@alias``, ``models:/name/Production`` (the alias
            ``production`` first, the stage second), ``models:/name`` or ``name`` (the newest).

    Raises:
        InvalidInputError: If it names no version; the message lists those that there are.
        MlflowException: If the registry cannot be asked.
    """
    text = model.strip().removeprefix("models:/").strip("/")
    name, at, alias = text.partition("@")
    selector = ""
    if not at:
        name, _, selector = text.partition("/")
    if "://" in model or model.startswith("runs:") or not name or ":" in text or "/" in alias + selector:
        raise InvalidInputError(
            "model must be a registered model: models:/name/3, models:/name@alias, models:/name or name", received=model
        )
    client = MlflowClient()
    versions = list_versions(name)
    number: str | None = selector
    if selector.lower() in ("staging", "production"):
        at, alias = "@", selector.lower()
    if at:
        number = _by_alias(client, name, alias)
        if number is None and selector:
            number = newest([v for v in versions if (v.current_stage or "").lower() == alias])
    elif selector in ("", "latest"):
        number = newest(versions)
    for version in versions:
        if str(version.version) == number:
            return client.get_model_version(name, number)
    known = ", ".join(str(number) for number in sorted(int(v.version) for v in versions))
    raise InvalidInputError(
        "model must name a registered version",
        received=model,
        remedy=f"{name} has the versions {known}" if known else f"no version of {name} is registered",
    )


def fixed_uri(uri: str) -> str:
    """The URI of the version that an alias, a stage or ``latest`` means now; anything else as it is.

    Raises:
        InvalidInputError: If it names no version.
        MlflowException: If the registry cannot be asked.
    """
    if not uri.startswith("models:/") or uri.startswith("models:/m-"):
        return uri
    version = find_version(uri)
    return version_uri(version.name, version.version)


def version_uri(name: str, number: str | int) -> str:
    """The URI of a version by its number."""
    return f"models:/{name}/{number}"


def name_and_number(uri: str) -> tuple[str, str]:
    """The registered model and the number that the URI of a version names."""
    name, _, number = uri.removeprefix("models:/").rpartition("/")
    return name, number


def named_latest(uri: str, name: str) -> bool:
    """Whether a URI means the newest version of a model, whichever that is."""
    return uri.rstrip("/") in (f"models:/{name}", f"models:/{name}/latest")


def is_version(text: str) -> bool:
    """Whether a text is the URI of a version by its number."""
    return re.fullmatch(r"models:/[^/]+/\d+", text) is not None


def has_files(client: MlflowClient, uri: str) -> bool:
    """Whether a version ``models:/name/version`` is registered and its files are there.

    Raises:
        MlflowException: If the server fails or refuses, which does not say that they are gone.
    """
    try:
        client.get_model_version(*name_and_number(uri))
        return any(file.path == MLMODEL_FILE_NAME for file in list_artifacts(artifact_uri=uri))
    except (MlflowException, OSError) as error:
        if is_away(error) or lacks_right(error):
            raise
        return False


def holds_stage(model_uri: str, stage: str) -> bool:
    """Whether the version ``models:/name/version`` has the alias of a stage."""
    name, number = name_and_number(model_uri)
    return _by_alias(MlflowClient(), name, stage.lower()) == number


def aliases_of(model_uri: str) -> list[str]:
    """The aliases of the version ``models:/name/version``."""
    return sorted(MlflowClient().get_model_version(*name_and_number(model_uri)).aliases)


def list_versions(name: str) -> list[ModelVersion]:
    """All versions of a registered model; none if there is no such model."""
    quote = '"' if "'" in name else "'"
    client = MlflowClient()
    versions: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(f"name={quote}{name}{quote}", page_token=token)
        versions += page
        token = page.token
        if not token:
            return versions


def newest(versions: Iterable[ModelVersion]) -> str | None:
    """The highest number, as text: it is an integer on some stores."""
    numbers = [int(version.version) for version in versions]
    return str(max(numbers)) if numbers else None


def _by_alias(client: MlflowClient, name: str, alias: str) -> str | None:
    try:
        return str(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"):
            return None
        raise


def tag_version(name: str, version: str | int, tags: Mapping[str, object]) -> None:
    """Set tags of a registered version."""
    client = MlflowClient()
    for key, value in tags.items():
        client.set_model_version_tag(name, str(version), key, redacted(str(value)))


_WHAT: Mapping[str, str] = {
    "supernet": "Supernet: one set of weights for every network of its search space.",
    "predictors": "Predictors: architectures in; accuracy (percent) and latency (ms) with intervals out.",
    "subnet": "Network found by a search: its architecture, its figures, and its weights if it was trained.",
    "tflite": "Int8 TensorFlow Lite classifier: images in, labels and probabilities out.",
    "edgetpu": "Int8 TensorFlow Lite classifier compiled for an Edge TPU: images in, labels and probabilities out.",
}


_CALLS: Mapping[str, tuple[str, ...]] = {
    "architectures": (
        "model = mlflow.pyfunc.load_model({uri!r})",
        "model.predict(pandas.DataFrame({{'architecture': [architecture.to_json()]}}))",
    ),
    "subnet": ("model = foxnas_mlflow.load_model({uri!r})  # model.architecture, model.weights",),
    "images": (
        "model = mlflow.pyfunc.load_model({uri!r})",
        "model.predict(pandas.DataFrame({{'image': [open('photo.jpg', 'rb').read()]}}))",
    ),
}
"""What to write to use a version, with its URI in place of {uri}, by what goes in."""

_INPUT = {
    "supernet": "architectures",
    "predictors": "architectures",
    "subnet": "subnet",
    "tflite": "images",
    "edgetpu": "images",
}

FACTS = "foxnas.facts"
"""Tag of a version: the rows of its page as a JSON object."""

REGISTERED_BY = "foxnas.run"
"""Tag of a version: the run that registered it."""

PREDICTORS_DIGEST = "predictors_digest"
"""Tag of a version of predictors: the digest of their content, so that the same ones are not registered again."""

PICTURE = "front"
"""Key of the row that is a picture, its value an address from `picture_of`."""


def describe_version(name: str, version: str | int, kind: str, *, facts: Mapping[str, object], command: str) -> None:
    """Write what a version is on its page: what it is, its figures, and the next command.

    The rows are kept as data in the tag `FACTS`: those that are there already stay unless a new one has
    their key. The registered model gets a description too. What somebody else has written stays. A
    registry that takes no text stops no work.

    Args:
        name: The registered model.
        version: The version.
        kind: Kind of the model.
        facts: Rows of the table; text as it is, numbers rounded for people.
        command: What to type next.
    """
    best_effort(_describe_version)(name, str(version), kind, facts, command)


def add_facts(name: str, version: str | int, facts: Mapping[str, object]) -> None:
    """Add rows to a version's page, whose next command stays. A registry that takes no text stops no work."""
    best_effort(_add_facts)(name, str(version), facts)


def _add_facts(name: str, version: str, facts: Mapping[str, object]) -> None:
    found = MlflowClient().get_model_version(name, version)
    kinds = {what: kind for kind, what in _WHAT.items()}
    first, _, _ = (found.description or "").partition("\n")
    if first in kinds:
        command = str(found.description).rpartition("Next:")[2].strip()
        _describe_version(name, version, kinds[first], facts, command)


def _describe_version(name: str, version: str, kind: str, facts: Mapping[str, object], command: str) -> None:
    client = MlflowClient()
    found = client.get_model_version(name, version)
    rows: dict[str, str] = json.loads(found.tags.get(FACTS, "{}"))
    rows |= {key: f"{value:.4g}" if isinstance(value, float) else redacted(str(value)) for key, value in facts.items()}
    client.set_model_version_tag(name, version, FACTS, json.dumps(rows))
    if not found.description or found.description.startswith(tuple(_WHAT.values())):
        client.update_model_version(name, version, description=_page(kind, rows, command, version_uri(name, version)))
    if not client.get_registered_model(name).description:
        client.update_registered_model(name, description=_WHAT[kind])


def _page(kind: str, rows: Mapping[str, str], command: str, uri: str) -> str:
    shown = {key: value for key, value in rows.items() if key != PICTURE}
    table = ["| | |", "|---|---|", *(f"| {_cell(key)} | {_cell(value)} |" for key, value in shown.items())]
    picture = [f"![{PICTURE}]({rows[PICTURE]})", ""] if PICTURE in rows else []
    calls = [f"    {line.format(uri=uri)}" for line in _CALLS[_INPUT[kind]]]
    lines = [_WHAT[kind], "", *table, "", *picture, "Use:", "", *calls, "", "Next:", "", f"    {command}"]
    return "\n".join(lines)


def picture_of(run_id: str, path: str) -> str:
    """The address of a run's picture for pages of the server that has it, wherever that is."""
    return f"get-artifact?path={path}&run_uuid={run_id}"


def shortened(words: Sequence[str], most: int = 12) -> str:
    """Many words as one text: the first ones, and how many there are."""
    return ", ".join(words[:most]) + (f", ... ({len(words)})" if len(words) > most else "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def metrics_of(model_id: str) -> list[Metric]:
    """Every value of every metric of a logged model, the newest last."""
    metrics = MlflowClient().get_logged_model(model_id).metrics or []
    return sorted(metrics, key=lambda metric: (metric.timestamp, metric.step))
