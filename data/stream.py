"""The endless token stream of one source: documents in a new order every epoch, packed end to end.

Every document ends with eos and the next one follows at once; attention is not masked between them
(arXiv 2412.19437, section 4.1). Any range of the stream is computed alone, from (seed, source, epoch,
document): reading it costs a binary search and a copy, whatever was read before.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.fim import NUM_MARKS, chosen, cut_points, rearranged
from data.hashing import make_key, permutation
from data.indexed import IndexedReader
from data.tokenizer import FimTokens

_KEPT_EPOCHS = 2  # a sample may begin in one epoch and end in the next


@dataclass(frozen=True)
class Epoch:
    """One pass over the documents: by place in the epoch, which document, rearranged or not, and its end."""

    order_N: NDArray[np.int64]
    rearranged_N: NDArray[np.bool_]
    bounds_N1: NDArray[np.int64]  # tokens before each place; the last is the length of the epoch
    fim_key: int


class TokenStream:
    """The stream of one source, random access.

    ends_with_eos says whether the stored documents have their eos; where not, one is added. fim_rate
    needs `fim`. shuffle=False keeps the stored order in every epoch.
    """

    def __init__(
        self,
        shards: list[IndexedReader],
        *,
        name: str,
        seed: int,
        eos_id: int,
        ends_with_eos: bool,
        fim: FimTokens | None = None,
        fim_rate: float = 0.0,
        shuffle: bool = True,
    ) -> None:
        self._name = name
        self._seed = seed
        self._eos = np.array([eos_id])
        self._fim = fim
        self._fim_rate = fim_rate
        self._shuffle = shuffle
        self._tokens = [shard.tokens for shard in shards]
        counts = [shard.num_documents for shard in shards]
        self._shard_N = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
        self._start_N = np.concatenate([shard.starts for shard in shards])
        # without eos, so that the arithmetic below is the same for both ways of storing
        self._length_N = np.concatenate([shard.lengths for shard in shards]) - int(ends_with_eos)
        self._epochs: dict[int, Epoch] = {}
        self._epoch_starts = [0]

    @property
    def num_documents(self) -> int:
        """Documents in one epoch."""
        return len(self._length_N)

    @property
    def num_tokens(self) -> int:
        """Tokens in one epoch, each document's eos counted, Fill-in-Middle marks not."""
        return int(self._length_N.sum()) + self.num_documents

    def epoch(self, number: int) -> Epoch:
        """Return one pass over the documents; computed at first use, O(n log n) in its documents."""
        if number not in self._epochs:
            while len(self._epochs) >= _KEPT_EPOCHS:
                del self._epochs[min(self._epochs, key=lambda kept: -abs(kept - number))]
            self._epochs[number] = self._make_epoch(number)
        return self._epochs[number]

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return tokens [start, stop) of the stream, int64."""
        out = np.empty(stop - start, np.int64)
        number = self._epoch_of(start)
        filled = 0
        while filled < len(out):
            epoch = self.epoch(number)
            first = start + filled - self._epoch_starts[number]
            count = min(len(out) - filled, int(epoch.bounds_N1[-1]) - first)
            self._read_epoch(epoch, first, out[filled : filled + count])
            filled += count
            number += 1
            self._epoch_of(start + filled)  # makes the start of the next epoch known
        return out

    def _make_epoch(self, number: int) -> Epoch:
        count = self.num_documents
        if self._shuffle:
            order_N = permutation(make_key(self._seed, self._name, number, "order"), count)
        else:
            order_N = np.arange(count)
        fim_key = make_key(self._seed, self._name, number, "fim")
        length_N = self._length_N[order_N]
        rearranged_N = chosen(fim_key, order_N, length_N, rate=self._fim_rate)
        bounds_N1 = np.zeros(count + 1, np.int64)
        np.cumsum(length_N + 1 + NUM_MARKS * rearranged_N, out=bounds_N1[1:])
        return Epoch(order_N, rearranged_N, bounds_N1, fim_key)

    def _epoch_of(self, position: int) -> int:
        """Return the epoch that holds a position of the stream."""
        while self._epoch_starts[-1] <= position:
            last = len(self._epoch_starts) - 1
            self._epoch_starts.append(self._epoch_starts[-1] + self._epoch_tokens(last))
        return int(np.searchsorted(self._epoch_starts, position, side="right")) - 1

    def _epoch_tokens(self, number: int) -> int:
        """Return the length of an epoch without ordering it, so that a far position is found quickly."""
        documents = np.arange(self.num_documents)
        key = make_key(self._seed, self._name, number, "fim")
        rearranged_N = chosen(key, documents, self._length_N, rate=self._fim_rate)
        return self.num_tokens + NUM_MARKS * int(rearranged_N.sum())

    def _read_epoch(self, epoch: Epoch, first: int, out: NDArray[np.int64]) -> None:
        """Fill `out` with the tokens of an epoch from its token `first` on."""
        bounds_N1 = epoch.bounds_N1
        low = int(np.searchsorted(bounds_N1, first, side="right")) - 1
        high = int(np.searchsorted(bounds_N1, first + len(out), side="left"))
        documents = epoch.order_N[low:high]
        places = zip(
            documents.tolist(),
            self._shard_N[documents].tolist(),
            self._start_N[documents].tolist(),
            self._length_N[documents].tolist(),
            epoch.rearranged_N[low:high].tolist(),
            (bounds_N1[low:high] - first).tolist(),
            strict=True,
        )
        for document, shard, start, length, is_rearranged, at in places:
            tokens = self._tokens[shard][start : start + length]
            if is_rearranged:
                self._copy_rearranged(epoch, document, tokens, out, at)
                continue
            skip = max(-at, 0)
            part = tokens[skip : len(out) - at]
            out[at + skip : at + skip + len(part)] = part
            if 0 <= at + length < len(out):
                out[at + length] = self._eos[0]

    def _copy_rearranged(
        self, epoch: Epoch, document: int, tokens: NDArray[Any], out: NDArray[np.int64], at: int
    ) -> None:
        """Copy what falls inside `out` of a rearranged document that begins at out[at] (at may be < 0)."""
        if self._fim is None:
            raise ValueError("fim_rate > 0 needs the Fill-in-Middle tokens")
        begin, end = cut_points(epoch.fim_key, document, len(tokens))
        for piece in [*rearranged(tokens, begin, end, self._fim), self._eos]:
            skip = max(-at, 0)
            part = piece[skip : max(len(out) - at, 0)]
            out[at + skip : at + skip + len(part)] = part
            at += len(piece)
