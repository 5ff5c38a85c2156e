"""Reports of runs that lack something, and of runs whose files are damaged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.train.fake_run import FakeStage, write_fake_run
from tests.train.report_reader import Page
from train.errors import RunError
from train.report import write_report


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_fake_run(tmp_path / "small", [FakeStage("pretrain", 128, 32, 25)])


def rewrite(run_dir: Path, change: Any) -> None:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        change(record)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("max_vio", {}, "Routers: not shown, the records have no MoE layer"),
        ("load", None, "Expert load: not shown, no step has carried a load histogram"),
        ("dead_experts", {}, "Dead experts: not shown, every expert"),
        ("mfu", None, "MFU: not shown, cluster.peak_tflops is not set"),
    ],
)
def test_what_was_not_measured_is_left_out_with_the_reason(small: Path, key: str, value: Any, words: str):
    rewrite(small, lambda record: (record["timing"] if key == "mfu" else record).update({key: value}))
    assert words in Page(write_report(small)).text.replace(" : ", ": ").replace("  ", " ")


def test_a_run_without_evaluations_or_steps_still_has_a_report(small: Path):
    shutil.rmtree(small / "evaluations")
    text = Page(write_report(small)).text
    assert "the run has no evaluation" in text
    (small / "metrics.jsonl").write_text("")
    text = Page(write_report(small)).text
    assert "metrics.jsonl has no step yet" in text
    assert "stands at 0% of its 102K tokens" in text


def test_a_run_that_never_had_a_finite_step_still_has_a_report(small: Path):
    rewrite(
        small, lambda r: r.update(loss=None, grad_norm=None, mtp_loss=[None], balance_loss=None, skipped=True)
    )
    assert "(25 skipped)" in Page(write_report(small)).text


def test_a_line_that_is_being_written_is_left_for_the_next_report(small: Path):
    with (small / "metrics.jsonl").open("a") as file:
        file.write('{"step":26,"sta')
    assert "tokens in 25 steps" in Page(write_report(small)).text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{\n", r"metrics\.jsonl:26: the line is not JSON"),
        ("7\n", r"metrics\.jsonl:26: the line is not a step record"),
        ('{"step": 26}\n', r"metrics\.jsonl:26: .* it lacks stage, tokens"),
    ],
)
def test_damaged_metrics_are_named(small: Path, line: str, words: str):
    with (small / "metrics.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(RunError, match=words):
        write_report(small)
    assert not (small / "report.html").exists()


def test_two_runs_in_one_file_are_refused(small: Path):
    text = (small / "metrics.jsonl").read_text()
    (small / "metrics.jsonl").write_text(text + text)
    with pytest.raises(RunError, match="step 1 follows step 25"):
        write_report(small)


def test_a_damaged_evaluation_is_named(small: Path):
    (small / "evaluations" / "pretrain-after.json").write_text("{")
    with pytest.raises(RunError, match=r"pretrain-after\.json is not an evaluation"):
        write_report(small)
