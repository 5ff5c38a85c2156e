"""Loading a model back: the right checkpoint, the right weights, or one clear error."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.tokenizer import train_bpe
from model.config import Compute, PrecisionConfig, YarnConfig
from model.transformer import Transformer
from parallel.mesh import single_process
from tests.model.small import small
from train.build import StageParts, build_stage
from train.checkpoints.manager import CheckpointManager
from train.config import OptimizerConfig, RunConfig, StageConfig
from train.errors import RunError
from train.load import Weights, find_checkpoint, load_model
from train.stored_config import config_text

VOCAB = 320


@dataclass(frozen=True)
class Saved:
    """A run on disk with the tensors of its two stage ends and of its last, unfinished step."""

    run: Path
    config: RunConfig
    tensors: dict[str, dict[str, Tensor]]


def snapshot(parts: StageParts, value: int) -> dict[str, Tensor]:
    """The tensors of a stage, each filled with other numbers."""
    generator = torch.Generator().manual_seed(value)
    return {
        name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        for name, tensor in parts.tensors().items()
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    run = tmp_path_factory.mktemp("runs") / "tiny"
    run.mkdir()
    train_bpe(["some text, some more text"], vocab_size=VOCAB).save(run / "tokenizer.json")
    config = RunConfig(
        name="tiny",
        model=small(vocab_size=VOCAB, num_mtp_layers=1),
        precision=PrecisionConfig(compute=Compute.bf16),
        optimizer=OptimizerConfig(ema_decay=0.9),
        stages={
            "short": StageConfig(seq_len=8, num_tokens=8),
            "long": StageConfig(seq_len=16, num_tokens=8, yarn=YarnConfig(factor=4, original_length=8)),
        },
    )
    config.data.tokenizer = str(run / "tokenizer.json")
    parts = build_stage(config, config.stages["short"], device=torch.device("cpu"), mesh=single_process())
    manager = CheckpointManager(run / "checkpoints", keep_last=2, asynchronous=False)
    tensors: dict[str, dict[str, Tensor]] = {}
    for step, (name, permanent) in enumerate(
        [
            ("short-00000001", True),
            ("long-00000002", False),
            ("long-00000003", True),
            ("long-00000004", False),
        ]
    ):
        tensors[name] = snapshot(parts, step)
        manager.save(
            name, tensors[name], {"step": step}, config_yaml=config_text(config), permanent=permanent
        )
    return Saved(run, config, tensors)


def assert_model_is(model: Transformer, tensors: dict[str, Tensor], *, of: str) -> None:
    """Every weight is that of the checkpoint, rounded once to the type of the model."""
    parameters = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        key = f"{of}.{name}" if name in parameters else f"model.{name}"
        assert torch.equal(tensor, tensors[key].to(tensor.dtype)), name


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("", "long-00000004"),
        ("@short", "short-00000001"),
        ("@long", "long-00000003"),
        ("/checkpoints/long-00000002", "long-00000002"),
    ],
)
def test_the_checkpoint_a_path_stands_for(saved: Saved, where: str, name: str) -> None:
    loaded = load_model(Path(f"{saved.run}{where}"))
    assert loaded.saved.name == name
    assert loaded.stage_name == name.split("-")[0]
    assert loaded.config == saved.config
    assert loaded.tokenizer.vocab_size <= VOCAB
    assert not loaded.model.training
    assert_model_is(loaded.model, saved.tensors[name], of="model")


@pytest.mark.parametrize("compute", [None, *Compute])
def test_the_compute_type(saved: Saved, compute: Compute | None) -> None:
    model = load_model(saved.run, compute=compute).model
    wanted = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[compute or Compute.bf16]
    assert model.head.weight.dtype == wanted
    assert {router.bias.dtype for router in model.routers().values()} == {torch.float32}
    assert_model_is(model, saved.tensors["long-00000004"], of="model")


def test_the_average_with_the_biases_of_the_last_step(saved: Saved) -> None:
    model = load_model(saved.run, weights=Weights.EMA).model
    assert_model_is(model, saved.tensors["long-00000004"], of="ema")


def test_the_stage_decides_the_rotation(saved: Saved) -> None:
    """Equal weights at equal positions give other outputs under YaRN, and the right ones."""
    tokens = torch.arange(16).reshape(1, 1, 16).repeat(1, 2, 1)
    positions = torch.arange(16).reshape(1, 16)
    model = load_model(Path(f"{saved.run}@long"), compute=Compute.fp32).model
    plain = load_model(Path(f"{saved.run}@long"), compute=Compute.fp32).model
    plain.set_yarn(None)
    expected = Transformer(saved.config.model, yarn=saved.config.stages["long"].yarn)
    expected.load_state_dict(model.state_dict())
    with torch.no_grad():
        ours, theirs, other = (
            m(tokens, positions).hidden_KBSD[0] for m in (model, expected.eval(), plain.eval())
        )
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, other, atol=1e-4)


def test_a_checkpoint_folder_stands_alone(saved: Saved, tmp_path: Path) -> None:
    moved = tmp_path / "long-00000003"
    (saved.run / "checkpoints" / "long-00000003").rename(moved)
    try:
        assert_model_is(load_model(moved).model, saved.tensors["long-00000003"], of="model")
    finally:
        moved.rename(saved.run / "checkpoints" / "long-00000003")


# ---- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("-absent", "does not exist; name a run directory"),
        ("@middle", "no checkpoint of the end of stage 'middle'; there is long-00000002, long-00000003"),
        ("-absent@short", "does not exist"),
        ("/..", "is no run directory"),
    ],
)
def test_a_path_that_is_nothing(saved: Saved, where: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        load_model(Path(f"{saved.run}{where}"))


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(RunError, match="has no checkpoint yet"):
        load_model(tmp_path)


@pytest.fixture
def alone(saved: Saved, tmp_path: Path) -> CheckpointManager:
    """A manager for checkpoints that differ from what a run writes."""
    return CheckpointManager(tmp_path / "checkpoints", keep_last=9, asynchronous=False)


def test_a_damaged_folder_is_not_replaced_by_another(
    saved: Saved, alone: CheckpointManager, tmp_path: Path
) -> None:
    tensors = saved.tensors["short-00000001"]
    for name in ("short-00000001", "short-00000002"):
        alone.save(name, tensors, {}, config_yaml=config_text(saved.config), permanent=True)
    folder = tmp_path / "checkpoints" / "short-00000002"
    (folder / "progress.json").write_text("[]")
    with pytest.raises(RunError, match=r"short-00000002 is damaged.*another one of its run"):
        load_model(folder)
    assert find_checkpoint(Path(f"{tmp_path}@short")).name == "short-00000001"


def test_tensors_that_are_not_the_models(saved: Saved, alone: CheckpointManager, tmp_path: Path) -> None:
    tensors = dict(saved.tensors["short-00000001"])
    tensors["model.head.weight"] = tensors["model.head.weight"][:-1]
    tensors["model.extra"] = torch.zeros(2)
    del tensors["model.norm.weight"]
    alone.save("short-1", tensors, {}, config_yaml=config_text(saved.config), permanent=True)
    with pytest.raises(RunError) as caught:
        load_model(tmp_path)
    for part in (
        f"model.head.weight has shape [{VOCAB - 1}, 32]",
        "model.extra, shape [2], is extra",
        "model.norm.weight, shape [32], is missing",
    ):
        assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 4


def test_no_average_was_kept(saved: Saved, alone: CheckpointManager, tmp_path: Path) -> None:
    tensors = {
        name: tensor
        for name, tensor in saved.tensors["short-00000001"].items()
        if not name.startswith("ema.")
    }
    alone.save("short-1", tensors, {}, config_yaml=config_text(saved.config), permanent=True)
    assert load_model(tmp_path).saved.name == "short-1"
    with pytest.raises(RunError, match="has no averaged weights"):
        load_model(tmp_path, weights=Weights.EMA)


def test_a_folder_that_is_not_named_after_a_stage(
    saved: Saved, alone: CheckpointManager, tmp_path: Path
) -> None:
    tensors = saved.tensors["short-00000001"]
    alone.save("other-1", tensors, {}, config_yaml=config_text(saved.config), permanent=True)
    with pytest.raises(RunError, match="not of a stage of its configuration, which has short, long"):
        load_model(tmp_path)


def test_a_tokenizer_larger_than_the_embedding(
    saved: Saved, alone: CheckpointManager, tmp_path: Path
) -> None:
    text = config_text(saved.config).replace(saved.config.data.tokenizer, "deepseek-v3")
    alone.save("short-1", saved.tensors["short-00000001"], {}, config_yaml=text, permanent=True)
    with pytest.raises(RunError, match=rf"deepseek-v3 has 1\d+ tokens.*only {VOCAB}"):
        load_model(tmp_path)
