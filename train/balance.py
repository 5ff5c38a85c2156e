"""Auxiliary-loss-free load balancing: the routers' biases after a step (arXiv 2408.15664; 2412.19437, 2.1.2).

Once per optimizer step every router's bias moves by `speed` towards its under-loaded experts. What counts
is the load of the whole global batch, an exact integer, summed over microbatches before any sign is taken:
the sign of a mean-free load is not a sum of microbatches' signs. A skipped step moves no bias.

Legend: L MoE layers in the model's order, MTP blocks included, E experts.
"""

from collections.abc import Mapping

from torch import Tensor

from model.router import Router, update_bias


def update_router_biases(routers: Mapping[str, Router], load_LE: Tensor, *, speed: float) -> None:
    """Update each router's bias in place from its row of the exact int64 loads.

    Args:
        routers: all routers of the model, in the order of `load_LE`.
        load_LE: tokens routed to each expert over the global batch.
        speed: gamma in this step; 0 leaves every bias as it is.

    Raises:
        ValueError: if there is not one row per router.
    """
    for router, load_E in zip(routers.values(), load_LE, strict=True):
        update_bias(router.bias, load_E, speed)
