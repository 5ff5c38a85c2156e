"""Figures of speed and memory over the course of training."""

import numpy as np

from train.reporting.page import Panel
from train.reporting.run_data import RunData
from train.reporting.timeline import BLUE, ORANGE, PURPLE, TEAL, Timeline, Values


def speed_panels(run: RunData, timeline: Timeline) -> list[Panel]:
    """Return throughput, model FLOP utilisation and memory."""
    rate = timeline.values(lambda record: record["timing"].get("tokens_per_second"))
    flops = timeline.values(lambda record: record["timing"].get("flops_per_second"))
    memory = timeline.values(lambda record: record["timing"].get("memory_gib"))
    mfu = timeline.values(lambda record: record["timing"].get("mfu"))
    panels = [
        _speed_panel(
            timeline, rate, title="Throughput", y="tokens per second", colour=TEAL, hover="%{y:,.3s}",
            caption="Longer sequences cost more attention per token, so a step down at a new stage is "
            "expected; a dip within a stage is not.",
        ),
        _speed_panel(
            timeline, flops / 1e12, title="Compute rate", y="TFLOP per second", colour=BLUE, hover="%{y:.3g}",
            caption="Model FLOPs (forward and backward, attention counted causally, nothing recomputed) "
            "over the time of a step. Unlike tokens per second it can be compared between stages.",
        ),
    ]  # fmt: skip
    if np.isfinite(mfu).any():
        panels.append(
            _speed_panel(
                timeline, mfu * 100, title="MFU", y="per cent of peak", colour=ORANGE, hover="%{y:.1f}%",
                caption=f"Model FLOP utilisation against {run.config.cluster.peak_tflops or 0:g} TFLOP/s per "
                f"device ({run.config.cluster.name}).",
            )
        )  # fmt: skip
    else:
        panels.append(
            Panel(title="MFU", missing="cluster.peak_tflops is not set, so there is no peak to compare with.")
        )
    panels.append(
        Panel(
            title="Memory",
            figure=timeline.figure(
                [timeline.line(memory, name="peak", line={"color": PURPLE, "width": 2}, fill="tozeroy",
                               fillcolor="rgba(138,99,217,.12)", hovertemplate="%{y:.2f} GiB")],
                y="GiB", showlegend=False,
            ).update_yaxes(rangemode="tozero"),
            caption="The most that the process had held until then. It may only rise; a rise within a stage "
            "is a leak.",
        )
    )  # fmt: skip
    return panels


def _speed_panel(
    timeline: Timeline, values: Values, *, title: str, y: str, colour: str, hover: str, caption: str
) -> Panel:
    figure = timeline.figure(
        [
            timeline.line(
                values, name="each step", opacity=0.3, line={"color": colour, "width": 1}, hoverinfo="skip"
            ),
            timeline.line(
                timeline.smooth(values), name=y, line={"color": colour, "width": 2.2}, hovertemplate=hover
            ),
        ],
        y=y,
        showlegend=False,
    )
    figure.update_yaxes(rangemode="tozero", exponentformat="B")
    return Panel(title=title, figure=figure, caption=caption)
