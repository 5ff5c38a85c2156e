"""How long work takes on a device that is given work faster than it does it."""

import statistics
import time
from collections.abc import Callable

import torch

WARM_UPS, REPEATS = 2, 5


def settle(device: torch.device) -> None:
    """Wait until the device has done everything it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def repeated_seconds(
    work: Callable[[], object],
    device: torch.device,
    *,
    warm_ups: int = WARM_UPS,
    repeats: int = REPEATS,
) -> list[float]:
    """Return the seconds of each of `repeats` runs, after `warm_ups` that are not counted."""
    seconds: list[float] = []
    for _ in range(warm_ups + repeats):
        settle(device)
        started = time.perf_counter()
        work()
        settle(device)
        seconds.append(time.perf_counter() - started)
    return seconds[warm_ups:]


def median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median of REPEATS runs, after WARM_UPS that are not counted."""
    return statistics.median(repeated_seconds(work, device))
