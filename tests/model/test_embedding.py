"""The embedding's gradient where a token occurs often."""

import pytest
import torch

from model.embedding import Embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_of_a_frequent_token_is_summed_in_fp32(dtype: torch.dtype) -> None:
    embedding = Embedding(5, 3, dtype=dtype)
    embedding.weight.grad_dtype = torch.float32
    embedding.weight.grad = torch.zeros(5, 3)
    with torch.no_grad():
        embedding.weight.copy_(torch.arange(15.0).view(5, 3))
    tokens = torch.tensor([[2] * 2001 + [4]])
    rows = embedding(tokens)
    assert rows.dtype == dtype
    assert torch.equal(rows[0, -1].float(), torch.tensor([12.0, 13.0, 14.0]))
    rows.backward(torch.ones_like(rows))
    assert embedding.weight.grad[:, 0].tolist() == [0, 0, 2001, 0, 1]


def test_gradient_takes_the_type_of_the_weight_when_nothing_else_is_asked() -> None:
    embedding = Embedding(5, 3, dtype=torch.bfloat16)
    embedding(torch.tensor([1, 1])).sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.dtype == torch.bfloat16
