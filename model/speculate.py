"""Speculative decoding with the multi-token prediction heads (arXiv 2412.19437, sections 2.2 and 5.4.3).

After the main model has chosen token t_{m+1}, MTP depth k guesses t_{m+1+k} from depth k-1's hidden state at
position m and the embedding of t_{m+k}, itself a guess for k > 1. The main model then reads t_{m+1} and all
guesses in ONE forward; the guesses are accepted from the left by the rejection rule of arXiv 2211.17192
(section 2.3), which leaves the distribution of the text exactly that of the main model alone. Greedy
decoding is the case of one-token distributions: a guess is accepted when it is the main model's own choice.

What stays valid in an MTP cache. Depth k's entry at position i was computed from the tokens up to i+k.
When the main model has confirmed the tokens up to position m, the tokens up to m+1 are final, so only the
entries i <= m+1-k are: D-1 positions at most are stale. Each round therefore runs every depth again from the
first stale position on, with the main model's hidden states there, which are kept for that purpose.

One sequence at a time: the sequences of a batch would accept different numbers of guesses.

Shapes: S tokens, D hidden width (as a suffix; in the text above the number of MTP depths), V vocabulary,
G guesses of a round.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.decode import IncrementalDecoder
from model.generate import TokenSink, ignore_token
from model.sampling import SamplingRule, draw, token_probabilities
from model.transformer import Transformer


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """How many guesses of one round stand, and the token the main model puts after them."""

    num_accepted: int
    next_token: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculativeResult:
    """The generated tokens (the prompt is not among them) and what the guesses were worth."""

    tokens: list[int]
    num_forwards: int  # forwards of the main model, prefill included
    num_guessed: int
    num_accepted: int

    @property
    def acceptance_rate(self) -> float:
        """Accepted guesses over guesses; 0 when nothing was guessed."""
        return self.num_accepted / max(1, self.num_guessed)


def verify(
    guesses: Sequence[int],
    guess_probabilities: Sequence[Tensor],
    main_probabilities_RV: Tensor,
    generator: torch.Generator,
) -> Verdict:
    """Accept guesses from the left so that every emitted token is distributed as the main model's.

    Guess x drawn from q is accepted with probability min(1, p(x) / q(x)); at the first refusal the next
    token is drawn from max(p - q, 0), renormalised (arXiv 2211.17192, section 2.3 and appendix A.1).

    Args:
        guesses: G tokens, guess g drawn from `guess_probabilities[g]`.
        guess_probabilities: q of each guess, FP32 [V].
        main_probabilities_RV: p, FP32, R = G + 1 rows: row g after the first g guesses.
        generator: source of the uniform numbers and the draw.
    """
    for g, guess in enumerate(guesses):
        p_V, q_V = main_probabilities_RV[g], guess_probabilities[g]
        uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
        if uniform * float(q_V[guess]) < float(p_V[guess]):
            continue
        residual_V = (p_V - q_V).clamp(min=0)
        # equal distributions leave no residual; only rounding can refuse a guess then
        source_V = residual_V if float(residual_V.sum()) > 0 else p_V
        return Verdict(num_accepted=g, next_token=int(draw(source_V, generator)))
    return Verdict(num_accepted=len(guesses), next_token=int(draw(main_probabilities_RV[-1], generator)))


class _Drafter:
    """Runs the MTP depths over the window of positions whose entries are new or stale."""

    def __init__(self, decoder: IncrementalDecoder, hidden_1SD: Tensor) -> None:
        self._decoder = decoder
        self._hidden_1SD = hidden_1SD  # the main model's, from position `_start` on
        self._start = 0

    def observe(self, hidden_1SD: Tensor) -> None:
        """Take in the main model's hidden states at the positions confirmed since the last round."""
        window = self._hidden_1SD.shape[1]
        num_stale = min(self._decoder.num_mtp_layers - 1, window)
        self._start += window - num_stale
        self._hidden_1SD = torch.cat((self._hidden_1SD[:, window - num_stale :], hidden_1SD), dim=1)

    def guess(
        self, tokens: list[int], count: int, rule: SamplingRule, generator: torch.Generator
    ) -> "_Draft":
        """Guess the `count` tokens after `tokens`, whose last one the main model has not read yet."""
        guesses: list[int] = []
        probabilities: list[Tensor] = []
        hidden_1SD = self._hidden_1SD
        window = hidden_1SD.shape[1]
        for depth in range(1, count + 1):
            first = self._start + depth
            inputs_1S = torch.tensor([(tokens + guesses)[first : first + window]])
            hidden_1SD = self._decoder.run_mtp(depth, hidden_1SD, inputs_1S, start=self._start)
            logits_V = self._decoder.logits(hidden_1SD[0, -1])
            probabilities.append(token_probabilities(logits_V, rule))
            guesses.append(int(draw(probabilities[-1], generator)))
        return _Draft(guesses, probabilities)


@dataclass(frozen=True, slots=True)
class _Draft:
    """Guesses and the distribution [V] that each was drawn from."""

    guesses: list[int]
    probabilities: list[Tensor]


def generate_with_mtp(
    model: Transformer,
    prompt: Sequence[int],
    *,
    rule: SamplingRule,
    max_new_tokens: int,
    stop_token: int | None = None,
    seed: int = 0,
    on_token: TokenSink = ignore_token,
) -> SpeculativeResult:
    """Continue `prompt` as `model.generate.generate` does, checking D guesses per forward of the main model.

    Greedy decoding gives the same tokens (up to ties within rounding); sampling the same distribution, but
    other tokens for the same seed, as the random numbers are used differently.

    Args:
        model: in evaluation mode, with at least one MTP depth (else ValueError).
        prompt: token ids, at least one.
        rule: how guesses and tokens are drawn; greedy by default.
        max_new_tokens: at least 1.
        stop_token: ends the text and is kept; None to go on to the end.
        seed: of the draws.
        on_token: called with (0, token) for every new token.
    """
    decoder = IncrementalDecoder(model, max_length=len(prompt) + max_new_tokens - 1)
    if decoder.num_mtp_layers == 0:
        raise ValueError("the model has no MTP layer to guess with; use model.generate.generate")
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)
    hidden_1SD = decoder.run(torch.tensor([text]))
    drafter = _Drafter(decoder, hidden_1SD)
    new = [int(draw(token_probabilities(decoder.logits(hidden_1SD[0, -1]), rule), generator))]
    num_forwards, num_guessed, num_accepted = 1, 0, 0
    while True:
        for token in new:
            text.append(token)
            on_token(0, token)
            if token == stop_token or len(text) == len(prompt) + max_new_tokens:
                return SpeculativeResult(
                    tokens=text[len(prompt) :],
                    num_forwards=num_forwards,
                    num_guessed=num_guessed,
                    num_accepted=num_accepted,
                )
        room = len(prompt) + max_new_tokens - len(text) - 1  # the main model adds one token by itself
        draft = drafter.guess(text, min(decoder.num_mtp_layers, room), rule, generator)
        verdict, hidden_1SD = _check(decoder, text, draft, rule, generator)
        drafter.observe(hidden_1SD)
        new = [*draft.guesses[: verdict.num_accepted], verdict.next_token]
        num_forwards += 1
        num_guessed += len(draft.guesses)
        num_accepted += verdict.num_accepted


def _check(
    decoder: IncrementalDecoder,
    text: list[int],
    draft: _Draft,
    rule: SamplingRule,
    generator: torch.Generator,
) -> tuple[Verdict, Tensor]:
    """Read the last token and the guesses at once; keep in the cache, and return, what is confirmed."""
    hidden_1SD = decoder.run(torch.tensor([[text[-1], *draft.guesses]]))
    main_probabilities_RV = token_probabilities(decoder.logits(hidden_1SD[0]), rule)
    verdict = verify(draft.guesses, draft.probabilities, main_probabilities_RV, generator)
    decoder.cache.truncate([len(text) + verdict.num_accepted])
    return verdict, hidden_1SD[:, : 1 + verdict.num_accepted]
