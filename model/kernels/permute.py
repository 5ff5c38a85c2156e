"""Moving token rows to experts and back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.kernels import reference


@dataclass(frozen=True)
class RowOrder:
    """The order of routed rows sorted by expert, stable in (token, choice). R = T * A.

    choice_R [R]: flat index t * A + a of the choice that row r is (gathers a [T, A] tensor into row order).
    token_R [R]: the token of row r. row_TA [T, A]: the row of choice a of token t (the inverse).
    """

    choice_R: Tensor
    token_R: Tensor
    row_TA: Tensor


def sort_by_expert(indices_TA: Tensor) -> RowOrder:
    """Return the row order that sorts the choices by expert index."""
    choice_R = indices_TA.flatten().argsort(stable=True)
    row_TA = torch.empty_like(choice_R)
    row_TA[choice_R] = torch.arange(choice_R.numel(), device=choice_R.device)
    return RowOrder(choice_R, choice_R // indices_TA.shape[1], row_TA.view(indices_TA.shape))


def permute(x_TD: Tensor, order: RowOrder) -> Tensor:
    """Return row token_R[r] of x as row r, shape [R, D]."""
    return reference.permute(x_TD, order.token_R)


def combine(rows_RD: Tensor, order: RowOrder) -> Tensor:
    """Return for each token the sum of its A rows, summed in FP32, shape [T, D], type of rows."""
    return reference.combine(rows_RD, order.row_TA)
