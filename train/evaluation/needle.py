"""Needle in a haystack, scored by likelihood so that it means something for a base model.

A sentence that states a random pass key (arXiv 2305.16300, section 4.2) is hidden at some depth of real
held-out text; the text ends with the question. Nothing is generated: the right key competes with keys
that were drawn like it but hidden nowhere. A key's score is how many nats the context added to it,

    log P(key | text with the needle, cue) - log P(key | a little text without it, cue),

so that keys which the model likes anyway win nothing. A model that does not use the needle is right
with probability 1 / (number of candidates) exactly, because the right key is drawn uniformly from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError

NUM_DISTRACTORS = 9
NEEDLE_BEFORE, NEEDLE_BETWEEN, NEEDLE_AFTER = "\nThe pass key is", ". Remember it:", " is the pass key.\n"
CUE = "\nWhat is the pass key? The pass key is"
NUM_PRIOR_TOKENS = 32  # filler in front of the cue when a key's needle-free likelihood is taken
NUM_KEY_DRAWS = 256  # keys drawn to find enough of equal token count


class TextEncoder(Protocol):
    """What the needle needs of a tokenizer."""

    def encode_batch(self, texts: Sequence[str], /) -> Sequence[Sequence[int]]:
        """Return the token ids of each text."""
        ...


class ContinuationScorer(Protocol):
    """Anything that can say how likely continuations of a context are."""

    def __call__(self, context_S: Tensor, candidates_NK: Tensor) -> Tensor:
        """Return the total log-likelihood [N], in nats, of each candidate after the context."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleGrid:
    """Retrieval by context length (rows) and depth (columns)."""

    lengths: list[int]
    depths: list[float]  # 0: the needle opens the text; 1: it stands right before the cue
    grid: list[list[float]]  # share of trials in which the right key scored best
    margin: list[list[float]]  # nats the right key is ahead of the mean distractor
    chance: float

    def as_json(self) -> dict[str, Any]:
        """Return the grid as it stands in evaluations/*.json."""
        return {
            "lengths": self.lengths,
            "depths": self.depths,
            "grid": self.grid,
            "margin": self.margin,
            "chance": self.chance,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Haystack:
    """One trial: filler text, candidate keys, and each key's likelihood where no needle is in sight."""

    filler: Tensor  # [at least the longest length]
    keys: Tensor  # [N, K] tokens
    priors: Tensor  # [N] nats


@dataclass(frozen=True, kw_only=True, slots=True)
class Phrases:
    """The token ids of the needle's pieces and of the cue."""

    before: Tensor
    between: Tensor
    after: Tensor
    cue: Tensor

    def needle(self, key_K: Tensor) -> Tensor:
        """Return the tokens of the sentence that hides `key_K`."""
        return torch.cat((self.before, key_K, self.between, key_K, self.after))


def needle_grid(
    score: ContinuationScorer,
    *,
    filler_TL: Tensor,
    tokenizer: TextEncoder,
    lengths: Sequence[int],
    depths: Sequence[float],
    seed: int,
) -> NeedleGrid:
    """Hide a key in each of the T filler texts, at every length and depth, and score its retrieval.

    `filler_TL` holds the tokens [trials, at least max(lengths)] of real text. A length counts everything:
    filler, needle, cue and key. Lengths too short for needle and cue are left out. Deterministic in `seed`.
    """
    rng = np.random.default_rng(seed)
    phrases = _encode_phrases(tokenizer)
    haystacks = [_haystack(score, filler, phrases, tokenizer, rng) for filler in filler_TL]
    longest_key = max(haystack.keys.shape[1] for haystack in haystacks)
    shortest = len(phrases.needle(haystacks[0].keys[0])) + len(phrases.cue) + 3 * longest_key
    kept_lengths = [length for length in lengths if length >= shortest]
    grid: list[list[float]] = []
    margin: list[list[float]] = []
    for length in kept_lengths:
        cells = [[_trial(score, h, phrases, length, depth, rng) for h in haystacks] for depth in depths]
        grid.append([float(np.mean([hit for hit, _ in trials])) for trials in cells])
        margin.append([float(np.mean([nats for _, nats in trials])) for trials in cells])
    return NeedleGrid(
        lengths=kept_lengths,
        depths=list(depths),
        grid=grid,
        margin=margin,
        chance=1 / (1 + NUM_DISTRACTORS),
    )


def even_depths(count: int) -> list[float]:
    """Return `count` depths evenly spaced over [0, 1]; a single one lies in the middle."""
    return [0.5] if count == 1 else [i / (count - 1) for i in range(count)]


def halvings(length: int, count: int) -> list[int]:
    """Return `length` and its halvings, `count` lengths in all, shortest first."""
    return [length >> i for i in reversed(range(count))]


def _haystack(
    score: ContinuationScorer,
    filler: Tensor,
    phrases: Phrases,
    tokenizer: TextEncoder,
    rng: np.random.Generator,
) -> Haystack:
    keys_NK = draw_keys(tokenizer, NUM_DISTRACTORS + 1, rng)
    needle_free = torch.cat((filler[:NUM_PRIOR_TOKENS], phrases.cue))
    return Haystack(filler=filler, keys=keys_NK, priors=score(needle_free, keys_NK))


def _trial(
    score: ContinuationScorer,
    haystack: Haystack,
    phrases: Phrases,
    length: int,
    depth: float,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Return whether the right key scored best (shared among equals) and its lead in nats."""
    keys_NK = haystack.keys
    right = int(rng.integers(len(keys_NK)))
    needle = phrases.needle(keys_NK[right])
    num_filler = length - len(needle) - len(phrases.cue) - keys_NK.shape[1]
    cut = round(depth * num_filler)
    filler = haystack.filler[:num_filler]
    context = torch.cat((filler[:cut], needle, filler[cut:], phrases.cue))
    gain_N = (score(context, keys_NK) - haystack.priors).double()
    best = gain_N == gain_N.max()
    distractors = torch.cat((gain_N[:right], gain_N[right + 1 :]))
    return float(best[right]) / int(best.sum()), float(gain_N[right] - distractors.mean())


def draw_keys(tokenizer: TextEncoder, count: int, rng: np.random.Generator) -> Tensor:
    """Return the tokens [count, K] of different five-digit keys that all have the same number of tokens.

    Raises DataError when the tokenizer gives too few keys of equal token count.
    """
    numbers = rng.choice(90_000, size=NUM_KEY_DRAWS, replace=False) + 10_000
    encoded = [list(ids) for ids in tokenizer.encode_batch([f" {number}" for number in numbers])]
    counts = [len(ids) for ids in encoded]
    commonest = max(set(counts), key=lambda size: (counts.count(size), size))
    keys = [ids for ids in encoded if len(ids) == commonest and ids]
    different = list(dict.fromkeys(map(tuple, keys)))[:count]
    if len(different) < count:
        raise DataError(
            f"the tokenizer gives {len(different)} different encodings of five-digit numbers, the needle "
            f"evaluation needs {count}; use a tokenizer that knows digits, or set evaluation.enabled=false"
        )
    return torch.tensor(different)


def _encode_phrases(tokenizer: TextEncoder) -> Phrases:
    texts = [NEEDLE_BEFORE, NEEDLE_BETWEEN, NEEDLE_AFTER, CUE]
    before, between, after, cue = (torch.tensor(list(ids)) for ids in tokenizer.encode_batch(texts))
    return Phrases(before=before, between=between, after=after, cue=cue)
