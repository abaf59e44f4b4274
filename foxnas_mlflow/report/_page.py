"""The look that all pages share: one self-contained HTML file with plots, tables and sections."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup, escape

from foxnas_mlflow._version import __version__
from foxnas_mlflow.core.errors import import_or_raise
from foxnas_mlflow.core.redaction import redacted

BLUE, GREEN, ORANGE, RED = "#1f5fa8", "#2a9d8f", "#c77d1a", "#c0392b"
"""Colours of what is drawn."""


def write_page(path: Path, *, title: str, lead: str, sections: Sequence[tuple[str, str]]) -> None:
    """Write a page that needs nothing but itself.

    Args:
        path: File to write.
        title: Its title.
        lead: Its first paragraph.
        sections: Heading and content of each section. Whatever is no `Markup` is text, and is escaped.

    Raises:
        MissingDependencyError: If plotly is not installed.
    """
    offline = import_or_raise("plotly.offline", extra="report", feature="a report")
    page = _template("page.html").render(
        title=title,
        lead=_redacted(lead),
        sections=[(heading, _redacted(content)) for heading, content in sections],
        plotly=offline.get_plotlyjs(),
        version=__version__,
    )
    path.write_text(page, encoding="utf-8")


def fill(words: str, *parts: object, **values: object) -> Markup:
    """Words of a page with values in their places, as `str.format`; values that are no `Markup` are escaped."""
    return Markup(words).format(*parts, **values)  # noqa: S704 - words of this package


def _redacted(text: str) -> Markup:
    return Markup(redacted(escape(text)))  # noqa: S704 - escaped before


@functools.cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(name)


def scatter(x: Any, y: Any, name: str, colour: str, size: int) -> dict[str, Any]:
    """Markers at (x, y), as a plotly trace."""
    return {
        "x": [round(float(v), 6) for v in x],
        "y": [round(float(v), 6) for v in y],
        "mode": "markers",
        "name": name,
        "marker": {"size": size, "color": colour},
    }


def axes_layout(x: str, y: str) -> dict[str, Any]:
    """The layout of a plot with the names of its axes."""
    return {
        "xaxis": {"title": {"text": x}, "gridcolor": "#e5e7eb", "zeroline": False},
        "yaxis": {"title": {"text": y}, "gridcolor": "#e5e7eb", "zeroline": False},
        "margin": {"l": 60, "r": 15, "t": 10, "b": 50},
        "legend": {"orientation": "h", "y": 1.12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
    }


def plot(name: str, figure: Mapping[str, Any], height: int = 420) -> Markup:
    """A plotly figure, its name unique on the page, its height in pixels."""
    return fill(
        '<div id="{name}" style="height:{height}px"></div>'
        "<script>(function(){{var f={data};"
        'Plotly.newPlot("{name}",f.data,f.layout,{{responsive:true,displayModeBar:false}});}})();</script>',
        name=name,
        height=height,
        data=htmlsafe_json_dumps(figure),
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A table that scrolls sideways where it does not fit."""
    head = Markup().join(fill("<th>{}</th>", h) for h in header)
    body = Markup().join(fill("<tr>{}</tr>", Markup().join(fill("<td>{}</td>", c) for c in row)) for row in rows)
    return fill('<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>', head, body)


def link(url: str, text: str) -> Markup:
    """A link to an http address; the text alone for any other."""
    if not url.startswith(("http://", "https://")):
        return escape(text)
    return fill('<a href="{}">{}</a>', url, text)
