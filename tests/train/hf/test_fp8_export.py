"""FP8 exports: the released layout, the codes that training multiplies with, what others read from them."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.utils.quantization_config import FineGrainedFP8Config

from model.config import Compute, Fp8Scales, ModelConfig, PrecisionConfig
from model.fp8 import Fp8Policy
from model.hf import HfTensor, Role, hf_tensors
from tests.train.hf.runs import ATTENTION, MOE, convert, read_all, refused, tiny, write_run
from train.hf.encoding import SCALE_SUFFIX, Encoding, ExportType
from train.hf.folder import INDEX_FILE, dequantize_blocks
from train.hf.to_hf import CheckpointWeights
from train.load import Weights, load_model

RAGGED = tiny(hidden_size=160, dense_intermediate_size=150)
"""Matrices of more than one block, with parts of blocks at the edges, and of less than one."""

WHOLE = tiny(
    hidden_size=256,
    dense_intermediate_size=384,
    moe=replace(MOE, num_experts=2, num_groups=1, top_k_groups=1, intermediate_size=128),
    attention=replace(
        ATTENTION,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=128,
        v_head_dim=64,
    ),
)
"""Matrices of whole blocks only, which is all that the dequantisation of transformers takes."""


def is_linear(name: str) -> bool:
    """Return whether the released files hold a weight in FP8: written down from their names."""
    return name.endswith("_proj.weight") or name.endswith("_proj_with_mqa.weight")


def in_fp8(name: str) -> bool:
    return is_linear(name) and not name.endswith("eh_proj.weight")


def by_hand(weight: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Return codes and scales of a matrix, block by block."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.ones(math.ceil(rows / 128), math.ceil(columns / 128))
    for p in range(scales.shape[0]):
        for q in range(scales.shape[1]):
            block = (slice(128 * p, 128 * p + 128), slice(128 * q, 128 * q + 128))
            if largest := weight[block].abs().max():
                scale = largest.float() / 448
                scales[p, q] = 2.0 ** math.ceil(math.log2(scale)) if power_of_two else scale
            codes[block] = (weight[block].float() / scales[p, q]).to(torch.float8_e4m3fn)
    return codes, scales


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def cut(state: dict[str, Tensor], tensor: HfTensor) -> Tensor:
    source = state[tensor.source]
    return source if tensor.expert is None else source[tensor.expert]


@pytest.mark.parametrize("config", [RAGGED, WHOLE], ids=["ragged", "whole"])
@pytest.mark.parametrize("scales", Fp8Scales)
def test_linear_maps_are_codes_of_the_bf16_weights_and_all_else_is_bf16(
    config: ModelConfig, scales: Fp8Scales, tmp_path: Path
) -> None:
    state = write_run(tmp_path / "run", config, compute=Compute.bf16)
    convert("to-hf", tmp_path / "run", tmp_path / "hf", "--dtype", "fp8", "--fp8-scales", scales)
    stored = read_all(tmp_path / "hf")
    for tensor in hf_tensors(config):
        weight, found = cut(state, tensor), stored.pop(tensor.name)
        if in_fp8(tensor.name):
            codes, factors = by_hand(weight.bfloat16(), power_of_two=scales is Fp8Scales.power_of_two)
            assert found.dtype == torch.float8_e4m3fn
            assert torch.equal(bits(found), bits(codes)), tensor.name
            assert torch.equal(stored.pop(tensor.name + SCALE_SUFFIX), factors), tensor.name
        else:
            expected = weight if tensor.role is Role.ROUTER_BIAS else weight.bfloat16()
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected), tensor.name
    assert stored == {}


@pytest.mark.parametrize("scales", Fp8Scales)
def test_codes_are_those_that_training_multiplies_with(scales: Fp8Scales, tmp_path: Path) -> None:
    """By default the scales are those of the run."""
    state = write_run(
        tmp_path / "run", RAGGED, precision=PrecisionConfig(compute=Compute.bf16, fp8_scales=scales)
    )
    convert("to-hf", tmp_path / "run", tmp_path / "hf", "--dtype", "fp8")
    stored = read_all(tmp_path / "hf")
    policy = Fp8Policy(PrecisionConfig(fp8_scales=scales))
    for name, source in (
        ("layers.0.mlp.up_proj", "layers.0.ffn.w3"),
        ("layers.0.self_attn.o_proj", "layers.0.attn.wo"),
    ):
        weight = state[f"{source}.weight"].bfloat16()
        x = torch.randn(3, weight.shape[1], dtype=torch.bfloat16)
        policy.linear(x, weight, scales=policy.linear_scales(source.split(".", 2)[2]))
        used = policy.weights.codes(weight, power_of_two=scales is Fp8Scales.power_of_two)
        assert torch.equal(bits(stored[f"model.{name}.weight"]), bits(used.codes))
        assert torch.equal(stored[f"model.{name}.weight_scale_inv"], used.scales)


def test_the_index_and_the_configuration_are_of_the_released_form(tmp_path: Path) -> None:
    write_run(tmp_path / "run", RAGGED)
    convert("to-hf", tmp_path / "run", tmp_path / "hf", "--dtype", "fp8", "--shard-size", "60KB")
    index = json.loads((tmp_path / "hf" / INDEX_FILE).read_text())
    stored = read_all(tmp_path / "hf")
    assert index["weight_map"].keys() == stored.keys()
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in stored.values())
    for name in filter(in_fp8, list(stored)):
        assert index["weight_map"][name] == index["weight_map"][name + SCALE_SUFFIX]

    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert values["torch_dtype"] == "bfloat16"
    assert values["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    theirs = FineGrainedFP8Config.from_dict(values["quantization_config"])
    assert (theirs.scale_fmt, theirs.weight_block_size) == ("float", [128, 128])


def test_deepseek_v3_takes_the_bytes_of_its_release() -> None:
    """The published files hold 688,586,727,753 bytes, of which a header takes some 130 for each tensor."""
    encoding = Encoding(type=ExportType.FP8)
    tensors = hf_tensors(ModelConfig())
    names = [name for tensor in tensors for name in encoding.names(tensor)]
    assert {t.name for t in tensors if len(encoding.names(t)) == 2} == {
        t.name for t in tensors if in_fp8(t.name)
    }
    headers = 688_586_727_753 - sum(encoding.num_bytes(tensor) for tensor in tensors)
    assert 125 < headers / len(names) < 135


@pytest.mark.parametrize("scales", Fp8Scales)
def test_what_comes_back_is_what_transformers_reads(scales: Fp8Scales, tmp_path: Path) -> None:
    write_run(tmp_path / "run", WHOLE, compute=Compute.bf16)
    convert("to-hf", tmp_path / "run", tmp_path / "hf", "--dtype", "fp8", "--fp8-scales", scales)
    convert("from-hf", tmp_path / "hf", tmp_path / "back")
    stored, loaded = read_all(tmp_path / "hf"), load_model(tmp_path / "back")
    in_bf16, linear = loaded.model.state_dict(), [t for t in hf_tensors(WHOLE) if in_fp8(t.name)]
    checkpoint = CheckpointWeights.open(loaded.saved.path, loaded.config, Weights.MODEL)
    in_fp32 = checkpoint.read(list(dict.fromkeys(tensor.source for tensor in linear)))
    reader: Any = Fp8Dequantize(None)
    for tensor in linear:
        pair = {"weight": stored[tensor.name], "weight_scale_inv": stored[tensor.name + SCALE_SUFFIX]}
        expected = reader.convert(pair)["weight"]
        assert torch.equal(cut(in_fp32, tensor), expected), tensor.name
        assert torch.equal(cut(in_bf16, tensor), expected.bfloat16()), tensor.name


@pytest.mark.parametrize("scales", Fp8Scales)
def test_a_second_export_has_the_same_values_and_with_fp32_scales_the_same_bits(
    scales: Fp8Scales, tmp_path: Path
) -> None:
    write_run(tmp_path / "run", RAGGED)
    fp8 = ("--dtype", "fp8", "--fp8-scales", scales)
    convert("to-hf", tmp_path / "run", tmp_path / "first", *fp8)
    convert("from-hf", tmp_path / "first", tmp_path / "back")
    assert load_model(tmp_path / "back").config.precision.compute is Compute.bf16
    convert("to-hf", tmp_path / "back", tmp_path / "second", *fp8)
    first, second = read_all(tmp_path / "first"), read_all(tmp_path / "second")
    assert first.keys() == second.keys()
    if scales is Fp8Scales.deepseek:
        assert all(torch.equal(bits(second[name]), bits(tensor)) for name, tensor in first.items())
    for name, tensor in first.items():
        scale = name + SCALE_SUFFIX
        if scale in first:
            values = dequantize_blocks(tensor, first[scale])
            assert torch.equal(dequantize_blocks(second[name], second[scale]), values), name
        elif not name.endswith(SCALE_SUFFIX):
            assert torch.equal(second[name], tensor), name


LINEAR = HfTensor(name="w", shape=(3, 130), source="w", role=Role.LINEAR)


@given(
    exponents=st.lists(st.integers(-80, 120), min_size=2, max_size=2),  # see the next test for less
    spread=st.integers(0, 30),
    scales=st.sampled_from(Fp8Scales),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_writing_again_is_exact_for_any_magnitudes(
    exponents: list[int], spread: int, scales: Fp8Scales, seed: int
) -> None:
    """Two blocks of a magnitude each, with elements down to 2^-30 of the largest, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(LINEAR.shape, generator=generator)
    weight *= torch.exp2(-torch.randint(0, spread + 1, LINEAR.shape, generator=generator).float())
    weight[:, 7::11] = 0
    weight[:, :128] *= 2.0 ** exponents[0]
    weight[:, 128:] *= 2.0 ** exponents[1]
    encoding = Encoding(type=ExportType.FP8, fp8_scales=scales)
    codes, factors = encoding.encode(LINEAR, weight).values()
    values = dequantize_blocks(codes, factors)
    again, new_factors = encoding.encode(LINEAR, values).values()
    assert torch.equal(dequantize_blocks(again, new_factors), values)
    if scales is Fp8Scales.deepseek:
        assert torch.equal(bits(again), bits(codes))
        assert torch.equal(new_factors, factors)


def test_a_block_too_small_for_any_code_gets_the_scale_of_zeros() -> None:
    encoding = Encoding(type=ExportType.FP8)
    codes, factors = encoding.encode(LINEAR, torch.full(LINEAR.shape, 2.0**-128)).values()
    again, new_factors = encoding.encode(LINEAR, dequantize_blocks(codes, factors)).values()
    assert not codes.float().any()
    assert not again.float().any()
    assert factors.tolist() == [[2.0**-117] * 2]
    assert new_factors.tolist() == [[1.0, 1.0]]


def test_a_power_of_two_may_be_halved() -> None:
    """The largest code of 230 is 224: half the scale serves for it, and the values are what they were."""
    encoding = Encoding(type=ExportType.FP8, fp8_scales=Fp8Scales.power_of_two)
    codes, factors = encoding.encode(LINEAR, torch.full(LINEAR.shape, 230.0)).values()
    again, new_factors = encoding.encode(LINEAR, dequantize_blocks(codes, factors)).values()
    assert set(codes.float().flatten().tolist()) == {224.0}
    assert set(again.float().flatten().tolist()) == {448.0}
    assert torch.equal(new_factors * 2, factors)


def test_scales_of_other_tools_move_by_rounding_and_leave_the_codes() -> None:
    """A scale of 24 significant bits is no BF16 number over 448."""
    codes = torch.randn(LINEAR.shape, generator=torch.Generator().manual_seed(3)).mul(100)
    codes = codes.clamp(-448, 448).to(torch.float8_e4m3fn)
    codes[0, 0] = codes[1, 129] = 448.0
    factors = torch.tensor([[0.0123456789, 3.3333333]])
    encoding = Encoding(type=ExportType.FP8)
    again, new_factors = encoding.encode(LINEAR, dequantize_blocks(codes, factors)).values()
    assert torch.equal(bits(again), bits(codes))
    assert not torch.equal(new_factors, factors)
    torch.testing.assert_close(new_factors, factors, rtol=2.0**-8, atol=0)


def test_scales_without_fp8_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", tiny())
    message = refused(capsys, "to-hf", tmp_path / "run", tmp_path / "hf", "--fp8-scales", "power_of_two")
    assert "--fp8-scales=power_of_two" in message
    assert "--dtype fp8" in message
    assert not (tmp_path / "hf").exists()
