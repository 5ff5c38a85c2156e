"""`python -m train recipe=NAME key=value …`: train, evaluate, report; resumes by itself.

Exit codes: 0 done, 2 bad input (nothing started) or a file that cannot be written, 3 unstable, 4 a process of
the job was lost, 75 stopped by a signal and saved. torchrun itself ends with 1 when one of them is not 0, and
lists them.
"""

import os
import sys

import hydra
from omegaconf import DictConfig

from train.config_store import COMPOSITION_ERRORS, composition_error, register, to_run_config
from train.errors import exit_cleanly

register()


def main() -> None:
    """Compose the configuration from the command line and run the job it describes."""
    composed = False
    leads = os.environ.get("RANK", "0") == "0"
    # Read by OpenMP when torch is loaded, which is later. Threads that spin while waiting take the cores from
    # those that work as soon as anything else runs on the machine: a step then takes several times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    # Hydra then lets its errors pass instead of printing them, some with a traceback.
    os.environ["HYDRA_FULL_ERROR"] = "1"

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
    if not leads:  # Hydra prints which options it does not know, and every process would say the same
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # until this process ends
    with exit_cleanly():
        try:
            entry()
        except COMPOSITION_ERRORS as error:
            if composed:
                raise
            raise composition_error(error) from error


if __name__ == "__main__":
    main()
