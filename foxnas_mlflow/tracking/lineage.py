"""From a version back to its images, and forward to all that was made of it: read from tags and runs alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from foxnas_mlflow.core.redaction import redacted
from foxnas_mlflow.flavor import model_id_of
from foxnas_mlflow.tracking.inputs import is_uri, run_in
from foxnas_mlflow.tracking.promotion import held
from foxnas_mlflow.tracking.registry import (
    add_facts,
    find_version,
    is_version,
    list_versions,
    name_and_number,
    version_uri,
)

LOCAL_UI = "http://127.0.0.1:5000"
"""Where `mlflow ui` answers by default."""

_PARENTS = ("supernet", "predictors", "subnet", "finetuned_from", "int8_model")
"""Tags of a version that name versions which it was made from."""


@dataclass(frozen=True, slots=True)
class Ancestor:
    """Something that a version was made from or measured on.

    Attributes:
        what: ``data``, ``supernet``, ``rows``, ``predictors``, ``search``, ``subnet``, ``file``, ``benchmark``,
            ``board``.
        name: Its URI, or its name.
        url: Its address in MLflow's pages, or empty.
        note: What is known of it, or that it is gone.
    """

    what: str
    name: str
    url: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a version is from, and what came of it.

    Attributes:
        uri: The version.
        ancestors: From the images to the board, in the order of making.
        descendants: URIs of the versions that were made from it, with their addresses.
    """

    uri: str
    ancestors: tuple[Ancestor, ...]
    descendants: Mapping[str, str]


def trace(model: str) -> Lineage:
    """Follow a version's tags and runs.

    Args:
        model: As for `find_version`.

    Raises:
        InvalidInputError: If it names no version.
        MlflowException: If the registry cannot be asked.
    """
    version = find_version(model)
    uri = version_uri(version.name, version.version)
    line = dict(_line(version))
    tags: dict[str, str] = {}
    for found in reversed(line.values()):
        tags |= found.tags
    return Lineage(uri, tuple(_ancestors(version, line, tags)), _descendants(version, uri))


def draw(line: Lineage) -> None:
    """Write a lineage as a chain of links to the page of its version; a registry that takes no text stops nothing."""
    links = [
        # Relative to MLflow's one page, which may lie behind a prefix of the path.
        f"[{ancestor.what}: {ancestor.name}](#{ancestor.url.partition('/#')[2]})"
        if ancestor.url
        else f"{ancestor.what}: {ancestor.name}"
        for ancestor in line.ancestors
    ]
    add_facts(*name_and_number(line.uri), {"lineage": " → ".join(links)})


def _line(version: ModelVersion) -> Iterator[tuple[str, ModelVersion]]:
    """The version, and versions that it was made from: a file's twin and subnet, the subnet that was finetuned."""
    what = "subnet" if "search_run" in version.tags and "subnet" not in version.tags else "version"
    yield ("file" if "subnet" in version.tags else what), version
    for key, role in (("int8_model", "int8 file"), ("subnet", "subnet"), ("finetuned_from", "shared subnet")):
        parent = _version(version.tags.get(key, ""))
        if parent is not None:
            yield role, parent
            if key == "subnet" and (shared := _version(parent.tags.get("finetuned_from", ""))) is not None:
                yield "shared subnet", shared


def _ancestors(version: ModelVersion, line: Mapping[str, ModelVersion], tags: Mapping[str, str]) -> Iterator[Ancestor]:
    if "data" in tags:
        yield Ancestor("data", tags["data"], note=f"digest {tags.get('data_digest', 'unknown')[:16]}")
    supernet = tags.get("supernet", "")
    if supernet:
        yield _named("supernet", supernet)
    predictors = tags.get("predictors", "")
    source = tags.get("source", "")
    if predictors:
        found = _version(predictors)
        source = "" if found is None else found.tags.get("source", "")
    if source:
        yield _named("rows", source)
    if predictors:
        yield _named("predictors", predictors)
    if "search_run" in tags:
        yield _named("search", f"runs:/{tags['search_run']}")
    for what in ("shared subnet", "subnet", "int8 file", "file", "version"):
        if what in line:
            yield _named(what, version_uri(line[what].name, line[what].version))
    yield from _measured(version)


def _measured(version: ModelVersion) -> Iterator[Ancestor]:
    """The benchmark that counts for a promotion, and its board."""
    if model_id_of(version) is None:
        return
    candidate = held(version.name, str(version.version))
    measured = candidate.benchmark
    if measured is None:
        return
    latency = f"p90 {candidate.latency_ms:.4g} ms" if candidate.latency_ms is not None else ""
    yield _named("benchmark", f"runs:/{measured.run_id}", note=latency)
    yield Ancestor("board", measured.machine or "unknown", note="emulated" if measured.emulated else "")


def _named(what: str, name: str, note: str = "") -> Ancestor:
    """An ancestor by its URI, with its page; one that is gone says so."""
    run_id = run_in(name)
    if run_id is not None:
        run = _run(run_id)
        return Ancestor(what, name, "" if run is None else page_of_run(run), note if run is not None else "is gone")
    if not is_uri(name):
        return Ancestor(what, redacted(name), note=note)
    version = _version(name)
    if version is None:
        return Ancestor(what, redacted(name), note="is gone")
    aliases = ", ".join(f"@{alias}" for alias in version.aliases)
    return Ancestor(what, name, page_of_version(version), ", ".join(filter(None, (aliases, note))))


def _descendants(version: ModelVersion, uri: str) -> dict[str, str]:
    client, found = MlflowClient(), {}
    for key in _PARENTS:
        for child in client.search_model_versions(f"tags.{key} = '{uri}'"):
            found[version_uri(child.name, child.version)] = page_of_version(child)
    return dict(sorted(found.items()))


def _version(uri: str) -> ModelVersion | None:
    """A registered version; None where there is none, or it was deleted."""
    if not is_version(uri):
        return None
    name, number = name_and_number(uri)
    if not any(str(version.version) == number for version in list_versions(name)):
        return None
    return MlflowClient().get_model_version(name, number)


def _run(run_id: str) -> Run | None:
    try:
        return mlflow.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def page_of_run(run: Run) -> str:
    """Address of a run in MLflow's pages."""
    return f"{_base()}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def page_of_version(version: ModelVersion) -> str:
    """Address of a version in MLflow's pages."""
    return f"{_base()}/#/models/{version.name}/versions/{version.version}"


def _base() -> str:
    server = redacted(mlflow.get_tracking_uri())
    return server.rstrip("/") if server.startswith(("http://", "https://")) else LOCAL_UI
