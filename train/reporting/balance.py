"""Figures of how far each layer is from balance, and what the routers do about it."""

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from train.reporting.curves import schedule_panel
from train.reporting.load import layer_labels, load_panels
from train.reporting.page import Panel
from train.reporting.run_data import RunData
from train.reporting.timeline import ORANGE, PURPLE, RED, TEAL, Timeline

MAX_LEGEND_LAYERS = 12
DEPTH_SCALE = [[0.0, "#2f9fd0"], [0.5, "#7a68d8"], [1.0, "#cf4f8f"]]
"""Colours from the first layer to the last."""


def balance_panels(run: RunData, timeline: Timeline) -> list[Panel]:
    """Return every panel about the routers."""
    layers = list(run.records[-1].get("max_vio") or {}) if run.records else []
    if not layers:
        return [Panel(title="Routers", missing="the records have no MoE layer; a dense model has no router.")]
    return [
        *load_panels(run),
        _layer_panel(
            timeline, layers, "max_vio", title="MaxVio per layer", y="MaxVio", wide=True,
            caption="How far the busiest expert of a layer lies above the mean: 0 is perfect balance, 1 "
            "means that one expert gets twice its share and everyone waits for it. It should fall "
            "while the biases learn, and stay down. Averaged over time; every step is in "
            "metrics.jsonl.",
        ),
        _layer_panel(
            timeline, layers, "load_entropy", title="Load entropy", y="entropy / log E",
            caption="1 when all experts of a layer are used alike, 0 when a single one takes everything. It "
            "sees the whole distribution where MaxVio sees the worst expert only.",
        ),
        _layer_panel(
            timeline, layers, "bias_range", title="Spread of the router bias", y="max − min",
            caption="How far the biases had to move apart to balance the layer. A spread that never settles "
            "means that the router keeps pulling in one direction.",
        ),
        schedule_panel(
            timeline, timeline.values(lambda record: record.get("bias_speed")),
            title="Bias speed", y="γ", colour=PURPLE, hover="%{y:.3g}", shape="hv",
            caption="How far a router bias moves each step towards balance (γ in the DeepSeek-V3 report). "
            "At 0 the biases are frozen.",
        ),
        _balance_loss_panel(timeline),
        _dead_panel(timeline, layers),
    ]  # fmt: skip


def _layer_panel(
    timeline: Timeline, layers: list[str], key: str, *, title: str, y: str, caption: str, wide: bool = False
) -> Panel:
    """One smoothed curve per layer, coloured by depth; MTP blocks are dashed."""
    blocks = [layer for layer in layers if not layer.startswith("mtp")]
    shades = sample_colorscale(DEPTH_SCALE, np.linspace(0, 1, max(2, len(blocks))).tolist())
    limit = max(60, 12_000 // len(layers))
    labels = layer_labels(layers)
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
                name=labels[layer],
                line={"color": colour, "width": 1.8, "dash": "solid" if is_block else "dash"},
                hovertemplate="%{y:.3f}",
            )
        )
    figure = timeline.figure(traces, y=y, wide=wide, showlegend=len(layers) <= MAX_LEGEND_LAYERS)
    if len(layers) > MAX_LEGEND_LAYERS:
        figure.update_layout(hovermode="closest")
    return Panel(title=title, figure=figure, caption=caption, wide=wide, height=360 if wide else 330)


def _balance_loss_panel(timeline: Timeline) -> Panel:
    values = timeline.values(lambda record: record.get("balance_loss"))
    line = timeline.line(
        timeline.smooth(values),
        name="balance loss",
        line={"color": TEAL, "width": 2},
        hovertemplate="%{y:.4g}",
    )
    return Panel(
        title="Balance loss",
        figure=timeline.figure([line], y="balance loss", showlegend=False),
        caption="The sequence-wise auxiliary loss, already weighted: the small push that keeps single "
        "sequences from flooding one expert.",
    )


def _dead_panel(timeline: Timeline, layers: list[str]) -> Panel:
    total = timeline.values(lambda record: sum((record.get("dead_experts") or {}).values()))
    if not np.nansum(total):
        return Panel(
            title="Dead experts", missing="every expert of every layer has received tokens in every step."
        )
    at = timeline.thin(total)
    labels = layer_labels(layers)
    details = [
        ", ".join(
            f"{labels[k]}: {v}" for k, v in (timeline.records[i].get("dead_experts") or {}).items() if v
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
        "learns nothing and wastes its memory; the bias should bring it back.",
    )
