"""`python -m parallel.pipeline`: how long each schedule idles, by its own table, beside its formula."""

import argparse

from parallel.config import Schedule
from parallel.pipeline.actions import action_table
from parallel.pipeline.bubble import Costs, bubble_row, bubble_table
from parallel.pipeline.rules import schedule_problems


def main() -> None:
    """Print one line for each schedule that can run with so many microbatches, and why the others cannot."""
    parser = argparse.ArgumentParser(prog="python -m parallel.pipeline", description=__doc__)
    parser.add_argument("--pp", type=int, default=4, help="pipeline ranks")
    parser.add_argument("--microbatches", type=int, default=16, help="microbatches of a step")
    parser.add_argument("--chunks", type=int, default=2, help="stages per rank of the interleaved schedules")
    for name, meaning in (
        ("forward", "a forward pass"),
        ("input", "the gradients of inputs"),
        ("weight", "the gradients of weights"),
    ):
        parser.add_argument(f"--{name}", type=float, default=1.0, help=f"time of {meaning} through a stage")
    parser.add_argument("--overlapped", type=float, help="time of a forward and a backward pass joined")
    options = parser.parse_args()
    costs = Costs(
        forward=options.forward,
        backward_input=options.input,
        backward_weight=options.weight,
        overlapped=options.overlapped,
    )
    rows, refused = [], []
    for schedule in Schedule:
        sizes = {"pp": options.pp, "chunks": options.chunks, "num_microbatches": options.microbatches}
        if problems := schedule_problems(schedule, **sizes):
            refused += [f"{schedule}: {problem}" for problem in problems]
            continue
        table = action_table(schedule, overlap=options.overlapped is not None, **sizes)
        rows.append(bubble_row(table, schedule, num_microbatches=options.microbatches, costs=costs))
    print(bubble_table(rows))
    print("\n".join(refused))


if __name__ == "__main__":
    main()
