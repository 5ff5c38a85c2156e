"""Conversion against transformers as the reader, against itself as a round trip, and on broken files."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.tokenizer import train_bpe
from model.config import AttentionConfig, Compute, ModelConfig, MoEConfig, PrecisionConfig, YarnConfig
from model.hf import Role, hf_tensors, is_mtp_tensor
from model.transformer import Transformer
from train.checkpoints.manager import CheckpointManager
from train.config import RunConfig, StageConfig
from train.convert import main, parse_size
from train.errors import RunError
from train.hf import writer as hf_writer
from train.hf.encoding import Encoding, ExportType
from train.hf.folder import INDEX_FILE, HfFolder, dequantize_blocks
from train.hf.progress import byte_progress
from train.hf.writer import plan_shards, write_shards
from train.load import load_model
from train.state import TrainState
from train.stored_config import config_text

ATTENTION = AttentionConfig(
    num_heads=2, q_lora_rank=10, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5
)
DIRECT = replace(ATTENTION, q_lora_rank=None)
MOE = MoEConfig(num_experts=8, top_k=2, intermediate_size=12, num_groups=4, top_k_groups=2)
TWO_SHARED = replace(MOE, num_shared_experts=2, num_groups=1, top_k_groups=1, route_scale=1.0)
YARN = YarnConfig(factor=8.0, original_length=16)


def tiny(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 16,
        "num_layers": 3,
        "num_dense_layers": 1,
        "dense_intermediate_size": 20,
        "attention": ATTENTION,
        "moe": MOE,
        "num_mtp_layers": 1,
    }
    return ModelConfig(**(sizes | changes))


def random_state(config: ModelConfig) -> dict[str, Tensor]:
    """Return FP32 weights in which no two tensors are alike, norms and router biases included."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    generator = torch.Generator().manual_seed(7)
    state = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    return {name: 1 + tensor if "norm" in name else tensor for name, tensor in state.items()}


def write_run(
    folder: Path,
    config: ModelConfig,
    *,
    yarn: YarnConfig | None = None,
    compute: Compute = Compute.fp32,
    precision: PrecisionConfig | None = None,
) -> dict[str, Tensor]:
    """Write a run as training leaves it, moments and average included; return its weights."""
    folder.mkdir(parents=True)
    tokenizer = folder / "tokenizer.json"
    train_bpe(["to be or not to be, that is the question"] * 20, vocab_size=300).save(tokenizer)
    run = RunConfig(
        recipe="tiny",
        name=folder.name,
        root=str(folder.parent),
        model=config,
        precision=precision or PrecisionConfig(compute=compute),
        stages={"pretrain": StageConfig(seq_len=64, num_tokens=1, yarn=yarn)},
    )
    run.data.tokenizer = str(tokenizer)
    text = config_text(run)
    (folder / "config.yaml").write_text(text)
    state = random_state(config)
    tensors = {f"model.{name}": tensor for name, tensor in state.items()}
    tensors |= {
        f"optim.{name}.exp_avg": torch.zeros_like(t) for name, t in state.items() if "bias" not in name
    }
    tensors |= {f"ema.{name}": 2 * tensor for name, tensor in state.items() if "bias" not in name}
    checkpoints = CheckpointManager(folder / "checkpoints", keep_last=1, asynchronous=False)
    progress = TrainState(stage="pretrain", step=3).to_dict()
    checkpoints.save("pretrain-00000003", tensors, progress, config_yaml=text, permanent=True)
    return state


def convert(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the message of a conversion that must end with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        convert(*arguments)
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    return message


def load_theirs(folder: Path) -> tuple[Any, dict[str, Any]]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return model.eval(), info


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


def read_all(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


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


def test_other_quantisations_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", tiny())
    convert("to-hf", tmp_path / "run", tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings))
    assert "quant_method='gptq'" in refused(capsys, "from-hf", tmp_path / "hf", tmp_path / "back")


def test_dequantisation_is_the_closed_form() -> None:
    weight = torch.ones(300, 200).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    found = dequantize_blocks(weight, scale)
    assert torch.equal(found.unique(), torch.arange(1.0, 7.0))
    assert found[127, 127] == 1
    assert found[127, 128] == 2
    assert found[128, 127] == 3
    assert found[299, 199] == 6


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", tiny())
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "precious.txt").write_text("x")
    assert "exists already" in refused(capsys, "to-hf", tmp_path / "run", tmp_path / "hf")
    assert [file.name for file in (tmp_path / "hf").iterdir()] == ["precious.txt"]


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", tiny())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_writer, "save_file", full)
    message = refused(capsys, "to-hf", tmp_path / "run", tmp_path / "hf")
    assert "No space left on device" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(("name", "words"), [("nowhere", "does not exist"), ("empty", "no manifest.json")])
def test_sources_that_are_no_run(
    name: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert words in refused(capsys, "to-hf", tmp_path / name, tmp_path / "hf")
    assert "config.json" in refused(capsys, "from-hf", tmp_path / name, tmp_path / "hf")


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


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("2GiB", 2 << 30), ("1.5 kb", 1500), ("4096", 4096)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "5 parsecs"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RunError, match="--shard-size"):
        parse_size(text)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_or_lines(terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(force_terminal=terminal, width=100)
    with byte_progress(console, verb="writing", total_bytes=3000) as advance:
        advance("a.safetensors", 1000)
        advance("a.safetensors", 1000)
        advance("b.safetensors", 1000)
    shown = capsys.readouterr().out
    if terminal:
        assert "\x1b" in shown
        assert "3.0/3.0 kB" in shown
    else:
        assert shown.splitlines() == [
            "writing a.safetensors · 1KB of 3KB",
            "writing b.safetensors · 3KB of 3KB",
        ]
