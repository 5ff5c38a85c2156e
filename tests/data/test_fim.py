import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.fim import NUM_MARKS, chosen, cut_points, rearranged
from data.hashing import make_key
from data.tokenizer import FimTokens

MARKS = FimTokens(begin=1003, hole=1002, end=1004)


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 999), min_size=3, max_size=50), document=st.integers(0, 2**40))
def test_a_rearranged_document_joins_back_to_itself(tokens: list[int], document: int) -> None:
    begin, end = cut_points(make_key(0), document, len(tokens))
    assert 0 <= begin <= end <= len(tokens)
    result = np.concatenate(rearranged(np.array(tokens), begin, end, MARKS)).tolist()
    assert len(result) == len(tokens) + NUM_MARKS
    assert result[0] == MARKS.begin
    hole, last = result.index(MARKS.hole), result.index(MARKS.end)
    prefix, suffix, middle = result[1:hole], result[hole + 1 : last], result[last + 1 :]
    assert prefix + middle + suffix == tokens


def test_the_rate_holds_and_short_documents_are_left_alone() -> None:
    documents = np.arange(100_000)
    picked = chosen(make_key(3), documents, np.full(100_000, 50), rate=0.1)
    assert abs(picked.mean() - 0.1) < 0.004  # four standard deviations
    assert not chosen(make_key(3), documents, np.full(100_000, 2), rate=1.0).any()
    assert chosen(make_key(3), documents, np.full(100_000, 3), rate=1.0).all()
    assert not chosen(make_key(3), documents, np.full(100_000, 50), rate=0.0).any()


def test_cut_points_are_spread_evenly() -> None:
    points = np.array([cut_points(make_key(1), document, 9) for document in range(20_000)]).ravel()
    counts = np.bincount(points, minlength=10)
    assert len(counts) == 10
    assert np.abs(counts / 4000 - 1).max() < 0.08


def test_the_cuts_do_not_follow_the_choice() -> None:
    key, documents = make_key(5), np.arange(20_000)
    picked = documents[chosen(key, documents, np.full(20_000, 100), rate=0.1)]
    begins = np.array([cut_points(key, int(document), 100) for document in picked])
    assert abs(begins.mean() - 50) < 2
