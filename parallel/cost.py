"""Memory of a rank in closed form: weights and their FP8 codes, gradients, optimizer state. Imports no torch.

A rank holds the layers of its pipeline stages. Of each weight it holds what parallel/sharding.py says, and
its optimizer state is cut once more over the processes that sum the gradient (ZeRO, arXiv 1910.02054):

    weights                                          held here          optimizer state cut over
    wq or wq_b, wkv_b, wo; w1, w2, w3; embed, head   1 / tp             dp_shard * cp
    experts                                          1 / ep             edp / edp_replicate
    wq_a, wkv_a, eh_proj; norms and gate (FP32)      all                dp_shard * cp * tp
    embedding with a copy on the last pipeline rank  1 / tp             2 * dp_shard * cp

zero1 keeps gradients whole in FP32; its FP32 weights are their own masters. The deepspeed engine keeps a
master of every weight; stage 2 cuts gradients too, stage 3 also the weights, of which it keeps head, norms
and gates whole beside their shards, and one bucket for gradients on their way.

Where products are FP8, a step makes codes of every weight inside the blocks at its first use and keeps them
to its end (model/fp8.py): a byte a weight, and four bytes for each block of 128 x 128. The reference keeps
them once, the Triton kernels also transposed, as FP8 tensor cores read along rows alone; Transformer Engine
caches both for the same reason and as long, and what it may add is not counted. They are of what this rank
multiplies by, so of whole weights under stage 3 as well.

Left out: activations, buffers that live for one collective, and the padding of flat buffers (less than 64
elements a weight).
"""

from dataclasses import dataclass

from model.activations import FP8_TILE
from model.config import Compute, Gemm, ModelConfig
from model.cost import (
    FP32_BYTES,
    Parts,
    down_projections,
    element_bytes,
    layer_parameters,
    mtp_parameters,
)
from parallel.config import Engine, Offload, ParallelConfig
from parallel.layout import Layout
from parallel.placement import assign_layers, count_stages, rank_of_stage, stages_on_rank

DEEPSPEED_BUCKET_ELEMENTS = 1 << 26
"""Gradients that the deepspeed engine sums at a time."""
_CODED_COPIES = {Gemm.compute: 0, Gemm.fp8_reference: 1, Gemm.fp8_triton: 2, Gemm.fp8_te: 2}
"""How often the codes of a weight are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Bytes that one rank keeps all the time, on its device but for `offloaded`; codes not between steps."""

    parameters: int
    """Weights as the forward pass reads them, router biases included."""
    gradients: int
    optimizer: int
    """Moments, and masters that are not the weights themselves."""
    buffers: int = 0
    """What the engine keeps for its collectives."""
    codes: int = 0
    """Weights as FP8 products read them, from their first use in a step to its end."""
    offloaded: int = 0
    """Optimizer state in the host's memory."""

    @property
    def total(self) -> int:
        """Return the bytes on the device."""
        return self.parameters + self.gradients + self.optimizer + self.buffers + self.codes


def rank_memory(
    model: ModelConfig,
    parallel: ParallelConfig,
    layout: Layout,
    *,
    compute: Compute,
    moment_bytes: int,
    pp_rank: int,
    seq_len: int,
    gemm: Gemm = Gemm.compute,
) -> RankMemory:
    """Return what a rank keeps; all ranks of one pipeline rank keep as much.

    Args:
        model: the model.
        parallel: the layout as configured, without problems.
        layout: its degrees for the number of processes (`parallel.checks.layout_of`).
        compute: the type of matrices; norms and gates are FP32.
        moment_bytes: bytes of an element of each of AdamW's two moments.
        pp_rank: the pipeline rank.
        seq_len: tokens of a sequence, which decide how layers are placed.
        gemm: what multiplies inside the blocks.
    """
    rank = _rank(model, parallel, pp_rank=pp_rank, seq_len=seq_len)
    kinds = _held(model, rank, layout, width=element_bytes(compute))
    sharded_weights, sharded_gradients = parallel.zero_stage == 3, parallel.zero_stage >= 2
    state = 0
    for kind in kinds:
        is_master = parallel.engine is Engine.zero1 and kind.width == FP32_BYTES
        state += (2 * moment_bytes + (0 if is_master else FP32_BYTES)) * kind.shard
    on_host = parallel.offload is Offload.cpu
    return RankMemory(
        parameters=FP32_BYTES * model.moe.num_experts * rank.num_routers
        + sum(kind.width * (kind.shard if sharded_weights else kind.count) for kind in kinds)
        + (_kept_whole(rank.parts, layout, width=element_bytes(compute)) if sharded_weights else 0),
        gradients=FP32_BYTES * sum(kind.shard if sharded_gradients else kind.count for kind in kinds),
        optimizer=0 if on_host else state,
        buffers=FP32_BYTES * DEEPSPEED_BUCKET_ELEMENTS if sharded_weights else 0,
        codes=_CODED_COPIES[gemm] * _codes(model, rank, layout),
        offloaded=state if on_host else 0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rank:
    """What the stages of a pipeline rank hold."""

    parts: Parts
    num_blocks: int
    num_routers: int
    embedding_copies: int
    """Pipeline ranks that hold the embedding, if this is one of them."""


def _rank(model: ModelConfig, parallel: ParallelConfig, *, pp_rank: int, seq_len: int) -> _Rank:
    """Add up layers, embedding, head and MTP modules of a pipeline rank's stages."""
    num_stages = count_stages(parallel)
    where = (parallel.schedule, parallel.pp, parallel.chunks)
    placed = assign_layers(model, seq_len, num_stages, layers_per_stage=parallel.layers_per_stage)
    layers = [layer for stage in stages_on_rank(*where, pp_rank) for layer in placed[stage]]
    first, last = rank_of_stage(*where, 0), rank_of_stage(*where, num_stages - 1)
    embeds = {first, last} if model.num_mtp_layers else {first}
    table = model.vocab_size * model.hidden_size
    parts = Parts(embedding=table if pp_rank in embeds else 0)
    for layer in layers:
        parts += layer_parameters(model, layer)
    num_mtp = 0
    if pp_rank == last:
        parts += Parts(head=table, norms=model.hidden_size) + mtp_parameters(model)
        num_mtp = model.num_mtp_layers
    return _Rank(
        parts=parts,
        num_blocks=len(layers) + num_mtp,
        num_routers=sum(layer >= model.num_dense_layers for layer in layers) + num_mtp,
        embedding_copies=len(embeds),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """Weights that are cut alike: how many this rank holds, over how many its state is cut, bytes of each."""

    count: int
    shards: int
    width: int

    @property
    def shard(self) -> int:
        """Return the weights whose state this rank keeps."""
        return -(-self.count // self.shards)


def _kept_whole(parts: Parts, layout: Layout, *, width: int) -> int:
    """Return the bytes of the weights that stage 3 keeps whole: those used outside a module's own forward."""
    return width * (parts.head // layout.tp) + FP32_BYTES * (parts.norms + parts.gate)


def _codes(model: ModelConfig, rank: _Rank, layout: Layout) -> int:
    """Return the bytes of one set of codes of all weights that multiply inside blocks, scales included."""
    parts, down = rank.parts, rank.num_blocks * down_projections(model)
    split = parts.attention - down + parts.dense_ffn + parts.shared_experts
    weights = split // layout.tp + down + parts.routed_experts // layout.ep
    return weights + FP32_BYTES * weights // FP8_TILE**2


def _held(model: ModelConfig, rank: _Rank, layout: Layout, *, width: int) -> list[_Kind]:
    """Return this rank's weights by the rows of the module's table."""
    parts, tp, dp_cp = rank.parts, layout.tp, layout.dp_shard * layout.cp
    down = rank.num_blocks * down_projections(model)
    split = parts.attention - down + parts.dense_ffn + parts.shared_experts + parts.head
    edp_shard = layout.edp // layout.edp_replicate
    return [
        _Kind(count=split // tp, shards=dp_cp, width=width),
        _Kind(count=parts.embedding // tp, shards=rank.embedding_copies * dp_cp, width=width),
        _Kind(count=parts.routed_experts // layout.ep, shards=edp_shard, width=width),
        _Kind(count=down + parts.mtp_projection, shards=dp_cp * tp, width=width),
        _Kind(count=parts.norms + parts.gate, shards=dp_cp * tp, width=FP32_BYTES),
    ]
