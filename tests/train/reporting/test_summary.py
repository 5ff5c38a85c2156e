import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.train.fake_run import STAGES, write_fake_run
from train.reporting.run_data import loss_beyond, needle_score, read_run, stage_summaries
from train.reporting.summary import closing_table


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_run(tmp_path_factory.mktemp("runs") / "smoke")


def text_of(run_dir: Path, *, width: int = 160) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(closing_table(run_dir))
    return out.getvalue()


def evaluation(run_dir: Path, stage: str, when: str) -> dict:
    return json.loads((run_dir / "evaluations" / f"{stage}-{when}.json").read_text())


def test_loss_beyond_is_the_mean_over_positions_not_over_bins():
    parts = [
        {"from": 0, "to": 4, "loss": 9.0},
        {"from": 4, "to": 8, "loss": 4.0},
        {"from": 8, "to": 20, "loss": 2.0},
    ]
    assert loss_beyond({"by_position": parts}, 4) == pytest.approx((4 * 4.0 + 12 * 2.0) / 16)
    assert loss_beyond({"by_position": parts}, 8) == 2.0
    assert loss_beyond({"by_position": parts}, 20) is None
    assert loss_beyond({}, 0) is None


def test_needle_score_is_the_mean_of_the_grid():
    assert needle_score({"needle": {"grid": [[0.0, 1.0], [0.5, 0.5]]}}) == 0.5
    assert needle_score({"needle": {"grid": []}}) is None
    assert needle_score({"needle": None}) is None


def test_every_stage_is_summed_up(run_dir: Path):
    summaries = stage_summaries(read_run(run_dir))
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(s.name, s.seq_len, s.steps) for s in summaries] == [(s.name, s.seq_len, s.steps) for s in STAGES]
    assert [s.previous_length for s in summaries] == [None, 128, 1024]
    assert [s.skipped for s in summaries] == [2, 0, 0]
    for summary, stage in zip(summaries, STAGES, strict=True):
        own = [record for record in records if record["stage"] == stage.name]
        assert summary.tokens == stage.seq_len * stage.batch_size * stage.steps
        assert summary.seconds == pytest.approx(sum(record["timing"]["seconds"] for record in own))
        assert summary.final_loss == pytest.approx(sum(record["loss"] for record in own[-20:]) / 20)
        for when, part in (("before", summary.before), ("after", summary.after)):
            assert part is not None
            assert part.held_out == evaluation(run_dir, stage.name, when)["held_out"]["loss"]
    assert summaries[0].before is not None
    assert summaries[0].before.beyond is None


def test_the_table_shows_before_and_after_and_the_baseline(run_dir: Path):
    text = text_of(run_dir)
    for stage in STAGES:
        row = next(line for line in text.splitlines() if stage.name in line)
        before, after = (
            evaluation(run_dir, stage.name, when)["held_out"]["loss"] for when in ("before", "after")
        )
        assert f"{before:.3f} → {after:.3f}" in row
    last = evaluation(run_dir, "extend_128k", "after")["held_out"]
    below = last["unigram"] - last["loss"]
    assert f"Held-out loss {last['loss']:.3f} ends {below:.2f} nats under the unigram baseline" in text
    assert f"({last['unigram']:.3f})" in text
    beyond = [loss_beyond(evaluation(run_dir, "extend_128k", when), 1024) for when in ("before", "after")]
    assert f"{beyond[0]:.3f} → {beyond[1]:.3f}" in text


def test_the_table_fits_an_ordinary_terminal(run_dir: Path):
    for width in (120, 80):
        text = text_of(run_dir, width=width)
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
        for when in ("before", "after"):
            assert f"{evaluation(run_dir, 'extend_32k', when)['held_out']['loss']:.3f}" in text


def test_a_run_without_evaluation_has_a_table_too(tmp_path: Path):
    run_dir = write_fake_run(tmp_path / "run", STAGES[:1])
    for path in (run_dir / "evaluations").iterdir():
        path.unlink()
    text = text_of(run_dir)
    assert "No held-out loss was measured." in text
    assert "pretrain" in text
    assert "None" not in text
