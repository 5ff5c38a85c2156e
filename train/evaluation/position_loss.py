"""Held-out cross-entropy position by position: does the model use a longer context?

Legend: N rows, B of them in one forward, S sequence length, W = S + 1, D hidden, T = B * S.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.kernels.cross_entropy import linear_cross_entropy
from model.transformer import Transformer

TOKENS_PER_FORWARD = 8192
"""Rows go through the model together up to this many tokens."""

NUM_OCTAVES = 8
"""Position bins below the sequence length, each twice as wide as the one before."""


@torch.no_grad()
def position_losses(model: Transformer, rows_NW: Tensor) -> Tensor:
    """Return the mean cross-entropy at each position, FP64 [S], over N rows of W = S + 1 tokens."""
    device = model.embed.weight.device
    num_rows, seq_len = rows_NW.shape[0], rows_NW.shape[1] - 1
    sums_S = torch.zeros(seq_len, dtype=torch.float64)
    for rows_BW in rows_NW.split(max(1, TOKENS_PER_FORWARD // seq_len)):
        tokens_BS = rows_BW[:, :-1].to(device)
        positions_BS = torch.arange(seq_len, device=device).expand_as(tokens_BS)
        # one token a position is given, so that the MTP depths are not run
        hidden_BSD = model(tokens_BS[:, None], positions_BS).hidden_KBSD[0]
        labels_T = rows_BW[:, 1:].reshape(-1).to(device)
        weights_T = torch.ones(len(labels_T), dtype=torch.float32, device=device)
        _, losses_T = linear_cross_entropy(hidden_BSD.flatten(0, 1), model.head.weight, labels_T, weights_T)
        sums_S += losses_T.view(-1, seq_len).double().sum(0).cpu()
    return sums_S / num_rows


def position_edges(seq_len: int, lengths: Sequence[int]) -> list[int]:
    """Return the edges of the position bins: 0, powers of two, shorter lengths trained on, `seq_len`.

    There are 8 bins at least (fewer below 128 positions), and "beyond the former stage's length" is a
    union of bins.
    """
    smallest = 1 << max(0, (seq_len - 1).bit_length() - NUM_OCTAVES)
    octaves = {smallest << i for i in range(NUM_OCTAVES + 1)}
    return sorted({0, seq_len} | {edge for edge in octaves | set(lengths) if 0 < edge < seq_len})
