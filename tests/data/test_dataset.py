from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig, SourceConfig
from data.dataset import TrainingData
from data.errors import DataError
from data.loader import Batches
from data.sample_order import SampleOrder
from tests.data.corpus import make_config, random_documents, write_shard


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return make_config(tmp_path_factory.mktemp("corpus"))


def open_data(config: DataConfig, **changes: object) -> TrainingData:
    arguments = {"seed": 3, "seq_len": 16, "extra_tokens": 2} | changes
    return TrainingData(config, **arguments)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("window", [None, 16 * 7])
def test_order_depends_neither_on_batch_sizes_nor_on_the_resume_point(
    config: DataConfig, window: int | None
) -> None:
    config = config if window is None else replace(config, shuffle_window=window)
    data = open_data(config)
    expected = np.stack([data.sample(i) for i in range(400)])

    @settings(max_examples=40, deadline=None)
    @given(first=st.integers(0, 200), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5))
    def check(first: int, sizes: list[int]) -> None:
        with Batches(open_data(config), first) as batches:
            read = np.concatenate([batches.next(size) for size in sizes])
            assert batches.next_sample == first + sum(sizes)
        assert np.array_equal(read, expected[first : first + sum(sizes)])

    check()


def test_samples_overlap_by_the_extra_tokens_only(config: DataConfig) -> None:
    data = open_data(replace(config, shuffle_window=0), weights={"a": 1.0, "b": 0.0})
    samples = data.batch(0, 5)
    assert samples.shape == (5, 18)
    assert samples.dtype == np.int64
    for left, right in pairwise(samples):
        assert np.array_equal(left[16:], right[:2])


def test_mixing_draws_every_sample_of_a_window_once_and_stays_inside_it(config: DataConfig) -> None:
    one_source = {"weights": {"a": 1.0, "b": 0.0}}
    plain = open_data(replace(config, shuffle_window=0), **one_source).batch(0, 40)
    mixed = open_data(replace(config, shuffle_window=16 * 20), **one_source).batch(0, 40)
    assert not np.array_equal(plain, mixed)
    for window in (slice(0, 20), slice(20, 40)):
        assert sorted(map(tuple, plain[window].tolist())) == sorted(map(tuple, mixed[window].tolist()))


def test_every_window_of_every_source_has_an_order_of_its_own() -> None:
    def order(seed: int, source: str, window: int) -> tuple[int, ...]:
        places = SampleOrder(seed=seed, source=source, window=50).places(50 * window, 50)
        return tuple((places - 50 * window).tolist())

    assert len({order(0, "a", 0), order(0, "a", 1), order(0, "b", 0), order(1, "a", 0)}) == 4


def test_a_window_that_was_begun_counts_as_used(config: DataConfig) -> None:
    data = open_data(replace(config, shuffle_window=16 * 20), weights={"a": 1.0, "b": 0.0}, start={"a": 5})
    assert [data.position(i)["a"] for i in (0, 1, 20, 21)] == [5, 5 + 320, 5 + 320, 5 + 640]


def test_the_next_stage_goes_on_where_this_one_ended(config: DataConfig) -> None:
    config = replace(config, shuffle_window=0)
    first = open_data(config)
    position = first.position(50)
    assert sum(position.values()) == 50 * 16
    later = open_data(config, seq_len=64, weights={"b": 1.0, "a": 0.0}, start=position)
    whole = open_data(config, weights={"b": 1.0, "a": 0.0})
    stream = np.concatenate(
        [whole.sample(i)[:16] for i in range(position["b"] // 16, position["b"] // 16 + 5)]
    )
    assert np.array_equal(later.sample(0), stream[:66])
    assert later.position(3) == {"a": position["a"], "b": position["b"] + 3 * 64}


def test_seed_changes_the_order(config: DataConfig) -> None:
    assert not np.array_equal(open_data(config).batch(0, 9), open_data(config, seed=4).batch(0, 9))


def test_fingerprint_knows_content_seed_and_rate_but_not_weights_or_paths(
    config: DataConfig, tmp_path: Path
) -> None:
    before = open_data(config).fingerprint()
    assert before == open_data(config, weights={"a": 5.0}, seq_len=8).fingerprint()
    assert before != open_data(config, seed=4).fingerprint()
    moved = make_config(tmp_path)
    assert before == open_data(moved).fingerprint()
    moved.fim_rate = 0.1
    assert before != open_data(moved).fingerprint()
    moved.fim_rate = config.fim_rate
    documents = random_documents(0, 50)
    documents[-1] = [11] * len(documents[-1])  # the same size, other tokens
    write_shard(tmp_path / "a" / "train" / "s0", documents)
    assert before != open_data(moved).fingerprint()


def test_megatron_prefix_and_plain_folder_are_accepted(config: DataConfig, tmp_path: Path) -> None:
    write_shard(tmp_path / "plain" / "x", random_documents(0, 50))
    for path in ("plain", "plain/x"):
        config_here = DataConfig(
            sources={"a": SourceConfig(path=str(tmp_path / path))}, tokenizer=config.tokenizer, fim_rate=0.0
        )
        assert open_data(config_here).num_tokens["a"] == sum(map(len, random_documents(0, 50))) + 50


class TestErrors:
    def source(self, config: DataConfig, path: Path) -> DataConfig:
        return DataConfig(sources={"a": SourceConfig(path=str(path))}, tokenizer=config.tokenizer)

    def test_missing_folder(self, config: DataConfig, tmp_path: Path) -> None:
        with pytest.raises(
            DataError, match=r"none does not exist, neither as a folder.*data.prepare SOURCE --out"
        ):
            open_data(self.source(config, tmp_path / "none"))

    def test_empty_folder(self, config: DataConfig, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"has no train documents: no .bin and .idx files"):
            open_data(self.source(config, tmp_path))

    def test_unfinished_preparation(self, config: DataConfig, tmp_path: Path) -> None:
        write_shard(tmp_path / "train" / "x", random_documents(0, 50))
        (tmp_path / "manifest.json").write_text('{"status": "incomplete", "options": {}}')
        for path in (tmp_path, tmp_path / "train"):
            with pytest.raises(DataError, match=r"is not finished.*run the same data.prepare command again"):
                open_data(self.source(config, path))

    def test_token_beyond_the_vocabulary(self, config: DataConfig, tmp_path: Path) -> None:
        write_shard(tmp_path / "x", [*random_documents(0, 50), [300]])
        with pytest.raises(DataError, match=r"x.bin holds token id 300, but the vocabulary has 300 tokens"):
            open_data(self.source(config, tmp_path / "x"))
        with pytest.raises(DataError, match=r"holds token id \d+, but the vocabulary has 250 tokens"):
            open_data(config, vocab_size=250)
        assert open_data(self.source(config, tmp_path / "x"), vocab_size=301).vocab_size == 301

    def test_the_check_is_repeated_when_the_file_changes(self, config: DataConfig, tmp_path: Path) -> None:
        write_shard(tmp_path / "x", random_documents(0, 50))
        here = self.source(config, tmp_path / "x")
        open_data(here)
        assert (tmp_path / "x.check.json").is_file()
        (tmp_path / "x.check.json").write_text("{ torn")
        open_data(here)
        content = bytearray((tmp_path / "x.bin").read_bytes())
        content[100:102] = b"\xff\xff"
        (tmp_path / "x.bin").write_bytes(content)
        with pytest.raises(DataError, match=r"holds token id 65535"):
            open_data(here)

    def test_a_read_only_corpus_is_examined_without_a_cache(
        self, config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_shard(tmp_path / "x", random_documents(0, 50))

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError("read-only")

        monkeypatch.setattr(Path, "write_text", refuse)
        open_data(self.source(config, tmp_path / "x"))
        assert not (tmp_path / "x.check.json").exists()

    def test_too_few_tokens(self, config: DataConfig) -> None:
        with pytest.raises(DataError, match=r"data.sources.a.path=.* tokens, but one sample needs.*= 99999"):
            open_data(config, seq_len=99_997)

    def test_mixed_document_ends(self, config: DataConfig, tmp_path: Path) -> None:
        write_shard(tmp_path / "x", random_documents(0, 50))
        write_shard(tmp_path / "y", random_documents(1, 50), eos_id=None)
        with pytest.raises(
            DataError, match=r"50 of 100 documents end with the end-of-document token 1; all must"
        ):
            open_data(self.source(config, tmp_path))

    def test_other_tokenizer_than_the_corpus(self, config: DataConfig, tmp_path: Path) -> None:
        write_shard(tmp_path / "train" / "x", random_documents(0, 50))
        (tmp_path / "manifest.json").write_text(
            '{"status": "complete", "options": {}, "tokenizer": {"sha256": "other"}}'
        )
        with pytest.raises(
            DataError, match=r"prepared with another tokenizer.*set data.tokenizer=.*tokenizer.json"
        ):
            open_data(self.source(config, tmp_path))

    def test_unknown_weight(self, config: DataConfig) -> None:
        with pytest.raises(DataError, match=r"source_weights.c names no source of data.sources; known: a, b"):
            open_data(config, weights={"c": 1.0})

    def test_no_sources(self, config: DataConfig) -> None:
        with pytest.raises(DataError, match=r"data.sources is empty"):
            open_data(DataConfig(tokenizer=config.tokenizer))

    def test_fim_without_its_tokens(self, config: DataConfig, tmp_path: Path) -> None:
        text = Path(config.tokenizer).read_text().replace("fim▁", "other▁")
        (tmp_path / "tokenizer.json").write_text(text)
        config_here = DataConfig(sources=config.sources, tokenizer=str(tmp_path), fim_rate=0.1)
        with pytest.raises(DataError, match=r"data.fim_rate=0.1, but the tokenizer .* set data.fim_rate=0"):
            open_data(config_here)


def test_an_error_while_reading_ahead_reaches_the_caller() -> None:
    class Broken:
        def batch(self, first: int, count: int) -> np.ndarray:
            if first:
                raise DataError("gone")
            return np.zeros((count, 3), np.int64)

    with Batches(Broken()) as batches:
        batches.next(2)
        with pytest.raises(DataError, match=r"gone"):
            batches.next(2)
