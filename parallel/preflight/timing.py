"""How long work takes on a device that is given work faster than it does it."""

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch

WARM_UPS, REPEATS = 2, 5

Result = TypeVar("Result")


def settle(device: torch.device) -> None:
    """Wait until the device has done everything it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Return the seconds that work takes on an idle device, until it is idle again, and what it gives."""
    settle(device)
    started = time.perf_counter()
    result = work()
    settle(device)
    return time.perf_counter() - started, result


def repeated_seconds(work: Callable[[], object], device: torch.device) -> list[float]:
    """Return the seconds of each of REPEATS runs, after WARM_UPS that are not counted."""
    return [timed(work, device)[0] for _ in range(WARM_UPS + REPEATS)][WARM_UPS:]


def median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median of REPEATS runs, after WARM_UPS that are not counted."""
    return statistics.median(repeated_seconds(work, device))
