"""The allocator setting, in a process of its own because it cannot be undone."""

import platform
import subprocess
import sys

import pytest

PROBE = """
import resource, sys
from model.kernels.allocator import keep_freed_memory
acted = keep_freed_memory() if sys.argv[1] == "tuned" else None
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(acted, faults())
"""


def _run(mode: str) -> list[str]:
    return subprocess.run(
        [sys.executable, "-c", PROBE, mode], capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_taken_again_without_page_faults():
    acted, faults = _run("tuned")
    assert acted == "True"
    assert int(faults) < 100
    assert int(_run("plain")[1]) > 1000


def test_systems_without_glibc_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    from model.kernels.allocator import keep_freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
