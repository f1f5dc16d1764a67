"""A run as one HTML page that needs no network: curves, all masks over time, graphs, profile, what it ran on.

The curves are plotly's: of the well-kept libraries it is the one whose page stands alone, zooms and tells the values
under the pointer; its script, 5 MB in every page, is the price. Masks are bytes that the page inflates and draws on
canvases: a plot per layer and step would be slow and many times as large.
"""

import base64
import html
import importlib.resources
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ctrlcompile.inspect import drawing
from ctrlcompile.inspect.profile import Profile
from ctrlcompile.inspect.run import Respecialised, Run
from ctrlcompile.pictures import patches

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter

PROFILE = "profile.json"  # in the run's folder: what `ctrlcompile profile --json` printed
FRAMES = 200  # decisions at which masks are shown, at most
CELLS = 128  # blocks of a mask shown each way, at most; of a larger one, patches of blocks

MARGIN = {"l": 50, "r": 20, "t": 40, "b": 40}
COLOURS = ("#1f4e79", "#c2641a")
CURVES = (  # a plot against steps each, with its lines
    ("loss",),
    ("FLOPs used", "of the dense run"),
    ("seconds",),
    ("density", "target"),
    ("price",),
    ("blocks reactivated", "switched off"),
)


def page(run: Run) -> str:
    """The page. Raises ImportError without plotly and Jinja2, ValueError where the run's `profile.json` is none."""
    import jinja2

    template = importlib.resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        run=run,
        last=run.decisions[-1],
        settings=run.processes[-1]["settings"] if run.processes else {},
        processes=[process | {"started": _date(process["started"])} for process in run.processes],
        curves=_html(_curves(run), "curves", script=True),
        densities=_html(_densities(run), "densities", script=False),
        masks=_masks(run),
        graphs=_graphs(run),
        profile=_profile(run.folder / PROFILE),
    )


def _curves(run: Run) -> "Figure":
    from plotly import graph_objects, subplots

    found = run.curves()

    def title(names: tuple[str, ...]) -> str:
        known = [name if set(found[name]) != {None} else f"{name}: none was noted" for name in names]
        spans = [f'<span style="color:{colour}">{n}</span>' for n, colour in zip(known, COLOURS, strict=False)]
        return ", ".join(spans)

    figure = subplots.make_subplots(rows=2, cols=3, subplot_titles=[title(names) for names in CURVES])
    for number, names in enumerate(CURVES):
        for name, colour in zip(names, COLOURS, strict=False):
            line = graph_objects.Scatter(x=run.steps, y=found[name], name=name, mode="lines", line_color=colour)
            figure.add_trace(line, row=1 + number // 3, col=1 + number % 3)
        if "seconds" in names and run.respecialised:
            seconds = [became.seconds for became in run.respecialised]
            figure.add_trace(_markers(run.respecialised, seconds), row=1 + number // 3, col=1 + number % 3)
    figure.update_xaxes(title_text="step", row=2)
    return figure.update_layout(template="plotly_white", height=560, showlegend=False, margin=MARGIN)


def _densities(run: Run) -> "Figure":
    from plotly import graph_objects

    found = run.densities()
    picture = graph_objects.Heatmap(
        x=run.steps, y=list(found), z=list(found.values()), zmin=0, zmax=1, colorscale=["#eeeeee", COLOURS[0]],
        hovertemplate="%{y}<br>step %{x}: density %{z:.3f}<extra></extra>",
    )  # fmt: skip
    figure = graph_objects.Figure(picture)
    known = [became for became in run.respecialised if became.gate in found]
    if known:
        figure.add_trace(_markers(known, [became.gate for became in known]))
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title_text="step")
    return figure.update_layout(template="plotly_white", height=90 + 18 * max(4, len(found)), margin=MARGIN)


def _markers(respecialised: Sequence[Respecialised], places: Sequence[Any]) -> "Scatter":
    """A triangle where a variant took over, a cross where one was not taken; under the pointer, the whole tale."""
    from plotly import graph_objects

    return graph_objects.Scatter(
        x=[became.step for became in respecialised], y=places, mode="markers", name="kernels chosen anew",
        marker={"color": COLOURS[1], "size": 8,
                "symbol": ["triangle-up" if became.outcome.in_force else "x-thin-open" for became in respecialised]},
        text=[_tale(became) for became in respecialised], hovertemplate="step %{x}: %{text}<extra></extra>",
    )  # fmt: skip


def _tale(became: Respecialised) -> str:
    """As HTML, in which plotly takes some tags of a layer's name for its own."""
    return "<br>".join(html.escape(f"{became.gate} {became.outcome}").split("; "))


def _html(figure: "Figure", name: str, *, script: bool) -> str:
    settings = {"displayModeBar": False, "responsive": True}  # whose buttons lead to a network, too
    return figure.to_html(config=settings, include_plotlyjs=script, full_html=False, div_id=name)


def _masks(run: Run) -> dict[str, Any]:
    """For the page's script: the steps at which masks are shown, and for each layer a byte per cell and step."""
    places, layers = run.frames(FRAMES), []
    for name, line in run.densities().items():
        gate, shares = run.gates[name], torch.stack([patches(mask, CELLS, CELLS) for mask in run.masks(name, places)])
        cells = bytes((255 * shares).round().byte().flatten().tolist())
        rows, columns = shares.shape[1:]
        layers.append(
            {
                "name": name, "shape": gate["shape"], "block": gate["block"], "rows": rows, "columns": columns,
                "densities": [line[place] for place in places],
                "cells": base64.b64encode(zlib.compress(cells)).decode(),
            }
        )  # fmt: skip
    return {"steps": [run.decisions[place].step for place in places], "layers": layers}


def _graphs(run: Run) -> list[str]:
    at_the_end = {name: line[-1] for name, line in run.densities().items()}
    found = []
    for graph in run.graphs:
        densities = {node: at_the_end.get(gate) for node, gate in graph.gates.items()}
        found.append(drawing.svg(graph.outline, {node: d for node, d in densities.items() if d is not None}))
    return found


def _profile(path: Path) -> str:
    try:
        return Profile.from_json(path.read_text(encoding="utf-8"))._repr_html_()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no profile: {error}; `ctrlcompile profile TARGET --json` prints one") from error


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(seconds))
