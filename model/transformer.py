"""The whole model, or a part of it: embedding, decoder layers, final norm, multi-token prediction, head.

`layers` and `mtp` are dictionaries keyed by global index, so that a part of the model keeps its names. The
parts of a model in order compute what the whole does: each takes the hidden states of the one before it.

Legend: B sequences in the microbatch, S length (s of it on this device, between layers), K = 1 + MTP depths,
D hidden, V vocabulary, E experts, L mixture-of-experts layers including those of MTP, F rotary frequencies.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.block import Block, BlockOutput
from model.config import Compute, ModelConfig, Recompute, YarnConfig
from model.embedding import Embedding
from model.feedforward import FeedForward
from model.linear import Linear
from model.moe import MoE
from model.mtp import MtpLayer
from model.norm import RMSNorm
from model.precision import torch_dtype
from model.rope import RotaryEmbedding
from model.router import Router


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a model: the embedding in the first one, some layers, norm, MTP and head in the last one.

    MTP embeds tokens as well, so the last part of a model with MTP has an embedding too, the same one.
    """

    first: bool
    layers: range
    last: bool


def whole(config: ModelConfig) -> Part:
    """Return the part that is the model."""
    return Part(first=True, layers=range(config.num_layers), last=True)


def moe_layer_names(config: ModelConfig) -> list[str]:
    """Return the module names of all mixture-of-experts blocks of a model, in the order of load_LE."""
    layers = [f"layers.{i}" for i in range(config.num_dense_layers, config.num_layers)]
    return layers + [f"mtp.{k}.block" for k in range(config.num_mtp_layers)]


@dataclass(frozen=True)
class ModelOutput:
    """hidden_KBSD: K tensors [B, s, D], main model first, each ready for the head.

    A part that is not the last gives one, the hidden states that the next part takes. load_LE: exact int64
    counts per layer, in the order of `Transformer.moe_layer_names`; balance_loss: FP32 scalar, detached, the
    sum over layers.
    """

    hidden_KBSD: list[Tensor]
    load_LE: Tensor
    balance_loss: Tensor


class Transformer(nn.Module):
    """A DeepSeek-V3-class decoder. Matrices have the compute type; norms, gate and bias are FP32.

    Matrices are uninitialised until `model.init.initialize` or a checkpoint fills them.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        part: Part | None = None,
        yarn: YarnConfig | None = None,
        recompute: Recompute = Recompute.none,
        compute: Compute = Compute.fp32,
    ) -> None:
        super().__init__()
        dtype = torch_dtype(compute)
        self.config = config
        self.part = part = part or whole(config)
        self.dtype = dtype
        if part.first or (part.last and config.num_mtp_layers):
            self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.rope = RotaryEmbedding(config.attention, yarn)

        def block(index: int) -> Block:
            if index < config.num_dense_layers:
                width = config.dense_intermediate_size
                ffn = FeedForward(config.hidden_size, width, dtype=dtype, recompute=recompute)
            else:
                ffn = MoE(config, dtype=dtype, recompute=recompute)
            return Block(config, ffn, dtype=dtype, yarn=yarn, recompute=recompute)

        self.layers = nn.ModuleDict({str(i): block(i) for i in part.layers})
        if part.last:
            self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
            self.head = Linear(config.hidden_size, config.vocab_size, dtype=dtype)
        # the blocks of MTP follow the last layer and are mixtures of experts also after dense layers only
        depths = range(config.num_mtp_layers if part.last else 0)
        self.mtp = nn.ModuleDict(
            {
                str(k): MtpLayer(config, block(config.num_layers + k), dtype=dtype, recompute=recompute)
                for k in depths
            }
        )

    def forward(
        self,
        tokens_BKS: Tensor,
        positions_BS: Tensor,
        hidden_BsD: Tensor | None = None,
        *,
        balance_scale: float = 0.0,
    ) -> ModelOutput:
        """Return the hidden states of the main model and of the MTP depths that tokens are given for.

        tokens_BKS[:, k, i] is token i + k of the sequence, int64; positions_BS int64, increasing in each row.
        K = 1 runs the main model alone; depths left out are missing in every part of the output. Raises
        ValueError for more depths than there are.
        hidden_BsD: what the part before this one returned; None for the first part.
        balance_scale: the gradient given to the balance losses where they arise; 0 leaves them out.
        """
        table_BS2F = self.rope(positions_BS)
        embeddings_KBSD = self.embeddings(tokens_BKS)
        outputs: list[BlockOutput] = []
        x_BSD = embeddings_KBSD.pop(0) if hidden_BsD is None else hidden_BsD
        for layer in self.layers.values():
            outputs.append(layer(x_BSD, table_BS2F, positions_BS, balance_scale=balance_scale))
            x_BSD = outputs[-1].x_BSD
        hidden_KBSD = [self.norm(x_BSD) if self.part.last else x_BSD]
        for embedding_BSD, layer in zip(embeddings_KBSD, self.mtp.values(), strict=False):
            outputs.append(
                layer(embedding_BSD, hidden_KBSD[-1], table_BS2F, positions_BS, balance_scale=balance_scale)
            )
            hidden_KBSD.append(outputs[-1].x_BSD)
        return self.collect(hidden_KBSD, outputs)

    def collect(self, hidden_KBSD: list[Tensor], outputs: list[BlockOutput]) -> ModelOutput:
        """Return the output of this part from its last hidden states and what each block gave, in order."""
        return ModelOutput(hidden_KBSD, self._stack_load(outputs), self._sum_balance(outputs))

    def embeddings(self, tokens_BKS: Tensor) -> list[Tensor]:
        """Return the embeddings that this part needs, [B, s, D] each.

        The first part needs those of the main model, the last one those of the MTP depths that tokens are
        given for. Raises ValueError for tokens of more depths than there are.
        """
        depths = tokens_BKS.shape[1] - 1
        if not 0 <= depths <= self.config.num_mtp_layers:
            raise ValueError(f"tokens for {depths} MTP depths, but num_mtp_layers={len(self.mtp)}")
        tokens_KBS = tokens_BKS.transpose(0, 1)
        needed_KBS = tokens_KBS[0 if self.part.first else 1 : None if self.part.last else 1]
        if not len(needed_KBS):
            return []
        # one lookup for all depths: its gradient, as large as the table, is then made once
        rows_NsD = self.embed(needed_KBS.flatten(0, 1))
        return list(rows_NsD.unflatten(0, (len(needed_KBS), -1)).unbind(0))

    def set_yarn(self, yarn: YarnConfig | None) -> None:
        """Switch to the rotation setting of another training stage."""
        self.rope.set_yarn(yarn)
        for _, block in self._blocks():
            block.attn.set_yarn(yarn)

    def moe_layer_names(self) -> list[str]:
        """Return the module names of the mixture-of-experts blocks, in the order of load_LE."""
        return [name for name, block in self._blocks() if isinstance(block.ffn, MoE)]

    def routers(self) -> dict[str, Router]:
        """Return the routers by the name of their block, in the order of load_LE."""
        return {name: block.ffn.gate for name, block in self._blocks() if isinstance(block.ffn, MoE)}

    def _blocks(self) -> Iterator[tuple[str, Block]]:
        return ((name, module) for name, module in self.named_modules() if isinstance(module, Block))

    def _stack_load(self, outputs: list[BlockOutput]) -> Tensor:
        loads = [output.load_E for output in outputs if output.load_E.numel()]
        if loads:
            return torch.stack(loads)
        device = self.rope.inv_freq.device
        return torch.zeros(0, self.config.moe.num_experts, dtype=torch.int64, device=device)

    def _sum_balance(self, outputs: list[BlockOutput]) -> Tensor:
        none = torch.zeros((), dtype=torch.float32, device=self.rope.inv_freq.device)
        return torch.stack([output.balance_loss for output in outputs]).sum() if outputs else none
