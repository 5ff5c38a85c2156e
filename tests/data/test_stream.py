from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.fim import chosen, cut_points, rearranged
from data.hashing import make_key, permutation
from data.indexed import IndexedReader
from data.stream import TokenStream
from data.tokenizer import FimTokens
from tests.data.corpus import random_documents, write_shard

MARKS = FimTokens(begin=1003, hole=1002, end=1004)
EOS = 1


def naive(documents: list[list[int]], *, epochs: int, seed: int, rate: float, shuffle: bool) -> list[int]:
    """Return the stream built document by document, as the definition says."""
    out: list[int] = []
    for epoch in range(epochs):
        key = make_key(seed, "s", epoch, "fim")
        order = permutation(make_key(seed, "s", epoch, "order"), len(documents))
        for document in order.tolist() if shuffle else range(len(documents)):
            tokens = np.array(documents[document], np.int64)
            if chosen(key, np.array([document]), np.array([len(tokens)]), rate=rate)[0]:
                begin, end = cut_points(key, document, len(tokens))
                tokens = np.concatenate(rearranged(tokens, begin, end, MARKS))
            out += [*tokens.tolist(), EOS]
    return out


@pytest.mark.parametrize("stored_eos", [True, False])
@pytest.mark.parametrize(("rate", "shuffle"), [(0.0, True), (0.4, True), (0.4, False), (1.0, True)])
def test_every_range_equals_the_naive_construction(
    tmp_path: Path, stored_eos: bool, rate: float, shuffle: bool
) -> None:
    documents = [[7], *random_documents(0, 30)]
    eos_id = EOS if stored_eos else None
    write_shard(tmp_path / "a", documents[:11], eos_id=eos_id)
    write_shard(tmp_path / "b", documents[11:], eos_id=eos_id)
    stream = TokenStream(
        [IndexedReader(tmp_path / "a"), IndexedReader(tmp_path / "b")],
        name="s",
        seed=5,
        eos_id=EOS,
        ends_with_eos=stored_eos,
        fim=MARKS,
        fim_rate=rate,
        shuffle=shuffle,
    )
    expected = naive(documents, epochs=5, seed=5, rate=rate, shuffle=shuffle)
    assert stream.num_tokens == sum(map(len, documents)) + len(documents)

    @settings(max_examples=100, deadline=None)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        start = data.draw(st.integers(0, len(expected)))
        stop = data.draw(st.integers(start, len(expected)))
        assert stream.read(start, stop).tolist() == expected[start:stop]

    check()
    assert stream.read(0, len(expected)).tolist() == expected


def test_epochs_differ_and_hold_the_same_documents(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", random_documents(1, 40))
    stream = TokenStream([IndexedReader(tmp_path / "a")], name="s", seed=0, eos_id=EOS, ends_with_eos=True)
    size = stream.num_tokens
    first, second = stream.read(0, size), stream.read(size, 2 * size)
    assert not np.array_equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist())


def test_a_far_epoch_is_reached_directly(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", random_documents(1, 40))
    arguments = {"name": "s", "seed": 0, "eos_id": EOS, "ends_with_eos": True, "fim": MARKS, "fim_rate": 0.5}
    walked = TokenStream([IndexedReader(tmp_path / "a")], **arguments)
    for start in range(0, 20_000, 500):
        last = walked.read(start, start + 500)
    direct = TokenStream([IndexedReader(tmp_path / "a")], **arguments)
    assert np.array_equal(direct.read(19_500, 20_000), last)
    assert len(direct._epochs) <= 2
