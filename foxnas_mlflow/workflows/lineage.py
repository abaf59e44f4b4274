"""Lineage: from a registered version back to its images, and forward to what was made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foxnas_mlflow.workflows._request import Request, parameter
from foxnas_mlflow.workflows._workflow import Result, Workflow

if TYPE_CHECKING:
    from foxnas_mlflow.tracking.lineage import Lineage


@dataclass(frozen=True, kw_only=True)
class LineageRequest(Request):
    """Which version; see `run_lineage`."""

    model: str = parameter(
        "", "Registered version: models:/foxnas-cpu@production, models:/foxnas-cpu/3, or a name.", positional=True
    )


@dataclass(frozen=True, kw_only=True)
class LineageResult(Result):
    """Where a version is from.

    Attributes:
        model_uri: The version.
        ancestors: By what they are (``data``, ``supernet``, ``rows``, ...): URI or name.
        descendants: URIs of versions that were made from it.
    """

    model_uri: str
    ancestors: Mapping[str, str]
    descendants: tuple[str, ...] = ()


def run_lineage(request: LineageRequest) -> LineageResult:
    """Tell where a version is from, draw it on the version's page, and tell what was made of it.

    Args:
        request: Which version.

    Raises:
        InvalidInputError: If it names no version.
        MlflowException: If the registry cannot be asked.
    """
    from foxnas_mlflow.tracking.lineage import draw, trace

    line = trace(request.model)
    draw(line)
    return LineageResult(
        run_id="",
        model_uri=line.uri,
        ancestors={ancestor.what: ancestor.name for ancestor in line.ancestors},
        descendants=tuple(line.descendants),
        summary=_summary(line),
    )


def _summary(line: Lineage) -> str:
    width = max(len(ancestor.name) for ancestor in line.ancestors)
    lines = [f"{line.uri}:"]
    for ancestor in line.ancestors:
        words = "  ".join(filter(None, (f"{ancestor.name:<{width}}", ancestor.note, ancestor.url)))
        lines.append(f"  {ancestor.what:<14}{words}".rstrip())
    for i, (uri, url) in enumerate(line.descendants.items()):
        lines.append(f"  {'' if i else 'made of it':<14}{uri:<{width}}  {url}")
    return "\n".join(lines)


WORKFLOW = Workflow(
    "lineage",
    "Tell where a registered version is from, step by step back to its images, and what was made of it.",
    LineageRequest,
    run_lineage,
    entry_point=False,
)
