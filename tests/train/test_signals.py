"""Stop requests, with real signals; a second Ctrl-C in a process of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.groups import Group
from train.signals import STOP_FILE_VARIABLE, WATCHED, StopRequest


@pytest.mark.parametrize("number", WATCHED)
def test_a_signal_is_noted_and_explained(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested == number.name
    message = capfd.readouterr().err
    assert f"{number.name}: saving a checkpoint after this step, then stopping" in message
    assert ("Ctrl-C again" in message) == (number is signal.SIGINT)


def test_the_first_signal_is_kept_and_repeats_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert stop.requested == "SIGUSR1"
    assert capfd.readouterr().err.count("saving a checkpoint") == 1


@pytest.mark.parametrize("interrupted", [False, True])
def test_handlers_are_restored(interrupted: bool) -> None:
    before = {number: signal.getsignal(number) for number in WATCHED}
    with StopRequest():
        assert all(signal.getsignal(number) != before[number] for number in WATCHED)
        if interrupted:
            os.kill(os.getpid(), signal.SIGINT)
    assert {number: signal.getsignal(number) for number in WATCHED} == before
    with pytest.raises(ZeroDivisionError), StopRequest():
        _ = 1 / 0
    assert {number: signal.getsignal(number) for number in WATCHED} == before


def test_the_first_process_looks_for_a_stop_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file, world = tmp_path / "stop", Group("world")
    monkeypatch.setenv(STOP_FILE_VARIABLE, str(file))
    with StopRequest() as stop:
        assert stop.agreed(world) is None
        file.touch()
        monkeypatch.setenv("RANK", "1")
        assert stop.agreed(world) is None
        monkeypatch.setenv("RANK", "0")
        assert stop.agreed(world) == "SIGUSR1"
        assert stop.agreed(world) == "SIGUSR1"
    assert capfd.readouterr().err.count("SIGUSR1: saving a checkpoint after this step") == 1


STUBBORN = """
import threading, time
from train.signals import StopRequest

# a thread that Python would wait for at its end, as for a checkpoint being written
threading.Thread(target=time.sleep, args=(600,)).start()
with StopRequest() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print(stop.requested, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_ends_at_once(first: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(first)
            assert process.stdout.readline() == f"{first.name}\n"
            if first is signal.SIGTERM:
                # a scheduler repeats itself: that must not cut the save short
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGINT)
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.3)
            # two Ctrl-C that come before the first is noticed are one
            while "press Ctrl-C again to end at once" not in process.stderr.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=10)
            assert process.returncode == -signal.SIGINT
        finally:
            process.kill()
