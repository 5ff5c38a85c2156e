"""The seam for sequences of which this device holds a part, and for weights split by output channel.

Between matrix products the tokens of a sequence may be spread over devices. Weights that are split (the up
projections of attention, feed-forward networks, embedding, head) need all tokens of the devices that share
the weight: `gather` brings them together, `scatter` adds up the partial results and leaves each device its
own tokens. The plain implementation holds whole sequences and does nothing.

Legend: B sequences, s own tokens of a sequence, S tokens of the devices that share weights, E experts.
"""

from typing import Protocol

from torch import Tensor


class SequenceSplit(Protocol):
    """How the tokens of a sequence are spread."""

    num_parts: int
    """Parts into which each sequence is cut; the balance loss divides by the whole sequence's length."""

    def own(self, x_BSX: Tensor) -> Tensor:
        """Return this device's tokens of x, [B, s, ...]; x carries no gradient."""
        ...

    def gather(self, x_BsX: Tensor) -> Tensor:
        """Return all tokens, [B, S, ...], in order; the gradient of each token is summed over the devices."""
        ...

    def scatter(self, x_BSX: Tensor) -> Tensor:
        """Return this device's tokens [B, s, ...] of the sum of all devices' x; the reverse of `gather`."""
        ...

    def sum_counts(self, counts_BE: Tensor) -> Tensor:
        """Return integer counts of the parts of each sequence, added up over the parts; no gradient."""
        ...


class WholeSequences:
    """Whole sequences and whole weights on this device."""

    num_parts = 1

    def own(self, x_BSX: Tensor) -> Tensor:
        """Return x."""
        return x_BSX

    def gather(self, x_BsX: Tensor) -> Tensor:
        """Return x."""
        return x_BsX

    def scatter(self, x_BSX: Tensor) -> Tensor:
        """Return x."""
        return x_BSX

    def sum_counts(self, counts_BE: Tensor) -> Tensor:
        """Return the counts."""
        return counts_BE
