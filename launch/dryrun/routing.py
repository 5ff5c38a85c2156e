"""What a dry run answers when the host asks how many rows go where.

Rows have no values in a dry run, so the counts are those of balanced routing: every expert is chosen as
often, which is what the router's biases bring about (arXiv 2408.15664), and in two hops a token reaches as
many nodes and processes as it does on average (parallel/traffic.py). With an imbalance of X this rank is the
most loaded one of its peers: X times the mean number of rows reaches it, and each of its experts.
"""

from torch import Tensor

from model.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.traffic import hops


class EvenRouting:
    """Stands in for the host's reading of counts; see `model.dispatch.counts_from`.

    Args:
        model: the model.
        parallel: the layout.
        tokens: of a microbatch, on one process between layers.
        places: this process's rank in each group of exchanges, by name.
        imbalance: rows that reach this process, in multiples of the mean; at least 1.

    Raises:
        ValueError: if an imbalance is larger than the number of rows allows.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        *,
        tokens: int,
        places: dict[str, int],
        imbalance: float = 1.0,
    ) -> None:
        moe = model.moe
        self._counts: list[int] = []
        limit = tokens  # of tokens that can go to one member
        for hop in hops(model, parallel, tokens=tokens):
            # between nodes the load of this process counts as one of those of its node
            own = imbalance if hop.group != "ep_inter" else 1 + (imbalance - 1) / parallel.node_size
            limit = limit * moe.top_k if hop.group == "ep" else limit
            sent = _uneven(round(hop.rows), hop.members, place=places[hop.group], imbalance=own, limit=limit)
            limit = round(own * hop.rows)  # tokens that arrived, and go on
            self._counts += [*sent, *_even(limit, hop.members)]
        chosen = tokens * moe.top_k
        if parallel.ep == 1:
            self._counts += _uneven(chosen, moe.num_experts, place=0, imbalance=imbalance, limit=tokens)
        else:
            self._counts += _even(round(imbalance * chosen), moe.num_experts // parallel.ep)

    def __call__(self, counts: Tensor) -> list[int]:
        """Return the counts that the dispatcher asks for, whose number is all that is looked at.

        ValueError where it is another number than this layout's dispatcher asks for.
        """
        if len(counts) != len(self._counts):
            raise ValueError(f"{len(counts)} counts were asked for, not {len(self._counts)}")
        return list(self._counts)


def _even(total: int, parts: int) -> list[int]:
    """Return `total` in parts that differ by at most one."""
    share, rest = divmod(total, parts)
    return [share + (i < rest) for i in range(parts)]


def _uneven(total: int, parts: int, *, place: int, imbalance: float, limit: int) -> list[int]:
    """Return `total` in parts of which one is `imbalance` times the mean and the others are even."""
    if imbalance == 1 or parts == 1:
        return _even(total, parts)
    most = round(imbalance * total / parts)
    if most > min(total, limit):
        raise ValueError(
            f"imbalance={imbalance:g} would send {most} rows to one of {parts}, but there are "
            f"{min(total, limit)}; use at most {min(total, limit) * parts / total:.3g}"
        )
    others = _even(total - most, parts - 1)
    return [*others[:place], most, *others[place:]]
