"""Make a part of the model parallel by what stands at its seams; its layers stay one-device maths.

tokens between layers   `split` of attention, feed-forward and gate      parallel/tensor.py
attention memory        `core` of attention                              parallel/context.py, ulysses.py
expert exchange         `dispatcher` of each mixture of experts          parallel/expert.py, two_hop.py
embedding rows          `lookup` of the embedding                        parallel/tensor.py
"""

from model.attention import AttentionCore, LocalAttention
from model.config import MoEConfig, Recompute
from model.dispatch import LocalDispatcher, TokenDispatcher
from model.embedding import Embedding
from model.feedforward import FeedForward
from model.mla import MultiHeadLatentAttention
from model.moe import MoE
from model.router import Router
from model.transformer import Transformer
from parallel.config import Context, Dispatcher, ParallelConfig
from parallel.context import GatheredAttention
from parallel.expert import AllToAllDispatcher
from parallel.mesh import Mesh
from parallel.tensor import TensorSplit, VocabularyLookup, VocabularyRows
from parallel.two_hop import TwoHopDispatcher
from parallel.ulysses import UlyssesAttention


def parallelize(
    model: Transformer, mesh: Mesh, config: ParallelConfig, *, fp8_dispatch: bool = False
) -> None:
    """Install what `config` asks for at the seams of a model whose parameters are this process's pieces.

    fp8_dispatch: what experts quantise anyway travels to them as FP8 codes (parallel/wire.py).
    """
    split = TensorSplit(mesh.tp, mesh.sequence)
    for module in model.modules():
        match module:
            case MultiHeadLatentAttention():
                module.split, module.core = split, attention_core(mesh, config.context)
            case FeedForward() | Router():
                module.split = split
            case MoE():
                module.dispatcher = dispatcher(mesh, model.config.moe, config, fp8=fp8_dispatch)
            case Embedding() if mesh.tp.size > 1:
                rows = VocabularyRows(mesh.tp, model.config.vocab_size)
                module.lookup = VocabularyLookup(rows, split)


def attention_core(mesh: Mesh, context: Context) -> AttentionCore:
    """Return the attention core for sequences spread over cp and tp."""
    if mesh.sequence.size == 1:
        return LocalAttention()
    if context is Context.ulysses and mesh.cp.size > 1:
        return UlyssesAttention(mesh.tp, mesh.cp)
    return GatheredAttention(mesh.sequence, cp=mesh.cp.size, cp_rank=mesh.cp.rank)


def dispatcher(mesh: Mesh, moe: MoEConfig, config: ParallelConfig, *, fp8: bool = False) -> TokenDispatcher:
    """Return what brings tokens to experts that are spread over ep; fp8: as codes, where they travel."""
    recompute: Recompute = config.recompute
    if mesh.ep.size == 1:
        return LocalDispatcher(recompute)
    if config.dispatcher is Dispatcher.two_hop and mesh.ep_inter.size > 1:
        return TwoHopDispatcher(mesh.ep_inter, mesh.ep_intra, moe.num_experts, recompute, fp8=fp8)
    return AllToAllDispatcher(mesh.ep, moe.num_experts, recompute, fp8=fp8)
