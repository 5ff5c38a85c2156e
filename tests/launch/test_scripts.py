"""The scripts a new machine starts with."""

import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_script_parses(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_an_old_python_is_refused_before_anything_is_installed(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.18\nexit 1\n', encoding="utf-8")
    old.chmod(0o755)
    (tmp_path / "launch").mkdir()
    for name in ("setup.sh", "smoke.sh"):
        (tmp_path / "launch" / name).write_text((LAUNCH / name).read_text(encoding="utf-8"), encoding="utf-8")
    done = subprocess.run(
        ["bash", tmp_path / "launch" / "smoke.sh"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(old)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "too old" in done.stderr
    assert "3.11" in done.stderr
    assert not (tmp_path / ".venv").exists()
