"""Curves over training: one horizontal axis, the tokens seen, with the stages as tinted bands."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from train.reporting.run_data import RunData

Values = NDArray[np.float64]

BLUE, ORANGE, TEAL, RED, PURPLE, GREY = "#3f7cf0", "#ee8b2d", "#16a394", "#dc4a56", "#8a63d9", "#8f9bab"
STAGE_COLOURS = ("#3f7cf0", "#16a394", "#ee8b2d", "#c74fa5", "#8a63d9", "#7a9a2e")
MAX_POINTS = 1500
"""A curve has at most about twice this many points: more cannot be seen, only downloaded."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """The stretch of tokens that one stage covers."""

    stage: str
    first: float  # tokens before its first step
    last: float  # tokens after its last


class Timeline:
    """The records of a run along the tokens seen, and how a quantity becomes a curve on it."""

    def __init__(self, run: RunData) -> None:
        self.records = run.records
        self.tokens = np.array([record["tokens"] for record in run.records], dtype=np.float64)
        self.steps = np.array([record["step"] for record in run.records], dtype=np.int64)
        self.spans: list[Span] = []
        # Indices at which a stage begins, and the end: curves are broken there and smoothed between.
        self.edges = [0]
        for stage, group in groupby(run.records, key=lambda record: record["stage"]):
            self.edges.append(self.edges[-1] + len(list(group)))
            first = self.spans[-1].last if self.spans else 0.0
            self.spans.append(Span(stage=stage, first=first, last=float(self.tokens[self.edges[-1] - 1])))
        self.colours = stage_colours(run)

    def values(self, get: Callable[[dict[str, Any]], float | None]) -> Values:
        """Return one number per record; nan where it has none."""
        return np.array([get(record) for record in self.records], dtype=np.float64)

    def smooth(self, values: Values) -> Values:
        """Return the mean around each step, over a fiftieth of its stage or a few steps if that is more."""
        out = np.full_like(values, np.nan)
        for first, end in pairwise(self.edges):
            part = values[first:end]
            known = np.isfinite(part)
            sums = np.concatenate(([0.0], np.cumsum(np.where(known, part, 0.0))))
            counts = np.concatenate(([0], np.cumsum(known)))
            half = max(len(part) // 100, min(3, len(part) // 10))
            low = np.maximum(np.arange(len(part)) - half, 0)
            high = np.minimum(np.arange(len(part)) + half + 1, len(part))
            total = (counts[high] - counts[low]).astype(np.float64)
            total[total == 0] = np.nan
            out[first:end] = (sums[high] - sums[low]) / total
        return out

    def thin(self, values: Values, *, limit: int = MAX_POINTS) -> NDArray[np.int64]:
        """Return the indices to draw: all when few, else the lowest and highest of every small piece."""
        if len(values) <= 2 * limit:
            return np.arange(len(values))
        kept = {0, len(values) - 1, *self.edges[:-1], *(edge - 1 for edge in self.edges[1:])}
        filled = np.where(np.isfinite(values), values, np.nanmedian(values))
        for piece in np.array_split(np.arange(len(values)), limit):
            kept |= {int(piece[filled[piece].argmin()]), int(piece[filled[piece].argmax()])}
        return np.array(sorted(kept))

    def line(self, values: Values, *, at: NDArray[np.int64] | None = None, **style: Any) -> go.Scatter:
        """Return the curve of `values`, broken between stages; `style` goes to plotly's trace."""
        indices = self.thin(values) if at is None else at
        places = np.searchsorted(indices, self.edges[1:-1])
        x = np.insert(self.tokens[indices], places, np.nan)
        y = np.insert(values[indices], places, np.nan)
        steps = np.insert(self.steps[indices].astype(np.float64), places, np.nan)
        if style.pop("with_step", False):
            style["customdata"] = steps
        return go.Scatter(x=x, y=y, mode="lines", connectgaps=False, **style)

    def figure(self, traces: Sequence[go.Scatter], *, y: str, wide: bool = False, **layout: Any) -> go.Figure:
        """Return a figure of curves with the stages behind them; `y` is the title of the vertical axis."""
        figure = go.Figure(traces)
        total = max(1.0, self.tokens[-1])
        figure.update_layout(
            margin={"l": 58, "r": 16, "t": 26, "b": 76 if layout.get("showlegend", True) else 44},
            hovermode="x unified",
            legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
            xaxis={
                "title": {"text": "tokens seen"},
                "exponentformat": "B",
                "showgrid": False,
                "showline": True,
                "range": [-0.008 * total, 1.008 * total],
            },
            yaxis={"title": {"text": y}, "exponentformat": "power", "zeroline": False},
            **layout,
        )
        # Names of stages narrower than their own text would run into each other.
        self._mark_stages(figure, least_share=0.08 if wide else 0.17)
        return figure

    def _mark_stages(self, figure: go.Figure, *, least_share: float) -> None:
        total = max(1.0, self.tokens[-1])
        for span in self.spans:
            colour = self.colours[span.stage]
            figure.add_vrect(
                x0=span.first, x1=span.last, fillcolor=colour, opacity=0.07, line_width=0, layer="below"
            )
            if span.last - span.first >= least_share * total:
                figure.add_annotation(
                    x=span.first,
                    xanchor="left",
                    y=1.0,
                    yref="paper",
                    yanchor="bottom",
                    text=span.stage,
                    showarrow=False,
                    font={"color": colour, "size": 11},
                )


def stage_colours(run: RunData) -> dict[str, str]:
    """Return the colour of every stage, the same in all figures of a report."""
    return {name: STAGE_COLOURS[i % len(STAGE_COLOURS)] for i, name in enumerate(run.config.stages)}
