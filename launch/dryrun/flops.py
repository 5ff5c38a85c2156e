"""FLOPs of the operations that are done, by the shapes of matrix products: 2 per multiply-add.

What is done again for the backward pass counts again. Attention counts causal pairs of a query and a key, as
model/cost.py does: two products for each in the forward pass, four in the backward pass; the scores that the
backward kernel computes once more stay inside it and are not counted.
"""

from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry


class FlopCount:
    """An observer (launch/dryrun/fake.py) that adds up FLOPs in `total`."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, flops: int) -> None:
        """Add FLOPs of something that is no operation of torch's."""
        self.total += flops

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Add those of one operation."""
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        elif func._schema.name in _ATTENTION:
            self.total += _ATTENTION[func._schema.name] * _attention_products(*args[:3])


_ATTENTION = {"fathom::causal_attention": 1, "fathom::causal_attention_gradients": 2}
"""Multiples of the two products of the forward pass."""


def _attention_products(q_BSHK: Tensor, k_BMHK: Tensor, v_BMHU: Tensor) -> int:
    """Return the FLOPs of q k^T and of probabilities times v for the last S of M tokens."""
    batch, length, heads, width = q_BSHK.shape
    pairs = length * (k_BMHK.shape[1] - length) + length * length // 2
    return 2 * batch * heads * pairs * (width + v_BMHU.shape[3])
