"""Inputs, targets and counts against plain indexing of the token rows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.schedule import Batch
from tests.distributed import run_ranks
from train.batch import IGNORED_LABEL, make_batch

CPU = torch.device("cpu")


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 3))
def test_every_depth_is_shifted_by_its_index(num_sequences: int, seq_len: int, num_mtp_layers: int) -> None:
    rows_BW = np.arange(num_sequences * (seq_len + 1 + num_mtp_layers)).reshape(num_sequences, -1)
    batch = make_batch(rows_BW, num_mtp_layers=num_mtp_layers, device=CPU)
    assert batch.tokens_BKS.shape == batch.labels_BKS.shape == (num_sequences, 1 + num_mtp_layers, seq_len)
    assert batch.tokens_BKS.dtype == batch.labels_BKS.dtype == batch.positions_BS.dtype == torch.int64
    for b in range(num_sequences):
        for k in range(1 + num_mtp_layers):
            assert batch.tokens_BKS[b, k].tolist() == rows_BW[b, k : k + seq_len].tolist()
            assert batch.labels_BKS[b, k].tolist() == rows_BW[b, k + 1 : k + 1 + seq_len].tolist()
        assert batch.positions_BS[b].tolist() == list(range(seq_len))
    assert batch.valid_K.tolist() == [num_sequences * seq_len] * (1 + num_mtp_layers)
    assert batch.global_sequences == num_sequences
    assert [len(part.labels_BKS) for part in batch.microbatches(2)] == [
        min(2, num_sequences - start) for start in range(0, num_sequences, 2)
    ]


def test_ignored_tokens_are_no_targets_and_harmless_inputs() -> None:
    rows_BW = torch.tensor([[5, 6, 7, 8, 9, 4], [5, 6, 7, IGNORED_LABEL, IGNORED_LABEL, IGNORED_LABEL]])
    batch = make_batch(rows_BW, num_mtp_layers=1, device=CPU)
    assert batch.valid_K.tolist() == [4 + 2, 4 + 1]
    assert batch.tokens_BKS[1].tolist() == [[5, 6, 7, 0], [6, 7, 0, 0]]
    assert batch.labels_BKS[1, 0].tolist() == [6, 7, IGNORED_LABEL, IGNORED_LABEL]
    assert batch.tokens_BKS.min() >= 0


def part_of(rank: int, rows_BW: np.ndarray) -> Batch:
    mesh = build_mesh(Layout(dp_shard=2, cp=2), rank=rank)
    return make_batch(np.split(rows_BW, 2)[mesh.dp.rank], num_mtp_layers=1, device=CPU, mesh=mesh)


def test_the_parts_of_all_processes_are_the_batch() -> None:
    """Two data-parallel ranks with unequal counts of targets, two context-parallel ones per sequence."""
    rows_BW = np.arange(4 * 10).reshape(4, 10)
    rows_BW[1, 6:] = rows_BW[3, 3:] = IGNORED_LABEL
    whole = make_batch(rows_BW, num_mtp_layers=1, device=CPU)
    parts = run_ranks(4, part_of, rows_BW)
    for rank, part in enumerate(parts):
        dp, cp = divmod(rank, 2)
        places = [0, 1, 6, 7] if cp == 0 else [2, 3, 4, 5]  # zigzag: chunks 0 and 3, or 1 and 2
        sequences = slice(2 * dp, 2 * dp + 2)
        assert torch.equal(part.tokens_BKS, whole.tokens_BKS[sequences][..., places])
        assert torch.equal(part.labels_BKS, whole.labels_BKS[sequences][..., places])
        assert torch.equal(part.positions_BS, whole.positions_BS[sequences][..., places])
        assert torch.equal(part.valid_K, whole.valid_K)
        assert part.global_sequences == 4


def test_the_loaders_rows_are_not_written_to() -> None:
    rows_BW = np.array([[1, -100, 3, 4]])
    make_batch(rows_BW, num_mtp_layers=0, device=CPU)
    assert rows_BW.tolist() == [[1, -100, 3, 4]]


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_narrow_rows_are_widened(dtype: type) -> None:
    batch = make_batch(
        np.array([[1, 2, 65535 if dtype is np.uint16 else 3]], dtype), num_mtp_layers=0, device=CPU
    )
    assert batch.labels_BKS.dtype == torch.int64
    assert batch.labels_BKS.min() > 0
