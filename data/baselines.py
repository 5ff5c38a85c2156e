"""What a model must beat: uniform, unigram and bigram predictions of the same held-out tokens.

All losses are mean negative log-likelihoods in nats per token. The unigram is add-one smoothed over the
vocabulary. The bigram is interpolated with it by Witten and Bell's rule (IEEE Trans. Information Theory
37(4), 1991), which has no constant to tune: p(b|a) = (c(a,b) + t(a) p(b)) / (c(a) + t(a)), where t(a) is
the number of different tokens seen after a.
"""

from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import NDArray

from data.dataset import TrainingData


@dataclass(frozen=True)
class BaselineLoss:
    """Nats per token of each baseline, on num_tokens predicted tokens."""

    uniform: float
    unigram: float
    bigram: float
    num_tokens: int


class Baselines:
    """Counts of tokens and of pairs in a sample of the training stream, at most `max_tokens` long.

    Samples are taken from the start of the stage's own mixture. Pairs are stored sparsely, sorted by
    first * vocab_size + second.
    """

    def __init__(self, data: TrainingData, *, max_tokens: int = 4_000_000) -> None:
        vocab_size = data.vocab_size
        available = sum(data.num_tokens.values())
        count = max(1, min(max_tokens, available) // data.seq_len)
        tokens_BS = data.batch(0, count)[:, : data.seq_len + 1]
        self._vocab_size = vocab_size
        counts_V = np.bincount(tokens_BS[:, 1:].ravel(), minlength=vocab_size)
        self._unigram_V = (counts_V + 1.0) / (counts_V.sum() + vocab_size)
        pairs = tokens_BS[:, :-1].astype(np.int64) * vocab_size + tokens_BS[:, 1:]
        self._pairs, self._pair_counts = np.unique(pairs.ravel(), return_counts=True)
        first = self._pairs // vocab_size
        self._followers_V = np.bincount(first, minlength=vocab_size)
        self._first_V = np.bincount(first, weights=self._pair_counts, minlength=vocab_size)

    def evaluate(self, tokens_BS: NDArray[np.int64]) -> BaselineLoss:
        """Return the losses on every token but the first of each row, predicted from the one before."""
        previous, target = tokens_BS[:, :-1].ravel(), tokens_BS[:, 1:].ravel()
        unigram = self._unigram_V[target]
        return BaselineLoss(
            uniform=log(self._vocab_size),
            unigram=float(-np.log(unigram).mean()),
            bigram=float(-np.log(self._bigram(previous, target, unigram)).mean()),
            num_tokens=len(target),
        )

    def _bigram(
        self, previous: NDArray[np.int64], target: NDArray[np.int64], unigram: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        key = previous * self._vocab_size + target
        at = np.minimum(np.searchsorted(self._pairs, key), len(self._pairs) - 1)
        count = np.where(self._pairs[at] == key, self._pair_counts[at], 0)
        followers = np.maximum(self._followers_V[previous], 1)  # a token never seen before another: unigram
        return (count + followers * unigram) / (self._first_V[previous] + followers)
