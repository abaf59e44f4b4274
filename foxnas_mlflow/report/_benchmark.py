"""The page of a measurement: its figures, its single runs, and what became of them under load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from foxnas_mlflow.report._page import BLUE, GREEN, ORANGE, RED, axes_layout, fill, plot, table, write_page

_LONGEST = 2.0
"""Runs longer than so many medians are left out of the histogram."""

_DRAWN = {
    "latency (ms)": (("p50_ms", "median", BLUE), ("p90_ms", "p90", RED)),
    "temperature (C)": (("temperature_c", "temperature", ORANGE),),
    "clock (MHz)": (("frequency_mhz", "clock", GREEN),),
}
"""What is drawn below each other against the seconds: by axis the key of a window, name and colour of each line."""

_KNOWN = {True: "yes", False: "no", None: "unknown: the machine cannot tell"}


def write_benchmark_report(path: Path, *, model: str, target: str, benchmark: Mapping[str, Any]) -> None:
    """Write a self-contained page.

    Args:
        path: File to write.
        model: What was measured.
        target: Name of the target that it was measured for.
        benchmark: Content of ``benchmark.json``, with windows of a load.
    """
    lead = fill(
        "<b>{}</b> takes <b>{:.4g} ms</b> in the median on {}, and at the end of {:.0f} s of load without a pause at "
        "most <b>{:.4g} ms</b> in 90 % of the runs.",
        model,
        benchmark["latency_ms_p50"],
        benchmark["device"],
        benchmark["windows"][-1]["second"] + benchmark["windows"][-1]["seconds"],
        benchmark["sustained_p90_ms"],
    )
    if not benchmark["valid"]:
        lead += fill(" <b>These figures cannot be trusted: {}.</b>", "; ".join(benchmark["invalid_reasons"]))
    sections = [
        ("Figures", facts(benchmark)),
        ("Under load", under_load(benchmark)),
        ("Single runs", single_runs(benchmark)),
    ]
    write_page(path, title=f"FOX-NAS benchmark for {target}", lead=lead, sections=sections)


def facts(benchmark: Mapping[str, Any], more: Mapping[str, str] | None = None) -> Markup:
    """The figures as a table, with further rows; documents of earlier releases lack some."""
    rows = [
        ("machine", f"{benchmark['device']} ({benchmark['connection']})"),
        ("runtime", f"{benchmark['runtime']}, {benchmark['threads']} thread(s), batch {benchmark['batch']}"),
        ("median", f"{benchmark['latency_ms_p50']:.4g} ms of {benchmark['n_runs']} runs"),
        ("p90, p99", f"{benchmark['latency_ms_p90']:.4g} ms, {benchmark['latency_ms_p99']:.4g} ms"),
        *(more or {}).items(),
        ("peak memory", f"{benchmark['peak_memory_bytes'] / 2**20:.1f} MiB"),
        ("valid", "yes" if benchmark["valid"] else "; ".join(benchmark["invalid_reasons"])),
        ("throttled", _KNOWN[benchmark.get("throttled")]),
    ]
    if benchmark["emulated"]:
        rows.append(("emulated", "yes: these times say nothing of real hardware"))
    sustained, energy = benchmark.get("sustained_p90_ms"), benchmark.get("energy_mj")
    if sustained is not None:
        rows.append(("p90 at the end of the load", f"{sustained:.4g} ms"))
    if energy is not None:
        error, meter = benchmark["energy_error_mj"], benchmark["power_meter"]
        rows.append(("energy of one inference", f"{energy:.4g} ± {error:.2g} mJ ({meter})"))
    if sustained is not None or energy is not None:
        rows.append(("throttled meanwhile", _KNOWN[benchmark.get("throttled_under_load")]))
    return table(("benchmark", ""), rows)


def single_runs(benchmark: Mapping[str, Any]) -> Markup:
    """How often a run took how long."""
    # A few interrupted runs would squeeze the rest into one bar.
    longest = _LONGEST * float(benchmark["latency_ms_p50"])
    samples = [round(float(v), 5) for v in benchmark["samples_ms"] if v <= longest]
    slower = len(benchmark["samples_ms"]) - len(samples)
    note = fill("<p>{} runs of more than {:.3g} ms are not drawn.</p>", slower, longest) if slower else ""
    figure = {
        "data": [{"type": "histogram", "x": samples, "marker": {"color": BLUE}, "name": "runs"}],
        "layout": axes_layout("latency of one run (ms)", "runs"),
    }
    return plot("runs", figure, 260) + note


def under_load(benchmark: Mapping[str, Any]) -> Markup:
    """Latency, temperature and clock of each window of the load, against its seconds."""
    windows = benchmark["windows"]
    # Of earlier releases a window does not say how long it was.
    x = [round(window["second"] + window.get("seconds", 0.0), 1) for window in windows]
    shown = {axis: lines for axis, lines in _DRAWN.items() if any(w[lines[0][0]] is not None for w in windows)}
    untold = [lines[0][1] for axis, lines in _DRAWN.items() if axis not in shown]
    layout: dict[str, Any] = axes_layout("seconds under load, at the end of each window", "")
    axis_layout, height, data = layout.pop("yaxis"), 1 / len(shown), []
    for i, (axis, lines) in enumerate(shown.items()):
        number, top = "" if i == 0 else str(i + 1), 1 - i * height
        # Room between one and the next; the lowest one has the seconds.
        domain = [max(top - height + 0.04, 0.0), top]
        layout[f"yaxis{number}"] = axis_layout | {"title": {"text": axis}, "domain": domain}
        for key, name, colour in lines:
            values = [None if window[key] is None else round(float(window[key]), 4) for window in windows]
            line = {"x": x, "y": values, "yaxis": f"y{number}", "mode": "lines+markers", "name": name}
            data.append(line | {"line": {"color": colour}})
    layout["xaxis"] |= {"anchor": f"y{len(shown)}" if len(shown) > 1 else "y", "rangemode": "tozero"}
    note = fill("<p>The machine does not tell its {}.</p>", " and its ".join(untold)) if untold else Markup()
    return plot("load", {"data": data, "layout": layout}, 120 + 150 * len(shown)) + note
