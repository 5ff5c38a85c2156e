"""Exports against transformers as the reader."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from model.config import Compute, ModelConfig, YarnConfig
from model.hf import Role, hf_tensors, is_mtp_tensor
from tests.train.hf.runs import ATTENTION, MOE, convert, load_theirs, random_state, read_all, tiny, write_run
from train.hf.encoding import Encoding, ExportType
from train.hf.folder import HfFolder
from train.hf.writer import plan_shards, write_shards
from train.load import load_model

DIRECT = replace(ATTENTION, q_lora_rank=None)
TWO_SHARED = replace(MOE, num_shared_experts=2, num_groups=1, top_k_groups=1, route_scale=1.0)
YARN = YarnConfig(factor=8.0, original_length=16)


def our_logits(run: Path, tokens_BS: Tensor) -> Tensor:
    model = load_model(run).model
    depths = 1 + model.config.num_mtp_layers
    length = tokens_BS.shape[1]
    # tokens beyond the end only feed the MTP depths
    padded = torch.nn.functional.pad(tokens_BS, (0, depths))
    tokens_BKS = torch.stack([padded[:, k : k + length] for k in range(depths)], dim=1)
    positions_BS = torch.arange(length).expand(tokens_BS.shape)
    with torch.no_grad():
        return model.head(model(tokens_BKS, positions_BS).hidden_KBSD[0])


CONFIGS = {
    "plain": (tiny(num_mtp_layers=0), None),
    "yarn": (tiny(num_mtp_layers=0), YARN),
    "direct queries, two shared experts": (
        tiny(num_mtp_layers=0, attention=DIRECT, moe=TWO_SHARED, num_dense_layers=0),
        YARN,
    ),
    "dense only": (tiny(num_mtp_layers=0, num_dense_layers=3), None),
    "mtp": (tiny(), YARN),
    "two depths": (tiny(num_mtp_layers=2), None),
}


@pytest.mark.parametrize(("config", "yarn"), CONFIGS.values(), ids=CONFIGS.keys())
def test_transformers_loads_an_export_and_gives_the_same_logits(
    config: ModelConfig, yarn: YarnConfig | None, tmp_path: Path
) -> None:
    write_run(tmp_path / "run", config, yarn=yarn)
    convert("to-hf", tmp_path / "run", tmp_path / "hf", "--dtype", "fp32")
    theirs, info = load_theirs(tmp_path / "hf")

    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not info["error_msgs"]
    # transformers reads MTP modules for generation only, and passes over them silently as layer 61 alone
    mtp = {tensor.name for tensor in hf_tensors(config) if is_mtp_tensor(tensor.name, config)}
    unexpected = {name for name in info["unexpected_keys"] if ".experts." not in name}
    assert unexpected == {name for name in mtp if ".experts." not in name}
    assert all(is_mtp_tensor(name, config) for name in info["unexpected_keys"])

    tokens_BS = torch.randint(0, config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens_BS).logits
    torch.testing.assert_close(our_logits(tmp_path / "run", tokens_BS), expected, rtol=1e-5, atol=1e-5)


def test_61_layers_generate_the_same_tokens_with_mtp(tmp_path: Path) -> None:
    config = tiny(
        num_layers=61, num_dense_layers=3, moe=replace(MOE, num_experts=4, num_groups=2, top_k_groups=1)
    )
    state = write_run(tmp_path / "run", config)
    convert("to-hf", tmp_path / "run", tmp_path / "hf", "--dtype", "fp32")
    theirs, info = load_theirs(tmp_path / "hf")
    assert not any(info.values())

    drafted = record_mtp_models()
    prompt = torch.tensor([[5, 17, 200, 31]])
    settings: dict[str, Any] = {
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    plain = theirs.generate(prompt, **settings)
    with drafted as models:
        speculative = theirs.generate(prompt, use_mtp=True, **settings)
    assert torch.equal(plain, speculative)
    assert plain.shape == (1, 16)
    # the module that drafted is ours
    layer = models[0].layers[0]
    assert torch.equal(layer.eh_proj.weight, state["mtp.0.eh_proj.weight"])
    assert torch.equal(layer.post_norm.weight, state["mtp.0.norm.weight"])
    assert torch.equal(layer.mtp_block.mlp.gate.e_score_correction_bias, state["mtp.0.block.ffn.gate.bias"])
    assert torch.equal(layer.mtp_block.mlp.experts.down_proj, state["mtp.0.block.ffn.experts.w2"])


class record_mtp_models:  # noqa: N801  # reads as a function
    """Collect the MTP models that transformers loads inside the block."""

    def __enter__(self) -> list[Any]:
        from transformers.modeling_layers import MtpModel

        self.cls, self.original, found = MtpModel, MtpModel.__dict__["from_pretrained"], []

        def recording(*args: Any, **kwargs: Any) -> Any:
            found.append(self.original.__get__(None, MtpModel)(*args, **kwargs))
            return found[-1]

        MtpModel.from_pretrained = recording
        return found

    def __exit__(self, *_: object) -> None:
        self.cls.from_pretrained = self.original


def test_bf16_export_keeps_router_biases_in_fp32(tmp_path: Path) -> None:
    config = tiny()
    state = write_run(tmp_path / "run", config, compute=Compute.bf16)
    convert("to-hf", tmp_path / "run", tmp_path / "hf")
    stored = read_all(tmp_path / "hf")
    for tensor in hf_tensors(config):
        source = state[tensor.source] if tensor.expert is None else state[tensor.source][tensor.expert]
        expected = source if tensor.role is Role.ROUTER_BIAS else source.bfloat16()
        assert stored[tensor.name].dtype == expected.dtype
        assert torch.equal(stored[tensor.name], expected), tensor.name
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"

    convert("from-hf", tmp_path / "hf", tmp_path / "back")
    assert load_model(tmp_path / "back").config.precision.compute is Compute.bf16
    convert("to-hf", tmp_path / "back", tmp_path / "again")
    again = read_all(tmp_path / "again")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())


def test_average_of_the_weights_can_be_exported(tmp_path: Path) -> None:
    state = write_run(tmp_path / "run", tiny())
    convert("to-hf", tmp_path / "run", tmp_path / "hf", "--weights", "ema")
    stored = read_all(tmp_path / "hf")
    assert torch.equal(
        stored["model.layers.2.mlp.experts.5.up_proj.weight"], 2 * state["layers.2.ffn.experts.w3"][5]
    )
    bias = stored["model.layers.2.mlp.gate.e_score_correction_bias"]
    assert torch.equal(bias, state["layers.2.ffn.gate.bias"])


def test_tokenizer_goes_along(tmp_path: Path) -> None:
    write_run(tmp_path / "run", tiny())
    convert("to-hf", tmp_path / "run", tmp_path / "hf")
    ours = load_model(tmp_path / "run").tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "that is to be, or not"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs.eos_token_id == ours.eos_id
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == ours.eos_id


@pytest.mark.parametrize("dtype", [ExportType.FP32, ExportType.FP8])
def test_shards_are_filled_one_at_a_time(dtype: ExportType, tmp_path: Path) -> None:
    """No source is read twice for neighbouring shards, and a file is never larger than asked."""
    config = tiny(num_mtp_layers=1)
    state = random_state(config)
    encoding = Encoding(type=dtype)
    shards = plan_shards(hf_tensors(config), encoding=encoding, shard_bytes=2500)
    reads: list[str] = []

    def read(names: Any) -> dict[str, Tensor]:
        reads.extend(names)
        return {name: state[name] for name in names}

    done: list[str] = []
    write_shards(
        tmp_path, shards, encoding=encoding, read_sources=read, written=lambda s: done.append(s.file)
    )
    assert done == [shard.file for shard in shards]
    assert all(shard.num_bytes <= 2500 or len(shard.tensors) == 1 for shard in shards)
    twice = {name for name in reads if reads.count(name) > 1}
    assert twice == {"embed.weight", "head.weight"}  # for their copies in the MTP module
    folder = HfFolder.open(tmp_path)
    folder.check(hf_tensors(config), ignored=lambda name: False)


def test_files_are_for_whom_the_umask_says(tmp_path: Path) -> None:
    write_run(tmp_path / "run", tiny())
    before = os.umask(0o027)
    try:
        convert("to-hf", tmp_path / "run", tmp_path / "hf")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "hf").iterdir()} == {0o640}
