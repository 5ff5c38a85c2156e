"""Continuing prompts token by token with the main model alone (model/speculate.py adds guesses).

Legend: B sequences, S padded prompt length, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.decode import IncrementalDecoder
from model.sampling import SamplingRule, draw, token_probabilities
from model.transformer import Transformer

TokenSink = Callable[[int, int], None]
"""Called with (sequence, token) for every new token, in order."""


def ignore_token(sequence: int, token: int) -> None:
    """Take no notice of a new token."""


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    rule: SamplingRule,
    max_new_tokens: int,
    stop_token: int | None = None,
    seeds: Sequence[int],
    on_token: TokenSink = ignore_token,
) -> list[list[int]]:
    """Continue each prompt by up to `max_new_tokens` tokens; `stop_token` ends a sequence and is kept.

    A sequence depends on its own prompt and seed, not on what shares the batch (up to rounding).

    Args:
        model: in evaluation mode.
        prompts: token ids, one token each at least; lengths may differ.
        rule: greedy by default.
        max_new_tokens: at least 1.
        stop_token: None to go on to the end.
        seeds: one per prompt; each draws from its own generator.
        on_token: told of every new token as soon as it is chosen.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    lengths = [len(prompt) for prompt in prompts]
    decoder = IncrementalDecoder(
        model, num_sequences=len(prompts), max_length=max(lengths) + max_new_tokens - 1
    )
    hidden_BSD = decoder.run(pad_right(prompts), lengths=lengths)
    last_BD = hidden_BSD[torch.arange(len(prompts)), torch.tensor(lengths) - 1]
    generated: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    while True:
        probabilities_BV = token_probabilities(decoder.logits(last_BD), rule)
        # a finished sequence is fed its last token again until the others are done; nothing reads it
        for row in sorted(unfinished):
            token = int(draw(probabilities_BV[row], generators[row]))
            generated[row].append(token)
            on_token(row, token)
            if token == stop_token or len(generated[row]) == max_new_tokens:
                unfinished.discard(row)
        if not unfinished:
            return generated
        last_BD = decoder.run(torch.tensor([[tokens[-1]] for tokens in generated]))[:, -1]


def pad_right(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the rows as one int64 tensor [B, S], filled up on the right with token 0."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
