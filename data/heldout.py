"""Held-out sequences in a fixed order, the same for every stage, run and seed."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from data.config import DataConfig
from data.errors import DataError
from data.shards import open_shards
from data.stream import TokenStream
from data.tokenizer import load_tokenizer

_ORDER_SEED = 0  # documents are mixed once, in the same way for everyone


class HeldOut:
    """Sequences of seq_len + extra tokens from the validation shards, without Fill-in-Middle.

    Documents are packed as in training, in one fixed mixed order, so that the first sequences are not all
    of one kind. Sequence i holds tokens [i * seq_len, (i + 1) * seq_len + extra). Raises DataError where
    config.validation is unset, has no documents or too few tokens for one sequence.
    """

    def __init__(
        self, config: DataConfig, *, seq_len: int, extra: int, vocab_size: int | None = None
    ) -> None:
        if config.validation is None:
            raise DataError(
                "data.validation=null, so there is no held-out text; name a folder of validation shards"
            )
        tokenizer = load_tokenizer(config.tokenizer)
        self.seq_len = seq_len
        self.extra = extra
        self.vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        shards = open_shards(
            config.validation, split="validation", tokenizer=tokenizer, vocab_size=self.vocab_size
        )
        self._stream = TokenStream(
            shards.readers,
            name="validation",
            seed=_ORDER_SEED,
            eos_id=tokenizer.eos_id,
            ends_with_eos=shards.ends_with_eos,
        )
        if self.num_sequences < 1:
            raise DataError(
                f"data.validation={config.validation} holds {self._stream.num_tokens} tokens, but one "
                f"sequence needs seq_len + {extra} = {seq_len + extra}; "
                "prepare again with a larger --validation-fraction"
            )

    @property
    def num_sequences(self) -> int:
        """How many sequences there are without repeating a document."""
        return max(0, (self._stream.num_tokens - self.extra) // self.seq_len)

    def batch(self, first: int, count: int) -> NDArray[np.int64]:
        """Return sequences [first, first + count), int64 [count, seq_len + extra]; fewer at the end."""
        count = max(0, min(count, self.num_sequences - first))
        width = self.seq_len + self.extra
        if count == 0:
            return np.empty((0, width), np.int64)
        begin = first * self.seq_len
        tokens = self._stream.read(begin, begin + count * self.seq_len + self.extra)
        return sliding_window_view(tokens, width)[:: self.seq_len]
