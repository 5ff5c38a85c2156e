"""Maps of the expert load: which expert of which layer got how many tokens, and how that changed.

Legend: N histograms, L MoE layers, E routed experts.
"""

from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from train.logs.console import quantity
from train.reporting.page import Panel, Scale
from train.reporting.run_data import RunData

MAX_CELLS = 300_000
"""Cells of all frames of the load map together: about 2 MB in the page."""

MAX_LAYER_MAPS = 6


def layer_labels(names: list[str]) -> dict[str, str]:
    """Return names for people: `layers.3` is "layer 3", the MTP blocks are "MTP 1" and so on by depth."""
    depths = [name for name in names if name.startswith("mtp")]
    return {
        name: f"MTP {depths.index(name) + 1}" if name in depths else name.replace("layers.", "layer ")
        for name in names
    }


def load_panels(run: RunData) -> list[Panel]:
    """Return the map of layer by expert with its slider, and the history of the experts layer by layer."""
    records = [record for record in run.records if record.get("load")]
    if not records:
        every = run.config.logging.histogram_every
        reason = f"no step has carried a load histogram yet; logging.histogram_every={every}."
        return [Panel(title="Expert load", missing=reason)]
    layers = list(records[-1]["load"])
    counts_NLE = np.array(
        [[record["load"][layer] for layer in layers] for record in records], dtype=np.float64
    )
    mean_NL1 = np.maximum(counts_NLE.mean(axis=2, keepdims=True), 1e-9)
    ratio_NLE = (counts_NLE / mean_NL1).astype(np.float32)
    return [
        _load_map_panel(records, layers, counts_NLE, ratio_NLE),
        _expert_history_panel(records, layers, ratio_NLE),
    ]


def _load_map_panel(
    records: list[dict[str, Any]], layers: list[str], counts_NLE: NDArray[Any], ratio_NLE: NDArray[Any]
) -> Panel:
    """One map of layer by expert, with a slider over the histograms."""
    num_frames = max(1, min(len(records), 60, MAX_CELLS // ratio_NLE[0].size))
    shown = np.unique(np.linspace(0, len(records) - 1, num_frames).round().astype(int))
    labels = list(layer_labels(layers).values())

    def heatmap(i: int) -> go.Heatmap:
        return go.Heatmap(
            z=ratio_NLE[i],
            customdata=counts_NLE[i].astype(np.int32),
            y=labels,
            coloraxis="coloraxis",
            hovertemplate="%{y}, expert %{x}<br><b>%{z:.2f}×</b> the mean (%{customdata:,} "
            "tokens)<extra></extra>",
        )

    names = [f"{records[i]['step']:,}" for i in shown]
    still = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    moving = {"mode": "immediate", "fromcurrent": False, "frame": {"duration": 220, "redraw": True}}
    figure = go.Figure(
        data=[heatmap(int(shown[-1]))],
        frames=[go.Frame(data=[heatmap(int(i))], name=name) for i, name in zip(shown, names, strict=True)],
    )
    figure.update_layout(
        coloraxis=_load_colours(),
        margin={"l": 70, "r": 16, "t": 8, "b": 8},
        xaxis={"title": {"text": "expert"}, "showgrid": False, "zeroline": False},
        yaxis={"autorange": "reversed", "showgrid": False, "zeroline": False, "type": "category"},
        sliders=[
            {
                "active": len(names) - 1,
                "currentvalue": {"prefix": "step ", "xanchor": "left"},
                "pad": {"t": 42, "l": 84},
                "bgcolor": "rgba(128,140,160,.25)",
                "bordercolor": "rgba(0,0,0,0)",
                "tickcolor": "rgba(128,140,160,.5)",
                "minorticklen": 0,
                "font": {"size": 11},
                "steps": [{"label": name, "method": "animate", "args": [[name], still]} for name in names],
            }
        ],
        updatemenus=[
            {
                "type": "buttons",
                "direction": "left",
                "showactive": False,
                "x": 0,
                "y": 0,
                "xanchor": "left",
                "yanchor": "top",
                "pad": {"t": 62, "l": -6},
                "bgcolor": "rgba(128,140,160,.15)",
                "bordercolor": "rgba(128,140,160,.4)",
                "buttons": [
                    {"label": "▶", "method": "animate", "args": [None, moving]},
                    {"label": "❚❚", "method": "animate", "args": [[None], still]},
                ],
            }
        ],
    )
    return Panel(
        title="Expert load by layer",
        figure=figure,
        wide=True,
        height=min(900, 230 + 26 * len(layers)),
        scale=Scale.DIVERGING,
        caption="One row a layer, one column an expert, coloured by its share of the tokens: the neutral "
        "colour is the mean, warm is more, blue is less. Move the slider or press play to watch the "
        "routers even out.",
    )


def _expert_history_panel(records: list[dict[str, Any]], layers: list[str], ratio_NLE: NDArray[Any]) -> Panel:
    """Maps of expert over time, one for each of the layers that are furthest from balance at the end."""
    worst = np.argsort(-ratio_NLE[-1].max(axis=1), kind="stable")[:MAX_LAYER_MAPS]
    chosen = sorted(int(i) for i in worst)
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    shown = np.unique(np.linspace(0, len(records) - 1, min(len(records), 150)).round().astype(int))
    labels = list(layer_labels(layers).values())
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[labels[i] for i in chosen],
        horizontal_spacing=0.05,
        vertical_spacing=0.16 / rows + 0.04,
    )
    steps = [records[i]["step"] for i in shown]
    text = [quantity(records[i]["tokens"]) for i in shown]
    for place, layer in enumerate(chosen):
        figure.add_trace(
            go.Heatmap(
                x=steps,
                z=ratio_NLE[shown, layer].T,
                customdata=np.tile(np.array(text), (ratio_NLE.shape[2], 1))
                if ratio_NLE.shape[2] <= 64
                else None,
                coloraxis="coloraxis",
                hovertemplate=f"{labels[layer]}, expert %{{y}}, step %{{x:,}}<br>"
                "<b>%{z:.2f}×</b> the mean<extra></extra>",
            ),
            row=place // columns + 1,
            col=place % columns + 1,
        )
    figure.update_layout(coloraxis=_load_colours(), margin={"l": 40, "r": 16, "t": 26, "b": 40})
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(showgrid=False, zeroline=False)
    figure.update_xaxes(title_text="step", row=rows)
    figure.update_annotations(font_size=12)
    which = (
        ""
        if len(chosen) == len(layers)
        else f" Shown are the {len(chosen)} layers furthest from balance at the end."
    )
    return Panel(
        title="Expert load over time",
        figure=figure,
        wide=True,
        height=90 + 190 * rows,
        scale=Scale.DIVERGING,
        caption="Each line across is the life of one expert, in the same colours. Lasting stripes are "
        "experts that the router prefers or starves; a blue stripe that ends is an expert that came "
        f"back.{which}",
    )


def _load_colours() -> dict[str, Any]:
    # From nothing to twice the mean and above: the mean lies in the neutral middle.
    return {
        "cmin": 0,
        "cmax": 2,
        "colorbar": {
            "title": {"text": "load / mean", "side": "right"},
            "tickvals": [0, 0.5, 1, 1.5, 2],
            "ticktext": ["0", "0.5", "1", "1.5", "≥ 2"],
            "thickness": 12,
            "outlinewidth": 0,
        },
    }
