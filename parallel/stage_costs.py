"""What the stages of a layout cost for one microbatch: times, and what travels. Imports no torch."""

from dataclasses import dataclass
from functools import cached_property

from model.config import Recompute
from model.cost import layer_parameters, mtp_parameters
from parallel.cluster import ClusterConfig
from parallel.layout import Layout
from parallel.links import (
    Bytes,
    attention_collectives,
    exchange,
    exchange_overlap,
    hidden_collectives,
    stage_border,
)
from parallel.placement import stages_on_rank
from parallel.work import PassTimes, Setting, dense_block, head, moe_block, mtp_joint


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """One microbatch in one block: times, exchanges included, and what a device sends in a forward pass."""

    dense: PassTimes
    moe: PassTimes
    mtp: PassTimes
    """An MTP module, without its use of the head."""
    head: PassTimes
    exchange: Bytes
    """With the experts of a layer."""
    collectives: Bytes
    """Over tp and cp."""

    @classmethod
    def of(cls, setting: Setting, cluster: ClusterConfig) -> "Blocks":
        """Return the costs of all kinds of blocks; under recompute=full, exchanges are repeated as well."""
        tokens = exchange(setting, cluster)
        attention, hidden = attention_collectives(setting, cluster), hidden_collectives(setting, cluster)
        exchanged = tokens.seconds(setting.rates, overlap=exchange_overlap(setting, cluster))
        waited = attention.seconds(setting.rates) + hidden.seconds(setting.rates)
        times = 2 if setting.parallel.recompute is Recompute.full else 1
        dense = PassTimes(collective_forward=waited, collective_backward=times * waited)
        moe = moe_block(setting) + dense
        moe += PassTimes(exchange_forward=exchanged, exchange_backward=times * exchanged)
        return cls(
            dense=dense_block(setting) + dense,
            moe=moe,
            mtp=moe + mtp_joint(setting),
            head=head(setting),
            exchange=tokens,
            collectives=attention + hidden,
        )

    def stage(self, *, dense: int, moe: int, mtp: int, heads: int) -> PassTimes:
        """Return the times of a stage with so many blocks, MTP modules and uses of the head."""
        total = PassTimes()
        for count, one in ((dense, self.dense), (moe, self.moe), (mtp, self.mtp), (heads, self.head)):
            if count:
                total += one * count
        return total


@dataclass(frozen=True)
class Stages:
    """The stages of one layout, whatever the number of microbatches. layers: of every stage."""

    setting: Setting
    cluster: ClusterConfig
    layout: Layout
    blocks: Blocks
    layers: list[range]

    @cached_property
    def times(self) -> list[PassTimes]:
        """Return the times of a microbatch in every stage."""
        known: dict[tuple[int, int, int, int], PassTimes] = {}
        result = []
        for stage in range(len(self.layers)):
            dense, moe, mtp, heads = counts = self._counts(stage)
            if counts not in known:
                known[counts] = self.blocks.stage(dense=dense, moe=moe, mtp=mtp, heads=heads)
            result.append(known[counts])
        return result

    @cached_property
    def border(self) -> Bytes:
        """Return what one microbatch takes from a stage to the next."""
        return stage_border(self.setting, self.layout, self.cluster)

    def on_rank(self, pp_rank: int) -> list[int]:
        """Return the stages of a pipeline rank."""
        p = self.setting.parallel
        return stages_on_rank(p.schedule, p.pp, p.chunks, pp_rank)

    def layers_of(self, pp_rank: int) -> list[int]:
        """Return the decoder layers of a pipeline rank."""
        return [layer for stage in self.on_rank(pp_rank) for layer in self.layers[stage]]

    def routed_blocks(self, pp_rank: int) -> int:
        """Return how many layers of a pipeline rank have experts, MTP modules included."""
        return sum(moe + mtp for _, moe, mtp, _ in map(self._counts, self.on_rank(pp_rank)))

    def num_blocks(self, pp_rank: int) -> int:
        """Return how many layers a pipeline rank has, MTP modules included."""
        return sum(dense + moe + mtp for dense, moe, mtp, _ in map(self._counts, self.on_rank(pp_rank)))

    def expert_elements(self, pp_rank: int) -> int:
        """Return the weights of routed experts that a device of a pipeline rank holds."""
        model = self.setting.model
        total = sum(layer_parameters(model, layer).routed_experts for layer in self.layers_of(pp_rank))
        if len(self.layers) - 1 in self.on_rank(pp_rank):
            total += mtp_parameters(model).routed_experts
        return total // self.layout.ep

    def layer_counts(self, stage: int) -> tuple[int, int]:
        """Return the dense layers of a stage, and those with experts, without MTP modules."""
        layers = self.layers[stage]
        dense = max(0, min(layers.stop, self.setting.model.num_dense_layers) - layers.start)
        return dense, len(layers) - dense

    def _counts(self, stage: int) -> tuple[int, int, int, int]:
        """Return the dense layers, layers with experts, MTP modules and uses of the head of a stage."""
        dense, moe = self.layer_counts(stage)
        model = self.setting.model
        mtp = model.num_mtp_layers if stage == len(self.layers) - 1 else 0
        heads = 1 + mtp if stage == len(self.layers) - 1 else 0
        return dense, moe, mtp, heads
