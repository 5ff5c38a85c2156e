import io
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.train.fake_run import STAGES, fake_config, fake_evaluation
from train.config import WandbMode
from train.errors import RunError
from train.logs.console import ConsoleSink, duration, quantity
from train.logs.sinks import JsonlSink, Sinks, finite, open_sinks


def record(step: int, *, stage: str = "pretrain", **changes: object) -> dict:
    base = {
        "step": step, "stage": stage, "tokens": step * 4096, "stage_tokens": step * 4096, "seq_len": 128,
        "batch_size": 32, "loss": 5.0, "mtp_loss": [5.5], "balance_loss": 1e-4, "lr": 2.2e-4,
        "mtp_weight": 0.3, "bias_speed": 0.001, "grad_norm": 0.7, "skipped": False,
        "max_vio": {"layers.1": 0.1},
        "load_entropy": {"layers.1": 0.9}, "bias_range": {"layers.1": 0.0}, "dead_experts": {"layers.1": 0},
        "timing": {"seconds": 0.5, "tokens_per_second": 8192.0, "flops_per_second": 1e9, "mfu": None,
                   "memory_gib": 1.0},
    }  # fmt: skip
    return base | changes


def write(path: Path, steps: range, *, resume_step: int) -> None:
    sink = JsonlSink(path, resume_step=resume_step)
    for step in steps:
        sink.write(record(step))
    sink.close()


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path):
    path = tmp_path / "new" / "metrics.jsonl"
    sink = JsonlSink(path, resume_step=0)
    sink.write(record(1))
    assert steps_in(path) == [1]
    sink.close()


def test_resuming_drops_the_steps_that_will_be_written_again(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 31), resume_step=0)
    once = path.read_bytes()
    write(path, range(21, 31), resume_step=20)
    assert path.read_bytes() == once
    write(path, range(31, 32), resume_step=30)
    assert steps_in(path) == list(range(1, 32))


def test_a_new_run_in_the_directory_starts_an_empty_file(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 5), resume_step=0)
    write(path, range(1, 3), resume_step=0)
    assert steps_in(path) == [1, 2]


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 2000), resume_step=st.integers(0, 12))
def test_a_file_torn_anywhere_resumes_to_whole_lines(tmp_path_factory, cut: int, resume_step: int):
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    write(path, range(1, 11), resume_step=0)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    complete = path.read_bytes().count(b"\n")
    JsonlSink(path, resume_step=resume_step).close()
    assert steps_in(path) == list(range(1, min(complete, resume_step) + 1))


@pytest.mark.parametrize("line", [b"\0\0\0\n", b"{}\n", b'{"step":"7"}\n', b"[1]\n", b"\n"])
def test_a_damaged_line_is_named_and_nothing_is_lost(tmp_path: Path, line: bytes):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4), resume_step=0)
    damaged = path.read_bytes() + line
    path.write_bytes(damaged)
    with pytest.raises(RunError, match=r"metrics\.jsonl: the line at byte \d+ is not a step record"):
        JsonlSink(path, resume_step=3)
    assert path.read_bytes() == damaged


def test_json_is_strict(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, resume_step=0)
    sink.write(
        record(1, loss=math.nan, grad_norm=math.inf, mtp_loss=[-math.inf], max_vio={"layers.1": math.nan})
    )
    sink.close()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert (read["loss"], read["grad_norm"], read["mtp_loss"], read["max_vio"]) == (
        None, None, [None], {"layers.1": None},
    )  # fmt: skip


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_come_back_bit_for_bit(value: float):
    assert json.loads(json.dumps(finite({"x": [value]}), allow_nan=False))["x"] == [value]


def console_of(*, terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=160, _environ={}), out


def show(console: Console, *, every: int = 10) -> ConsoleSink:
    return ConsoleSink(console, every=every, total_tokens=100 * 4096, stages=fake_config().stages)


def test_plain_output_is_one_line_every_so_many_steps():
    console, out = console_of(terminal=False)
    sink = show(console)
    for step in range(1, 26):
        sink.write(record(step))
    sink.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "── stage pretrain · sequences of 128 tokens · 1.72M tokens ──"
    assert [line.split(" · ")[0] for line in lines[1:]] == [f"pretrain step {n}" for n in (10, 20, 25)]
    assert lines[1] == (
        "pretrain step 10 · 41K tokens (10%) · loss 5.000 · mtp 5.500 · lr 2.20e-04 · grad norm 0.70 · "
        "8.19K tok/s · ETA 45s"
    )
    assert "\x1b" not in out.getvalue()


def test_stage_changes_messages_skips_and_evaluations_are_lines_of_their_own():
    console, out = console_of(terminal=False)
    sink = show(console)
    sink.write(record(1))
    sink.write(record(2, skipped=True, loss=math.nan, grad_norm=math.inf))
    sink.message("saved checkpoint [pretrain-00000002]")
    sink.write(record(3, stage="extend_32k", seq_len=1024))
    sink.evaluation(fake_evaluation(STAGES[0], index=0, when="after", step=3, tokens=1))
    sink.close()
    text = out.getvalue()
    assert "step 2 skipped: its loss or gradient was not finite" in text
    assert "loss – " in text
    assert "  saved checkpoint [pretrain-00000002]\n" in text
    assert "── stage extend_32k · sequences of 1,024 tokens · 369K tokens · YaRN ×40 over 128 ──" in text
    assert "evaluated after pretrain: held-out loss" in text
    assert (
        text.index("step 2 skipped")
        < text.index("pretrain step 2 ·")
        < text.index("saved")
        < text.index("──", 80)
    )
    assert text.count("step 3 ·") == 1


def test_a_terminal_gets_a_bar_that_ends_on_the_last_step():
    console, out = console_of(terminal=True)
    sink = show(console)
    for step in range(1, 101):
        sink.write(record(step))
    sink.message("saved")
    sink.close()
    text = out.getvalue()
    assert "pretrain step 100" in text
    assert "100%" in text
    assert "━" in text
    assert "saved" in text


def test_an_evaluation_without_needle_or_held_out_is_still_a_line():
    console, out = console_of(terminal=False)
    show(console).evaluation({"stage": "pretrain", "when": "before", "needle": {"grid": []}})
    assert out.getvalue() == "  evaluated before pretrain: nothing to measure\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (950, "950"), (999.7, "1K"), (12345, "12.3K"), (999_600, "1M"), (4_194_304, "4.19M"),
        (14.8e12, "14.8T"), (2.5e16, "25,000T"),
    ],
)  # fmt: skip
def test_quantities(value: float, text: str):
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.6, "1m 00s"),
        (200, "3m 20s"),
        (18_420, "5h 07m"),
        (1_051_200, "12d 4h"),
        (math.inf, "?"),
    ],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


def test_sinks_write_everything_and_disabled_wandb_is_not_even_imported(tmp_path: Path):
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from tests.train.logs.test_sinks import record;"
        "from tests.train.fake_run import fake_config; from train.logs.sinks import open_sinks\n"
        f"with open_sinks(fake_config(), Path({str(tmp_path)!r}), resume_step=0, total_tokens=10) as sinks:"
        " sinks.write(record(1)); sinks.message('hello')\n"
        "assert 'wandb' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pretrain step 1" in done.stdout
    assert "hello" in done.stdout
    assert steps_in(tmp_path / "metrics.jsonl") == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_sink_that_cannot_be_closed_does_not_keep_the_others_open(tmp_path: Path):
    class Refuses(JsonlSink):
        def close(self) -> None:
            raise RunError("no")

    last = JsonlSink(tmp_path / "last.jsonl", resume_step=0)
    with pytest.raises(RunError, match="no"), Sinks([Refuses(tmp_path / "first.jsonl", resume_step=0), last]):
        pass
    with pytest.raises(ValueError, match="closed"):
        last.write(record(1))


def test_online_without_a_login_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    config = fake_config()
    config.logging.wandb = WandbMode.online
    with pytest.raises(RunError, match=r"logging\.wandb=offline"):
        open_sinks(config, tmp_path, resume_step=0, total_tokens=1)
