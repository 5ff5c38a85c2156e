import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train import wandb_reader
from tests.train.fake_run import STAGES, fake_config, fake_evaluation
from tests.train.logs.test_sinks import record
from train.config import WandbMode
from train.errors import RunError
from train.logs.wandb_login import logged_in, resolve_mode

LOAD = list(range(32))

# In a process of its own: wandb starts a service and threads that outlive the run.
RUN = """
import socket, sys
from pathlib import Path

def note(*address, **_):
    # Collected in a file: whoever reaches for the network may do so in a thread, or at exit.
    with Path(sys.argv[1], "network").open("a") as file:
        print(address[:2], file=file)
    raise OSError("no network in this test")

real_connect = socket.socket.connect
def connect(self, address):
    return real_connect(self, address) if self.family == socket.AF_UNIX else note(address)

socket.socket.connect, socket.getaddrinfo = connect, note

from tests.train.fake_run import STAGES, fake_config, fake_evaluation
from tests.train.logs.test_sinks import record
from tests.train.logs.test_wandb_sink import LOAD
from train.config import WandbMode
from train.logs.sinks import open_sinks

run_dir, first, last, resume_step = Path(sys.argv[1]), *map(int, sys.argv[2:5])
config = fake_config()
config.logging.wandb = WandbMode.auto
with open_sinks(config, run_dir, resume_step=resume_step, total_tokens=10**6) as sinks:
    for step in range(first, last + 1):
        extra = {"load": {"layers.1": LOAD}} if step == 2 else {}
        sinks.write(record(step, loss=float("nan") if step == 3 else 5.0, skipped=step == 3, **extra))
    sinks.evaluation(fake_evaluation(STAGES[0], index=0, when="after", step=last, tokens=1))
"""


def run_offline(run_dir: Path, *, first: int, last: int, resume_step: int) -> str:
    environ = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(run_dir / "home"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": ".",
    }
    arguments = [sys.executable, "-c", RUN, str(run_dir), str(first), str(last), str(resume_step)]
    return subprocess.run(arguments, env=environ, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    output = run_offline(run_dir, first=1, last=4, resume_step=0)
    assert f"W&B: {run_dir / 'wandb'}" in output.replace("\n", "")
    run_offline(run_dir, first=4, last=6, resume_step=3)
    return run_dir


@pytest.fixture(scope="module")
def files(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)


def test_a_resumed_run_keeps_its_id(run_dir: Path, files: list[Path]):
    stored = (run_dir / "wandb" / "run_id").read_text().strip()
    assert [path.name for path in files] == [f"run-{stored}.wandb"] * 2


def test_offline_nothing_reaches_for_the_network(run_dir: Path, files: list[Path]):
    assert not (run_dir / "network").exists(), (run_dir / "network").read_text()


def test_every_step_is_there_with_grouped_names(files: list[Path]):
    rows = wandb_reader.history(files[0])
    assert [row["_step"] for row in rows] == [1, 2, 3, 4]
    row = rows[0]
    assert row["train/loss"] == 5.0
    assert row["train/mtp_loss/1"] == 5.5
    assert row["schedule/lr"] == 2.2e-4
    assert row["train/tokens"] == 4096
    assert row["router/max_vio/layers.1"] == 0.1
    assert {
        f"router/{name}/layers.1" for name in ("load_entropy", "bias_range", "dead_experts")
    } <= row.keys()
    assert row["timing/tokens_per_second"] == 8192.0
    assert "timing/mfu" not in row
    assert math.isnan(rows[2]["train/loss"])
    assert rows[2]["train/skipped"] == 1
    assert [row["_step"] for row in wandb_reader.history(files[1])] == [4, 5, 6]


def test_loads_are_histograms_over_the_experts(files: list[Path]):
    rows = wandb_reader.history(files[0])
    assert [
        row["_step"] for row in rows if "router/load/layers.1._type" in row or "router/load/layers.1" in row
    ] == [2]
    value = rows[1].get("router/load/layers.1") or {
        key: rows[1][f"router/load/layers.1.{key}"] for key in ("values", "bins")
    }
    assert value["values"] == LOAD
    assert value["bins"] == list(range(33))


def test_evaluations_join_the_row_of_their_step(files: list[Path]):
    row = wandb_reader.history(files[1])[-1]
    expected = fake_evaluation(STAGES[0], index=0, when="after", step=6, tokens=1)
    assert row["train/loss"] == 5.0
    assert row["evaluation/tokens"] == 1
    assert row["evaluation/pretrain/held_out_loss"] == expected["held_out"]["loss"]
    assert row["evaluation/pretrain/needle_score"] == pytest.approx(0.38, abs=0.2)
    assert row["evaluation/pretrain/loss_by_position/0-16"] == expected["by_position"][0]["loss"]


def test_the_whole_configuration_is_stored(files: list[Path]):
    stored = wandb_reader.config(files[0])
    assert stored["model"]["moe"]["num_experts"] == 32
    assert stored["stages"]["extend_32k"]["yarn"]["factor"] == 40
    json.dumps(stored)


def test_more_experts_than_bins_are_merged_without_losing_a_token():
    from train.logs.wandb_sink import MAX_BINS, load_histogram

    histogram = load_histogram([3] * 1000)
    assert len(histogram.histogram) == MAX_BINS
    assert sum(histogram.histogram) == 3000


def test_an_unreachable_server_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from train.logs import wandb_sink

    def fail(**_: object) -> None:
        raise wandb_sink.WandbError("connection refused")

    monkeypatch.setattr(wandb_sink.wandb, "init", fail)
    with pytest.raises(RunError, match=r"connection refused.*logging\.wandb=offline"):
        wandb_sink.WandbSink(fake_config(), tmp_path, mode=WandbMode.online)


def test_auto_is_online_only_with_a_login(tmp_path: Path):
    nobody = {"HOME": str(tmp_path)}
    assert resolve_mode(WandbMode.auto, nobody) is WandbMode.offline
    assert resolve_mode(WandbMode.auto, nobody | {"WANDB_API_KEY": "k" * 40}) is WandbMode.online
    assert resolve_mode(WandbMode.auto, {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}) is WandbMode.offline
    assert (
        resolve_mode(WandbMode.auto, {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}) is WandbMode.disabled
    )
    assert resolve_mode(WandbMode.disabled, {"WANDB_API_KEY": "k"}) is WandbMode.disabled
    assert resolve_mode(WandbMode.offline, {"WANDB_API_KEY": "k"}) is WandbMode.offline


def test_a_login_is_one_for_the_server_that_is_used(tmp_path: Path):
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    home = {"HOME": str(tmp_path)}
    assert logged_in(home)
    assert not logged_in(home | {"WANDB_BASE_URL": "https://wandb.example.org"})
    assert not logged_in({"HOME": str(tmp_path), "NETRC": str(tmp_path / "absent")})
    (tmp_path / ".config" / "wandb").mkdir(parents=True)
    (tmp_path / ".config" / "wandb" / "settings").write_text(
        "[default]\nbase_url = https://wandb.example.org\n"
    )
    assert not logged_in(home)
    (tmp_path / ".netrc").write_text("machine wandb.example.org login user password secret\n")
    assert logged_in(home)
    (tmp_path / ".netrc").write_text("machine\n")
    assert not logged_in(home)


def test_the_record_made_for_tests_is_one_that_is_logged_in_full():
    from train.logs.wandb_sink import scalars

    names = scalars(record(1)).keys()
    assert {name.split("/")[0] for name in names} == {"train", "schedule", "router", "timing"}
