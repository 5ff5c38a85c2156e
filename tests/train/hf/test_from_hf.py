"""Imports: a round trip gives the same bits, and broken files are refused in words."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import YarnConfig
from tests.train.hf.runs import ATTENTION, convert, load_theirs, refused, tiny, write_run
from train.hf.folder import INDEX_FILE, dequantize_blocks
from train.load import load_model

DIRECT = replace(ATTENTION, q_lora_rank=None)
YARN = YarnConfig(factor=8.0, original_length=16)


@pytest.mark.parametrize("shard_size", ["5GB", "3KB"])
def test_round_trip_is_bit_identical(shard_size: str, tmp_path: Path) -> None:
    config = tiny(num_mtp_layers=2)
    state = write_run(tmp_path / "run", config, yarn=YARN)
    convert("to-hf", tmp_path / "run", tmp_path / "hf", "--shard-size", shard_size)
    convert("from-hf", tmp_path / "hf", tmp_path / "back")
    loaded = load_model(tmp_path / "back")

    assert loaded.config.model == config
    assert loaded.config.stages[loaded.stage_name].yarn == YARN
    assert loaded.config.stages[loaded.stage_name].seq_len == 64
    assert loaded.saved.progress["step"] == 0
    found = loaded.model.state_dict()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name
    assert not (tmp_path / "back" / "scratch").exists()
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (
        tmp_path / "run" / "tokenizer.json"
    ).read_bytes()


def test_without_mtp_in_both_directions(tmp_path: Path) -> None:
    config = tiny()
    state = write_run(tmp_path / "run", config)
    convert("to-hf", tmp_path / "run", tmp_path / "plain", "--without-mtp")
    _, info = load_theirs(tmp_path / "plain")
    assert not any(info.values())
    convert("to-hf", tmp_path / "run", tmp_path / "full")
    convert("from-hf", tmp_path / "full", tmp_path / "back", "--without-mtp")
    loaded = load_model(tmp_path / "back")
    assert loaded.config.model == replace(config, num_mtp_layers=0)
    main_names = {name for name in state if not name.startswith("mtp.")}
    found = loaded.model.state_dict()
    assert found.keys() == main_names
    assert all(torch.equal(found[name], state[name]) for name in main_names)


def test_promised_but_absent_mtp_names_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", tiny())
    convert("to-hf", tmp_path / "run", tmp_path / "hf", "--without-mtp")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings | {"num_nextn_predict_layers": 1}))
    message = refused(capsys, "from-hf", tmp_path / "hf", tmp_path / "back")
    assert "num_nextn_predict_layers=1" in message
    assert "--without-mtp" in message
    convert("from-hf", tmp_path / "hf", tmp_path / "back", "--without-mtp")
    assert load_model(tmp_path / "back").config.model.num_mtp_layers == 0


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of an export of one file, and its index with them."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, file.name)}
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_every_wrong_tensor_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", tiny())
    convert("to-hf", tmp_path / "run", tmp_path / "hf")
    missing = [
        "model.layers.1.mlp.experts.3.down_proj.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
    ]
    extra = ["model.layers.1.mlp.experts.8.down_proj.weight", "model.rotary.inv_freq"]
    wrong = "model.layers.0.self_attn.q_b_proj.weight"
    integer = "model.norm.weight"

    def damage(tensors: dict[str, Tensor]) -> None:
        for name in missing:
            del tensors[name]
        for name in extra:
            tensors[name] = torch.zeros(3)
        tensors[wrong] = tensors[wrong].T.contiguous()
        tensors[integer] = tensors[integer].int()

    edit(tmp_path / "hf", damage)
    message = refused(capsys, "from-hf", tmp_path / "hf", tmp_path / "back")
    assert all(f"missing: {name}" in message for name in missing)
    assert all(f"unexpected: {name}" in message for name in extra)
    assert f"misshaped: {wrong}" in message
    assert f"type: {integer}" in message
    assert len(message.strip().splitlines()) == 1 + 6
    assert not (tmp_path / "back").exists()
    assert not (tmp_path / "back.partial").exists()


def test_index_and_shards_that_disagree_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", tiny())
    convert("to-hf", tmp_path / "run", tmp_path / "hf", "--shard-size", "20KB")
    first, second, third, *_ = sorted((tmp_path / "hf").glob("*.safetensors"))
    moved = load_file(first) | {"lm_head.weight": torch.zeros(320, 16)}
    save_file(moved, first, metadata={"format": "pt"})
    second.write_bytes(second.read_bytes()[:-8])
    with safe_open(third, framework="pt") as shard:
        lost = next(iter(shard.keys()))
    third.unlink()
    message = refused(capsys, "from-hf", tmp_path / "hf", tmp_path / "back")
    assert "twice: lm_head.weight" in message
    assert f"unreadable file: {second.name}" in message
    assert f"missing file: {third.name}" in message
    assert f"missing: {lost}" in message


def test_second_copies_may_be_absent_but_not_different(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", tiny())
    convert("to-hf", tmp_path / "run", tmp_path / "hf")
    copy = "model.layers.3.embed_tokens.weight"
    edit(tmp_path / "hf", lambda tensors: tensors[copy][4, 2].add_(1))
    assert copy in refused(capsys, "from-hf", tmp_path / "hf", tmp_path / "back")
    edit(tmp_path / "hf", lambda tensors: tensors.pop(copy))
    convert("from-hf", tmp_path / "hf", tmp_path / "back")


def test_fp8_blocks_are_multiplied_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Quantise some matrices by hand, one of them larger than a block with a ragged edge."""
    config = tiny(hidden_size=160, dense_intermediate_size=150, num_mtp_layers=0)
    write_run(tmp_path / "run", config)
    convert("to-hf", tmp_path / "run", tmp_path / "hf")
    expected: dict[str, Tensor] = {}

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in ("model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.experts.4.up_proj.weight"):
            rows, columns = tensors[name].shape
            scale = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
            tensors[name] = (tensors[name] * 100).to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scale
            expected[name] = torch.empty(rows, columns)
            for r in range(rows):
                for c in range(columns):
                    expected[name][r, c] = tensors[name][r, c].float() * scale[r // 128, c // 128]

    edit(tmp_path / "hf", quantize)
    convert("from-hf", tmp_path / "hf", tmp_path / "back")
    state = load_model(tmp_path / "back").model.state_dict()
    dense, expert = expected.values()
    assert torch.equal(state["layers.0.ffn.w1.weight"], dense)
    assert torch.equal(state["layers.1.ffn.experts.w3"][4], expert)

    scale = "model.layers.0.mlp.gate_proj.weight_scale_inv"
    edit(tmp_path / "hf", lambda tensors: tensors.pop(scale))
    assert f"missing: {scale}" in refused(capsys, "from-hf", tmp_path / "hf", tmp_path / "other")
    edit(tmp_path / "hf", lambda tensors: tensors.update({scale: torch.ones(3, 2)}))
    message = refused(capsys, "from-hf", tmp_path / "hf", tmp_path / "other")
    assert f"misshaped: {scale} is [3, 2], must be [2, 2]" in message


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method='gptq'"),
        ({"quant_method": "fp8"}, "weight_block_size=None"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "weight_block_size=[64, 64]"),
    ],
)
def test_other_quantisations_are_refused(
    quantization: dict[str, object], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", tiny())
    convert("to-hf", tmp_path / "run", tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    settings["quantization_config"] = quantization
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings))
    assert words in refused(capsys, "from-hf", tmp_path / "hf", tmp_path / "back")


def test_dequantisation_is_the_closed_form() -> None:
    weight = torch.ones(300, 200).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    found = dequantize_blocks(weight, scale)
    assert torch.equal(found.unique(), torch.arange(1.0, 7.0))
    assert found[127, 127] == 1
    assert found[127, 128] == 2
    assert found[128, 127] == 3
    assert found[299, 199] == 6
