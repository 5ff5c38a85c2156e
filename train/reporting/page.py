"""The page of a report: panels with a figure and a caption each, in one HTML file that needs no network.

plotly.js is embedded. Figures carry no colours of paper, text or grid: the page's script takes those from
the page's own light or dark theme, and changes them with it.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from html import escape

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs


class Scale(StrEnum):
    """What the colours of a heat map say; the script has one scale of each kind for light and for dark."""

    DIVERGING = "diverging"  # below, at, above a neutral middle
    SEQUENTIAL = "sequential"  # little to much


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One figure with the words that explain it, or the reason why it is not there."""

    title: str
    caption: str = ""  # how to read it
    figure: go.Figure | None = None
    missing: str = ""  # why there is no figure
    wide: bool = False
    height: int = 330
    scale: Scale | None = None


@dataclass(frozen=True, kw_only=True)
class Section:
    """A headed group of panels."""

    title: str
    lead: str
    panels: list[Panel] = field(default_factory=list)


def render_page(*, title: str, header: str, sections: list[Section], footer: str) -> str:
    """Return the whole page; `header` and `footer` are HTML."""
    links = "".join(f'<a href="#{_anchor(s.title)}">{escape(s.title)}</a>' for s in sections)
    figures: list[str] = []
    body = "".join(_section(section, figures) for section in sections)
    # "</" inside a script element would end it; JSON allows the escaped slash.
    data = "[" + ",".join(figures).replace("</", "<\\/") + "]"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n<script>{get_plotlyjs()}</script>\n</head>\n<body>\n"
        f'<nav>{links}<button id="theme" title="light or dark">◐</button></nav>\n'
        f"<main>\n{header}\n{body}\n{footer}\n</main>\n"
        f'<script type="application/json" id="figures">{data}</script>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _section(section: Section, figures: list[str]) -> str:
    panels = "".join(_panel(panel, figures) for panel in section.panels)
    return (
        f'<section id="{_anchor(section.title)}"><h2>{escape(section.title)}</h2>'
        f'<p class="lead">{section.lead}</p><div class="panels">{panels}</div></section>\n'
    )


def _panel(panel: Panel, figures: list[str]) -> str:
    if panel.figure is None:
        return f'<p class="missing"><b>{escape(panel.title)}</b>: not shown, {panel.missing}</p>'
    number = len(figures)
    figures.append(panel.figure.to_json() or "")
    scale = f' data-scale="{panel.scale}"' if panel.scale else ""
    return (
        f'<figure class="panel{" wide" if panel.wide else ""}"><h3>{escape(panel.title)}</h3>'
        f'<div class="plot" data-figure="{number}"{scale} style="height:{panel.height}px"></div>'
        f"<figcaption>{panel.caption}</figcaption></figure>"
    )


def _anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())


STYLE = """
:root { --paper:#f6f7f9; --card:#ffffff; --ink:#1c2430; --soft:#5f6b7a; --line:#e3e7ec; --grid:#eceff3;
  --accent:#3b6fe0; --good:#12805c; --bad:#b42335; color-scheme:light; }
:root[data-theme=dark] { --paper:#0f131a; --card:#171c25; --ink:#e6eaf0; --soft:#98a3b3; --line:#28303c;
  --grid:#242b36; --accent:#7aa2ff; --good:#4ccf9f; --bad:#ff7a85; color-scheme:dark; }
* { box-sizing:border-box; }
html { scroll-behavior:smooth; scroll-padding-top:3.5rem; }
body { margin:0; background:var(--paper); color:var(--ink);
  font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif; }
nav { position:sticky; top:0; z-index:9; display:flex; gap:1.4rem; align-items:center; padding:.55rem 1.6rem;
  overflow-x:auto; background:color-mix(in srgb, var(--paper) 88%, transparent); backdrop-filter:blur(8px);
  border-bottom:1px solid var(--line); }
nav a { color:var(--soft); text-decoration:none; white-space:nowrap; font-size:.88rem; }
nav a:hover { color:var(--accent); }
nav button { margin-left:auto; border:1px solid var(--line); border-radius:99px; background:var(--card);
  color:var(--ink); font-size:1rem; width:2rem; height:2rem; cursor:pointer; flex:none; }
main { max-width:1280px; margin:0 auto; padding:1.6rem; }
h1 { font-size:2rem; line-height:1.2; margin:.6rem 0 .2rem; letter-spacing:-.02em; }
h2 { font-size:1.35rem; margin:2.6rem 0 .2rem; letter-spacing:-.01em; }
h3 { font-size:.98rem; margin:0 0 .3rem; }
.lead, .verdict { color:var(--soft); max-width:78ch; margin:.2rem 0 1rem; }
.verdict { font-size:1.05rem; color:var(--ink); }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(158px,1fr)); gap:.8rem; margin:1.2rem 0; }
.tile { background:var(--card); border:1px solid var(--line); border-radius:12px; padding:.8rem 1rem; }
.tile b { display:block; font-size:1.5rem; font-weight:650; letter-spacing:-.02em; }
.tile span { color:var(--soft); font-size:.82rem; }
.scroll { overflow-x:auto; background:var(--card); border:1px solid var(--line); border-radius:12px; }
table { border-collapse:collapse; width:100%; font-size:.9rem; font-variant-numeric:tabular-nums; }
th, td { padding:.55rem .9rem; text-align:right; border-bottom:1px solid var(--line); white-space:nowrap; }
th { color:var(--soft); font-weight:500; font-size:.8rem; vertical-align:bottom; }
th:first-child, td:first-child { text-align:left; } tr:last-child td { border-bottom:0; }
.dot { display:inline-block; width:.7em; height:.7em; border-radius:50%; margin-right:.55em; }
.from { color:var(--soft); } .good, .bad { font-weight:600; }
.good { color:var(--good); } .bad { color:var(--bad); }
.panels { display:flex; flex-wrap:wrap; gap:1rem; }
.panel { margin:0; min-width:0; flex:1 1 min(500px,100%); background:var(--card);
  border:1px solid var(--line); border-radius:12px; padding:1rem 1.1rem .9rem; }
.wide, .missing { flex-basis:100%; } .plot { width:100%; }
figcaption { color:var(--soft); font-size:.86rem; max-width:95ch; margin-top:.4rem; }
.missing { margin:0; padding:.6rem 1.1rem; color:var(--soft); font-size:.9rem;
  border:1px dashed var(--line); border-radius:12px; }
details { margin:2.6rem 0 1rem; } summary { cursor:pointer; color:var(--soft); }
pre { overflow:auto; max-height:34rem; background:var(--card); border:1px solid var(--line);
  border-radius:12px; padding:1rem; font-size:.8rem; line-height:1.45; }
@media (max-width:640px) { main { padding:.9rem; } h1 { font-size:1.5rem; } .panel { padding:.8rem .6rem; } }
"""

SCRIPT = """
const root = document.documentElement, figures = JSON.parse(document.getElementById("figures").textContent);
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const scales = {
  light: { diverging: [[0,"#2b5fc7"],[.25,"#9dbdf2"],[.5,"#f4f5f7"],[.75,"#f3b08a"],[1,"#c2402d"]],
           sequential: [[0,"#f1f4f9"],[.35,"#a9cfe8"],[.7,"#3c8dbc"],[1,"#123a6b"]] },
  dark: { diverging: [[0,"#6ea0ff"],[.25,"#31548f"],[.5,"#1f2632"],[.75,"#8d4a34"],[1,"#ff8a5c"]],
          sequential: [[0,"#1c2430"],[.35,"#215273"],[.7,"#3d9cc9"],[1,"#b9ecff"]] } };
const colour = name => getComputedStyle(root).getPropertyValue("--" + name).trim();
function look(div, layout) {
  const patch = { "font.color": colour("soft"), paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    "hoverlabel.bgcolor": colour("card"), "hoverlabel.bordercolor": colour("line"),
    "hoverlabel.font.color": colour("ink"), "modebar.bgcolor": "rgba(0,0,0,0)",
    "modebar.color": colour("soft"), "modebar.activecolor": colour("accent") };
  for (const axis of Object.keys(layout).filter(key => /^[xy]axis/.test(key))) {
    patch[axis + ".gridcolor"] = colour("grid"); patch[axis + ".linecolor"] = colour("line");
    patch[axis + ".zerolinecolor"] = colour("grid");
  }
  if (div.dataset.scale) patch["coloraxis.colorscale"] = scales[root.dataset.theme][div.dataset.scale];
  return patch;
}
function assign(layout, patch) {
  for (const [path, value] of Object.entries(patch)) {
    const keys = path.split("."), last = keys.pop();
    keys.reduce((node, key) => node[key] = node[key] || {}, layout)[last] = value;
  }
  return layout;
}
const plots = [...document.querySelectorAll(".plot")];
function setTheme(theme) {
  root.dataset.theme = theme;
  for (const div of plots) if (div.layout) Plotly.relayout(div, look(div, div.layout));
}
setTheme(prefersDark.matches ? "dark" : "light");
prefersDark.addEventListener("change", event => setTheme(event.matches ? "dark" : "light"));
document.getElementById("theme").onclick = () => setTheme(root.dataset.theme === "dark" ? "light" : "dark");
for (const div of plots) {
  const { data, layout, frames } = figures[div.dataset.figure];
  // Where there is no pointer to hover with, the buttons would cover the figure for good.
  const config = { responsive: true, displaylogo: false,
    displayModeBar: matchMedia("(hover: hover)").matches && "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  Plotly.newPlot(div, { data, layout: assign(layout, look(div, layout)), frames, config });
}
"""
