"""A process in which Triton's kernels are interpreted, beside this one, in which they are compiled.

Triton decides at its import, for good, whether `@triton.jit` makes something to compile or to interpret.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]

Interpret = Callable[..., Any]
"""Calls a function of a test module, with arguments that can be pickled, in the interpreting process."""


def set_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def interpret() -> Iterator[Interpret]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=set_interpreter) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
