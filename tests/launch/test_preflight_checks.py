"""The judgements of preflight: facts of ranks in, problems with the right ranks and remedies out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.preflight.clocks import judge_clocks
from launch.preflight.command import main
from launch.preflight.device import Accelerator, judge_devices, read_ailments, usable_device
from launch.preflight.folder import View, checkpoint_bytes, judge_folder, needed_bytes
from launch.preflight.groups import judge_groups
from launch.preflight.product import Product, judge_products, wrong_elements
from launch.preflight.site import Outcome, Roster, deviants, spans
from parallel.preflight.clocks import Offset
from parallel.preflight.exercise import Exercise
from tests.train.tiny_job import train
from train.config_store import compose_run
from train.stored_config import read_config

ROSTER = Roster(["n0", "n0", "n1", "n1", "n2", "n2"])
GPU = Accelerator(kind="H800", uuid="GPU-0", free=79, total=80)


def test_ranks_are_named_by_host() -> None:
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ROSTER.name([0, 1, 3]) == "ranks 0-1 (n0), rank 3 (n1)"
    assert ROSTER.exclusion([2, 4]) == "exclude n1, n2 (sbatch --exclude=n1,n2)"
    assert ROSTER.exclusion(range(6)) == "look at what else runs on n0, n1, n2"
    assert ROSTER.first_ranks() == [0, 2, 4]
    assert Roster([f"n{rank}" for rank in range(20)]).name(range(20)).endswith("(n7), and 12 more hosts")
    assert deviants("aabac") == ("a", {"b": [2], "c": [4]})


def test_the_clock_that_is_off_is_named_even_if_it_is_the_leaders() -> None:
    def judged(*seconds: float, error_s: float = 0.0) -> Outcome:
        pairs = zip((2, 4), seconds, strict=True)
        offsets = [Offset(rank=rank, seconds=ahead, error_s=error_s) for rank, ahead in pairs]
        return judge_clocks(offsets, ROSTER, max_skew_s=1.0)

    assert judged(0.5, -0.5).problems == ()
    assert [line.split(" is ")[0] for line in judged(-7.0, -7.1).problems] == ["the clock of n0"]
    assert "7.000 s ahead" in judged(-7.0, -7.1).problems[0]
    assert "9.000 s behind" in judged(0.1, -9.0).problems[0]
    assert judged(0.1, -9.0, error_s=8.5).problems == ()  # the question took too long to be sure
    assert judge_clocks([], Roster(["n0"]), max_skew_s=1.0).skipped


def test_devices_that_fail_differ_or_are_shared_are_named() -> None:
    ranks = [replace(GPU, uuid=f"GPU-{rank}") for rank in range(6)]
    assert judge_devices(ranks, [""] * 6, ROSTER).status == "ok"
    assert judge_devices([None] * 6, [""] * 6, ROSTER).skipped
    sick = [ranks[0], replace(ranks[1], uuid="GPU-0"), replace(ranks[2], kind="H20"), None, *ranks[4:]]
    sick[4] = replace(ranks[4], free=60, ailments=["rows wait (Yes)"])
    problems = judge_devices(sick, ["", "", "", "no CUDA", "", ""], ROSTER).problems
    expected = [
        "rank 3 (n1) cannot use its device: no CUDA; exclude n1",
        "rank 2 (n1): H20, but H800 on most ranks; exclude n1",
        "ranks 0-1 (n0) share one accelerator, GPU-0",
        "rank 4 (n2): 0.0 of 0.0 GB are taken by others; exclude n2",
        "rank 4 (n2): rows wait (Yes); exclude n2",
    ]
    assert len(problems) == len(expected)
    for line, beginning in zip(problems, expected, strict=True):
        assert line.startswith(beginning)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo '0, No, No, Not Active, Not Active'", []),
        ("echo '[N/A], [N/A], No, Not Active, Not Active'", []),
        ("echo '3, Yes, No, Active, Not Active'", ["errors", "wait for a reset", "by the hardware"]),
        ("echo 'No devices were found'; exit 6", ["ends with 6: No devices were found"]),
    ],
)
def test_what_nvidia_smi_says_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, expected: list[str]
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = read_ailments("GPU-0")
    assert len(found) == len(expected)
    assert all(part in line for part, line in zip(expected, found, strict=True))


def test_without_nvidia_smi_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_ailments("GPU-0") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has what the test asks for in vain")
def test_a_device_that_is_absent_is_a_finding() -> None:
    device, error = usable_device(compose_run(["recipe=smoke", "device=cuda"]), local_rank=0)
    assert device.type == "cpu"
    assert "device=cuda, but this machine" in error


def test_checkpoints_take_the_bytes_of_the_closed_form(tmp_path: Path) -> None:
    run = train(tmp_path, "optimizer.ema_decay=0.9", "~stages.extend_32k", "~stages.extend_128k")
    config = read_config(run / "config.yaml")
    (saved, *_) = (run / "checkpoints").iterdir()
    stored = 0
    for path in saved.glob("*.safetensors"):
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        stored += path.stat().st_size - 8 - header
    assert stored == checkpoint_bytes(config)
    assert needed_bytes(config) == (config.checkpoint.keep_last + 1) * checkpoint_bytes(config)


def test_the_published_model_needs_terabytes() -> None:
    config = compose_run(["recipe=deepseek_v3"])
    assert checkpoint_bytes(config) == pytest.approx(8 * 684.5e9, rel=0.01)  # 671 B and one MTP module
    assert len(config.stages) == 3  # the ends of the first two stay beside those that are kept and written
    assert needed_bytes(config) == (config.checkpoint.keep_last + 1 + 2) * checkpoint_bytes(config)
    views = [View(path="/runs", free=10**13)] * 6
    judged = judge_folder(views, [True] * 6, ROSTER, needed=needed_bytes(config), held=0)
    (problem,) = judged.problems
    assert problem.startswith("/runs has room for 10,000.0 GB on ranks 0-1 (n0)")
    assert "or lower checkpoint.keep_last" in problem
    held = judge_folder(views, [True] * 6, ROSTER, needed=needed_bytes(config), held=10**14)
    assert held.problems == ()
    lost = judge_folder(views, [True] * 5 + [False], ROSTER, needed=0, held=0)
    assert lost.problems[0].startswith("rank 5 (n2) wrote a file that rank 0 does not see")


def test_slow_and_wrong_products_are_named() -> None:
    found = [Product(seconds=1.0)] * 3 + [
        Product(seconds=1.2),
        Product(seconds=1.1, wrong=7),
        Product(error="E"),
    ]
    problems = judge_products(found, ROSTER, size=8, slow_percent=15).problems
    assert [line.split(" (")[0] for line in problems] == ["rank 5", "rank 4", "rank 3"]
    assert "1.20 times the median" in problems[2]
    nothing = judge_products([Product(error="E")], Roster(["n0"]), size=8, slow_percent=15)
    assert (nothing.status, nothing.broken) == ("failed", True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exact_product_is_exact(dtype: torch.dtype) -> None:
    assert wrong_elements(256, dtype, torch.device("cpu")) == 0


def test_the_slow_group_and_the_host_behind_it_are_named() -> None:
    def seen(ranks: tuple[int, ...], seconds: float, turn: int = 0, error: str = "") -> Exercise:
        return Exercise(
            turn=turn,
            group="dp",
            operation="all_reduce",
            ranks=ranks,
            num_bytes=8,
            seconds=seconds,
            error=error,
        )

    slow, fast, third = (0, 2), (1, 4), (3, 5)
    by_rank = {rank: seen(group, 1.0) for group in (fast, third) for rank in group}
    by_rank |= {0: seen(slow, 1.0), 2: seen(slow, 1.3)}
    found = [
        [by_rank[rank], seen((0, 1), 0.0, turn=1, error="refused")][: 1 + (rank < 2)] for rank in range(6)
    ]
    problems = judge_groups(found, Roster(["n0", "n1", "n9", "n3", "n4", "n5"]), slow_percent=15).problems
    assert [line.split(" failed")[0] for line in problems[:2]] == [
        "rank 0 (n0): all_reduce over dp",
        "rank 1 (n1): all_reduce over dp",
    ]
    assert problems[2].startswith(
        "all_reduce over dp of rank 0 (n0), rank 2 (n9) takes 1300.00 ms, 1.30 times"
    )
    assert problems[2].endswith("exclude n0, n9 (sbatch --exclude=n0,n9)")
    pair = [[seen((0, 2), 1.0)], [seen((1, 3), 1.3)]] * 2  # of two groups the faster one is the measure
    assert [line.split(" takes ")[0] for line in judge_groups(pair, ROSTER, slow_percent=15).problems] == [
        "all_reduce over dp of rank 1 (n0), rank 3 (n1)"
    ]
    blamed = judge_groups(found, Roster(["n1", "n1", "n9", "n3", "n4", "n5"]), slow_percent=15).problems
    assert blamed[2].endswith("exclude n9 (sbatch --exclude=n9)")  # n1 is in a fast group as well


def test_bad_options_end_in_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    for option, complaint in {
        "--timeout-s=0": "0 must be at least 1",
        "--timeout-s=1.5": "invalid int value: '1.5'",
        "--message-mb=inf": "inf must be at least 0, and finite",
        "--slow-percent=nan": "nan must be at least 0, and finite",
    }.items():
        with pytest.raises(SystemExit) as stop:
            main(["recipe=smoke", option])
        assert stop.value.code == 2
        assert complaint in capsys.readouterr().err
