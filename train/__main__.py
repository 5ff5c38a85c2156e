"""`python -m train recipe=NAME key=value …`: train, evaluate, report; resumes by itself.

Exit codes: 0 done, 2 bad input (nothing started), 3 unstable, 4 a process of the job was lost, 75 stopped by
a signal and saved. torchrun itself ends with 1 when one of them is not 0, and lists them.
"""

import os
import sys

import hydra
from omegaconf import DictConfig

from train.config_store import register, to_run_config
from train.errors import EXIT_BAD_INPUT, exit_cleanly

register()


def main() -> None:
    """Compose the configuration from the command line and run the job it describes."""
    composed = False
    leads = os.environ.get("RANK", "0") == "0"
    # Read by OpenMP when torch is loaded, which is later. Threads that spin while waiting take the cores from
    # those that work as soon as anything else runs on the machine: a step then takes several times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    @hydra.main(config_path="pkg://configs", config_name="config", version_base="1.3")
    def entry(overrides: DictConfig) -> None:
        nonlocal composed
        composed = True
        sys.stderr = stderr
        with exit_cleanly():
            # Imported here so that `--help`, `--cfg job` and a mistyped key answer before torch is loaded.
            from train.run import run

            run(to_run_config(overrides))

    stderr = sys.stderr
    if not leads:  # Hydra prints what it cannot compose, and every process would say the same
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # until this process ends
    try:
        entry()
    except SystemExit as stop:
        # Hydra ends with 1 when it cannot compose; that is bad input, and it has printed which.
        if stop.code == 1 and not composed:
            sys.exit(EXIT_BAD_INPUT)
        raise


if __name__ == "__main__":
    main()
