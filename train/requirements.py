"""What the FP8 backends need: of the configuration, and of the machine. Importable without torch.

`fp8_reference` runs wherever torch does. `fp8_triton` needs a GPU with FP8 tensor cores and Triton; `fp8_te`
also Transformer Engine, the CUDA version of its block-scaled products, and sizes that they take. Whatever is
missing is named, all of it, with what runs instead, before anything starts. The configuration is checked
anywhere, the machine only where the job runs.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from model.config import Fp8Scales, Gemm, ModelConfig, PrecisionConfig
from parallel.config import Engine, ParallelConfig

INSTEAD = "use precision=fp8_reference (emulated: slow) or precision=bf16"
HOPPER, BLACKWELL = (9, 0), (10, 0)
OLDEST_CUDA = (12, 9)
"""Of torch's build, for Transformer Engine's block-scaled products."""
TRANSFORMER_ENGINE = (2, 20)
"""The series whose conventions for gradients and codes the adapter follows."""
WIDTH_MULTIPLE = 16
"""Transformer Engine's FP8 products take widths that are multiples of this."""

_BACKENDS = (Gemm.fp8_triton, Gemm.fp8_te)


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


def find_machine(gemm: Gemm, *, device: str) -> Machine:
    """Look at this machine, with an eye to one backend: only what it needs is imported.

    device: as in `RunConfig.device`; with cpu, a GPU is as good as none.
    """
    if gemm not in _BACKENDS:
        return Machine(capability=None, cuda=None, triton=False, interprets=False, transformer_engine=None)
    import torch

    has_gpu = device != "cpu" and torch.cuda.is_available()
    installed = _version("transformer-engine")
    return Machine(
        capability=torch.cuda.get_device_capability() if has_gpu else None,
        cuda=_numbers(torch.version.cuda) if torch.version.cuda else None,
        triton=find_spec("triton") is not None,
        interprets=os.environ.get("TRITON_INTERPRET") == "1",
        transformer_engine=installed,
        import_error=_import_error() if gemm is Gemm.fp8_te and has_gpu and installed else None,
    )


def machine_problems(precision: PrecisionConfig, machine: Machine) -> list[str]:
    """Return what `precision.gemm` needs and the machine has not."""
    match precision.gemm:
        case Gemm.fp8_triton:
            missing = list(_triton(machine))
        case Gemm.fp8_te:
            missing = [*_gpu(machine), *_cuda(machine), *_transformer_engine(machine)]
            missing += _blackwell(precision, machine)
        case _:
            missing = []
    return [f"precision.gemm={precision.gemm} needs {line}; {INSTEAD}" for line in missing]


def backend_problems(
    precision: PrecisionConfig, layout: ParallelConfig, model: ModelConfig, *, path: str
) -> list[str]:
    """Return what `precision.gemm` asks of a model, and of a layout, whose place is `path`."""
    if precision.gemm is not Gemm.fp8_te:
        return []
    found: list[str] = []
    if layout.engine is not Engine.zero1:
        found.append(
            f"{path}.engine={layout.engine} cannot be had with precision.gemm=fp8_te, which adds to "
            "gradients in place, unseen by DeepSpeed; use engine=zero1, or another precision"
        )
    return found + [
        f"{name}={width} over {path}.tp={shares} leaves {width / shares:g} columns, which is no multiple of "
        f"{WIDTH_MULTIPLE}, as precision.gemm=fp8_te needs; change one of them, or use another precision"
        for name, width, shares in _widths(model, layout)
        if width % (WIDTH_MULTIPLE * shares)
    ]


def _triton(machine: Machine) -> Iterator[str]:
    if not machine.triton:
        yield "the package triton, which is not installed (Linux only: pip install triton)"
    if not machine.interprets:  # slow, but it computes the same: tests rely on it
        yield from _gpu(machine)


def _gpu(machine: Machine) -> Iterator[str]:
    if machine.capability is None:
        yield "a CUDA GPU, with device=cuda or device=auto; this process has none"
    elif machine.capability < HOPPER:
        yield f"a GPU of compute capability {_dotted(HOPPER)} or more, not {_dotted(machine.capability)}"


def _cuda(machine: Machine) -> Iterator[str]:
    if machine.cuda is None:
        yield f"torch built for CUDA {_dotted(OLDEST_CUDA)} or later, not for the CPU"
    elif machine.cuda < OLDEST_CUDA:
        yield f"torch built for CUDA {_dotted(OLDEST_CUDA)} or later, not {_dotted(machine.cuda)}"


def _transformer_engine(machine: Machine) -> Iterator[str]:
    wanted = f"transformer-engine {_dotted(TRANSFORMER_ENGINE)}"
    how = "pip install --no-build-isolation -e '.[cuda]'"
    if machine.transformer_engine is None:
        yield f"{wanted}, which is not installed ({how})"
    elif _numbers(machine.transformer_engine) != TRANSFORMER_ENGINE:
        yield f"{wanted}, not {machine.transformer_engine} ({how})"
    elif machine.import_error is not None:
        yield f"{wanted} that can be imported, but it says: {machine.import_error}"


def _blackwell(precision: PrecisionConfig, machine: Machine) -> Iterator[str]:
    newer = machine.capability is not None and machine.capability >= BLACKWELL
    if newer and precision.fp8_scales is not Fp8Scales.power_of_two:
        yield (
            f"precision.fp8_scales=power_of_two on this GPU, whose scales have no mantissa, not "
            f"{precision.fp8_scales}"
        )


def _widths(model: ModelConfig, layout: ParallelConfig) -> Iterator[tuple[str, int, int]]:
    """Yield name, value and number of shares of every width of a matrix inside the blocks."""
    attention, moe, shares = model.attention, model.moe, max(1, layout.tp)
    query = attention.qk_nope_head_dim + attention.qk_rope_head_dim
    yield "model.hidden_size", model.hidden_size, 1
    if attention.q_lora_rank is not None:
        yield "model.attention.q_lora_rank", attention.q_lora_rank, 1
    yield "model.attention.kv_lora_rank", attention.kv_lora_rank, 1
    keys = attention.kv_lora_rank + attention.qk_rope_head_dim
    yield "model.attention.kv_lora_rank + qk_rope_head_dim", keys, 1
    heads = "model.attention.num_heads ×"
    yield f"{heads} (qk_nope_head_dim + qk_rope_head_dim)", attention.num_heads * query, shares
    rows = attention.num_heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    yield f"{heads} (qk_nope_head_dim + v_head_dim)", rows, shares
    yield f"{heads} v_head_dim", attention.num_heads * attention.v_head_dim, shares
    if model.num_dense_layers:
        yield "model.dense_intermediate_size", model.dense_intermediate_size, shares
    if model.num_dense_layers < model.num_layers:
        yield "model.moe.intermediate_size", moe.intermediate_size, 1
        if moe.num_shared_experts:
            width = moe.num_shared_experts * moe.intermediate_size
            yield "model.moe.num_shared_experts × intermediate_size", width, shares


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


def _numbers(text: str) -> tuple[int, int]:
    """Return the first two numbers of a version."""
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
