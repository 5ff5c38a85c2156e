"""Tensor parallelism with sequence parallelism (arXiv 1909.08053, 2205.05198), by collectives at the seams.

Weights of the up projections are split by output channel, those of the projections that follow them by input
channel; norms, MLA's down projections and the gate are whole on every rank and see only their own tokens. So
what is gathered in attention is the compressed latents, and the shared rotary key needs no special care: its
gradient is summed by the reduce-scatter that belongs to the gather.

Legend: B sequences, s own tokens, S tokens of the tp group, E experts, V vocabulary rows held here, D hidden.
"""

import torch.distributed as dist
from torch import Tensor

from model.embedding import look_up
from model.split import SequenceSplit
from parallel.collectives import gather_tokens, scatter_tokens
from parallel.groups import Group


class TensorSplit:
    """`model.split.SequenceSplit`: tokens are spread over tp inside a part of cp, in order.

    sequence: the ranks of cp and tp together, among which each sequence is spread.
    """

    def __init__(self, tp: Group, sequence: Group) -> None:
        self._tp, self._sequence = tp, sequence
        self.num_parts = sequence.size

    def own(self, x_BSX: Tensor) -> Tensor:
        """Return this rank's tokens of x, a view; x itself where they are all."""
        return x_BSX if self._tp.size == 1 else x_BSX.chunk(self._tp.size, dim=1)[self._tp.rank]

    def gather(self, x_BsX: Tensor) -> Tensor:
        """Return the tokens of all tp ranks."""
        return gather_tokens(x_BsX, self._tp)

    def scatter(self, x_BSX: Tensor) -> Tensor:
        """Return this rank's tokens of the sum over tp."""
        return scatter_tokens(x_BSX, self._tp)

    def sum_counts(self, counts_BE: Tensor) -> Tensor:
        """Return counts of whole sequences."""
        return self._sequence.all_reduce(counts_BE.clone())


class VocabularyRows:
    """Which rows of embedding and head this rank holds: a `model.kernels.cross_entropy.VocabularySplit`."""

    def __init__(self, tp: Group, vocab_size: int) -> None:
        self._tp = tp
        self.first = tp.rank * (vocab_size // tp.size)

    def max(self, x: Tensor) -> Tensor:
        """Return the elementwise maximum over the tp ranks, in place."""
        return self._tp.all_reduce(x, op=dist.ReduceOp.MAX)

    def sum(self, x: Tensor) -> Tensor:
        """Return the elementwise sum over the tp ranks, in place."""
        return self._tp.all_reduce(x)


class VocabularyLookup:
    """The embedding of tokens whose rows lie on several ranks: zero where they lie elsewhere, then summed.

    Args:
        rows: which rows are held here.
        split: adds up the ranks' results and leaves each its own tokens.
    """

    def __init__(self, rows: VocabularyRows, split: SequenceSplit) -> None:
        self._rows, self._split = rows, split

    def __call__(self, tokens_BS: Tensor, weight_VD: Tensor) -> Tensor:
        """Return the embedding of this rank's own tokens, [B, s, D]."""
        local_BS = tokens_BS - self._rows.first
        elsewhere_BS = (local_BS < 0) | (local_BS >= len(weight_VD))
        x_BSD = look_up(local_BS.masked_fill(elsewhere_BS, 0), weight_VD)
        return self._split.scatter(x_BSD.masked_fill(elsewhere_BS[..., None], 0.0))
