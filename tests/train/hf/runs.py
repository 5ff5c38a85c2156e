"""Tiny runs with random weights, and conversions as their user starts them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from data.tokenizer import train_bpe
from model.config import AttentionConfig, Compute, ModelConfig, MoEConfig, PrecisionConfig, YarnConfig
from model.transformer import Transformer
from train.checkpoints.manager import CheckpointManager
from train.config import RunConfig, StageConfig
from train.convert import main
from train.state import TrainState
from train.stored_config import config_text

ATTENTION = AttentionConfig(
    num_heads=2, q_lora_rank=10, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5
)

MOE = MoEConfig(num_experts=8, top_k=2, intermediate_size=12, num_groups=4, top_k_groups=2)


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


def read_all(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
