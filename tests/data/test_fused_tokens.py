import numpy as np
import pytest

from data.fused_tokens import FusedTokenSplitter
from data.tokenizer import Tokenizer, load_tokenizer

TEXT = 'if (a) {\n\n  f("x");\r\n}\n\n# 世界。\nplain\n\n   spaced   \n' * 40


@pytest.fixture(scope="module")
def deepseek() -> Tokenizer:
    return load_tokenizer("deepseek-v3")


def test_every_fused_token_splits_at_its_line_break_and_keeps_its_text(deepseek: Tokenizer) -> None:
    splitter = FusedTokenSplitter(deepseek, rate=1.0)
    assert len(splitter.parts) > 500
    for token, parts in splitter.parts.items():
        whole = deepseek.decode([token])
        assert len(parts) > 1
        assert deepseek.decode(parts.tolist()) == whole
        assert not {"\n", "\r"} & set(deepseek.decode(parts[:1].tolist()))
    semicolon = deepseek.encode(";\n")
    assert len(semicolon) == 1
    assert splitter.parts[semicolon[0]].tolist() == deepseek.encode(";") + deepseek.encode("\n")
    assert deepseek.encode("\n\n")[0] not in splitter.parts
    assert deepseek.encode("   \n")[0] not in splitter.parts


def test_split_documents_keep_their_text_and_the_rate_holds(deepseek: Tokenizer) -> None:
    tokens = np.array(deepseek.encode(TEXT * 20))
    splitter = FusedTokenSplitter(deepseek, rate=0.3)
    fused = np.isin(tokens, list(splitter.parts))
    split = splitter.split(tokens, key=5)
    assert deepseek.decode(split.tolist()) == TEXT * 20
    gone = fused.sum() - np.isin(split, list(splitter.parts)).sum()
    assert abs(gone / fused.sum() - 0.3) < 0.03
    assert np.array_equal(split, splitter.split(tokens, key=5))
    assert not np.array_equal(split, splitter.split(tokens, key=6))


def test_rates_zero_and_one(deepseek: Tokenizer) -> None:
    tokens = np.array(deepseek.encode(TEXT))
    assert np.array_equal(FusedTokenSplitter(deepseek, rate=0.0).split(tokens, key=1), tokens)
    every = FusedTokenSplitter(deepseek, rate=1.0)
    assert not np.isin(every.split(tokens, key=1), list(every.parts)).any()
