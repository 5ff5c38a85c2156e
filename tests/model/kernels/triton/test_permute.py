"""Permuting and quantising in one kernel: interpreted, bit for bit both steps; compiled for both targets."""

import pytest
import torch

from model.kernels import fp8, reference
from model.kernels.permute import sort_by_expert
from model.kernels.triton.permute import permute_and_quantize
from tests.model.kernels.triton.ahead_of_time import TARGETS, Variant
from tests.model.kernels.triton.catalogue import permutations
from tests.model.kernels.triton.checks import check_compiled, check_same
from tests.model.kernels.triton.conftest import Interpret


def check(tokens: int, width: int, chosen: int, power_of_two: bool) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, width, generator=generator).bfloat16()
    order = sort_by_expert(torch.rand(tokens, 9, generator=generator).topk(chosen).indices)
    expected = fp8.quantize(reference.permute(x, order.token_R), fp8.ROW_TILE, power_of_two=power_of_two)
    check_same(permute_and_quantize(x, order.row_TA, power_of_two=power_of_two), expected)


@pytest.mark.parametrize("power_of_two", [True, False], ids=["powers of two", "FP32 scales"])
@pytest.mark.parametrize("sizes", [(130, 200, 3), (5, 128, 8), (1, 3, 1), (0, 128, 2)], ids=str)
def test_equals_both_steps(interpret: Interpret, sizes: tuple[int, int, int], power_of_two: bool):
    interpret(check, *sizes, power_of_two)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", permutations(), ids=lambda variant: variant.name)
def test_compiles(variant: Variant, target: str):
    check_compiled(variant, target)
