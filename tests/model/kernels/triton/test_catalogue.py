"""docs/kernels.md shows every kernel, and only these kernels need Triton."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.kernel_roofline import work_table
from tests.model.kernels.triton.ahead_of_time import TARGETS
from tests.model.kernels.triton.catalogue import everything

ROOT = Path(__file__).resolve().parents[4]
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


def test_the_page_has_every_kernel_and_the_floors():
    for variant in everything():
        for target in TARGETS:
            assert f"| {variant.name} | {variant.options['num_warps']} | {target} |" in PAGE
    for line in work_table():
        assert line in PAGE


@pytest.mark.parametrize("module", ["model.transformer", "model.kernels.fp8_gemm", "train.trainer"])
def test_nothing_else_needs_triton(module: str):
    """Where Triton is missing, as on macOS, its import fails as it does after this assignment."""
    code = f"import sys\nsys.modules['triton'] = None\nimport {module}"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
