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
    """Consecutive batches from `first_sample` on.

    A thread and not a process: copying tokens between processes costs far more than reading them, and
    numpy releases the interpreter lock while it copies. The thread guesses that the next batch has the
    size of the last one; a wrong guess costs time, never the order of samples.
    """

    def __init__(self, dataset: SampleSource, first_sample: int = 0) -> None:
        self._dataset = dataset
        self._next_sample = first_sample
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: Future[NDArray[np.int64]] | None = None

    @property
    def next_sample(self) -> int:
        """The sample that the next batch begins with; what a checkpoint stores."""
        return self._next_sample

    def next(self, count: int) -> NDArray[np.int64]:
        """Return the next `count` samples, int64 [count, seq_len + extra_tokens]."""
        ahead = self._ahead.result() if self._ahead is not None else None
        if ahead is not None and len(ahead) >= count:
            batch = ahead[:count]
        elif ahead is not None:
            missing = self._dataset.batch(self._next_sample + len(ahead), count - len(ahead))
            batch = np.concatenate([ahead, missing])
        else:
            batch = self._dataset.batch(self._next_sample, count)
        self._next_sample += count
        self._ahead = self._pool.submit(self._dataset.batch, self._next_sample, count)
        return batch

    def close(self) -> None:
        """Stop the thread."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
