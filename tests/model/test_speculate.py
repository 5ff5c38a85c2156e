"""Speculation changes the number of forwards, never the text or its distribution."""

import itertools

import pytest
import torch
from torch import Tensor

from model.config import YarnConfig
from model.generate import generate
from model.sampling import SamplingRule, draw, token_probabilities
from model.speculate import Verdict, generate_with_mtp, verify
from model.transformer import Transformer
from tests.model.test_decode import YARN, full_logits, make_model, random_tokens

GREEDY = SamplingRule()


def distributions(seed: int, rows: int, vocab_size: int) -> Tensor:
    return torch.softmax(
        2 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    seen = expected > 0
    assert counts[~seen].sum() == 0
    return float(((counts[seen].double() - expected[seen]) ** 2 / expected[seen]).sum())


@pytest.mark.parametrize("num_mtp_layers", [1, 2, 3])
@pytest.mark.parametrize("yarn", [None, YARN])
@pytest.mark.parametrize("num_dense_layers", [1, 3])
def test_greedy_tokens_are_those_without_mtp(
    num_mtp_layers: int, yarn: YarnConfig | None, num_dense_layers: int
) -> None:
    model = make_model(
        num_mtp_layers=num_mtp_layers, yarn=yarn, num_dense_layers=num_dense_layers, vocab_size=5
    )
    for seed in range(2):
        prompt = random_tokens(4 + seed, seed=seed, vocab_size=5).tolist()
        plain = generate(model, [prompt], rule=GREEDY, max_new_tokens=20, seeds=[0])[0]
        result = generate_with_mtp(model, prompt, rule=GREEDY, max_new_tokens=20)
        assert result.tokens == plain
        assert result.num_forwards + result.num_accepted == 20
        assert result.num_accepted <= result.num_guessed


@pytest.mark.parametrize("num_mtp_layers", [1, 3])
def test_caches_stay_right_whatever_is_rejected(num_mtp_layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Impose verdicts, and compare every guess with an uncached run of the MTP heads on the text so far."""
    model = make_model(num_mtp_layers=num_mtp_layers, yarn=YARN)
    drafts: list[list[int]] = []
    numbers = torch.Generator().manual_seed(5)

    def impose(guesses: list[int], *_: object) -> Verdict:
        drafts.append(list(guesses))
        accepted, token = torch.randint(61, (2,), generator=numbers).tolist()
        return Verdict(num_accepted=accepted % (len(guesses) + 1), next_token=token)

    monkeypatch.setattr("model.speculate.verify", impose)
    prompt = random_tokens(6).tolist()
    text = [*prompt, *generate_with_mtp(model, prompt, rule=GREEDY, max_new_tokens=30).tokens]
    numbers.manual_seed(5)
    known = len(prompt) + 1
    for guesses in drafts:
        assert guesses == uncached_guesses(model, text[:known], len(guesses))
        accepted = int(torch.randint(61, (2,), generator=numbers)[0]) % (len(guesses) + 1)
        assert text[known : known + accepted] == guesses[:accepted]
        known += accepted + 1
    assert known == len(text)
    assert len(drafts) > 5


@torch.no_grad()
def uncached_guesses(model: Transformer, text: list[int], count: int) -> list[int]:
    """What the MTP depths guess after `text`, by a full forward for each."""
    guesses: list[int] = []
    length = len(text) - 1
    for depth in range(1, count + 1):
        known = [*text, *guesses, *[0] * model.config.num_mtp_layers]
        rows = [known[k : k + length] for k in range(model.config.num_mtp_layers + 1)]
        output = model(torch.tensor([rows]), torch.arange(length)[None])
        guesses.append(int(model.head(output.hidden_KBSD[depth][0, -1]).argmax()))
    return guesses


def test_a_stop_token_ends_the_text() -> None:
    model = make_model(num_mtp_layers=2, vocab_size=5)
    prompt = [1, 2, 3]
    free = generate_with_mtp(model, prompt, rule=GREEDY, max_new_tokens=20).tokens
    stop = free[7]
    told: list[int] = []
    got = generate_with_mtp(
        model,
        prompt,
        rule=GREEDY,
        max_new_tokens=20,
        stop_token=stop,
        on_token=lambda _, token: told.append(token),
    ).tokens
    assert got == free[: free.index(stop) + 1] == told


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3])
def test_short_texts(max_new_tokens: int) -> None:
    model = make_model(num_mtp_layers=2, vocab_size=5)
    plain = generate(model, [[3]], rule=GREEDY, max_new_tokens=max_new_tokens, seeds=[0])[0]
    assert generate_with_mtp(model, [3], rule=GREEDY, max_new_tokens=max_new_tokens).tokens == plain


def test_a_model_without_mtp_is_refused() -> None:
    with pytest.raises(ValueError, match="no MTP layer"):
        generate_with_mtp(make_model(), [1], rule=GREEDY, max_new_tokens=2)


def test_verified_tokens_are_distributed_as_the_main_models() -> None:
    vocab_size, trials = 4, 8000
    q, p = distributions(0, 2, vocab_size), distributions(100, 3, vocab_size)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(2, vocab_size)
    accepted = 0
    for _ in range(trials):
        guesses = [int(draw(row, generator)) for row in q]
        verdict = verify(guesses, list(q), p, generator)
        emitted = [*guesses[: verdict.num_accepted], verdict.next_token]
        for place, token in enumerate(emitted[:2]):
            counts[place, token] += 1
        accepted += verdict.num_accepted >= 1
    # 3 degrees of freedom: 16.3 is exceeded once in a thousand seeds
    assert chi_square(counts[0], p[0]) < 16.3
    assert chi_square(counts[1], p[1]) < 16.3
    rate = float(torch.minimum(p[0], q[0]).sum())  # arXiv 2211.17192, corollary 3.6
    assert abs(accepted / trials - rate) < 4 * (rate * (1 - rate) / trials) ** 0.5


def test_greedy_distributions_accept_exactly_the_main_models_choice() -> None:
    one_hot = torch.eye(5)
    generator = torch.Generator().manual_seed(0)
    verdict = verify([2, 4, 1], list(one_hot[[2, 4, 1]]), one_hot[[2, 4, 3, 0]], generator)
    assert verdict == Verdict(num_accepted=2, next_token=3)
    verdict = verify([2, 4], list(one_hot[[2, 4]]), one_hot[[2, 4, 0]], generator)
    assert verdict == Verdict(num_accepted=2, next_token=0)


def test_sampled_text_keeps_its_distribution() -> None:
    """Every four-token text of a two-word model: exact probability against speculative runs."""
    model = make_model(num_mtp_layers=2, vocab_size=2, num_layers=1)
    rule, prompt, trials = SamplingRule(temperature=1.5), [1, 0, 1], 500
    exact = torch.zeros(16)
    for index, text in enumerate(itertools.product(range(2), repeat=4)):
        logits = full_logits(model, torch.tensor([[*prompt, *text[:3]]]))[0, 2:]
        exact[index] = token_probabilities(logits, rule)[torch.arange(4), torch.tensor(text)].prod()
    torch.testing.assert_close(exact.sum(), torch.tensor(1.0))
    counts = torch.zeros(16)
    guessed = accepted = 0
    for seed in range(trials):
        result = generate_with_mtp(model, prompt, rule=rule, max_new_tokens=4, seed=seed)
        counts[int("".join(map(str, result.tokens)), 2)] += 1
        guessed += result.num_guessed
        accepted += result.num_accepted
    assert 0.1 < accepted / guessed < 0.9
    assert (exact * trials).min() > 5
    assert chi_square(counts, exact) < 37.7  # 15 degrees of freedom: exceeded once in a thousand seeds
