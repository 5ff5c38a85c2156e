"""Layouts as short names, such as `pp2_dualpipev_ep2_tp2`: what they mean, and which are proved by default.

A name is degrees (dp2, tp4, cp2, ep2, pp2), in any order, with at most one schedule, one engine and options,
joined by `_`. Data parallelism is as small as the others allow: `ep4` runs on four processes, `tp2_ep2` on
two.
"""

import re
from dataclasses import dataclass, replace
from math import gcd

from parallel.checks import layout_of
from parallel.config import Context, Dispatcher, Engine, Offload, ParallelConfig, Schedule
from parallel.layout import Layout

DEGREES = ("dp", "tp", "cp", "ep", "pp")
SCHEDULES = tuple(schedule.value for schedule in Schedule)
OPTIONS = ("replicate<N>", "twohop<N>", "ulysses", "offload")


@dataclass(frozen=True, kw_only=True)
class NamedLayout:
    """A layout to prove; `parallel.dp` is set."""

    name: str
    parallel: ParallelConfig

    @property
    def layout(self) -> Layout:
        """Return its degrees."""
        p = self.parallel
        return layout_of(p, p.pp * (p.dp or 1) * p.cp * p.tp)

    @property
    def world_size(self) -> int:
        """Return the processes it takes."""
        return self.layout.world_size


def parse(name: str) -> NamedLayout:
    """Return the layout of a name. ValueError naming the part that is not understood."""
    parallel = ParallelConfig()
    for word in re.findall("interleaved_zb|[^_]+", name):
        parallel = _with(parallel, word, name)
    if parallel.dp is None:
        experts = parallel.ep // gcd(parallel.ep, parallel.cp * parallel.tp)
        parallel = replace(parallel, dp=max(experts, parallel.dp_replicate))
    if found := parallel.problems():
        raise ValueError(f"{name}: {found[0]}")
    return NamedLayout(name=name, parallel=parallel)


def _with(parallel: ParallelConfig, word: str, name: str) -> ParallelConfig:
    """Return the layout with one word of its name applied."""
    if word in SCHEDULES:
        return replace(parallel, schedule=Schedule(word))
    found = re.fullmatch(r"([a-z]+)(\d*)", word)
    match found.groups() if found else ("", ""):
        case kind, number if kind in DEGREES and number:
            return replace(parallel, **{kind: int(number)})
        case "replicate", number if number:
            return replace(parallel, dp_replicate=int(number))
        case "twohop", number if number:
            return replace(parallel, dispatcher=Dispatcher.two_hop, node_size=int(number))
        case "ulysses", "":
            return replace(parallel, context=Context.ulysses)
        case "deepspeed", number:
            return replace(parallel, engine=Engine.deepspeed, zero_stage=int(number or 1))
        case "zero", "1":
            return replace(parallel, engine=Engine.zero1)
        case "offload", "":
            return replace(parallel, offload=Offload.cpu)
    raise ValueError(
        f"{name}: {word!r} is not understood; join degrees ({', '.join(f'{d}2' for d in DEGREES)}), "
        f"a schedule ({', '.join(SCHEDULES)}), an engine (zero1, deepspeed1..3) and options "
        f"({', '.join(OPTIONS)}) by '_'"
    )


DEFAULT: tuple[str, ...] = (
    "dp1",
    "dp2",
    "dp4",
    "dp4_replicate2",
    "dp2_deepspeed1",
    "dp2_deepspeed2",
    "dp2_deepspeed3",
    "dp4_deepspeed1",
    "tp2",
    "tp4",
    "ep2",
    "ep4",
    "ep4_twohop2",
    "cp2",
    "cp4",
    "cp2_ulysses",
    *(f"pp{pp}_{schedule}" for pp in (2, 4) for schedule in SCHEDULES),
    "pp2_ep2",
    "pp2_dualpipev_ep2",
    "pp2_tp2",
    "tp2_ep2",
    "cp2_ep2",
    "pp2_cp2_ep2",
    "pp2_zbv_cp2_ep2",
    "pp2_dualpipev_cp2_ep2",
    "pp2_tp2_ep2_dp2",
    "pp2_dualpipev_tp2_ep2_dp2",
    "pp2_dp2_cp2_ep4",
    "pp2_dualpipev_dp2_cp2_ep4",
    "dp2_tp2_cp2_ep4_replicate2",
    "pp2_1f1b_dp2_ep2_deepspeed1",
    "pp2_dualpipev_dp2_ep2_deepspeed1",
)
"""What `python -m train.parity` proves: 1, 2, 4 and 8 processes against one."""
