"""What the place where a process runs offers to the backends that need more than torch."""

import os
import re
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from model.config import Gemm
from train.config import AdamKernel


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the place where a process runs offers.

    capability: of its GPU, None without one; cuda: the version torch was built for, None in a CPU build;
    triton: whether it can be imported; interprets: whether TRITON_INTERPRET=1 runs its kernels on a CPU;
    transformer_engine: its version, None where it is not installed; import_error: why it cannot be imported.
    """

    capability: tuple[int, int] | None
    cuda: tuple[int, int] | None
    triton: bool
    interprets: bool
    transformer_engine: str | None
    import_error: str | None = None


def find_machine(gemm: Gemm, kernel: AdamKernel = AdamKernel.torch, *, device: str) -> Machine:
    """Look at this machine, with an eye to what multiplies and what updates: only what they need is imported.

    device: as in `RunConfig.device`; with cpu, a GPU is as good as none.
    """
    wants_te = gemm is Gemm.fp8_te or kernel is AdamKernel.transformer_engine
    if gemm is not Gemm.fp8_triton and not wants_te:
        return Machine(capability=None, cuda=None, triton=False, interprets=False, transformer_engine=None)
    import torch

    has_gpu = device != "cpu" and torch.cuda.is_available()
    installed = _version("transformer-engine")
    return Machine(
        capability=torch.cuda.get_device_capability() if has_gpu else None,
        cuda=numbers(torch.version.cuda) if torch.version.cuda else None,
        triton=find_spec("triton") is not None,
        interprets=os.environ.get("TRITON_INTERPRET") == "1",
        transformer_engine=installed,
        import_error=_import_error() if wants_te and has_gpu and installed else None,
    )


def _import_error() -> str | None:
    try:
        import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def numbers(text: str) -> tuple[int, int]:
    """Return the first two numbers of a version."""
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)
