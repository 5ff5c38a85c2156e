"""Runs beside each other: what another precision, layout or setting changed.

The runs need not have the same steps: curves lie over the tokens seen, and the difference from the first run
is taken where both have been, by interpolation.
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from train.reporting.page import Panel
from train.reporting.run_data import RunData
from train.reporting.timeline import STAGE_COLOURS, Timeline, Values


def beside_panels(run: RunData, others: Sequence[RunData]) -> list[Panel]:
    """Return losses of all runs, their difference from `run` in percent, and their held-out losses."""
    timelines = {each.config.name: Timeline(each) for each in (run, *others) if each.records}
    if len(timelines) < 2:
        return [Panel(title="Losses", missing="fewer than two of the runs have a step.")]
    losses = {
        name: line.smooth(line.values(lambda record: record["loss"])) for name, line in timelines.items()
    }
    first = timelines[run.config.name]
    return [
        Panel(
            title="Losses beside each other",
            figure=first.figure(_curves(timelines, losses), y="nats per token", wide=True),
            wide=True,
            caption="Moving averages of the training loss.",
        ),
        Panel(
            title=f"Difference from {run.config.name}",
            figure=first.figure(_differences(timelines, losses, run.config.name), y="percent", wide=True),
            wide=True,
            caption="Of the same averages. Runs that differ by rounding alone drift apart by chance as well: "
            "compare with the spread between seeds.",
        ),
        _held_out(run, others),
    ]


def _curves(timelines: dict[str, Timeline], losses: dict[str, Values]) -> list[go.Scatter]:
    return [
        timeline.line(losses[name], name=name, line=_pen(i), hovertemplate="%{y:.4f}")
        for i, (name, timeline) in enumerate(timelines.items())
    ]


def _differences(timelines: dict[str, Timeline], losses: dict[str, Values], first: str) -> list[go.Scatter]:
    """Return each run's excess over the first in percent, at those tokens of the first that it saw too."""
    base, expected = timelines[first], losses[first]
    traces = []
    for i, (name, timeline) in enumerate(timelines.items()):
        if name == first:
            continue
        here = np.interp(base.tokens, timeline.tokens, losses[name], left=np.nan, right=np.nan)
        excess = 100 * (here / expected - 1)
        traces.append(base.line(excess, name=name, line=_pen(i), hovertemplate="%{y:+.3f} %"))
    return traces


def _pen(i: int) -> dict[str, object]:
    return {"color": STAGE_COLOURS[i % len(STAGE_COLOURS)], "width": 2}


def _held_out(run: RunData, others: Sequence[RunData]) -> Panel:
    """Return the last held-out loss of every run, the first one's as the line to compare with."""
    title = "Held-out losses beside each other"
    found = {each.config.name: held_out_loss(each) for each in (run, *others)}
    known = {name: loss for name, loss in found.items() if loss is not None}
    base = known.get(run.config.name)
    if base is None:
        return Panel(title=title, missing=f"{run.config.name} has no evaluation yet.")
    text = [f"{loss:.4f} ({100 * (loss / base - 1):+.3f} %)" for loss in known.values()]
    colours = [STAGE_COLOURS[i % len(STAGE_COLOURS)] for i in range(len(known))]
    markers = {"size": 12, "color": colours}
    figure = go.Figure(
        go.Scatter(
            x=list(known.values()),
            y=list(known),
            mode="markers+text",
            text=text,
            textposition="middle right",
            marker=markers,
            showlegend=False,
        )
    )
    figure.add_vline(x=base, line={"dash": "dot", "width": 1})
    span = max(known.values()) - min(known.values()) or 1e-3
    figure.update_layout(
        margin={"l": 190, "r": 16, "t": 26, "b": 44},
        xaxis={"title": {"text": "nats per token"}, "range": [min(known.values()) - span, base + 4 * span]},
        yaxis={"autorange": "reversed"},
    )
    return Panel(
        title=title, figure=figure, wide=True, height=120 + 34 * len(known), caption=_verdict(known, base)
    )


def _verdict(known: dict[str, float], base: float) -> str:
    if len(known) < 2:
        return "No other run has been evaluated after a stage yet."
    worst = max(known.values(), key=lambda loss: abs(loss / base - 1))
    return f"After the last finished stage of each; the farthest is {100 * (worst / base - 1):+.3f} % away."


def held_out_loss(run: RunData) -> float | None:
    """Return the held-out loss of the newest evaluation in nats per token, None where there is none."""
    return ((run.last_evaluation() or {}).get("held_out") or {}).get("loss")
