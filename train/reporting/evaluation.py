"""Figures of the evaluations: what each stage did to long contexts, before it and after."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from train.reporting.page import Panel, Scale
from train.reporting.run_data import RunData, loss_beyond, needle_score, stage_summaries
from train.reporting.timeline import GREY, stage_colours


def evaluation_panels(run: RunData) -> list[Panel]:
    """Return loss by position and the needle grid of every stage that was evaluated."""
    if not run.evaluations:
        reason = "the run has no evaluation; evaluation.enabled was false, or the first stage has not begun."
        return [Panel(title="Evaluation", missing=reason)]
    panels: list[Panel] = []
    for summary in stage_summaries(run):
        results = {
            when: run.evaluations[summary.name, when]
            for when in ("before", "after")
            if (summary.name, when) in run.evaluations
        }
        panels.append(_position_panel(run, summary.name, results, previous_length=summary.previous_length))
        panels.append(_needle_panel(summary.name, results))
    return panels


def _position_panel(
    run: RunData, stage: str, results: dict[str, dict[str, Any]], *, previous_length: int | None
) -> Panel:
    title = f"{stage}: loss by position"
    colour = stage_colours(run)[stage]
    styles = {
        "before": {"color": GREY, "width": 2, "dash": "dot"},
        "after": {"color": colour, "width": 2.6, "dash": "solid"},
    }
    figure = go.Figure()
    for when, result in results.items():
        parts = [part for part in result.get("by_position") or [] if part["loss"] is not None]
        if parts:
            figure.add_scatter(
                # The middle of a bin stands for it; a logarithmic axis has no place for position 0.
                x=[(part["from"] + part["to"]) / 2 for part in parts],
                y=[part["loss"] for part in parts],
                mode="lines+markers",
                name=f"{when} the stage",
                line=styles[when],
                marker={"size": 6},
                text=[f"positions {part['from']:,} to {part['to'] - 1:,}" for part in parts],
                hovertemplate="%{text}: <b>%{y:.3f}</b><extra>%{fullData.name}</extra>",
            )
    if not figure.data:
        return Panel(title=title, missing="it was not measured for this stage.")
    figure.update_layout(
        margin={"l": 58, "r": 16, "t": 20, "b": 76},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        xaxis={
            "title": {"text": "position in the sequence"},
            "type": "log",
            "dtick": np.log10(2),
            "showgrid": False,
        },
        yaxis={"title": {"text": "nats per token"}, "zeroline": False},
    )
    caption = (
        "Held-out loss of the tokens at each position; further right there is more context to use, so the "
        "line should fall."
    )
    if previous_length is not None:
        end = max(part["to"] for result in results.values() for part in result.get("by_position") or [])
        figure.add_vrect(
            x0=previous_length, x1=end, fillcolor=colour, opacity=0.07, line_width=0, layer="below"
        )
        figure.add_vline(x=previous_length, line={"color": GREY, "dash": "dash", "width": 1})
        caption += (
            f" The tinted part lies beyond the {previous_length:,} tokens trained on so far: there the "
            "dotted line shows how the model fares unprepared, the solid one after this stage."
        ) + _gain(results, previous_length)
    return Panel(title=title, figure=figure, caption=caption)


def _gain(results: dict[str, dict[str, Any]], length: int) -> str:
    values = [loss_beyond(results[when], length) for when in ("before", "after") if when in results]
    if len(values) < 2 or values[0] is None or values[1] is None:
        return ""
    return f" Its mean went from {values[0]:.2f} to <b>{values[1]:.2f}</b>."


def _needle_panel(stage: str, results: dict[str, dict[str, Any]]) -> Panel:
    title = f"{stage}: needle in a haystack"
    shown = {when: result for when, result in results.items() if needle_score(result) is not None}
    if not shown:
        return Panel(
            title=title, missing="it was not measured, or the sequences of this stage are too short for it."
        )
    figure = make_subplots(
        rows=1,
        cols=len(shown),
        subplot_titles=[f"{when}: {needle_score(result):.0%} found" for when, result in shown.items()],
        horizontal_spacing=0.09,
        shared_yaxes=True,
    )
    chance = 0.0
    for column, (when, result) in enumerate(shown.items(), start=1):
        needle = result["needle"]
        chance = needle["chance"]
        grid_LD = np.array(needle["grid"], dtype=np.float64)
        figure.add_trace(
            go.Heatmap(
                # Lengths across and depths down, so that a context reads from top to bottom.
                z=grid_LD.T,
                x=[f"{length:,}" for length in needle["lengths"]],
                y=[f"{depth:.0%}" for depth in needle["depths"]],
                coloraxis="coloraxis",
                xgap=2,
                ygap=2,
                texttemplate="%{z:.0%}",
                hovertemplate=f"{when}: %{{x}} tokens, needle at %{{y}}<br><b>%{{z:.0%}}</b> of the keys "
                f"found<extra></extra>",
            ),
            row=1,
            col=column,
        )
    figure.update_layout(
        coloraxis={"cmin": 0, "cmax": 1, "showscale": False},
        margin={"l": 58, "r": 16, "t": 30, "b": 44},
    )
    figure.update_xaxes(title_text="context length", type="category", showgrid=False)
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    figure.update_yaxes(title_text="depth of the needle", col=1)
    figure.update_annotations(font_size=12)
    return Panel(
        title=title,
        figure=figure,
        scale=Scale.SEQUENTIAL,
        caption="A pass key is hidden in real text; a cell is the share of trials in which the model finds "
        f"it likelier than the wrong keys. Guessing gives {chance:.0%}.",
    )
