"""Cross-entropy fused with the output projection, in chunks of tokens.

Logits [T, V] of the whole batch would be the largest tensor of a training step (at V3's vocabulary and
4096 tokens 1 GiB in BF16, 2 GiB in FP32). Here a chunk of them exists at a time: its loss is taken, and at
once its gradient, softmax - onehot, which gives the gradient of the hidden states and a term of the gradient
of the weight. The backward pass only multiplies both by the gradient of the loss.

Softmax and loss are FP32, from logits in the type of `hidden`; the weight's gradient is summed in FP32 and
returned in FP32 where the weight asks for that (`grad_dtype`). Token weights scale rows of [T, D], not of
[T, V]: d loss / d hidden = weights * (softmax - onehot) W, and likewise for the weight.

The rows of the weight may be spread over devices (vocabulary parallelism, arXiv 1909.08053, section 3). The
logits of a chunk then stay where they are; devices exchange one maximum, then two sums per token:

    pass A   the largest logit of each token                        -> maximum over devices
    pass B   sum of exp(logit - largest), and the label's logit     -> sum over devices
    pass C   softmax - onehot of the logits held here

Legend: T tokens, D hidden, V vocabulary (rows held here); C tokens of a chunk, N tokens of a block that is in
FP32 at a time.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.blocks import wide_type

IGNORED_LABEL = -100
SOFTMAX_ELEMENTS = 1 << 18
"""Logits in FP32 at a time: 1 MiB, which stays in the second-level cache over all passes."""
ACCUMULATE_ROWS = 1 << 12
"""Rows of the weight's gradient computed in the compute type before they are added in FP32."""


class VocabularySplit(Protocol):
    """Which rows of the vocabulary this device holds, and how statistics are combined with the others'.

    Every device calls `max` and `sum` in the same order, with tensors of the same shape. Both may work in
    place and return their argument.
    """

    first: int
    """The token id of the first row held here."""

    def max(self, x: Tensor) -> Tensor:
        """Return the elementwise maximum over devices."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Return the elementwise sum over devices."""
        ...


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    weights_T: Tensor,
    *,
    vocabulary: VocabularySplit | None = None,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Return (loss = sum_t weights_t CE_t, CE_T), CE the cross-entropy of logits = hidden weight^T.

    hidden [T, D] and weight [V, D] of one type; labels int64 [T], -100 is ignored (its CE is 0); weights FP32
    [T], without gradient. The loss is an FP32 scalar, differentiable in hidden and weight; CE is FP32 and
    detached. Without gradient mode no gradient is computed. Memory: chunk_tokens * V logits, and the
    gradients.

    With `vocabulary`, weight holds the rows from vocabulary.first on (at least one; devices may differ in
    number), labels are ids of the whole vocabulary, and all devices pass the same hidden states, labels and
    weights. Loss and CE are then complete on every device and the weight's gradient is that of its own rows,
    but the gradient of hidden is only this device's term: the sum over devices is left to the caller.
    """
    need_grad = torch.is_grad_enabled()
    out: Any = _LinearCrossEntropy.apply(
        hidden_TD, weight_VD, labels_T, weights_T, vocabulary, chunk_tokens, need_grad
    )
    return out


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        weights_T: Tensor,
        vocabulary: VocabularySplit | None,
        chunk_tokens: int,
        need_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = wide_type(hidden_TD)
        token_loss_T = hidden_TD.new_zeros(len(hidden_TD), dtype=wide)
        used_T = labels_T != IGNORED_LABEL
        weights_T = weights_T.to(wide) * used_T
        # Row weights relative to the largest: a plain mean leaves the hidden states as they are, and no FP16
        # number underflows.
        largest = torch.cat((weights_T.abs(), weights_T.new_full((1,), torch.finfo(wide).tiny))).max()
        relative_T1 = (weights_T / largest)[:, None]
        need_hidden, need_weight = (need_grad and need for need in ctx.needs_input_grad[:2])
        dhidden_TD = torch.empty_like(hidden_TD) if need_hidden else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if need_weight else None
        # one buffer for all chunks: a new tensor would exist beside the previous chunk's
        buffer_CV = hidden_TD.new_empty(min(chunk_tokens, len(hidden_TD)), len(weight_VD))
        for start in range(0, len(hidden_TD), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            hidden_CD = hidden_TD[chunk]
            logits_CV = torch.mm(hidden_CD, weight_VD.T, out=buffer_CV[: len(hidden_CD)])
            rows = (logits_CV, labels_T[chunk], token_loss_T[chunk])
            if vocabulary is None:
                _softmax_minus_onehot(*rows, need_grad=need_grad)
            else:
                _split_softmax_minus_onehot(*rows, vocabulary, need_grad=need_grad)
            if dhidden_TD is not None:
                torch.mm(logits_CV, weight_VD, out=dhidden_TD[chunk])
            if dweight_VD is not None:
                _add_product(dweight_VD, logits_CV, (hidden_CD * relative_T1[chunk]).to(hidden_CD.dtype))
        if dweight_VD is not None:
            dweight_VD = dweight_VD.mul_(largest).to(_gradient_type(weight_VD))
        token_loss_T *= used_T
        ctx.save_for_backward(weights_T, dhidden_TD, dweight_VD)
        ctx.mark_non_differentiable(token_loss_T)
        return (token_loss_T * weights_T).sum(), token_loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        grad_loss: Tensor = grad_outputs[0]
        weights_T, dhidden_TD, dweight_VD = ctx.saved_tensors
        if dhidden_TD is not None:
            dhidden_TD = (dhidden_TD * (weights_T * grad_loss)[:, None]).to(dhidden_TD.dtype)
        # A loss that is differentiated itself has the gradient 1: a copy of [V, D] less. (On an accelerator
        # the host would have to wait to know.)
        if dweight_VD is not None and (grad_loss.device.type != "cpu" or grad_loss.item() != 1):
            dweight_VD = dweight_VD * grad_loss
        return dhidden_TD, dweight_VD, None, None, None, None, None


def _gradient_type(weight_VD: Tensor) -> torch.dtype:
    """Return the type in which the weight's gradient is accumulated."""
    return (weight_VD.grad_dtype or weight_VD.dtype) if weight_VD.is_leaf else weight_VD.dtype


def _softmax_minus_onehot(
    logits_CV: Tensor, labels_C: Tensor, token_loss_C: Tensor, *, need_grad: bool
) -> None:
    """Write each row's cross-entropy to `token_loss`, and turn its logits into softmax - onehot, in place.

    Without `need_grad` only the cross-entropy is computed.
    Rows with an ignored label come out as if their label were 0; their weight is 0.
    """
    num_tokens, vocab = logits_CV.shape
    step = max(1, SOFTMAX_ELEMENTS // vocab)
    wide = token_loss_C.dtype
    wide_NV = torch.empty(min(step, num_tokens), vocab, dtype=wide, device=logits_CV.device)
    labels_C1 = labels_C.clamp(min=0)[:, None]
    for start in range(0, num_tokens, step):
        rows = slice(start, min(start + step, num_tokens))
        x_NV, labels_N1 = wide_NV[: rows.stop - rows.start].copy_(logits_CV[rows]), labels_C1[rows]
        label_logit_N1 = x_NV.gather(1, labels_N1)
        max_N1 = x_NV.amax(1, keepdim=True)
        sum_N1 = x_NV.sub_(max_N1).exp_().sum(1, keepdim=True)
        token_loss_C[rows] = (max_N1 - label_logit_N1 + sum_N1.log())[:, 0]
        if not need_grad:
            continue
        x_NV.mul_(sum_N1.reciprocal_())
        x_NV.scatter_add_(1, labels_N1, torch.full_like(label_logit_N1, -1.0))
        logits_CV[rows] = x_NV


def _split_softmax_minus_onehot(
    logits_CV: Tensor,
    labels_C: Tensor,
    token_loss_C: Tensor,
    vocabulary: VocabularySplit,
    *,
    need_grad: bool,
) -> None:
    """Do the same where logits[:, v] belongs to id vocabulary.first + v and other devices hold the rest."""
    wide = token_loss_C.dtype
    local_C = labels_C.clamp(min=0) - vocabulary.first
    here_C1 = ((local_C >= 0) & (local_C < logits_CV.shape[1]))[:, None]
    local_C1 = local_C.clamp(0, logits_CV.shape[1] - 1)[:, None]
    max_C = vocabulary.max(logits_CV.amax(1).to(wide))  # a maximum is exact in any type
    sums_2C = token_loss_C.new_empty(2, len(logits_CV))
    for rows, x_NV in _exponentials(logits_CV, max_C):
        torch.sum(x_NV, 1, out=sums_2C[0, rows])
    label_logit_C1 = logits_CV.gather(1, local_C1).to(wide) - max_C[:, None]
    sums_2C[1] = (label_logit_C1 * here_C1)[:, 0]
    sum_C, label_logit_C = vocabulary.sum(sums_2C)
    torch.sub(sum_C.log(), label_logit_C, out=token_loss_C)
    if not need_grad:
        return
    scale_C1 = sum_C.reciprocal()[:, None]
    for rows, x_NV in _exponentials(logits_CV, max_C):
        x_NV.mul_(scale_C1[rows]).scatter_add_(1, local_C1[rows], here_C1[rows].to(wide).neg_())
        logits_CV[rows] = x_NV


def _exponentials(logits_CV: Tensor, max_C: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield exp(logits - max) [N, V] by blocks of rows, each in the same scratch of the type of `max`."""
    num_tokens, vocab = logits_CV.shape
    step = max(1, SOFTMAX_ELEMENTS // vocab)
    wide_NV = max_C.new_empty(min(step, num_tokens), vocab)
    for start in range(0, num_tokens, step):
        rows = slice(start, min(start + step, num_tokens))
        x_NV = wide_NV[: rows.stop - rows.start].copy_(logits_CV[rows])
        yield rows, x_NV.sub_(max_C[rows, None]).exp_()


def _add_product(sum_VD: Tensor, logits_CV: Tensor, hidden_CD: Tensor) -> None:
    """Add logits^T hidden to `sum`, piece by piece, so that no second [V, D] tensor exists."""
    for start in range(0, len(sum_VD), ACCUMULATE_ROWS):
        part = slice(start, start + ACCUMULATE_ROWS)
        sum_VD[part] += logits_CV[:, part].T @ hidden_CD
