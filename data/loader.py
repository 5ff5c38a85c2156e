"""Batches of a training run in order, the next one read by a thread while the present one is used."""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class SampleSource(Protocol):
    """Random access to consecutive samples, such as `TrainingData`."""

    def batch(self, first: int, count: int) -> NDArray[np.int64]:
        """Return samples [first, first + count), int64 [count, tokens]."""
        ...


class Batches:
    """Consecutive batches from `first_sample` on, or part `part` of `parts` equal parts of each.

    A thread and not a process: copying tokens between processes costs far more than reading them, and
    numpy releases the interpreter lock while it copies. The thread guesses that the next batch has the
    size of the last one; a wrong guess costs time, never the order of samples.
    """

    def __init__(
        self, dataset: SampleSource, first_sample: int = 0, *, part: int = 0, parts: int = 1
    ) -> None:
        self._dataset = dataset
        self._next_sample = first_sample
        self._part, self._parts = part, parts
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[NDArray[np.int64]]] | None = None  # first sample, the samples

    @property
    def next_sample(self) -> int:
        """The sample that the next batch begins with; what a checkpoint stores."""
        return self._next_sample

    def next(self, count: int) -> NDArray[np.int64]:
        """Return this part of the next `count` samples, int64 [count / parts, seq_len + extra_tokens].

        ValueError if the samples cannot be divided evenly among the parts.
        """
        if count % self._parts:
            raise ValueError(f"{count} samples cannot be divided among {self._parts} parts")
        own = count // self._parts
        batch = self._take(self._next_sample + self._part * own, own)
        self._next_sample += count
        first = self._next_sample + self._part * own
        self._ahead = first, self._pool.submit(self._dataset.batch, first, own)
        return batch

    def _take(self, first: int, count: int) -> NDArray[np.int64]:
        """Return samples [first, first + count), as far as possible those that were read ahead."""
        begun, ahead = self._ahead or (first, None)
        read = ahead.result() if ahead else None
        if read is None or begun != first:
            return self._dataset.batch(first, count)
        if len(read) >= count:
            return read[:count]
        missing = self._dataset.batch(first + len(read), count - len(read))
        return np.concatenate([read, missing])

    def close(self) -> None:
        """Stop the thread."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
