"""A pipeline schedule as data: what each rank does, in order. No torch, no process.

The model is cut into stages, in order of the layers; each rank holds one stage or several. An action is a
pass of one microbatch through one stage, or a transfer of what lies between two stages.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class ActionKind(StrEnum):
    """What an action does; the values are those that torch prints."""

    FORWARD = "F"
    BACKWARD = "B"
    """Gradients of the stage's input and weights."""
    BACKWARD_INPUT = "I"
    """The gradient of the stage's input, which is all that the stage before waits for."""
    BACKWARD_WEIGHT = "W"
    """The gradients of the weights, which nobody waits for (arXiv 2401.10241)."""
    OVERLAP = "OVERLAP_F_B"
    """Forward of one microbatch and backward of another, each hiding the other's exchange of tokens."""
    SEND_FORWARD = "SEND_F"
    RECEIVE_FORWARD = "RECV_F"
    SEND_BACKWARD = "SEND_B"
    RECEIVE_BACKWARD = "RECV_B"
    REDUCE_GRAD = "REDUCE_GRAD"
    """The stage's gradients are complete on this rank."""


TRANSFERS = frozenset(
    {
        ActionKind.SEND_FORWARD,
        ActionKind.RECEIVE_FORWARD,
        ActionKind.SEND_BACKWARD,
        ActionKind.RECEIVE_BACKWARD,
    }
)


@dataclass(frozen=True)
class Action:
    """One entry of a table. A send names the stage that sends, a receive the stage that receives.

    `microbatch` is -1 where an action is about no single one; `parts` are the two passes of an OVERLAP, whose
    own stage is -1.
    """

    kind: ActionKind
    stage: int
    microbatch: int = -1
    parts: tuple["Action", ...] = ()

    def __str__(self) -> str:
        if self.parts:
            return f"({';'.join(map(str, self.parts))}){self.kind}"
        return f"{self.stage}{self.kind}{'' if self.microbatch < 0 else self.microbatch}"

    @property
    def passes(self) -> tuple["Action", ...]:
        """Return the passes through stages that this action is made of; none for transfers and reductions."""
        if self.kind in TRANSFERS or self.kind is ActionKind.REDUCE_GRAD:
            return ()
        return self.parts or (self,)


@dataclass(frozen=True)
class ActionTable:
    """actions: of each rank, in order; stage_to_rank: who holds each stage."""

    actions: tuple[tuple[Action, ...], ...]
    stage_to_rank: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        """Return the number of stages over all ranks."""
        return len(self.stage_to_rank)

    def passes(self, rank: int) -> Iterator[Action]:
        """Yield the passes of one rank in order, those of an OVERLAP one after the other."""
        for action in self.actions[rank]:
            yield from action.passes
