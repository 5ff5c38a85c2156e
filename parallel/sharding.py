"""One table: how each parameter is split, and over which processes its gradient is summed.

It drives everything that depends on the layout: the shapes a process builds, the piece of the initial weights
it keeps, the bucket its gradients are reduced in, and the box of the global tensor that a checkpoint stores.

    split rows     output channels over tp: wq, wq_b, wkv_b, w1, w3, embedding, head; gradient over dp and cp
    split columns  input channels over tp: wo, w2; gradient over dp and cp
    experts        whole experts over ep; gradient over the processes with the same experts
    whole          on every tp rank, applied to its own tokens only; gradient over dp, cp and tp

Where the first and the last pipeline rank hold a copy of the embedding, its gradient is summed over both.
"""

from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

import torch
from torch import nn

from model.config import Compute, ModelConfig, Recompute, YarnConfig
from model.init import Share, initialize
from model.transformer import Part, Transformer
from parallel.mesh import Mesh, Reduction


class Split(Enum):
    """How a parameter is split."""

    rows = "rows"
    columns = "columns"
    experts = "experts"
    whole = "whole"


RULES: tuple[tuple[str, Split], ...] = (
    ("embed.weight", Split.rows),
    ("head.weight", Split.rows),
    ("*.attn.wq.weight", Split.rows),
    ("*.attn.wq_b.weight", Split.rows),
    ("*.attn.wkv_b.weight", Split.rows),
    ("*.attn.wo.weight", Split.columns),
    ("*.ffn.experts.w[123]", Split.experts),
    ("*.ffn*.w[13].weight", Split.rows),
    ("*.ffn*.w2.weight", Split.columns),
    ("*", Split.whole),
)


def split_of(name: str) -> Split:
    """Return how the parameter `name` is split: the first rule of the table that matches."""
    return next(split for pattern, split in RULES if fnmatchcase(name, pattern))


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """The table of one mesh. `two_embeddings`: first and last pipeline rank hold a copy of the embedding."""

    mesh: Mesh
    two_embeddings: bool = False

    def share(self, name: str) -> Share:
        """Return the piece of a parameter that this process holds."""
        tp, ep = self.mesh.tp, self.mesh.ep
        match split_of(name):
            case Split.rows:
                return Share(0, tp.rank, tp.size)
            case Split.columns:
                return Share(1, tp.rank, tp.size)
            case Split.experts:
                return Share(0, ep.rank, ep.size)
            case Split.whole:
                return Share()

    def reduction(self, name: str) -> Reduction:
        """Return over which processes the gradient of a parameter is summed."""
        if name == "embed.weight" and self.two_embeddings and self.mesh.ends:
            return self.mesh.ends
        match split_of(name):
            case Split.rows | Split.columns:
                return self.mesh.dense
            case Split.experts:
                return self.mesh.expert
            case Split.whole:
                return self.mesh.replicated


def build_part(
    config: ModelConfig,
    part: Part,
    sharding: Sharding,
    *,
    device: torch.device,
    seed: int,
    yarn: YarnConfig | None = None,
    recompute: Recompute = Recompute.none,
    compute: Compute = Compute.fp32,
) -> Transformer:
    """Build this process's pieces of a part of the model, initialised; nothing larger is ever allocated.

    Initial values are those of the whole model's parameters, whatever the layout, because whole tensors are
    drawn, one at a time, on the CPU.
    """
    with torch.device("meta"):
        model = Transformer(config, part=part, yarn=yarn, recompute=recompute, compute=compute)
    for prefix, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            local = sharding.share(f"{prefix}.{leaf}").of(parameter)
            empty = torch.empty(local.shape, dtype=parameter.dtype, device=device)
            setattr(module, leaf, nn.Parameter(empty))
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, leaf, torch.zeros_like(buffer, device=device))
    model.set_yarn(yarn)
    initialize(model, seed=seed, share=sharding.share)
    return model
