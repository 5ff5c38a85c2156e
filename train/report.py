"""`python -m train.report RUN`: the whole run on one page, in one HTML file that opens without a network.

Everything comes from the run directory: config.yaml, metrics.jsonl and evaluations/*.json. A report can be
made while the run is going on, and what is not there yet is left out with a line that says why. With
`--beside OTHER…` the page begins with the losses of other runs next to this one's.
"""

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median

from model.cost import active_parameters, parameters
from train.checkpoints.durable import replace_durably
from train.errors import RunError, exit_cleanly, writing
from train.logs.console import duration, quantity
from train.reporting.balance import balance_panels
from train.reporting.beside import beside_panels
from train.reporting.curves import loss_panel, schedule_panels, stability_panel
from train.reporting.evaluation import evaluation_panels
from train.reporting.fp8 import fp8_panels
from train.reporting.page import Panel, Section, render_page
from train.reporting.run_data import RunData, StageSummary, read_run, stage_summaries
from train.reporting.speed import speed_panels
from train.reporting.timeline import Timeline, stage_colours
from train.stored_config import config_text


def write_report(run_dir: Path, *, beside: Sequence[Path] = ()) -> Path:
    """Write `run_dir`/report.html and return its path.

    Raises RunError when a file of a run is damaged, or the report cannot be written.
    """
    run = read_run(run_dir)
    others = [read_run(other) for other in beside]
    names = [each.config.name for each in (run, *others)]
    if len(set(names)) < len(names):
        raise RunError(f"--beside: runs are told apart by name, but these are {', '.join(names)}; rename one")
    path = run_dir / "report.html"
    page = report_page(run, others)
    with writing(path):
        replace_durably(path, page)  # a report that is open in a browser is never seen half written
    return path


def report_page(run: RunData, others: Sequence[RunData] = ()) -> str:
    """Return the HTML of the report of `run`, beside `others`."""
    compared = Section(
        title="Beside other runs",
        lead="The same tokens, another run.",
        panels=beside_panels(run, others) if others else [],
    )
    return render_page(
        title=f"{run.config.name} · training report",
        header=_header(run),
        sections=([compared] if others else []) + _sections(run),
        footer=f"<details><summary>Configuration "
        f"(config.yaml)</summary><pre>{escape(config_text(run.config))}</pre></details>",
    )


def _sections(run: RunData) -> list[Section]:
    evaluation = Section(
        title="Long contexts",
        lead="What each stage changed: the loss at every position, and whether a fact far back in the text "
        "is found.",
        panels=evaluation_panels(run),
    )
    if not run.records:
        missing = Panel(title="Training", missing="metrics.jsonl has no step yet.")
        return [Section(title="Training", lead="", panels=[missing]), evaluation]
    timeline = Timeline(run)
    return [
        Section(
            title="Learning",
            lead="All curves run over the tokens seen; the tinted bands are the stages. Drag to zoom, "
            "double-click to return, click a name in a legend to hide its curve.",
            panels=[loss_panel(run, timeline), *schedule_panels(timeline), stability_panel(run, timeline)],
        ),
        evaluation,
        Section(
            title="Experts",
            lead="How evenly the routers spread the tokens over their experts.",
            panels=balance_panels(run, timeline),
        ),
        Section(
            title="FP8",
            lead="What quantising weights, activations and gradients loses, counted in some steps.",
            panels=fp8_panels(run, timeline),
        ),
        Section(title="Speed", lead="What the machine made of it.", panels=speed_panels(run, timeline)),
    ]


def _header(run: RunData) -> str:
    summaries = stage_summaries(run)
    model = run.config.model
    shape = (
        f"{model.num_layers} layers of width {model.hidden_size:,}, {model.moe.num_experts} experts of which "
        f"{model.moe.top_k} serve a token, vocabulary of {model.vocab_size:,}"
    )
    recipe = "" if run.config.recipe == run.config.name else f"recipe {escape(run.config.recipe)} · "
    tiles = "".join(
        f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for value, label in _tiles(run)
    )
    return (
        f'<h1>{escape(run.config.name)}</h1><p class="lead">{recipe}{shape}.</p>'
        f'<p class="verdict">{_verdict(run, summaries)}</p>'
        f'<div class="tiles">{tiles}</div>{_table(run, summaries)}'
    )


def _tiles(run: RunData) -> list[tuple[str, str]]:
    """Return the large figures at the top: value and label."""
    tiles: list[tuple[str, str]] = []
    held_out = (run.last_evaluation() or {}).get("held_out") or {}
    if held_out.get("loss") is not None:
        tiles.append((f"{held_out['loss']:.3f}", "held-out loss, nats per token"))
        if held_out.get("unigram") is not None:
            below = held_out["unigram"] - held_out["loss"]
            side = "below" if below >= 0 else "above"
            tiles.append((f"{abs(below):.2f}", f"nats {side} the unigram baseline"))
    model = run.config.model
    active = f"{quantity(active_parameters(model).total)} active per token"
    tiles.append((quantity(parameters(model).total), f"parameters, {active}"))
    if run.records:
        last = run.records[-1]
        tiles.append((quantity(last["tokens"]), f"tokens in {last['step']:,} steps"))
        tiles.append((duration(sum(r["timing"]["seconds"] for r in run.records)), "in optimizer steps"))
        rates = [r["timing"].get("tokens_per_second") for r in run.records]
        known = [rate for rate in rates if rate is not None]
        if known:
            tiles.append((quantity(median(known)), "tokens per second (median)"))
    return tiles


def _verdict(run: RunData, summaries: list[StageSummary]) -> str:
    """Return what the run came to, in a sentence or two."""
    planned = sum(stage.num_tokens for stage in run.config.stages.values())
    seen = run.records[-1]["tokens"] if run.records else 0
    state = (
        "finished"
        if seen >= planned
        else f"stands at {seen / max(1, planned):.0%} of its {quantity(planned)} tokens"
    )
    sentences = [f"The run {state}."]
    held_out = (run.last_evaluation() or {}).get("held_out") or {}
    if held_out.get("loss") is not None:
        sentences.append(
            f"Held-out text costs {held_out['loss']:.2f} nats per token, against {held_out['bigram']:.2f} "
            f"for bigrams, {held_out['unigram']:.2f} for single tokens and {held_out['uniform']:.2f} for "
            "guessing."
        )
    beyond = [
        (stage, stage.before.beyond, stage.after.beyond)
        for stage in summaries
        if stage.before is not None and stage.after is not None
    ]
    measured = [found for found in beyond if found[1] is not None and found[2] is not None]
    if measured:
        stage, before, after = measured[-1]
        sentences.append(
            f"Training on sequences of {stage.seq_len:,} tokens took the loss at positions beyond "
            f"{stage.previous_length:,} from {before:.2f} to {after:.2f}."
        )
    return " ".join(sentences)


def _table(run: RunData, summaries: list[StageSummary]) -> str:
    colours = stage_colours(run)
    heads = [
        "stage",
        "sequence",
        "tokens",
        "steps",
        "time",
        "train loss",
        "held-out loss",
        "beyond previous length",
        "needle found",
    ]
    rows = []
    for s in summaries:
        skipped = f' <span class="bad">({s.skipped} skipped)</span>' if s.skipped else ""
        cells = [
            f'<span class="dot" style="background:{colours[s.name]}"></span>{escape(s.name)}',
            f"{s.seq_len:,}",
            quantity(s.tokens),
            f"{s.steps:,}{skipped}",
            duration(s.seconds),
            _cell(s.final_loss, ".3f"),
            _change(s, "held_out", ".3f", lower_is_better=True),
            _change(s, "beyond", ".3f", lower_is_better=True),
            _change(s, "needle", ".0%", lower_is_better=False),
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _change(summary: StageSummary, key: str, spec: str, *, lower_is_better: bool) -> str:
    """Return "before → after", the latter coloured by whether it is better."""
    before = getattr(summary.before, key, None)
    after = getattr(summary.after, key, None)
    if after is None:
        return _cell(before, spec)
    if before is None:
        return _cell(after, spec)
    better = after == before or (after < before) == lower_is_better
    verdict = "good" if better else "bad"
    return f'<span class="from">{before:{spec}} →</span> <span class="{verdict}">{after:{spec}}</span>'


def _cell(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def main() -> None:
    """Write the report of the run named on the command line and print where it is."""
    parser = argparse.ArgumentParser(prog="python -m train.report", description="Write report.html of a run.")
    parser.add_argument("run", type=Path, help="the run's directory, such as runs/smoke")
    parser.add_argument("--beside", nargs="+", type=Path, default=[], metavar="OTHER", help="runs to compare")
    arguments = parser.parse_args()
    with exit_cleanly():
        print(write_report(arguments.run, beside=arguments.beside))


if __name__ == "__main__":
    main()
