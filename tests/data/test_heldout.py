from itertools import pairwise
from math import log
from pathlib import Path

import numpy as np
import pytest

from data.baselines import Baselines
from data.config import DataConfig
from data.dataset import TrainingData
from data.errors import DataError
from data.heldout import HeldOut
from tests.data.corpus import make_config, write_shard


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return make_config(tmp_path_factory.mktemp("corpus"))


def test_sequences_are_the_packed_documents_without_rearrangement(config: DataConfig) -> None:
    held = HeldOut(config, seq_len=16, extra=2)
    rows = held.batch(0, held.num_sequences + 10)
    assert rows.shape == (held.num_sequences, 18)
    assert held.batch(held.num_sequences, 3).shape == (0, 18)
    assert np.array_equal(rows[3:5], held.batch(3, 2))
    assert not {2, 3, 4} & set(rows.ravel().tolist())
    longer = HeldOut(config, seq_len=32, extra=2).batch(0, 1)[0]
    assert np.array_equal(longer[:32], np.concatenate([rows[0][:16], rows[1][:16]]))


def test_the_last_sequence_does_not_begin_the_documents_again(config: DataConfig) -> None:
    num_tokens = HeldOut(config, seq_len=16, extra=2)._stream.num_tokens
    assert HeldOut(config, seq_len=num_tokens - 2, extra=2).num_sequences == 1
    with pytest.raises(DataError, match=f"holds {num_tokens} tokens, but one sequence needs"):
        HeldOut(config, seq_len=num_tokens - 1, extra=2)


def test_no_validation_is_named(config: DataConfig, tmp_path: Path) -> None:
    for validation, message in [
        (None, "data.validation=null"),
        (str(tmp_path / "none"), "none does not exist"),
        (str(tmp_path), "has no validation documents.*larger --validation-fraction"),
    ]:
        broken = DataConfig(sources=config.sources, validation=validation, tokenizer=config.tokenizer)
        with pytest.raises(DataError, match=message):
            HeldOut(broken, seq_len=16, extra=2)
    with pytest.raises(DataError, match=r"tokens, but one sequence needs seq_len \+ 2 = 90002"):
        HeldOut(config, seq_len=90_000, extra=2)


def test_baselines_against_direct_counting(config: DataConfig) -> None:
    data = TrainingData(config, seed=0, seq_len=16, extra_tokens=2)
    baselines = Baselines(data, max_tokens=800)
    fitted = data.batch(0, 50)[:, :17]
    held = HeldOut(config, seq_len=16, extra=2).batch(0, 20)[:, :17]
    vocab_size = data.vocab_size
    unigram = np.full(vocab_size, 1.0)
    pairs = np.zeros((vocab_size, vocab_size))
    for row in fitted:
        for previous, target in pairwise(row.tolist()):
            unigram[target] += 1
            pairs[previous, target] += 1
    unigram /= unigram.sum()
    followers = np.maximum((pairs > 0).sum(1, keepdims=True), 1)
    bigram = (pairs + followers * unigram) / (pairs.sum(1, keepdims=True) + followers)
    np.testing.assert_allclose(bigram.sum(1), 1.0)
    previous, target = held[:, :-1].ravel(), held[:, 1:].ravel()
    loss = baselines.evaluate(held)
    assert loss.uniform == pytest.approx(log(vocab_size))
    assert loss.unigram == pytest.approx(-np.log(unigram[target]).mean())
    assert loss.bigram == pytest.approx(-np.log(bigram[previous, target]).mean())
    assert loss.num_tokens == 320


def test_the_bigram_finds_structure(config: DataConfig, tmp_path: Path) -> None:
    cycle = [list(range(10, 60)) * 4] * 30
    write_shard(tmp_path / "train" / "s", cycle)
    write_shard(tmp_path / "validation" / "s", cycle[:5])
    here = DataConfig(validation=str(tmp_path), tokenizer=config.tokenizer, fim_rate=0.0)
    here.sources = {"a": type(next(iter(config.sources.values())))(path=str(tmp_path))}
    data = TrainingData(here, seed=0, seq_len=16, extra_tokens=2)
    loss = Baselines(data).evaluate(HeldOut(here, seq_len=16, extra=2).batch(0, 20)[:, :17])
    assert loss.bigram < 0.5 < loss.unigram < loss.uniform
