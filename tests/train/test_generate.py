"""The generate command: its text, its statistics and its refusals."""

from pathlib import Path

import pytest

from data.tokenizer import Tokenizer, train_bpe
from model.generate import generate
from model.sampling import SamplingRule
from tests.train.tiny_run import make_run
from train.generate import main
from train.load import load_model
from train.text_stream import TextStream

PROMPT = "alpha beta gamma"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["plain words only"] * 3, vocab_size=290)


def run(run_dir: Path, *arguments: str) -> None:
    main([str(run_dir), "--device", "cpu", *arguments])


def test_text_is_the_prompt_and_its_greedy_continuation(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(run_dir, "--prompt", PROMPT, "--max-new-tokens", "20")
    printed = capsys.readouterr()
    loaded = load_model(run_dir)
    tokens = generate(
        loaded.model,
        [loaded.tokenizer.encode(PROMPT)],
        rule=SamplingRule(),
        max_new_tokens=20,
        stop_token=loaded.tokenizer.eos_id,
        seeds=[0],
    )[0]
    text = loaded.tokenizer.decode([token for token in tokens if token != loaded.tokenizer.eos_id])
    assert printed.out == PROMPT + text + "\n"
    assert f"{len(tokens)} tokens in " in printed.err


def test_mtp_writes_the_same_text_and_tells_its_acceptance_rate(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(run_dir, "--prompt", PROMPT, "--max-new-tokens", "30")
    plain = capsys.readouterr()
    run(run_dir, "--prompt", PROMPT, "--max-new-tokens", "30", "--mtp")
    drafted = capsys.readouterr()
    assert drafted.out == plain.out
    assert "acceptance rate" in drafted.err
    assert "acceptance rate" not in plain.err


def test_a_file_of_prompts_and_a_count(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("alpha beta\n\nmu nu xi alpha beta\n")
    options = ["--file", str(tmp_path / "prompts.txt"), "--max-new-tokens", "8", "--temperature", "1.0"]
    run(run_dir, *options, "--count", "2", "--seed", "5")
    first = capsys.readouterr().out
    heads = [line for line in first.splitlines() if line.startswith("---")]
    assert heads == [f"--- {i} of 4, seed {seed}" for i, seed in ((1, 5), (2, 6), (3, 5), (4, 6))]
    run(run_dir, *options, "--count", "2", "--seed", "5")
    assert capsys.readouterr().out == first
    run(run_dir, *options, "--count", "2", "--seed", "9")
    assert capsys.readouterr().out != first
    run(run_dir, *options, "--count", "2", "--mtp", "--top-p", "0.9")
    assert capsys.readouterr().out.count("alpha beta") >= 4


def test_an_empty_prompt_begins_a_document(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(run_dir, "--prompt", "", "--max-new-tokens", "3")
    assert "tokens in" in capsys.readouterr().err


def test_text_ends_at_the_length_of_the_stage(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(run_dir, "--prompt", PROMPT, "--max-new-tokens", "1000", "--temperature", "1")
    num_prompt = len(load_model(run_dir).tokenizer.encode(PROMPT))
    expected = (
        f"note: {256 - num_prompt} new tokens instead of 1000, as stage long trained on sequences of 256"
    )
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "alpha " * 300], "sequences of 256; give fewer, or a checkpoint of a longer stage"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature=-1.0 must be finite and not negative"),
        (["--prompt", "x", "--top-p", "0"], "--top-p=0.0 must lie in (0, 1]"),
        (["--prompt", "x", "--count", "0"], "--count=0 must be at least 1"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens=0 must be at least 1"),
        (["--prompt", "x", "--seed", "-1"], "--seed=-1 must lie in [0, 2**62); use 0"),
        (["--prompt", "x", "--seed", str(10**27)], f"--seed={10**27} must lie in [0, 2**62)"),
        (["--file", "/nowhere/prompts.txt"], "cannot be read"),
        (["--prompt", "x", "--file", "y"], "not allowed with argument"),
        ([], "one of the arguments --prompt --file is required"),
    ],
)
def test_mistakes_exit_with_two(
    run_dir: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(run_dir, *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_mtp_without_mtp_layers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run(tmp_path, num_mtp_layers=0)
    with pytest.raises(SystemExit) as stop:
        run(run_dir, "--prompt", "x", "--mtp")
    assert stop.value.code == 2
    assert "model.num_mtp_layers=0; leave --mtp out" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["plain words", "naïve 🙂🙃 words 漢字", "🙂"])
def test_streamed_pieces_are_whole_characters_and_add_up(tokenizer: Tokenizer, text: str) -> None:
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.finish() == ""


def test_a_torn_character_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("a🙂")
    assert "".join(stream.push(token) for token in ids[:-1]) == "a"
    assert "\ufffd" in stream.finish()
