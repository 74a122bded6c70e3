"""Charts as plotly's JSON. Colours that depend on the theme are set in the page, by ``page.js``."""

import html
from typing import Any

from adamerge.results.numbers import decimal
from adamerge.results.report.charts import BarChart, Chart, HeatMap, LineChart, Panel, short

DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "diamond", "square", "star", "triangle-up", "cross")
_LEGEND = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "font": {"size": 12}}


def figure(chart: Chart) -> dict[str, Any]:
    """Return a chart's ``data`` and ``layout``, whose height is without the legend: the page makes room for that."""
    if isinstance(chart, LineChart):
        return _lines(chart)
    if isinstance(chart, HeatMap):
        return _heat(chart)
    assert isinstance(chart, BarChart)
    return _bars(chart)


def label(name: str) -> str:
    """Return a name as plotly shows it as it is: its texts are read as HTML."""
    return html.escape(short(name), quote=False)


def _layout(height: int, **more: Any) -> dict[str, Any]:
    base = {"height": height, "margin": {"l": 56, "r": 12, "t": 12, "b": 48}, "dragmode": False, "hovermode": "closest"}
    return {**base, **more}


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": html.escape(title, quote=False)}, "automargin": True, "fixedrange": True, **more}


def _lines(chart: LineChart) -> dict[str, Any]:
    data = []
    for name, (color, style) in chart.looks().items():
        xs, ys = chart.series[name]
        line = {"color": color, "dash": DASHES[style], "width": 1.5 if name in chart.quiet else 2}
        data.append(
            {
                "type": "scatter", "mode": "lines" if len(xs) > 1 else "markers", "name": label(name), "x": list(xs),
                "y": list(ys), "line": line, "hovertemplate": "%{y:.4g}",
                "visible": "legendonly" if name in chart.hidden else True,
            }
        )  # fmt: skip
    x = _axis(chart.x, hoverformat=".4~g")
    if chart.ticks:
        x |= {"tickvals": list(chart.ticks), "ticktext": [label(name) for name in chart.ticks.values()]}
    y = _axis(chart.y, type="log" if chart.is_log else "linear", exponentformat="power")
    layout = _layout(
        320, xaxis=x, yaxis=y, legend=_LEGEND, hovermode="x unified" if len(data) <= 12 else "closest",
        showlegend=len(data) > 1,
    )  # fmt: skip
    return {"data": data, "layout": layout}


def _heat(chart: HeatMap) -> dict[str, Any]:
    low, high = chart.limits()
    size = 24 if len(chart.rows) <= 12 else 16
    gaps = [30 if panel.title else 8 for panel in chart.panels]
    heights = [gap + size * len(chart.rows) + 26 for gap in gaps]
    total = sum(heights)
    layout = _layout(
        total + 48,
        margin={"l": 8, "r": 8, "t": 8, "b": 40},
        coloraxis={
            "cmin": low, "cmax": high,
            "colorbar": {
                "title": {"text": chart.value if total > 160 else "", "side": "right"},  # it is as long as the bar
                "thickness": 12, "len": 1, "lenmode": "fraction", "y": 0.5, "outlinewidth": 0,
                "exponentformat": "e",  # 5e-4, not 500µ
            },
        },
        meta={"scale": chart.scale},
        annotations=[],
    )  # fmt: skip
    data, top = [], 1.0
    for number, (panel, gap, height) in enumerate(zip(chart.panels, gaps, heights, strict=True), 1):
        upper, lower = top - gap / total, top - (height - 26) / total
        top -= height / total
        axis = "" if number == 1 else str(number)
        is_last = number == len(chart.panels)
        data.append(_panel(chart, panel, axis))
        layout[f"xaxis{axis}"] = _columns(chart, panel, axis, is_last)
        layout[f"yaxis{axis}"] = _axis(
            "", domain=[max(0, lower), upper], anchor=f"x{axis}", autorange="reversed", showgrid=False, ticks="",
            tickvals=list(range(len(chart.rows))), ticktext=[label(name) for name in chart.rows], zeroline=False,
        )  # fmt: skip
        if panel.title:
            layout["annotations"].append(
                {
                    "text": f"<b>{label(panel.title)}</b>", "showarrow": False, "xref": "paper", "yref": "paper",
                    "x": 0,
                    "y": upper, "xanchor": "left", "yanchor": "bottom", "font": {"size": 13},
                }
            )  # fmt: skip
    return {"data": data, "layout": layout}


def _panel(chart: HeatMap, panel: Panel, axis: str) -> dict[str, Any]:
    lines = ["%{hovertext}", f"{chart.value} %{{z:.4g}}"]
    lines += [f"{name} %{{customdata[{at}]:.4~g}}" for at, name in enumerate(panel.details)]
    names = [html.escape(name, quote=False) for name in panel.columns]
    trace = {
        "type": "heatmap", "z": panel.values, "coloraxis": "coloraxis", "xaxis": f"x{axis}", "yaxis": f"y{axis}",
        "xgap": 1, "ygap": 1, "hoverongaps": False, "name": "",
        "hovertext": [[f"<b>{label(row)}</b><br>{name}" for name in names] for row in chart.rows],
        "hovertemplate": "<br>".join(lines) + "<extra></extra>",
    }  # fmt: skip
    if panel.details:
        columns = list(panel.details.values())
        trace["customdata"] = [
            [[values[row][at] for values in columns] for at in range(len(names))] for row in range(len(chart.rows))
        ]
    if chart.shows_values:
        texts = [["" if value is None else decimal(value, chart.digits) for value in row] for row in panel.values]
        trace |= {"text": texts, "texttemplate": "%{text}"}
    return trace


def _columns(chart: HeatMap, panel: Panel, axis: str, is_last: bool) -> dict[str, Any]:
    """Return the horizontal axis of a panel: few enough names to be read."""
    shown = panel.shown_ticks(24)
    title = ("block" if panel.ticks else chart.column) if is_last else ""
    return _axis(
        title, anchor=f"y{axis}", showgrid=False, zeroline=False, tickvals=list(shown), ticks="",
        ticktext=[label(name) for name in shown.values()],
    )  # fmt: skip


def _bars(chart: BarChart) -> dict[str, Any]:
    places, colors, lanes = range(len(chart.categories)), chart.colors(), chart.lanes()
    data: list[dict[str, Any]] = []
    names = [html.escape(name, quote=False) for name in chart.categories]
    hover = "%{customdata}<br>%{fullData.name} %{x:.1f} %<extra></extra>"
    common = {"customdata": names, "hovertemplate": hover}
    if chart.bar:
        name, values = chart.bar
        data.append(
            {
                "type": "bar", "name": label(name), "x": [100 * v for v in values], "y": list(places), "width": 0.8,
                "orientation": "h", "marker": {"color": colors[name]}, "opacity": 0.55, **common,
            }
        )  # fmt: skip
    for number, (name, values) in enumerate(chart.marks.items()):
        marker = {"size": 11, "color": colors[name], "symbol": SYMBOLS[number % len(SYMBOLS)], "line": {"width": 1.5}}
        data.append(
            {
                "type": "scatter", "mode": "markers", "name": label(name), "x": [100 * v for v in values],
                "y": [round(place + lanes[name], 4) for place in places], "marker": marker, **common,
            }
        )  # fmt: skip
    lowest = min([v for trace in data for v in trace["x"]], default=0)
    x = _axis(chart.x, range=[0 if chart.bar else max(0, lowest - 5), 101], zeroline=False)
    y = _axis(
        "", tickvals=list(places), ticktext=[label(n) for n in chart.categories], showgrid=False, zeroline=False,
        range=[len(places) - 0.4, -0.6],
    )  # fmt: skip
    row = max(34 if len(places) <= 10 else 26, 10 * len(chart.marks))
    return {"data": data, "layout": _layout(70 + row * len(places), xaxis=x, yaxis=y, legend=_LEGEND)}
