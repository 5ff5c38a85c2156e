import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.train.fake_run import LAYERS, NUM_EXPERTS, STAGES, FakeStage, write_fake_run
from tests.train.report_reader import Page, array, known
from train.errors import RunError
from train.report import main, write_report
from train.reporting.run_data import read_run
from train.reporting.timeline import Timeline


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_run(tmp_path_factory.mktemp("runs") / "smoke")


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Page:
    return Page(write_report(run_dir))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_fake_run(tmp_path / "small", [FakeStage("pretrain", 128, 32, 25)])


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_page_fetches_nothing_and_has_plotly_inside(page: Page):
    assert page.fetched == []
    assert "plotly.js v" in page.html
    assert not re.search(r"@import|url\(", page.html[: page.html.index("plotly.js v")])


def test_every_figure_has_its_place_and_its_title(page: Page):
    assert page.plots == list(range(len(page.figures)))
    assert len(page.titles) == len(page.figures)
    expected = {
        "Loss",
        "Learning rate",
        "Batch",
        "MTP weight",
        "Gradient norm",
        "Expert load by layer",
        "MFU",
    }
    expected |= {"Expert load over time", "MaxVio per layer", "Load entropy", "Spread of the router bias"}
    expected |= {"FP8 underflow", "FP8 at the largest code", "FP8 magnitudes"}
    expected |= {"Bias speed", "Balance loss", "Dead experts", "Throughput", "Compute rate", "Memory"}
    for stage in STAGES:
        expected |= {f"{stage.name}: loss by position", f"{stage.name}: needle in a haystack"}
    assert set(page.titles) == expected
    assert "not shown" not in page.text


def test_the_summary_has_the_figures_of_the_run(page: Page, run_dir: Path):
    for text in ("smoke", "16.5M", "tokens in 570 steps", "extend_32k", "(2 skipped)", "The run finished."):
        assert text in page.text
    result = json.loads((run_dir / "evaluations" / "extend_128k-after.json").read_text())
    assert f"{result['held_out']['loss']:.3f}" in page.text
    assert f"{result['held_out']['unigram'] - result['held_out']['loss']:.2f}" in page.text


def test_loss_curves_carry_every_step_and_break_between_stages(page: Page, run_dir: Path):
    records = lines_of(run_dir)
    figure = page.figure("Loss")
    curves = {trace["name"]: trace for trace in figure["data"]}
    losses = [record["loss"] for record in records if record["loss"] is not None]
    np.testing.assert_array_equal(known(curves["each step"]["y"]), losses)
    assert np.isnan(array(curves["loss"]["x"])).sum() == len(STAGES) - 1
    assert {"MTP depth 1", "held-out, before the stage", "held-out, after the stage"} <= curves.keys()
    held_out = [
        json.loads((run_dir / "evaluations" / f"{s.name}-after.json").read_text())["held_out"]["loss"]
        for s in STAGES
    ]
    assert sorted(known(curves["held-out, after the stage"]["y"])) == sorted(held_out)
    notes = [note["text"] for note in figure["layout"]["annotations"]]
    assert {"uniform 8.32", "unigram 6.71", "bigram 4.38", "pretrain", "extend_32k", "extend_128k"} <= set(
        notes
    )


def test_stage_boundaries_lie_at_their_tokens(page: Page, run_dir: Path):
    ends = {record["stage"]: record["tokens"] for record in lines_of(run_dir)}
    for title in ("Loss", "Gradient norm", "Throughput", "MaxVio per layer"):
        bands = [s for s in page.figure(title)["layout"]["shapes"] if s["type"] == "rect"]
        assert [band["x1"] for band in bands] == [ends[s.name] for s in STAGES]
        assert [band["x0"] for band in bands] == [0, *[ends[s.name] for s in STAGES[:-1]]]


def test_skipped_steps_are_marked(page: Page):
    marks = page.figure("Gradient norm")["data"][-1]
    assert array(marks["customdata"]).tolist() == [37, 260]
    assert len(known(marks["y"])) == 2


def test_the_load_map_has_a_frame_per_histogram(page: Page, run_dir: Path):
    loads = [record for record in lines_of(run_dir) if "load" in record]
    figure = page.figure("Expert load by layer")
    assert [frame["name"] for frame in figure["frames"]] == [f"{record['step']:,}" for record in loads]
    assert len(figure["layout"]["sliders"][0]["steps"]) == len(loads)
    for frame, record in zip(figure["frames"], loads, strict=True):
        counts = np.array(list(record["load"].values()), dtype=np.float64)
        map_ = frame["data"][0]
        np.testing.assert_array_equal(array(map_["customdata"]), counts)
        np.testing.assert_allclose(array(map_["z"]), counts / counts.mean(axis=1, keepdims=True), rtol=1e-6)
    assert figure["data"][0]["y"] == ["layer 1", "layer 2", "layer 3", "layer 4", "MTP 1"]


def test_a_large_model_does_not_make_a_large_page(tmp_path: Path):
    # 58 layers of 256 experts and 100 histograms are 1.5 million cells: the frames are thinned.
    from train.reporting.load import MAX_CELLS, load_panels

    run = read_run(write_fake_run(tmp_path / "run", [FakeStage("pretrain", 128, 4, 2)]))
    rng = np.random.default_rng(0)
    load = {f"layers.{i}": rng.integers(0, 100, 256).tolist() for i in range(58)}
    run.records[:] = [run.records[0] | {"step": step, "load": load} for step in range(1, 101)]
    first, second = load_panels(run)
    assert first.figure is not None
    assert 1 < len(first.figure.frames) * 58 * 256 <= MAX_CELLS
    assert first.figure.frames[-1].name == "100"
    assert "6 layers furthest from balance" in second.caption


def test_evaluations_are_drawn_as_they_were_measured(page: Page, run_dir: Path):
    for stage in STAGES[1:]:
        before, after = (
            json.loads((run_dir / "evaluations" / f"{stage.name}-{when}.json").read_text())
            for when in ("before", "after")
        )
        lines = page.figure(f"{stage.name}: loss by position")["data"]
        for line, result in zip(lines, (before, after), strict=True):
            assert known(line["y"]).tolist() == [part["loss"] for part in result["by_position"]]
        maps = page.figure(f"{stage.name}: needle in a haystack")["data"]
        for map_, result in zip(maps, (before, after), strict=True):
            np.testing.assert_array_equal(array(map_["z"]), np.array(result["needle"]["grid"]).T)


def test_max_vio_has_a_curve_per_layer(page: Page):
    names = [trace["name"] for trace in page.figure("MaxVio per layer")["data"]]
    assert names == ["layer 1", "layer 2", "layer 3", "layer 4", "MTP 1"]
    assert len(names) == len(LAYERS)


def test_dead_experts_are_counted_over_the_layers(page: Page, run_dir: Path):
    counts = [sum(record["dead_experts"].values()) for record in lines_of(run_dir)]
    np.testing.assert_array_equal(known(page.figure("Dead experts")["data"][0]["y"]), counts)
    assert 0 < max(counts) < NUM_EXPERTS


def test_names_are_text_and_not_html(small: Path):
    path = small / "config.yaml"
    name = "</script><script>alert(1)</script>"
    path.write_text(re.sub(r"^name: .*$", f"name: {json.dumps(name)}", path.read_text(), flags=re.M))
    page = Page(write_report(small))
    assert "<script>alert" not in page.html
    assert name in page.text


def test_the_command_prints_the_path_and_ends_with_2_on_a_bad_run(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["report", str(small)])
    main()
    assert capsys.readouterr().out.strip() == str(small / "report.html")
    monkeypatch.setattr(sys, "argv", ["report", str(small / "absent")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "config.yaml does not exist" in capsys.readouterr().err


def test_smoothing_stays_within_a_stage_and_knows_no_gaps(run_dir: Path):
    timeline = Timeline(read_run(run_dir))
    values = timeline.values(lambda record: [s.name for s in STAGES].index(record["stage"]))
    values[5:9] = np.nan
    smooth = timeline.smooth(values)
    for index, stage in enumerate(STAGES):
        inside = [record["stage"] == stage.name for record in timeline.records]
        np.testing.assert_allclose(smooth[inside], index, atol=1e-12)


@given(st.lists(st.floats(-1e6, 1e6), min_size=30, max_size=300), st.integers(2, 12))
def test_thinning_keeps_ends_and_extremes(values: list[float], limit: int):
    timeline = Timeline.__new__(Timeline)
    timeline.edges = [0, len(values) // 2, len(values)]
    kept = timeline.thin(np.array(values), limit=limit)
    assert len(kept) <= max(2 * limit + 4, 2 * limit)
    assert {0, len(values) // 2, len(values) - 1} <= set(kept.tolist())
    assert max(values) == max(values[i] for i in kept)
    assert min(values) == min(values[i] for i in kept)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_a_browser_draws_every_figure(page: Page, run_dir: Path, tmp_path: Path):
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        f"--user-data-dir={tmp_path}", "--virtual-time-budget=8000", "--dump-dom", f"file://{run_dir}/report.html",
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert len(re.findall(r'class="plot js-plotly-plot"', dom)) == len(page.figures)


def test_runs_beside_each_other(run_dir: Path, tmp_path: Path):
    """Curves and differences of the runs that were named, over the tokens both have seen."""
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("name: smoke", "name: other"))
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["loss"] = line["loss"] and 1.01 * line["loss"]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in (other / "evaluations").glob("*.json"):
        result = json.loads(path.read_text())
        result["held_out"]["loss"] *= 1.02
        path.write_text(json.dumps(result))
    page = Page(write_report(run_dir, beside=[other]))
    losses = {trace["name"]: trace for trace in page.figure("Losses beside each other")["data"]}
    assert losses.keys() == {"smoke", "other"}
    (difference,) = page.figure("Difference from smoke")["data"]
    np.testing.assert_allclose(known(difference["y"]), 1.0, rtol=1e-6)
    assert "the farthest is +2.000 % away" in page.text
    half = len(lines) // 2
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:half]))
    shutil.rmtree(other / "evaluations")
    page = Page(write_report(run_dir, beside=[other]))
    (difference,) = page.figure("Difference from smoke")["data"]
    compared = array(difference["x"])[np.isfinite(array(difference["y"]))]
    assert compared.max() == lines[half - 1]["tokens"]  # no comparison beyond what the other has seen
    assert "No other run has been evaluated after a stage yet" in page.text
    write_report(run_dir)
    with pytest.raises(RunError, match="told apart by name"):
        write_report(run_dir, beside=[run_dir])
