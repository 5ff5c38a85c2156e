"""From the loader's token rows to the inputs, targets and counts of one optimizer step.

Data-parallel ranks read different rows. Targets are shifted here, on whole sequences, before a sequence is
split over context-parallel ranks, and counted over the whole global batch. Each row brings 1 + D tokens more
than the sequence length, so every position of every MTP depth has its target (arXiv 2412.19437, section 2.2).

Legend: B sequences of this process, S sequence length, D MTP depths, K = 1 + D, W = S + 1 + D.
"""

import numpy as np
import torch
from torch import Tensor

from parallel.context import split_context
from parallel.mesh import Mesh, single_process
from parallel.schedule import Batch

IGNORED_LABEL = -100
"""The target of a position where nothing is to be predicted; its cross-entropy is 0 and it is not counted."""


def make_batch(
    rows_BW: np.ndarray | Tensor, *, num_mtp_layers: int, device: torch.device, mesh: Mesh | None = None
) -> Batch:
    """Build this process's part of the global batch from int64 rows of seq_len + 1 + num_mtp_layers tokens.

    The rows are those of this process's data-parallel rank; without a mesh they are the global batch.

    IGNORED_LABEL in a row is no target, and reads as token 0 where it would be an input: so rows that are
    shorter than the others, such as held-out ones, can be padded at their end.
    """
    row_tokens_BW = torch.as_tensor(rows_BW, dtype=torch.int64).to(device, non_blocking=True)
    num_sequences, width = row_tokens_BW.shape
    seq_len = width - 1 - num_mtp_layers
    windows_BNS = row_tokens_BW.unfold(1, seq_len, 1)  # N = K + 1 windows; window n starts at token n
    labels_BKS = windows_BNS[:, 1:].contiguous()
    positions_BS = torch.arange(seq_len, device=device).expand(num_sequences, seq_len)
    mesh = mesh or single_process()
    return Batch(
        tokens_BKS=split_context(windows_BNS[:, :-1].clamp(min=0), dim=2, group=mesh.cp),
        labels_BKS=split_context(labels_BKS, dim=2, group=mesh.cp),
        positions_BS=split_context(positions_BS, dim=1, group=mesh.cp),
        valid_K=mesh.dp.all_reduce((labels_BKS != IGNORED_LABEL).sum((0, 2))),
        global_sequences=num_sequences * mesh.dp.size,
    )
