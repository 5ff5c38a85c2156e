"""The feed-forward of all routed experts over rows sorted by expert."""

from torch import Tensor

from model.kernels import reference


def expert_ffn(
    rows_RD: Tensor,
    w1_EID: Tensor,
    w3_EID: Tensor,
    w2_EDI: Tensor,
    counts: list[int],
    row_weights_R: Tensor,
) -> Tensor:
    """Return row_weights * (silu(x w1_e^T) * (x w3_e^T)) w2_e^T of each row x and its expert e, shape [R, D]."""
    return reference.expert_ffn(rows_RD, w1_EID, w3_EID, w2_EDI, counts, row_weights_R)
