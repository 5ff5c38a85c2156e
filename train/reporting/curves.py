"""Figures over the course of training: losses, schedules and gradient norm."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from train.reporting.page import Panel
from train.reporting.run_data import RunData
from train.reporting.timeline import BLUE, GREY, ORANGE, PURPLE, RED, TEAL, Timeline, Values


def loss_panel(run: RunData, timeline: Timeline) -> Panel:
    """Return training losses of the main model and each MTP depth, with the baselines and held-out losses."""
    main = timeline.values(lambda record: record["loss"])
    depths = max((len(record.get("mtp_loss") or []) for record in run.records), default=0)
    traces = [
        timeline.line(
            main, name="each step", opacity=0.3, line={"color": BLUE, "width": 1}, hoverinfo="skip"
        ),
        timeline.line(
            timeline.smooth(main),
            name="loss",
            line={"color": BLUE, "width": 2.5},
            with_step=True,
            hovertemplate="%{y:.3f} (step %{customdata:,})",
        ),
    ]
    for depth in range(depths):
        values = timeline.values(lambda record, depth=depth: _nth(record.get("mtp_loss"), depth))
        dash = ("solid", "dash", "dot")[depth % 3]
        traces.append(
            timeline.line(
                timeline.smooth(values),
                name=f"MTP depth {depth + 1}",
                line={"color": ORANGE, "width": 1.8, "dash": dash},
                hovertemplate="%{y:.3f}",
            )
        )
    traces += _held_out_markers(run, timeline)
    figure = timeline.figure(traces, y="nats per token", wide=True)
    _add_baselines(run, figure, main)
    return Panel(
        title="Loss",
        figure=figure,
        wide=True,
        height=430,
        caption="Lower is better. The pale line is every step, the strong one its moving average. An MTP "
        "line is the loss of the head that looks one token further ahead, so it lies above. "
        "Diamonds are held-out text: hollow before a stage, filled after it. The dotted lines are "
        "what a model would reach that knew only how often each token, or each pair of tokens, "
        "occurs.",
    )


def schedule_panels(timeline: Timeline) -> list[Panel]:
    """Return the learning rate, the batch and the weight of the MTP loss."""
    return [
        schedule_panel(
            timeline,
            timeline.values(lambda record: record["lr"]),
            title="Learning rate",
            colour=BLUE,
            hover="%{y:.3g}",
            caption="Warm-up and decay of every stage. A kink in the loss above should find its cause here "
            "or in the batch.",
        ),
        schedule_panel(
            timeline,
            timeline.values(lambda record: record["batch_size"] * record["seq_len"]),
            title="Batch",
            y="tokens per step",
            colour=TEAL,
            hover="%{y:,} tokens",
            shape="hv",
            caption="Tokens per optimizer step: sequences times their length. Longer sequences usually come "
            "with fewer of them.",
        ),
        schedule_panel(
            timeline,
            timeline.values(lambda record: record["mtp_weight"]),
            title="MTP weight",
            y="λ",
            colour=ORANGE,
            hover="%{y:.3g}",
            shape="hv",
            caption="How much the multi-token prediction loss counts beside the main loss (λ in the "
            "DeepSeek-V3 report).",
        ),
    ]


def schedule_panel(
    timeline: Timeline,
    values: Values,
    *,
    title: str,
    colour: str,
    hover: str,
    caption: str,
    y: str = "",
    shape: str = "linear",
) -> Panel:
    """Return one scheduled quantity; `shape` "hv" draws the steps of one that changes by jumps."""
    line = timeline.line(
        values,
        name=title,
        line={"color": colour, "width": 2, "shape": shape},
        with_step=True,
        hovertemplate=f"{hover} (step %{{customdata:,}})",
    )
    figure = timeline.figure([line], y=y or title.lower(), showlegend=False)
    # "B" counts in thousands, millions, billions, which suits tokens and leaves rates alone.
    figure.update_yaxes(rangemode="tozero", exponentformat="B" if shape == "hv" else "power")
    return Panel(title=title, figure=figure, caption=caption)


def stability_panel(run: RunData, timeline: Timeline) -> Panel:
    """Return the gradient norm with the clipping threshold, and the steps that were skipped."""
    norm = timeline.values(lambda record: record.get("grad_norm"))
    clip = run.config.optimizer.max_grad_norm
    traces = [
        timeline.line(
            norm, name="each step", opacity=0.35, line={"color": PURPLE, "width": 1}, hoverinfo="skip"
        ),
        timeline.line(
            timeline.smooth(norm),
            name="gradient norm",
            line={"color": PURPLE, "width": 2.2},
            with_step=True,
            hovertemplate="%{y:.3g} (step %{customdata:,})",
        ),
    ]
    skipped = [i for i, record in enumerate(run.records) if record["skipped"]]
    if skipped:
        # A skipped step has no finite norm of its own: it is marked at the height of its neighbours.
        height = timeline.smooth(norm)[skipped]
        traces.append(
            go.Scatter(
                x=timeline.tokens[skipped],
                y=height,
                mode="markers",
                name="skipped step",
                marker={"symbol": "x", "size": 10, "color": RED},
                customdata=timeline.steps[skipped],
                hovertemplate="step %{customdata:,}: not finite",
            )
        )
    figure = timeline.figure(traces, y="gradient norm")
    ticks = [factor * 10.0**power for power in range(-6, 7) for factor in (1, 2, 5)]
    figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    if np.isfinite(clip):
        figure.add_hline(y=clip, line={"color": GREY, "dash": "dot", "width": 1})
        # On a logarithmic axis an annotation is placed by the exponent, unlike a line.
        figure.add_annotation(
            x=1,
            xref="paper",
            xanchor="right",
            y=float(np.log10(clip)),
            yanchor="bottom",
            text=f"clipped above {clip:g}",
            showarrow=False,
            font={"size": 11},
        )
    share = f"{np.mean(norm[np.isfinite(norm)] > clip):.0%}" if np.isfinite(norm).any() else "none"
    return Panel(
        title="Gradient norm",
        figure=figure,
        caption=f"Before clipping, on a logarithmic axis; {share} of the steps were clipped and "
        f"{len(skipped)} skipped because loss or gradient was not finite. A norm that climbs for "
        "long is the first sign of instability.",
    )


def _held_out_markers(run: RunData, timeline: Timeline) -> list[go.Scatter]:
    traces = []
    for when, symbol in (("before", "diamond-open"), ("after", "diamond")):
        found = [r for (_, w), r in run.evaluations.items() if w == when and r.get("held_out")]
        if found:
            traces.append(
                go.Scatter(
                    x=[result["tokens"] for result in found],
                    y=[result["held_out"]["loss"] for result in found],
                    mode="markers",
                    cliponaxis=False,
                    name=f"held-out, {when} the stage",
                    marker={
                        "symbol": symbol,
                        "size": 11,
                        "color": [timeline.colours.get(result["stage"], GREY) for result in found],
                        "line": {"width": 2},
                    },
                    text=[f"{result['held_out']['loss']:.3f} ({result['stage']})" for result in found],
                    hovertemplate="%{text}",
                )
            )
    return traces


def _add_baselines(run: RunData, figure: go.Figure, losses: Values) -> None:
    result = run.last_evaluation()
    top = np.nanmax(losses) if np.isfinite(losses).any() else np.inf
    for name in ("uniform", "unigram", "bigram"):
        value = ((result or {}).get("held_out") or {}).get(name)
        if value is not None and value <= top * 1.05:
            figure.add_hline(
                y=value,
                line={"color": GREY, "dash": "dot", "width": 1.3},
                annotation_text=f"{name} {value:.2f}",
                annotation_position="top right",
                annotation_font_size=11,
            )


def _nth(values: Sequence[float | None] | None, index: int) -> float | None:
    return values[index] if values and index < len(values) else None
