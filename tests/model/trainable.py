"""A model as an engine leaves it, with gradients in place, and a loss that reaches all of its weights."""

import torch
from torch import Tensor

from model.config import Compute, ModelConfig, Recompute
from model.transformer import Transformer
from tests.model.oracle import randomize

S = 16


def trainable(config: ModelConfig, compute: Compute, recompute: Recompute = Recompute.none) -> Transformer:
    """Return a model whose gradients exist, in FP32, as those of the flat buffers do."""
    model = Transformer(config, recompute=recompute, compute=compute)
    randomize(model, seed=0)
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
        parameter.grad = torch.zeros(parameter.shape)
    return model


def loss_of(model: Transformer, microbatch: int) -> Tensor:
    generator = torch.Generator().manual_seed(microbatch)
    tokens_BKS = torch.randint(64, (2, 1 + len(model.mtp), S), generator=generator)
    output = model(tokens_BKS, torch.arange(S).expand(2, -1), balance_scale=0.5)
    weighted = [
        hidden_BSD.float() * torch.randn(hidden_BSD.shape, generator=generator)
        for hidden_BSD in output.hidden_KBSD
    ]
    return torch.stack(weighted).sum()
