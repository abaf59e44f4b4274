"""The look that all pages share: one self-contained HTML file with plots, tables and sections."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foxnas_mlflow._version import __version__
from foxnas_mlflow.core.errors import import_or_raise
from foxnas_mlflow.core.redaction import redacted


def write_page(path: Path, *, title: str, lead: str, sections: Sequence[tuple[str, str]]) -> None:
    """Write a page that needs nothing but itself.

    Args:
        path: File to write.
        title: Its title, as text.
        lead: Its first paragraph, as HTML.
        sections: Heading (text) and content (HTML) of each section.

    Raises:
        MissingDependencyError: If plotly is not installed.
    """
    offline = import_or_raise("plotly.offline", extra="report", feature="a report")
    body = "".join(f"<section><h2>{escape(heading)}</h2>{content}</section>" for heading, content in sections)
    page = _PAGE.format(
        title=escape(title),
        sentence=redacted(lead),
        body=redacted(body),
        plotly=offline.get_plotlyjs(),
        version=escape(__version__),
    )
    path.write_text(page, encoding="utf-8")


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


def plot(name: str, figure: Mapping[str, Any], height: int = 420) -> str:
    """A plotly figure, its name unique on the page, its height in pixels."""
    # A closing tag inside the data could end the script element.
    data = json.dumps(figure).replace("</", "<\\/")
    return (
        f'<div id="{name}" style="height:{height}px"></div>'
        f"<script>(function(){{var f={data};"
        f'Plotly.newPlot("{name}",f.data,f.layout,{{responsive:true,displayModeBar:false}});}})();</script>'
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways where it does not fit; cells are text."""
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(text: object) -> str:
    """Text for HTML; what is HTML already stays."""
    return str(text) if isinstance(text, Markup) else html.escape(str(text))


def link(url: str, text: str) -> Markup:
    """A link to an http address; the text alone for any other."""
    shown = html.escape(text)
    if not url.startswith(("http://", "https://")):
        return Markup(shown)
    return Markup(f'<a href="{html.escape(url, quote=True)}">{shown}</a>')


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1d2430; background: #fafbfc; margin: 0; }}
main {{ max-width: 1000px; margin: 0 auto; padding: 1rem; }}
section {{ background: #fff; border: 1px solid #e5e7eb; border-radius: 8px;
  padding: 0.5rem 1rem 1rem; margin: 1rem 0; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; }} h3 {{ font-size: 1rem; }}
.lead {{ font-size: 1.1rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.9rem; margin: 0.5rem 0; }}
th, td {{ text-align: left; padding: 0.25rem 0.9rem 0.25rem 0; border-bottom: 1px solid #eef0f3; white-space: nowrap; }}
td:not(:first-child) {{ font-variant-numeric: tabular-nums; }}
.pair {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); }}
.pair > div {{ min-width: 0; }}
.stages {{ display: flex; flex-wrap: wrap; gap: 0.8rem 2rem; }} .stage {{ max-width: 100%; }}
.stage svg {{ max-width: 100%; height: auto; }} .stage rect {{ fill: #dbe8f6; stroke: #1f5fa8; }}
.stage text {{ font: 12px system-ui, sans-serif; text-anchor: middle; fill: #1d2430; }}
li, p {{ overflow-wrap: anywhere; }}
</style><script>{plotly}</script></head>
<body><main><h1>{title}</h1><p class="lead">{sentence}</p>{body}
<footer><small>foxnas-mlflow {version}</small></footer></main></body></html>
"""
