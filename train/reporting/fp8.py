"""Figures of what FP8 loses: elements that vanish, elements at the end of the range, magnitudes."""

import numpy as np

from model.config import Gemm
from train.reporting.page import Panel
from train.reporting.run_data import RunData
from train.reporting.timeline import BLUE, ORANGE, PURPLE, TEAL, Timeline

CLASSES = {
    "weights": ("weights", BLUE),
    "activations": ("activations", TEAL),
    "expert_rows": ("rows of the experts", ORANGE),
    "gradients": ("gradients", PURPLE),
}
"""Label and colour of each class of tensors."""

MOST_MARKERS = 60
"""A curve of no more points shows each of them."""


def fp8_panels(run: RunData, timeline: Timeline) -> list[Panel]:
    """Return underflow, saturation and largest magnitudes of the quantised tensors, or why there are none."""
    if not any(record.get("fp8") for record in run.records):
        return [Panel(title="FP8", missing=_why_missing(run))]
    return [
        _panel(
            timeline, "underflow", title="FP8 underflow", y="per cent of elements", factor=100,
            caption="Elements other than zero that FP8 holds as zero: they are too small beside the largest "
            "one of their tile. A curve that climbs belongs to tensors whose magnitudes drift apart.",
        ),
        _panel(
            timeline, "saturated", title="FP8 at the largest code", y="per cent of elements", factor=100,
            caption="Elements at ±448. Scales put the largest of a tile of 128 there, so about one per cent "
            "is as it should be (less with power-of-two scales, and in the blocks of weights); many more "
            "come of a scale that is too small.",
        ),
        _panel(
            timeline, "amax", title="FP8 magnitudes", y="max |x|", logarithmic=True,
            caption="The largest element before it is quantised. Scales follow it, so size alone does no "
            "harm; a gap is an element that was not finite.",
        ),
    ]  # fmt: skip


def _panel(
    timeline: Timeline,
    quantity: str,
    *,
    title: str,
    y: str,
    caption: str,
    factor: float = 1.0,
    logarithmic: bool = False,
) -> Panel:
    """One curve for each class, through the steps in which it was counted."""
    traces = []
    for kind, (label, colour) in CLASSES.items():
        values = factor * timeline.values(
            lambda record, kind=kind: ((record.get("fp8") or {}).get(kind) or {}).get(quantity)
        )
        counted = [i for i, record in enumerate(timeline.records) if kind in (record.get("fp8") or {})]
        if counted:
            line = timeline.line(
                values,
                at=np.array(counted),
                name=label,
                line={"color": colour, "width": 1.8},
                with_step=True,
                hovertemplate="%{y:.3g} (step %{customdata:,})",
            )
            traces.append(line.update(mode="lines+markers" if len(counted) <= MOST_MARKERS else "lines"))
    figure = timeline.figure(traces, y=y)
    if logarithmic:
        figure.update_yaxes(type="log")
    else:
        figure.update_yaxes(rangemode="tozero")
    return Panel(title=title, figure=figure, caption=caption)


def _why_missing(run: RunData) -> str:
    precision, every = run.config.precision, run.config.logging.fp8_every
    if precision.gemm is Gemm.compute:
        return f"the run multiplied in {precision.compute}, and nothing was quantised."
    if precision.gemm is Gemm.fp8_te:
        return "Transformer Engine quantises inside its kernels, where nothing is counted."
    return f"no step was counted yet; every {every:,}th is (logging.fp8_every)."
