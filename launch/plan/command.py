"""`python -m launch plan recipe=… cluster=… [key=value …]`: the best layouts of a run, before it is paid for.

For every stage, all legal layouts of the cluster are enumerated, those that do not fit its devices are
dropped, and the rest is ranked by predicted time. The layout that the recipe has is always among them, marked
with *.
Keys of the layout that are given on the command line (parallel.pp=8) are held; all others are searched.
docs/plan.md says what is counted, where every assumption comes from, and how far it was off.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from launch.options import add_prediction_options, at_least, command_parser
from launch.plan.answer import StageAnswer, answer
from launch.plan.as_json import answer_json, comparisons_json
from launch.plan.measured import measured_json, measured_table, read_measured
from launch.plan.published import POINTS, compare
from launch.plan.question import questions
from launch.plan.sensitivity import sensitivity
from launch.plan.tables import (
    CUT,
    comparisons,
    costs,
    effects,
    is_published,
    memory,
    published_costs,
    ranking,
)
from launch.tables import console
from train.config_store import compose_run
from train.errors import RunError

SHOWN = 10
"""Layouts that are shown unless --layouts says how many."""


def main(argv: list[str]) -> None:
    """Answer one command line. RunError where the request is illegal, or nothing fits."""
    options = _parser().parse_intermixed_args(argv)
    _refuse_unread(options)
    out = console()
    if options.published:
        _published(out, as_json=options.json)
    elif options.metrics is not None:
        found = read_measured(options.metrics, world_size=options.world_size)
        _show(out, measured_json(found)) if options.json else out.print(measured_table(found))
    else:
        _plan(out, options)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("plan", __doc__)
    add_prediction_options(parser)
    parser.add_argument("--layouts", type=at_least(1, int), metavar="N", help=f"layouts to show ({SHOWN})")
    parser.add_argument("--metrics", type=Path, metavar="RUN_DIR", help="compare a run with its plan instead")
    parser.add_argument(
        "--published", action="store_true", help="compare published speeds with predictions instead"
    )
    return parser


def _refuse_unread(options: argparse.Namespace) -> None:
    """Raise RunError for what a comparison would not look at, since it has a configuration of its own."""
    if options.published:
        asked, reads, others = "--published compares layouts of its own", "--json", ("metrics", "world_size")
    elif options.metrics is not None:
        asked, reads, others = "--metrics compares a run as it is", "--world-size and --json", ()
    else:
        return
    unread = list(options.overrides)
    unread += [_option(name) for name in (*others, "layouts") if getattr(options, name) is not None]
    unread += [_option("imbalance")] * (options.imbalance != 1)
    if unread:
        raise RunError(f"{asked} and reads nothing but {reads}; leave out {', '.join(unread)}")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _plan(out: Console, options: argparse.Namespace) -> None:
    asked = questions(
        compose_run(options.overrides),
        overrides=options.overrides,
        world_size=options.world_size,
        imbalance=options.imbalance,
    )
    longest = max(asked, key=lambda question: question.num_tokens)
    shown = options.layouts or SHOWN
    answers = [answer(question, count=shown if question is longest else 1) for question in asked]
    main_answer = next(each for each in answers if each.question is longest)
    found = sensitivity(main_answer.best)
    if options.json:
        _show(out, answer_json(answers, main_answer, found))
        return
    _explain(out, main_answer)
    out.print(costs(answers))
    if is_published(main_answer):
        out.print(published_costs(answers))
    for each in answers:
        for problem in each.own_problems:
            out.print(f"not as configured: {problem}", style="red")
    out.print(effects(found))


def _explain(out: Console, found: StageAnswer) -> None:
    """Print the ranking of a stage, and the memory of its best layout and of its own."""
    out.print(ranking(found))
    own = "" if found.own is None else "  * the recipe's own layout"
    cut = f"  {CUT}" if any(plan.parallel.layers_per_stage for plan in found.plans) else ""
    out.print(
        f"of {found.found.num_legal:,} legal layouts{own}{cut}\n"
        "GB: of the fullest device; out, in: GB that a device sends between nodes, inside one, in a step;\n"
        "h/T: GPU hours per trillion tokens; MFU: of the BF16 peak\n"
        f"best: {' '.join(found.overrides(found.best)) or 'the recipe as it is'}"
    )
    out.print(memory(found.best, "the best layout"))
    if found.own is not None and not found.is_own(found.best):
        out.print(memory(found.own, "the recipe's own layout"))


def _published(out: Console, *, as_json: bool) -> None:
    found = [compare(point) for point in POINTS]
    if as_json:
        _show(out, comparisons_json(found))
        return
    out.print(comparisons(found))
    out.print(CUT)
    for each in found:
        out.print(f"{each.point.name}: {each.point.source}; {each.point.note}")


def _show(out: Console, answer: object) -> None:
    print(json.dumps(answer, indent=2), file=out.file)
