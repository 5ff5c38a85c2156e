"""From logits to tokens: greedy, temperature and nucleus (top-p) sampling as pure functions.

Every rule is first turned into an explicit distribution over the vocabulary, greedy decoding into the
distribution with all mass on the best token. Speculative decoding (model/speculate.py) compares such
distributions and therefore needs no case of its own for greedy decoding.

Shapes: V vocabulary; "..." any leading dimensions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRule:
    """How the next token is chosen. The default is greedy decoding."""

    temperature: float = 0.0  # 0: greedy; 1: the model's own distribution
    top_p: float = 1.0  # keep the smallest set of most likely tokens whose mass reaches it; 1 keeps all

    def problems(self) -> list[str]:
        """Return every broken rule."""
        found: list[str] = []
        if not 0 <= self.temperature < float("inf"):
            found.append(
                f"temperature={self.temperature} must be finite and not negative; use 0 for greedy decoding"
            )
        if not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p} must lie in (0, 1]; use 1 to keep every token")
        return found


def token_probabilities(logits: Tensor, rule: SamplingRule) -> Tensor:
    """Return the FP32 distribution [..., V] that `rule` draws from, given logits [..., V].

    Ties of greedy decoding go to the lowest token id.
    """
    if rule.temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, greedy(logits).unsqueeze(-1), 1.0)
    # the best logit is subtracted first, so that a tiny temperature gives exp(-inf) = 0 and never inf - inf
    shifted = logits.float() - logits.float().amax(dim=-1, keepdim=True)
    probabilities = torch.softmax(shifted / rule.temperature, dim=-1)
    return nucleus(probabilities, rule.top_p) if rule.top_p < 1 else probabilities


def greedy(logits: Tensor) -> Tensor:
    """Return the most likely token, int64 [...], of logits [..., V]; the lowest id among equals."""
    return logits.argmax(dim=-1)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the most likely tokens up to mass `top_p`, renormalised, [..., V] (arXiv 1904.09751, section 3.1).

    A token is kept while the tokens before it have not reached `top_p`, so at least one always is.
    """
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    mass_before = ordered.cumsum(dim=-1) - ordered
    kept = ordered.where(mass_before < top_p, torch.zeros_like(ordered))
    kept = kept / kept.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, order, kept)


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token, int64 [...], from each distribution [..., V]; it need not be normalised.

    The generator lives on the CPU and gives one uniform number a token, so that a seed draws the same
    tokens on every device, up to rounding of the distribution.
    """
    cumulative = probabilities.double().cumsum(dim=-1)
    uniform = torch.rand(probabilities.shape[:-1], generator=generator, dtype=torch.float64)
    threshold = uniform.to(probabilities.device).unsqueeze(-1) * cumulative[..., -1:]
    # right=True steps over tokens of zero mass in front of the one that crosses the threshold
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
