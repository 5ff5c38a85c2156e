"""`python -m train` as people run it: one message and a documented exit code, also after kill -9."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.train.tiny_job import ROOT, command, metrics, start, train
from train.errors import EXIT_BAD_INPUT, EXIT_STOPPED

SMALL_EVALUATION = [
    "evaluation.enabled=true",
    "evaluation.num_tokens=512",
    "evaluation.needle_trials=1",
    "evaluation.needle_depths=2",
    "evaluation.needle_lengths=1",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The job run once as a command, to its end: (its output, its run directory)."""
    root = tmp_path_factory.mktemp("main")
    process = start(command(root, *SMALL_EVALUATION))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, root / "tiny"


def test_a_run_leaves_everything_it_promises(whole):
    out, run_dir = whole
    assert (run_dir / "config.yaml").exists()
    assert "<html" in (run_dir / "report.html").read_text(encoding="utf-8")
    names = sorted(path.name for path in (run_dir / "evaluations").iterdir())
    assert names == [
        "extend_128k-after.json",
        "extend_128k-before.json",
        "extend_32k-after.json",
        "extend_32k-before.json",
        "pretrain_4k-after.json",
    ]
    result = json.loads((run_dir / "evaluations" / "extend_128k-after.json").read_text(encoding="utf-8"))
    assert result["seq_len"] == 128
    assert result["held_out"]["bigram"] < result["held_out"]["unigram"] < result["held_out"]["uniform"]
    assert "extend_128k" in out
    assert str(run_dir / "report.html") in out.replace("\n", "")


def test_the_same_command_again_says_that_nothing_remains(whole):
    _, run_dir = whole
    before = (run_dir / "metrics.jsonl").read_bytes()
    process = start(command(run_dir.parent, *SMALL_EVALUATION))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "nothing remains to train" in out
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_kill_9_at_any_step_repeats_what_was_lost_bit_for_bit(whole, tmp_path):
    _, finished = whole
    process = start(command(tmp_path))
    path = tmp_path / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= 10):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.communicate()
    killed_at = len(metrics_lines(path))
    train(tmp_path)
    assert 10 <= killed_at < len(metrics(finished))
    assert metrics(tmp_path / "tiny") == metrics(finished)


def test_a_signal_saves_and_exits_with_the_documented_code(tmp_path):
    process = start(command(tmp_path, "stages.pretrain_4k.num_tokens=600000"))
    path = tmp_path / "tiny" / "metrics.jsonl"
    while not (path.exists() and path.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, err
    assert "SIGUSR1" in err
    assert "the same command continues" in err
    last = metrics(tmp_path / "tiny")[-1]["step"]
    assert (tmp_path / "tiny" / "checkpoints" / f"pretrain_4k-{last:08d}").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.num_expert=8"], "num_expert"),
        (["model.num_layers=two"], "model.num_layers"),
        (["recipe=smokes"], "smokes"),
        (["model.moe.top_k=99", "optimizer.beta1=2", "model.num_dense_layers=9"], "3 problems"),
        (["data.sources.stdlib.path=/nowhere"], "/nowhere"),
        (["model.vocab_size=100"], "100"),
        (["device=tpu"], "device=tpu"),
    ],
)
def test_bad_input_gives_one_message_and_exit_code_2(tmp_path, more, message):
    process = start(command(tmp_path, *more))
    _, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_BAD_INPUT, err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "tiny").exists()


def test_damaged_shards_are_named(tmp_path):
    arguments = command(tmp_path)
    shard = tmp_path / "corpus" / "train" / "shard.bin"
    shard.write_bytes(shard.read_bytes()[:-10])
    process = start(arguments)
    _, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_BAD_INPUT
    assert "shard.bin" in err
    assert "Traceback" not in err


def test_an_unreadable_checkpoint_is_named_and_the_one_before_is_used(whole, tmp_path):
    _, finished = whole
    shutil.copytree(finished.parent, tmp_path / "root")
    newest = max((tmp_path / "root" / "tiny" / "checkpoints").iterdir(), key=lambda path: path.stem[-8:])
    (newest / "manifest.json").write_text("{", encoding="utf-8")
    process = start(command(tmp_path / "root"))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert newest.name in err
    assert metrics(tmp_path / "root" / "tiny") == metrics(finished)


def test_composition_can_be_looked_at_without_starting():
    arguments = [sys.executable, "-m", "train", "recipe=deepseek_v3", "--cfg", "job"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert "num_tokens: 14800000000000" in done.stdout


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("recipe=3", "Config group override must be a string"),
        ("recipe=large", "there is no recipe/large; use deepseek_v3"),
        ("parallel.schedule=gpip", "expected one of [gpipe, 1f1b"),
    ],
)
def test_what_hydra_refuses_is_one_line(override, words):
    arguments = [sys.executable, "-m", "train", override]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == EXIT_BAD_INPUT
    assert done.stderr.startswith("error: configuration: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def metrics_lines(path):
    return path.read_text(encoding="utf-8").splitlines()
