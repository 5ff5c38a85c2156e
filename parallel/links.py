"""What devices send each other, in bytes by link, and how long that takes. Imports no torch.

A device has two ways out: the fast link to the others of its node, and the slow one to other nodes. Counted
is what one device sends; with balanced routing all devices of a pipeline rank send as much.

    experts   a token's rows to its experts and back, for every microbatch and layer (parallel/travel.py)
    tp, cp    latents gathered and hidden states reduce-scattered, or tokens exchanged for heads
    pp        hidden states of every microbatch from stage to stage
    dp        once a step: FP32 gradients reduce-scattered, weights all-gathered
"""

from dataclasses import dataclass

from parallel.cluster import ClusterConfig
from parallel.config import Context, Dispatcher
from parallel.layout import Layout
from parallel.rates import Rates
from parallel.traffic import row_bytes_of
from parallel.travel import Rows, rows_sent
from parallel.work import Setting


@dataclass(frozen=True, kw_only=True, slots=True)
class Bytes:
    """Bytes that one device sends."""

    inter: float = 0.0
    """To other nodes."""
    intra: float = 0.0
    """To others of its node."""

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(inter=self.inter + other.inter, intra=self.intra + other.intra)

    def __mul__(self, times: float) -> "Bytes":
        return Bytes(inter=self.inter * times, intra=self.intra * times)

    def seconds(self, rates: Rates, *, overlap: float = 1.0) -> float:
        """Return the time to send them; `overlap` is the share of the shorter link's time that is hidden."""
        long, short = sorted((self.inter / rates.inter, self.intra / rates.intra), reverse=True)
        return long + (1 - overlap) * short


def exchange(setting: Setting, cluster: ClusterConfig) -> Bytes:
    """Return what the experts of one layer make a device send in a forward pass; in a backward pass as much.

    A row goes out in FP8 where blocks multiply in FP8, and comes back in the compute type (arXiv 2412.19437,
    section 3.3.3); gradients travel the same way round.
    """
    model, parallel = setting.model, setting.parallel
    if parallel.ep == 1:
        return Bytes()
    rows: Rows = rows_sent(
        model.moe, ep=parallel.ep, node_size=cluster.node_size, dispatcher=parallel.dispatcher
    )
    row = row_bytes_of(model, setting.precision)
    each = (row.dispatch + row.combine) * setting.own_tokens * setting.imbalance
    return Bytes(inter=rows.inter, intra=rows.intra) * each


def exchange_overlap(setting: Setting, cluster: ClusterConfig) -> float:
    """Return which share of the shorter link's time is hidden: all of it where one call uses both links."""
    return cluster.hop_overlap if setting.parallel.dispatcher is Dispatcher.two_hop else 1.0


def attention_collectives(setting: Setting, cluster: ClusterConfig) -> Bytes:
    """Return what attention of one layer makes a device send over tp and cp, forwards; backwards as much."""
    model, a, p = setting.model, setting.model.attention, setting.parallel
    own, width = setting.own_tokens, setting.width
    queries = a.q_lora_rank if a.q_lora_rank is not None else model.hidden_size
    memory = own * width * (a.kv_lora_rank + a.qk_rope_head_dim)
    within = ring(own * width * (queries + model.hidden_size), members=p.tp, stride=1, cluster=cluster)
    if p.context is Context.gather:
        return within + ring(memory, members=p.cp * p.tp, stride=1, cluster=cluster)
    return within + ring(memory, members=p.tp, stride=1, cluster=cluster) + _heads(setting, cluster)


def _heads(setting: Setting, cluster: ClusterConfig) -> Bytes:
    """Return what exchanging tokens for heads over cp sends: queries, keys and values, and outputs back."""
    a, p = setting.model.attention, setting.parallel
    of_head = 2 * (a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim)
    size = setting.shared_tokens * a.num_heads / p.tp * of_head * setting.width
    per_node = max(1, min(p.cp, cluster.node_size // p.tp))
    return Bytes(inter=size * (p.cp - per_node) / p.cp, intra=size * (per_node - 1) / p.cp)


def hidden_collectives(setting: Setting, cluster: ClusterConfig) -> Bytes:
    """Return what a dense network, or shared experts, make a device send: hidden states both ways."""
    shard = 2 * setting.own_tokens * setting.width * setting.model.hidden_size
    return ring(shard, members=setting.parallel.tp, stride=1, cluster=cluster)


def stage_border(setting: Setting, layout: Layout, cluster: ClusterConfig) -> Bytes:
    """Return what one microbatch takes from stage to stage, forwards; backwards as much."""
    size = setting.own_tokens * setting.width * setting.model.hidden_size
    return Bytes(inter=size) if layout.per_stage >= cluster.node_size else Bytes(intra=size)


def ring(shard: float, *, members: int, stride: int, cluster: ClusterConfig) -> Bytes:
    """Return what an all-gather of shards of so many bytes, or a reduce-scatter, makes a device send.

    Members are `stride` ranks apart. Each shard enters every other node once, over the links of all the
    members there, and is spread inside the node.
    """
    per_node = max(1, min(members, cluster.node_size // stride))
    return Bytes(inter=shard * (members - per_node) / per_node, intra=shard * (members - 1))
