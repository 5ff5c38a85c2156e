"""Sampling rules against brute force and closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.sampling import SamplingRule, draw, greedy, nucleus, token_probabilities


def brute_force_nucleus(probabilities: list[float], top_p: float) -> list[float]:
    order = sorted(range(len(probabilities)), key=lambda i: (-probabilities[i], i))
    kept: list[int] = []
    mass = 0.0
    for token in order:
        if mass >= top_p:
            break
        kept.append(token)
        mass += probabilities[token]
    return [probabilities[i] / mass if i in kept else 0.0 for i in range(len(probabilities))]


def random_logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def test_greedy_is_the_best_token_and_the_lowest_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert greedy(logits).tolist() == [1, 0]
    assert token_probabilities(logits, SamplingRule()).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_divides_the_logits(temperature: float) -> None:
    logits = random_logits(0, 3, 17)
    weights = [[math.exp(value / temperature) for value in row] for row in logits.double().tolist()]
    expected = torch.tensor([[w / sum(row) for w in row] for row in weights], dtype=torch.float64)
    got = token_probabilities(logits, SamplingRule(temperature=temperature))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7)


def test_tiny_temperature_is_greedy_and_finite() -> None:
    logits = random_logits(1, 5, 33) * 1e4
    got = token_probabilities(logits, SamplingRule(temperature=1e-30))
    assert torch.equal(got, token_probabilities(logits, SamplingRule()))


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 40), top_p=st.floats(0.01, 0.99))
def test_nucleus_is_the_smallest_set_that_reaches_the_mass(seed: int, size: int, top_p: float) -> None:
    probabilities = torch.softmax(random_logits(seed, size).double(), dim=-1)
    expected = torch.tensor(brute_force_nucleus(probabilities.tolist(), top_p), dtype=torch.float64)
    torch.testing.assert_close(nucleus(probabilities, top_p), expected)


def test_nucleus_keeps_one_token_at_least_and_everything_at_one() -> None:
    probabilities = torch.tensor([0.2, 0.5, 0.3])
    assert nucleus(probabilities, 1e-9).tolist() == [0, 1, 0]
    logits = probabilities.log()
    torch.testing.assert_close(token_probabilities(logits, SamplingRule(temperature=1.0)), probabilities)


def test_draw_follows_the_distribution() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    tokens = draw(probabilities.expand(40_000, -1), torch.Generator().manual_seed(0))
    counts = torch.bincount(tokens, minlength=6).double()
    assert counts[[0, 2, 5]].sum() == 0
    # chi-square with 2 degrees of freedom: 13.8 is exceeded once in a thousand seeds
    expected = probabilities.double()[[1, 3, 4]] * 40_000
    assert (((counts[[1, 3, 4]] - expected) ** 2) / expected).sum() < 13.8


def test_draw_depends_on_the_generator_only() -> None:
    probabilities = torch.softmax(random_logits(2, 50, 11), dim=-1)
    first, again = (draw(probabilities, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        (SamplingRule(temperature=-1.0), "temperature=-1.0"),
        (SamplingRule(temperature=float("nan")), "temperature=nan"),
        (SamplingRule(top_p=0.0), "top_p=0.0"),
        (SamplingRule(top_p=1.5), "top_p=1.5"),
    ],
)
def test_broken_rules_are_named(rule: SamplingRule, field: str) -> None:
    assert [problem.startswith(field) for problem in rule.problems()] == [True]
    assert SamplingRule(temperature=0.7, top_p=0.9).problems() == []
