"""Evaluation: every number against a plain computation, and the command line."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.init import initialize
from model.transformer import Transformer
from tests.model.small import small
from tests.train.tiny_run import make_run
from train.convert import main as convert
from train.evaluate import evaluate, main
from train.evaluation.continuation import CachedScorer
from train.evaluation.position_loss import position_edges, position_losses
from train.load import LoadedModel, load_model


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def loaded(run_dir: Path) -> LoadedModel:
    return load_model(run_dir)


def random_model(num_mtp_layers: int = 1) -> Transformer:
    model = Transformer(small(num_mtp_layers=num_mtp_layers, init_std=0.15))
    initialize(model, seed=0)
    return model.eval()


@torch.no_grad()
def plain_log_probabilities(model: Transformer, tokens_BS: Tensor) -> Tensor:
    tokens_BKS = tokens_BS[:, None].expand(-1, 1 + model.config.num_mtp_layers, -1)
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    return model.head(model(tokens_BKS, positions_BS).hidden_KBSD[0]).double().log_softmax(-1)


def test_position_losses_are_the_mean_cross_entropy_of_the_main_head() -> None:
    model = random_model()
    rows = torch.randint(64, (5, 33), generator=torch.Generator().manual_seed(0))
    log_p = plain_log_probabilities(model, rows[:, :-1])
    expected = F.nll_loss(log_p.transpose(1, 2), rows[:, 1:], reduction="none").mean(0)
    losses = position_losses(model, rows)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_the_cached_scorer_sums_log_probabilities(num_tokens: int) -> None:
    model = random_model()
    generator = torch.Generator().manual_seed(1)
    context = torch.randint(64, (21,), generator=generator)
    candidates = torch.randint(64, (3, num_tokens), generator=generator)
    scores = CachedScorer(model)(context, candidates)
    for candidate, score in zip(candidates, scores, strict=True):
        text = torch.cat((context, candidate))
        log_p = plain_log_probabilities(model, text[None, :-1])[0, 20:]
        expected = log_p.gather(-1, candidate[:, None]).sum()
        torch.testing.assert_close(score.double(), expected, rtol=0, atol=2e-5)


def test_bins_have_powers_of_two_and_former_lengths_as_edges() -> None:
    assert position_edges(4096, [128, 1024, 4096]) == [0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    assert position_edges(4096, [1000])[-5:] == [512, 1000, 1024, 2048, 4096]
    assert position_edges(128, [128]) == [0, 1, 2, 4, 8, 16, 32, 64, 128]
    for length in (100, 128, 129, 3000, 4096, 131_072):
        edges = position_edges(length, [length])
        assert len(edges) > 8
        assert edges[-1] == length


def test_the_evaluation_agrees_with_itself(loaded: LoadedModel) -> None:
    arguments = {"config": loaded.config, "stage_name": "long", "tokenizer": loaded.tokenizer}
    loaded.model.train()
    result = evaluate(loaded.model, **arguments, step=7, tokens=11, when="after")
    assert loaded.model.training
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
    assert {key: result[key] for key in ("stage", "step", "tokens", "seq_len", "when")} == {
        "stage": "long",
        "step": 7,
        "tokens": 11,
        "seq_len": 256,
        "when": "after",
    }
    held_out = result["held_out"]
    assert held_out["uniform"] == pytest.approx(math.log(320))
    assert held_out["bigram"] < held_out["unigram"] < held_out["uniform"] < held_out["loss"]
    assert held_out["num_tokens"] == 1024
    parts = result["by_position"]
    assert (parts[0]["from"], parts[-1]["to"]) == (0, 256)
    assert 48 in [part["from"] for part in parts]
    mean = sum(part["loss"] * (part["to"] - part["from"]) for part in parts) / 256
    assert mean == pytest.approx(held_out["loss"])
    assert result["needle"]["lengths"] == [128, 256]
    assert result["needle"]["depths"] == [0.0, 1.0]
    assert evaluate(loaded.model.eval(), **arguments, step=7, tokens=11, when="after") == result
    assert json.loads(json.dumps(result)) == result


def test_the_command_prints_tables_and_writes_the_result(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(run_dir), "--tokens", "512", "--json", str(tmp_path / "out.json"), "--device", "cpu"])
    printed = capsys.readouterr().out
    for words in ("held-out loss over 512 tokens", "unigram", "loss by position", "128 - 255", "needle"):
        assert words in printed
    stored = json.loads((run_dir / "evaluations" / "long-manual.json").read_text())
    assert stored == json.loads((tmp_path / "out.json").read_text())
    assert (stored["when"], stored["step"], stored["tokens"]) == ("manual", 7, 7360)


def test_a_model_without_a_corpus_is_measured_on_one_that_is_named(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an imported one is: with the text of the run that it came from, the same figures."""
    main([str(run_dir), "--tokens", "512", "--json", str(tmp_path / "own.json"), "--device", "cpu"])
    convert(["to-hf", str(run_dir), str(tmp_path / "hf")])
    convert(["from-hf", str(tmp_path / "hf"), str(tmp_path / "imported")])
    arguments = [str(tmp_path / "imported"), "--length", "256", "--tokens", "512", "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "use --corpus FOLDER" in capsys.readouterr().err
    corpus = load_model(run_dir).config.data.validation
    main([*arguments, "--corpus", str(corpus), "--json", str(tmp_path / "other.json")])
    own, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("own", "other"))
    assert other["held_out"]["loss"] == pytest.approx(own["held_out"]["loss"], rel=1e-5)
    # the baselines are counted in samples, which another seed draws in another order
    assert other["held_out"]["unigram"] == pytest.approx(own["held_out"]["unigram"], rel=0.01)


def test_another_stage_and_length(run_dir: Path) -> None:
    main([str(run_dir), "--stage", "short", "--length", "64", "--tokens", "256", "--device", "cpu"])
    stored = json.loads((run_dir / "evaluations" / "short-manual.json").read_text())
    assert stored["seq_len"] == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "none"], "--stage none is not a stage of this run; use one of short, long"),
        (["--length", "1"], "--length 1 must be at least 2"),
        (["--tokens", "0"], "--tokens 0 must be at least 1"),
        (["--length", "1000000"], "larger --validation-fraction"),
    ],
)
def test_mistakes_exit_with_two(
    run_dir: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(run_dir), "--device", "cpu", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_run_exits_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "none"), "--device", "cpu"])
    assert stop.value.code == 2
    assert "does not exist" in capsys.readouterr().err
