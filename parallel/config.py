"""The layout of one step: degrees, pipeline schedule, optimizer engine. Importable without torch.

Rules that need the model, the batch or the number of processes are in parallel/checks.py.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from model.config import Recompute

Schedule = StrEnum(
    "Schedule",
    {
        "gpipe": "gpipe",
        "1f1b": "1f1b",
        "interleaved": "interleaved",
        "interleaved_zb": "interleaved_zb",
        "zbv": "zbv",
        "dualpipev": "dualpipev",
    },
)
"""Pipeline schedules: GPipe (arXiv 1811.06965), 1F1B (2006.09503), interleaved 1F1B (2104.04473), interleaved
zero bubble and ZBV (2401.10241), DualPipeV (2412.19437, section 3.2.1, folded into a V)."""


class Dispatcher(StrEnum):
    """How tokens travel to experts."""

    alltoall = "alltoall"
    """One exchange; a token is sent once for each expert."""
    two_hop = "two_hop"
    """A token is sent at most once to each node, then spread inside it (2412.19437, section 3.2.2)."""


class Context(StrEnum):
    """How attention sees a sequence that is split over cp ranks."""

    gather = "gather"
    """Gather the compressed latents of all tokens; zigzag chunks balance the causal work."""
    ulysses = "ulysses"
    """Exchange tokens for heads (arXiv 2309.14509); heads per tp rank must divide by cp."""


class Engine(StrEnum):
    """Who holds gradients, optimizer state and their shards."""

    zero1 = "zero1"
    deepspeed = "deepspeed"


class Offload(StrEnum):
    """Where the deepspeed engine keeps optimizer state."""

    none = "none"
    cpu = "cpu"


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """The layout of one step; data parallelism takes the processes that the other degrees leave."""

    microbatch_size: int = 1  # sequences that go through the model together
    recompute: Recompute = Recompute.none
    dp: int | None = None  # data-parallel ranks; null: world size / (pp * cp * tp)
    dp_replicate: int = 1  # copies of the sharded optimizer state, such as one per node (HSDP)
    tp: int = 1  # tensor parallelism with sequence parallelism
    cp: int = 1  # context parallelism: each sequence is split over this many ranks
    ep: int = 1  # expert parallelism, over ranks of dp, cp and tp
    pp: int = 1  # pipeline parallelism
    schedule: Schedule = Schedule["1f1b"]
    chunks: int = 2  # pipeline stages per rank of the interleaved schedules; V schedules have 2, others 1
    layers_per_stage: list[int] = field(default_factory=list[int])  # empty: balanced by cost
    dispatcher: Dispatcher = Dispatcher.alltoall
    context: Context = Context.gather
    node_size: int = 8  # processes per node: two_hop spreads tokens inside it, tp stays inside it
    engine: Engine = Engine.zero1
    zero_stage: int = 1  # of the deepspeed engine; zero1 is stage 1
    offload: Offload = Offload.none
    timeout_s: int = 600  # a collective that takes longer ends the job and names the rank that is missing

    def problems(self) -> list[str]:
        """Return every broken rule."""
        degrees = (
            "microbatch_size",
            "dp_replicate",
            "tp",
            "cp",
            "ep",
            "pp",
            "chunks",
            "node_size",
            "timeout_s",
        )
        found = [
            f"{name}={getattr(self, name)} must be at least 1; use 1"
            for name in degrees
            if getattr(self, name) < 1
        ]
        if self.dp is not None and self.dp < 1:
            found.append(f"dp={self.dp} must be at least 1; use null for the processes that are left")
        if self.zero_stage not in (1, 2, 3):
            found.append(f"zero_stage={self.zero_stage} is unknown; use 1, 2 or 3")
        return found
