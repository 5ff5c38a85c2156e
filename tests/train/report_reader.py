"""Reads a report back: what a browser would fetch, the text it would show, and the figures it would draw."""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs


class Page(HTMLParser):
    """What a browser would fetch, draw and show of a report."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.fetched: list[str] = []
        self.titles: list[str] = []
        self.plots: list[int] = []
        self._open: list[str] = []
        self.text = ""
        self.figures: list[dict[str, Any]] = []
        # Nothing in plotly.js is ours to read, and it is most of the page.
        self.feed(self.html.replace(get_plotlyjs(), ""))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open.append(tag)
        values = dict(attrs)
        self.fetched += [
            v for k, v in attrs if v and k in ("src", "href", "srcset") and not v.startswith("#")
        ]
        if values.get("class") == "plot":
            self.plots.append(int(values["data-figure"] or ""))

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        tag = self._open[-1] if self._open else ""
        if tag == "script" and data.startswith("[{"):
            self.figures = json.loads(data)
        elif tag not in ("script", "style"):
            self.text += " " + data
            if tag == "h3":
                self.titles.append(data)

    def figure(self, title: str) -> dict[str, Any]:
        return self.figures[self.titles.index(title)]


def array(value: Any) -> np.ndarray:
    """Decode plotly's binary arrays."""
    if not isinstance(value, dict):
        return np.array(value, dtype=np.float64)
    flat = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
    return flat.reshape([int(n) for n in value["shape"].split(",")]) if "shape" in value else flat


def known(value: Any) -> np.ndarray:
    flat = array(value).astype(np.float64)
    return flat[np.isfinite(flat)]
