"""`python -m train.parity`: prove parallel layouts against one process, gradient by gradient.

Starts the processes itself (gloo, on this machine), takes optimizer steps of a small model under each
layout, and prints how far loss, every gradient, the gradient norm, every router bias and every parameter are
from those of one process on the same global batch. Exit codes: 0 every row is within the tolerance, 1 a row
is not, 2 a layout cannot be run.
"""

import argparse
import os
import sys
from pathlib import Path

from model.config import Gemm
from train.errors import RunError, exit_cleanly

GEMMS = (Gemm.compute.value, Gemm.fp8_reference.value)


def main() -> None:
    """Run the matrix that the command line asks for."""
    # read by OpenMP when torch is loaded: many processes share this machine
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(prog="python -m train.parity", description=__doc__)
    parser.add_argument("--layouts", nargs="+", metavar="LAYOUT", help="such as pp2_dualpipev_ep2_tp2")
    parser.add_argument("--gemm", choices=GEMMS, default=GEMMS[0], help="what multiplies inside the blocks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON as well")
    options = parser.parse_args()
    with exit_cleanly():
        # imported here so that --help answers before torch is loaded
        from train.parity.command import prove

        if options.json and not options.json.parent.is_dir():
            raise RunError(f"--json {options.json}: the folder does not exist; make it first")
        sys.exit(0 if prove(options.layouts, gemm=Gemm(options.gemm), json_file=options.json) else 1)


if __name__ == "__main__":
    main()
