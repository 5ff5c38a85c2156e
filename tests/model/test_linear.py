"""The seam through which another product replaces the plain one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.experts import Experts
from model.kernels.grouped_gemm import expert_ffn
from model.linear import Linear
from model.transformer import Transformer
from tests.model.oracle import randomize
from tests.model.small import small


def test_product_equals_matrix_multiplication() -> None:
    linear = Linear(5, 3, dtype=torch.float32)
    with torch.no_grad():
        linear.weight.normal_()
    x = torch.randn(2, 4, 5)
    torch.testing.assert_close(linear(x), x @ linear.weight.T)


def test_every_matrix_product_passes_through_the_seam() -> None:
    """With a product that returns zeros everywhere only the embedding is left, and its norm."""
    model = Transformer(small())
    randomize(model, seed=0)
    shapes: list[tuple[int, ...]] = []

    def gemm(x: Tensor, weight: Tensor) -> Tensor:
        shapes.append(tuple(weight.shape))
        return torch.zeros_like(F.linear(x, weight))

    def feed_forward(
        rows_RD: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, *rest: list[int] | Tensor
    ) -> Tensor:
        shapes.extend(tuple(weight.shape) for weight in (w1, w3, w2))
        return torch.zeros_like(rows_RD)

    for module in model.modules():
        if isinstance(module, Linear):
            module.gemm = gemm
        if isinstance(module, Experts):
            assert module.feed_forward is expert_ffn
            module.feed_forward = feed_forward
    tokens_BKS = torch.randint(64, (1, 1, 6), generator=torch.Generator().manual_seed(0))
    hidden_BSD = model(tokens_BKS, torch.arange(6)[None]).hidden_KBSD[0]
    model.head(hidden_BSD)
    torch.testing.assert_close(hidden_BSD, model.norm(model.embed(tokens_BKS[:, 0])))
    exempt = {"embed.weight"}  # a lookup; norms are vectors, and the gate stays FP32
    products = [
        tuple(p.shape)
        for name, p in model.named_parameters()
        if p.dim() > 1 and name not in exempt and ".gate." not in name
    ]
    assert sorted(shapes) == sorted(products)
