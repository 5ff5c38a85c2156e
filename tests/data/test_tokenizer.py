import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from data.errors import DataError
from data.tokenizer import EOS, FIM_HOLE, FimTokens, Tokenizer, load_tokenizer, train_bpe
from tests.data.corpus import TEXTS


@pytest.fixture(scope="module")
def deepseek() -> Tokenizer:
    return load_tokenizer("deepseek-v3")


def test_deepseek_ids(deepseek: Tokenizer) -> None:
    assert (deepseek.bos_id, deepseek.eos_id) == (0, 1)
    assert deepseek.fim == FimTokens(begin=128801, hole=128800, end=128802)
    assert deepseek.vocab_size == 128815
    assert deepseek.encode("Hello, world!\n") == [19923, 14, 2058, 8567]  # the last is "!\n"


def test_deepseek_agrees_with_the_whole_vocabulary_on_ordinary_text(deepseek: Tokenizer) -> None:
    backend = Backend.from_str(deepseek._content)
    texts = [*TEXTS, "Grüße, 世界! 12345 \r\n\t tail  ", ""]
    assert deepseek.encode_batch(texts) == [backend.encode(t, add_special_tokens=False).ids for t in texts]
    assert [deepseek.encode(text) for text in texts] == deepseek.encode_batch(texts)


def test_text_cannot_forge_special_tokens(deepseek: Tokenizer) -> None:
    text = f"a {EOS} b {FIM_HOLE} c"
    ids = deepseek.encode(text)
    assert not {0, 1, 128800, 128801, 128802} & set(ids)
    assert deepseek.decode(ids) == text


@pytest.mark.parametrize("text", ["", "naïve\r\n日本語 🎉\t\tx = 1_000;\n\n", "  leading and trailing  "])
def test_round_trip(deepseek: Tokenizer, text: str) -> None:
    assert deepseek.decode(deepseek.encode(text)) == text
    trained = train_bpe(TEXTS, vocab_size=300)
    assert trained.decode(trained.encode(text)) == text


def test_trained_tokenizer_is_deterministic_and_has_the_special_tokens(tmp_path: Path) -> None:
    first, second = train_bpe(TEXTS, vocab_size=300), train_bpe(iter(TEXTS), vocab_size=300)
    assert first.sha256 == second.sha256
    assert first.vocab_size == 300
    assert (first.bos_id, first.eos_id, first.fim) == (0, 1, FimTokens(begin=3, hole=2, end=4))
    assert first.token_id(EOS) == 1
    first.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.sha256 == first.sha256
        assert loaded.encode(TEXTS[0]) == first.encode(TEXTS[0])


def test_splits_numbers_as_deepseek_does() -> None:
    trained = train_bpe(["1234567 " * 100], vocab_size=300)
    assert [trained.decode([i]) for i in trained.encode("1234567")] == ["123", "456", "7"]


def test_missing_and_malformed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.json does not exist; give deepseek-v3"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad.json is not a tokenizer.json"):
        load_tokenizer(tmp_path / "bad.json")
    (tmp_path / "bare.json").write_text(Backend(models.BPE(vocab={"a": 0}, merges=[])).to_str())
    with pytest.raises(
        DataError, match=r"bare.json has no end-of-document token; its vocabulary must have one of"
    ):
        load_tokenizer(tmp_path / "bare.json")


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(DataError, match=r"a tokenizer of 200 tokens is too small.*need 261; use 4096"):
        train_bpe(TEXTS, vocab_size=200)


def test_other_families_of_special_tokens(tmp_path: Path) -> None:
    description = json.loads(train_bpe(TEXTS, vocab_size=300)._content)
    names = {0: "<s>", 1: "</s>", 2: "<fim_suffix>", 3: "<fim_prefix>", 4: "<fim_middle>"}
    for token in description["added_tokens"]:
        token["content"] = names[token["id"]]
    vocabulary = {names.get(i, name): i for name, i in description["model"]["vocab"].items()}
    description["model"]["vocab"] = vocabulary
    tokenizer = Tokenizer(json.dumps(description), origin="other")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.fim) == (0, 1, FimTokens(begin=3, hole=2, end=4))
