"""How likely continuations of a text are, with the text read only once.

Legend: S context length, K tokens of a candidate, N candidates, D hidden, V vocabulary.
"""

from torch import Tensor

from model.decode import IncrementalDecoder
from model.transformer import Transformer


class CachedScorer:
    """Scores continuations with the latent cache: the context is read once, each candidate from there."""

    def __init__(self, model: Transformer) -> None:
        self._model = model

    def __call__(self, context_S: Tensor, candidates_NK: Tensor) -> Tensor:
        """Return the total log-likelihood [N], FP32 nats, of each candidate after the context."""
        num_context, num_more = len(context_S), candidates_NK.shape[1] - 1
        decoder = IncrementalDecoder(self._model, max_length=num_context + num_more)
        last_1D = decoder.run(context_S[None])[:, -1]
        first_V = decoder.logits(last_1D)[0].log_softmax(-1).cpu()
        scores_N = first_V[candidates_NK[:, 0]].clone()
        if num_more == 0:
            return scores_N
        for n, candidate_K in enumerate(candidates_NK):
            decoder.cache.truncate([num_context])
            hidden_KD = decoder.run(candidate_K[None, :-1])[0]
            log_p_KV = decoder.logits(hidden_KD).log_softmax(-1).cpu()
            scores_N[n] += log_p_KV.gather(-1, candidate_K[1:, None]).sum()
        return scores_N
