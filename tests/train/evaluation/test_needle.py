"""The needle grid must tell a model that reads its context from one that does not."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from data.errors import DataError
from train.evaluation.needle import CUE, NEEDLE_BEFORE, draw_keys, even_depths, halvings, needle_grid


class Bytes:
    """One token a byte, so that contexts can be read back as text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]


class Reader:
    """Copies what follows the first "pass key is" among the last `window` bytes of the context."""

    def __init__(self, window: int = 1 << 30) -> None:
        self.window = window
        self.lengths: list[int] = []

    def __call__(self, context_S: Tensor, candidates_NK: Tensor) -> Tensor:
        text = bytes(context_S.tolist())[-self.window :]
        self.lengths.append(len(context_S) + candidates_NK.shape[1])
        start = text.find(NEEDLE_BEFORE.encode())
        seen = text[start + len(NEEDLE_BEFORE) :][: candidates_NK.shape[1]] if start >= 0 else b""
        keys = [bytes(key) for key in candidates_NK.tolist()]
        return torch.tensor([0.0 if key == seen else -9.0 for key in keys])


def random_scores(context_S: Tensor, candidates_NK: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(int(context_S.sum() * 7919 + candidates_NK.sum()))
    return torch.randn(len(candidates_NK), generator=generator)


def likes_some_keys(context_S: Tensor, candidates_NK: Tensor) -> Tensor:
    return -candidates_NK.double().sum(-1)  # a strong taste, and no look at the context


def filler(trials: int, length: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(5).integers(97, 123, size=(trials, length)))


def test_a_copying_oracle_scores_one_everywhere() -> None:
    reader = Reader()
    result = needle_grid(
        reader, filler_TL=filler(3, 800), tokenizer=Bytes(), lengths=[200, 800], depths=even_depths(5), seed=0
    )
    assert result.grid == [[1.0] * 5] * 2
    assert result.margin == [[9.0] * 5] * 2
    # apart from the needle-free ones, every context with its key has exactly the length asked for
    assert sorted(set(reader.lengths)) == [32 + len(CUE) + 6, 200, 800]


def test_a_random_model_is_near_chance() -> None:
    result = needle_grid(
        random_scores,
        filler_TL=filler(60, 200),
        tokenizer=Bytes(),
        lengths=[200],
        depths=even_depths(5),
        seed=0,
    )
    assert result.chance == 0.1
    # 300 trials at 0.1 have a standard deviation of 0.017
    assert abs(float(np.mean(result.grid)) - 0.1) < 0.06
    assert abs(float(np.mean(result.margin))) < 0.3


def test_a_taste_for_some_keys_wins_nothing() -> None:
    result = needle_grid(
        likes_some_keys, filler_TL=filler(4, 300), tokenizer=Bytes(), lengths=[300], depths=[0.0, 1.0], seed=3
    )
    np.testing.assert_allclose(result.grid, [[0.1, 0.1]])
    np.testing.assert_allclose(result.margin, 0, atol=1e-9)


def test_depth_counts_from_the_start_of_the_text() -> None:
    result = needle_grid(
        Reader(window=300),
        filler_TL=filler(4, 900),
        tokenizer=Bytes(),
        lengths=[900],
        depths=even_depths(5),
        seed=1,
    )
    assert result.grid[0][3:] == [1.0, 1.0]
    assert max(result.grid[0][:3]) <= 0.1


def test_the_grid_depends_on_the_seed_only() -> None:
    first, again, other = (
        needle_grid(
            random_scores, filler_TL=filler(5, 200), tokenizer=Bytes(), lengths=[200], depths=[0.5], seed=seed
        )
        for seed in (4, 4, 5)
    )
    assert first == again
    assert first != other


def test_lengths_without_room_for_the_needle_are_left_out() -> None:
    result = needle_grid(
        Reader(), filler_TL=filler(1, 512), tokenizer=Bytes(), lengths=halvings(512, 4), depths=[0.5], seed=0
    )
    assert result.lengths == [128, 256, 512]
    assert len(result.grid) == 3


def test_keys_differ_and_have_the_same_number_of_tokens() -> None:
    class Merges:
        """Merges some pairs of digits, as a trained BPE does."""

        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            return [list(text.replace("12", "a").replace("90", "b").encode()) for text in texts]

    keys = draw_keys(Merges(), 10, np.random.default_rng(0))
    assert len({tuple(key) for key in keys.tolist()}) == 10
    assert keys.shape == (10, 6)


def test_a_tokenizer_without_digits_is_refused() -> None:
    class Blind:
        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            return [[0] for _ in texts]

    with pytest.raises(DataError, match="gives 1 different encodings of five-digit numbers"):
        draw_keys(Blind(), 10, np.random.default_rng(0))


def test_depths_and_lengths_of_the_grid() -> None:
    assert even_depths(1) == [0.5]
    assert even_depths(3) == [0.0, 0.5, 1.0]
    assert halvings(4096, 3) == [1024, 2048, 4096]
