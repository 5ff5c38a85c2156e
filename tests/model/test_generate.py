"""Generation with the cache gives the tokens of generation without one."""

import pytest
import torch

from model.generate import generate
from model.sampling import SamplingRule
from model.transformer import Transformer
from tests.model.test_decode import VARIANTS, full_logits, make_model, random_tokens


def uncached_greedy(model: Transformer, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(full_logits(model, torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_equal_uncached_greedy_decoding(variant: str) -> None:
    model = make_model(**VARIANTS[variant])
    prompts = [random_tokens(length, seed=length).tolist() for length in (5, 1, 11)]
    expected = [uncached_greedy(model, prompt, 24) for prompt in prompts]
    together = generate(model, prompts, rule=SamplingRule(), max_new_tokens=24, seeds=[0, 0, 0])
    assert together == expected
    assert len({tuple(tokens) for tokens in expected}) == 3


def test_a_stop_token_ends_its_own_sequence_only() -> None:
    model = make_model()
    prompts = [random_tokens(length, seed=length).tolist() for length in (4, 8)]
    free = generate(model, prompts, rule=SamplingRule(), max_new_tokens=12, seeds=[0, 0])
    stop = next(token for token in free[0] if token not in free[1])
    told: list[list[int]] = [[], []]
    got = generate(
        model,
        prompts,
        rule=SamplingRule(),
        max_new_tokens=12,
        stop_token=stop,
        seeds=[0, 0],
        on_token=lambda row, token: told[row].append(token),
    )
    assert got == [free[0][: free[0].index(stop) + 1], free[1]]
    assert told == got


def test_a_sample_depends_on_its_prompt_and_seed_not_on_its_batch() -> None:
    model = make_model()
    prompts = [random_tokens(length, seed=length).tolist() for length in (4, 8, 4)]
    rule = SamplingRule(temperature=0.9, top_p=0.95)
    together = generate(model, prompts, rule=rule, max_new_tokens=10, seeds=[1, 2, 3])
    alone = [
        generate(model, [prompt], rule=rule, max_new_tokens=10, seeds=[seed])[0]
        for prompt, seed in zip(prompts, (1, 2, 3), strict=True)
    ]
    assert together == alone
    assert together[0] != together[2]
