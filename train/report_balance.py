"""Figures of the routers: which expert got how much, and how far each layer is from balance.

Legend: N histograms, L MoE layers, E routed experts.
"""

from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from train.console import quantity
from train.report_page import Panel, Scale
from train.report_timeline import ORANGE, RED, Timeline
from train.run_data import RunData

MAX_CELLS = 300_000
"""Cells of all frames of the load map together: about 2 MB in the page."""

MAX_LAYER_MAPS = 6
MAX_LEGEND_LAYERS = 12
DEPTH_SCALE = [[0.0, "#2f9fd0"], [0.5, "#7a68d8"], [1.0, "#cf4f8f"]]
"""Colours from the first layer to the last."""


def layer_label(name: str) -> str:
    """Return a layer's name for people: `layers.3` is "layer 3", `mtp.0` is "MTP 0"."""
    kind, _, rest = name.partition(".")
    return f"{ {'layers': 'layer', 'mtp': 'MTP'}.get(kind, kind) } {rest.partition('.')[0]}".strip()


def balance_panels(run: RunData, timeline: Timeline) -> list[Panel]:
    """Return every panel about the routers."""
    layers = list(run.records[-1].get("max_vio") or {}) if run.records else []
    if not layers:
        return [Panel(title="Routers", missing="the records have no MoE layer; a dense model has no router.")]
    return [
        *_load_panels(run),
        _layer_panel(
            timeline, layers, "max_vio", title="MaxVio per layer", y="MaxVio", wide=True,
            caption="How far the busiest expert of a layer lies above the mean: 0 is perfect balance, 1 "
            "means that one "
            "expert gets twice its share and everyone waits for it. It should fall while the biases learn, "
            "and stay "
            "down. Averaged over time; every step is in metrics.jsonl.",
        ),
        _layer_panel(
            timeline, layers, "load_entropy", title="Load entropy", y="entropy / log E",
            caption="1 when all experts of a layer are used alike, 0 when a single one takes everything. "
            "It sees the "
            "whole distribution where MaxVio sees the worst expert only.",
        ),
        _layer_panel(
            timeline, layers, "bias_range", title="Spread of the router bias", y="max − min",
            caption="How far the biases had to move apart to balance the layer. A spread that never "
            "settles means that "
            "the router keeps pulling in one direction.",
        ),
        _dead_panel(timeline, layers),
    ]  # fmt: skip


def _load_panels(run: RunData) -> list[Panel]:
    records = [record for record in run.records if record.get("load")]
    if not records:
        every = run.config.logging.histogram_every
        reason = (
            f"no step has carried a load histogram yet; one does every {every} (logging.histogram_every)."
        )
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
    labels = [layer_label(layer) for layer in layers]

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
        "colour is the "
        "mean, red is more, blue is less. Move the slider or press play to watch the routers even out.",
    )


def _expert_history_panel(records: list[dict[str, Any]], layers: list[str], ratio_NLE: NDArray[Any]) -> Panel:
    """Maps of expert over time, one for each of the layers that are furthest from balance at the end."""
    worst = np.argsort(-ratio_NLE[-1].max(axis=1), kind="stable")[:MAX_LAYER_MAPS]
    chosen = sorted(int(i) for i in worst)
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    shown = np.unique(np.linspace(0, len(records) - 1, min(len(records), 150)).round().astype(int))
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[layer_label(layers[i]) for i in chosen],
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
                hovertemplate=f"{layer_label(layers[layer])}, expert %{{y}}, step %{{x:,}}<br>"
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
        "experts that the "
        f"router prefers or starves; a blue stripe that ends is an expert that came back.{which}",
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


def _layer_panel(
    timeline: Timeline, layers: list[str], key: str, *, title: str, y: str, caption: str, wide: bool = False
) -> Panel:
    """One smoothed curve per layer, coloured by depth; MTP blocks are dashed."""
    blocks = [layer for layer in layers if not layer.startswith("mtp")]
    shades = sample_colorscale(DEPTH_SCALE, np.linspace(0, 1, max(2, len(blocks))).tolist())
    limit = max(60, 12_000 // len(layers))
    traces = []
    for layer in layers:
        values = timeline.smooth(
            timeline.values(lambda record, layer=layer: (record.get(key) or {}).get(layer))
        )
        is_block = layer in blocks
        colour = shades[blocks.index(layer)] if is_block else ORANGE
        traces.append(
            timeline.line(
                values,
                at=timeline.thin(values, limit=limit),
                name=layer_label(layer),
                line={"color": colour, "width": 1.8, "dash": "solid" if is_block else "dash"},
                hovertemplate="%{y:.3f}",
            )
        )
    figure = timeline.figure(traces, y=y, showlegend=len(layers) <= MAX_LEGEND_LAYERS)
    if len(layers) > MAX_LEGEND_LAYERS:
        figure.update_layout(hovermode="closest")
    return Panel(title=title, figure=figure, caption=caption, wide=wide, height=360 if wide else 330)


def _dead_panel(timeline: Timeline, layers: list[str]) -> Panel:
    total = timeline.values(lambda record: sum((record.get("dead_experts") or {}).values()))
    if not np.nansum(total):
        return Panel(
            title="Dead experts", missing="every expert of every layer has received tokens in every step."
        )
    at = timeline.thin(total)
    details = [
        ", ".join(
            f"{layer_label(k)}: {v}" for k, v in (timeline.records[i].get("dead_experts") or {}).items() if v
        )
        for i in at
    ]
    trace = go.Scatter(
        x=timeline.tokens[at],
        y=total[at],
        mode="lines",
        fill="tozeroy",
        fillcolor="rgba(220,74,86,.15)",
        line={"color": RED, "width": 1.6, "shape": "hv"},
        text=details,
        hovertemplate="%{y} in all<br>%{text}<extra></extra>",
    )
    figure = timeline.figure([trace], y="experts without a token", showlegend=False)
    figure.update_yaxes(rangemode="tozero")
    return Panel(
        title="Dead experts",
        figure=figure,
        caption="Experts of all layers that no token of a step was sent to. An expert that stays dead "
        "learns nothing and "
        "wastes its memory; the bias should bring it back.",
    )
