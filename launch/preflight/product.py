"""A matrix product on every rank at the same time: is one slow, and does one calculate wrongly?

The time is that of a product of random matrices in the type that training uses. The result is checked on
another product whose every partial sum is exact in any order and any type with eight significant bits:

    a[i, k] = 1 if (i + k) mod M = 0, else 0          so that row i of a picks every M-th row of b
    (a b)[i, j] = sum over m of b[M m + (-i mod M), j]       b of zeros and ones: at most K / M = 128

Legend: N rows and columns of all matrices, K = N what is summed over, M the distance of ones in a row.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from launch.preflight.site import Outcome, Roster, Site
from parallel.diagnosis import first_line
from parallel.preflight.timing import median_seconds

SIZES = {"cuda": 8192, "cpu": 512}
TYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
ONES_IN_A_ROW = 128


@dataclass(frozen=True, kw_only=True)
class Product:
    """One rank's product: median seconds, wrong elements, and what the device said if it failed."""

    seconds: float = 0.0
    wrong: int = 0
    error: str = ""


def multiply(device: torch.device) -> Product:
    """Time and check the product on a device."""
    size, dtype = SIZES[device.type], TYPES[device.type]
    try:
        draw = torch.Generator(device).manual_seed(0)
        a_NK = torch.randn(size, size, generator=draw, device=device).to(dtype)
        b_KN = torch.randn(size, size, generator=draw, device=device).to(dtype)
        seconds = median_seconds(lambda: a_NK @ b_KN, device)
        return Product(seconds=seconds, wrong=wrong_elements(size, dtype, device))
    except RuntimeError as failure:  # of the device: memory, an illegal instruction, a fallen bus
        return Product(error=first_line(failure))


def wrong_elements(size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many elements of the exact product are wrong."""
    distance = max(1, size // ONES_IN_A_ROW)
    index = torch.arange(size, device=device)
    a_NK = ((index[:, None] + index) % distance == 0).to(dtype)
    b_KN = ((index[:, None] * 7 + index * 3) % 5 < 2).to(dtype)
    picked_MN = b_KN.float().unflatten(0, (-1, distance)).sum(0)
    expected_NN = picked_MN[-index % distance].to(dtype)
    return int((a_NK @ b_KN != expected_NN).sum())


def check_products(site: Site) -> Outcome:
    """Multiply on every rank at once."""
    site.team.world.barrier()
    device = site.team.device
    found = [Product(**each) for each in site.share(asdict(multiply(device)))]
    return judge_products(found, site.roster, size=SIZES[device.type], slow_percent=site.slow_percent)


def judge_products(found: Sequence[Product], roster: Roster, *, size: int, slow_percent: float) -> Outcome:
    """Name the ranks whose product failed, came out wrong, or took slow_percent more than the median."""
    problems = [
        f"{roster.name([rank])}: a matrix product failed ({each.error}); {roster.exclusion([rank])}"
        for rank, each in enumerate(found)
        if each.error
    ]
    problems += [
        f"{roster.name([rank])}: a matrix product has {each.wrong} wrong elements of {size * size}; "
        f"{roster.exclusion([rank])}"
        for rank, each in enumerate(found)
        if each.wrong
    ]
    timed = {rank: each.seconds for rank, each in enumerate(found) if not each.error}
    if not timed:
        return Outcome(check="products", detail="no rank can multiply", problems=tuple(problems), broken=True)
    median = statistics.median_low(timed.values())
    problems += [
        f"{roster.name([rank])}: a matrix product takes {seconds * 1e3:.2f} ms, {seconds / median:.2f} times "
        f"the median of all ranks, {median * 1e3:.2f} ms; {roster.exclusion([rank])}"
        for rank, seconds in timed.items()
        if seconds > median * (1 + slow_percent / 100)
    ]
    rates = [2 * size**3 / seconds / 1e12 for seconds in (max(timed.values()), median)]
    detail = f"{size}³: {rates[1]:.3g} TFLOP/s, slowest {rates[0]:.3g}; {slow_percent:g} % allowed"
    broken = len(timed) < len(found)
    return Outcome(check="products", detail=detail, problems=tuple(problems), broken=broken)
