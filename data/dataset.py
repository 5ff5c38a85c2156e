"""The samples of a training stage: sample i is a pure function of the seed, the corpus and i.

No worker, batch size or number of processes has a say in it, and no sample depends on one read before,
so that a run resumes at any sample and a later stage goes on in each source where the earlier one ended.
"""

import hashlib
import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from data.config import DataConfig
from data.errors import DataError
from data.mixture import Mixture
from data.sample_order import SampleOrder
from data.shards import ShardFacts, open_shards
from data.stream import TokenStream
from data.tokenizer import Tokenizer, load_tokenizer


class TrainingData:
    """All samples of one stage.

    Sample i comes from the source that the mixture gives it, as that source's j-th draw, which is sample p(j)
    of the source: p mixes the samples within windows of config.shuffle_window tokens, one epoch at most.
    It holds the tokens [start + p * seq_len, start + (p + 1) * seq_len + extra_tokens) of its stream,
    so that with extra_tokens = 1 + (multi-token prediction depths) no position lacks a target.

    weights replaces the weights of config.sources by name; start is the first token of each source (0
    where absent), what `position` of the stage before returned; vocab_size is the model's, the
    tokenizer's when None. Raises DataError for a corpus that cannot be used.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        seq_len: int,
        extra_tokens: int,
        weights: Mapping[str, float] | None = None,
        start: Mapping[str, int] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if not config.sources:
            raise DataError("data.sources is empty; name prepared shards as data.sources.NAME.path=FOLDER")
        tokenizer = load_tokenizer(config.tokenizer)
        if config.fim_rate > 0 and tokenizer.fim is None:
            raise DataError(
                f"data.fim_rate={config.fim_rate}, but the tokenizer {config.tokenizer} has no "
                "Fill-in-Middle tokens; set data.fim_rate=0 or use another tokenizer"
            )
        self.seq_len = seq_len
        self.extra_tokens = extra_tokens
        self.vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        self._start = dict(start or {})
        self._facts: dict[str, list[ShardFacts]] = {}
        self._streams = {
            name: self._open(name, source.path, config, tokenizer, seed)
            for name, source in config.sources.items()
        }
        self._mixture = Mixture(_merged_weights(config, weights or {}))
        self._orders = {
            name: SampleOrder(seed=seed, source=name, window=_window(config, stream, seq_len))
            for name, stream in self._streams.items()
        }
        self._identity = {
            "tokenizer": tokenizer.sha256,
            "seed": seed,
            "fim_rate": config.fim_rate,
            "shuffle": config.shuffle,
            "shuffle_window": config.shuffle_window,
        }

    @property
    def num_tokens(self) -> dict[str, int]:
        """Tokens of one epoch of each source."""
        return {name: stream.num_tokens for name, stream in self._streams.items()}

    def sample(self, i: int) -> NDArray[np.int64]:
        """Return sample i, int64 [seq_len + extra_tokens]."""
        return self.batch(i, 1)[0]

    def batch(self, first: int, count: int) -> NDArray[np.int64]:
        """Return samples [first, first + count), int64 [count, seq_len + extra_tokens]."""
        width = self.seq_len + self.extra_tokens
        out_BS = np.empty((count, width), np.int64)
        sources_B = self._mixture.sources(first, count)
        before = self._mixture.counts(first)
        for index in np.unique(sources_B).tolist():
            name = self._mixture.names[index]
            rows = np.flatnonzero(sources_B == index)
            places = self._orders[name].places(int(before[index]), len(rows))
            for row, place in zip(rows.tolist(), places.tolist(), strict=True):
                begin = self._start.get(name, 0) + place * self.seq_len
                out_BS[row] = self._streams[name].read(begin, begin + width)
        return out_BS

    def position(self, i: int) -> dict[str, int]:
        """Return the first unused token of each source after i samples: the `start` of a stage that follows.

        A window that was begun counts as used, so that no later stage repeats one of its samples.
        """
        counts = dict(zip(self._mixture.names, self._mixture.counts(i).tolist(), strict=True))
        return {
            name: self._start.get(name, 0) + self._orders[name].used(counts[name]) * self.seq_len
            for name in self._streams
        }

    def fingerprint(self) -> str:
        """Return what identifies the corpus and its order; a run must not resume when it has changed.

        It covers the content of all shards by source, the tokenizer, the seed and the rearrangement. Paths
        and weights are left out: a corpus may move, and the weights belong to the stage.
        """
        content = {name: [facts.sha256 for facts in shards] for name, shards in self._facts.items()}
        text = json.dumps({"sources": content, **self._identity}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _open(self, name: str, path: str, config: DataConfig, tokenizer: Tokenizer, seed: int) -> TokenStream:
        shards = open_shards(path, split="train", tokenizer=tokenizer, vocab_size=self.vocab_size)
        stream = TokenStream(
            shards.readers,
            name=name,
            seed=seed,
            eos_id=tokenizer.eos_id,
            ends_with_eos=shards.ends_with_eos,
            fim=tokenizer.fim,
            fim_rate=config.fim_rate,
            shuffle=config.shuffle,
        )
        needed = self.seq_len + self.extra_tokens
        if stream.num_tokens < needed:
            raise DataError(
                f"data.sources.{name}.path={path} holds {stream.num_tokens} tokens, but one sample needs "
                f"seq_len + {self.extra_tokens} = {needed}; add text or shorten the sequence"
            )
        self._facts[name] = shards.facts
        return stream


def _window(config: DataConfig, stream: TokenStream, seq_len: int) -> int:
    """Return the samples that are mixed together: at most those of an epoch."""
    tokens = min(config.shuffle_window, stream.num_tokens) if config.shuffle else 0
    return max(1, tokens // seq_len)


def _merged_weights(config: DataConfig, weights: Mapping[str, float]) -> dict[str, float]:
    for name in weights:
        if name not in config.sources:
            raise DataError(
                f"source_weights.{name} names no source of data.sources; known: {', '.join(config.sources)}"
            )
    return {name: weights.get(name, source.weight) for name, source in config.sources.items()}
