"""The training objective: next-token cross-entropy plus the weighted MTP losses.

    total = CE_0 / n_0 + sum over depths k = 1 .. D of (lambda / D) * CE_k / n_k

with CE_k the cross-entropy summed over depth k's targets and n_k their number in the GLOBAL batch
(arXiv 2412.19437, equations 24 and 25). Because the division is by global counts, the losses of
microbatches add up to the objective. The sequence-wise balance loss (equation 17) is no term here: each
router attaches its gradient where it arises.

Legend: B sequences, S length, D hidden width, V vocabulary, K = 1 + MTP depths, T = K * B * S targets.
"""

import torch
from torch import Tensor

from model.kernels.cross_entropy import VocabularySplit, linear_cross_entropy
from model.split import SequenceSplit, WholeSequences
from model.transformer import ModelOutput
from parallel.schedule import MicrobatchLoss


class Objective:
    """The loss function of a schedule; the main model and all MTP depths share the output head.

    Args:
        head_weight_VD: the head's weight, a parameter that stays the same object while its data changes.
        split: how the hidden states' tokens are spread; labels are those of all tokens that it gathers.
        vocabulary: which rows of the head are held here; None for all of them.
    """

    def __init__(
        self,
        head_weight_VD: Tensor,
        *,
        split: SequenceSplit | None = None,
        vocabulary: VocabularySplit | None = None,
    ) -> None:
        self._head_weight_VD = head_weight_VD
        self._split = split or WholeSequences()
        self._vocabulary = vocabulary

    def __call__(
        self,
        output: ModelOutput,
        labels_BKS: Tensor,
        *,
        valid_K: Tensor,
        mtp_weight: float,
        loss_scale: float = 1.0,
    ) -> MicrobatchLoss:
        """Return one microbatch's share of the objective, from one cross-entropy call over all depths.

        `loss_scale` multiplies the targets' weights rather than the sum, so that gradients which the fused
        kernel rounds to FP16 are already scaled when they are rounded.

        Args:
            output: the model's hidden states of K depths, each [B, s, D], s the tokens held here.
            labels_BKS: targets; -100 is ignored.
            valid_K: targets per depth in the global batch, int64.
            mtp_weight: lambda, shared equally by the MTP depths.
            loss_scale: factor on the differentiable total.
        """
        depths = labels_BKS.shape[1]
        hidden_TD = self._split.gather(torch.cat(output.hidden_KBSD)).flatten(0, 1)
        weights_K = depth_weights(valid_K, mtp_weight=mtp_weight) * loss_scale
        total, token_loss_T = linear_cross_entropy(
            hidden_TD,
            self._head_weight_VD,
            labels_BKS.transpose(0, 1).reshape(-1),
            weights_K.repeat_interleave(labels_BKS.numel() // depths),
            vocabulary=self._vocabulary,
        )
        sums_K = token_loss_T.view(depths, -1).sum(1, dtype=torch.float64).float()
        return MicrobatchLoss(total=total, loss_sums_K=sums_K)


def depth_weights(valid_K: Tensor, *, mtp_weight: float) -> Tensor:
    """Return the weight of one target's cross-entropy per depth: 1 / n_0, then (lambda / D) / n_k; FP32 [K].

    A depth without any target has no loss, whatever its weight; it is counted as one to stay finite.
    """
    weights_K = 1.0 / valid_K.clamp(min=1).float()
    weights_K[1:] *= mtp_weight / max(1, valid_K.numel() - 1)
    return weights_K
