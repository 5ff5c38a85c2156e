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
        decoder = IncrementalDecoder(self._model, max_length=num_context + candidates_NK[:, 1:].numel())
        last_D = decoder.run(context_S[None])[0, -1]
        scores_N = decoder.logits(last_D).log_softmax(-1).cpu()[candidates_NK[:, 0]]
        if num_more == 0:
            return scores_N
        log_p_NKV = decoder.logits(decoder.run_branches(candidates_NK[:, :-1])).log_softmax(-1).cpu()
        return scores_N + log_p_NKV.gather(-1, candidates_NK[:, 1:, None]).sum((1, 2))
