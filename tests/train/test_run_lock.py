"""A run belongs to one process at a time."""

import subprocess
import sys

import pytest

from tests.golden.compose import compose_run
from tests.train.tiny_job import overrides
from train.errors import EXIT_BAD_INPUT, RunError
from train.run import run
from train.run_lock import only_process

HOLD = """
import sys, time
from pathlib import Path
from train.run_lock import only_process
with only_process(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path):
    run_dir = tmp_path / "a b@c" / "tiny"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process works on"), only_process(run_dir):
            pass
        with only_process(run_dir.with_name("other")):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with only_process(run_dir):
        assert not run_dir.exists()


def test_the_command_takes_the_lock(tmp_path, capsys):
    config = compose_run(*overrides(tmp_path))
    with only_process(tmp_path / "tiny"), pytest.raises(SystemExit) as left:
        run(config)
    assert left.value.code == EXIT_BAD_INPUT
    assert "another process works on" in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()
