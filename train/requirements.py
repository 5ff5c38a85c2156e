"""What the backends need of the machine. Importable without torch.

`fp8_reference` runs wherever torch does. `fp8_triton` needs a GPU with FP8 tensor cores and Triton; `fp8_te`
also Transformer Engine and the CUDA version of its block-scaled products. The optimizer's kernel of
Transformer Engine needs that and any GPU. Whatever is missing is named, all of it, with what runs instead,
before anything starts. What they need of the configuration is in parallel/backend_rules.py.
"""

from collections.abc import Iterator

from model.config import Fp8Scales, Gemm, PrecisionConfig
from parallel.backend_rules import BLACKWELL_MULTIPLE, WIDTH_MULTIPLE
from train.config import AdamKernel, OptimizerConfig
from train.machine import Machine, numbers

INSTEAD = "use precision=fp8_reference (emulated: slow) or precision=bf16"
NO_GPU = "a CUDA GPU, with device=cuda or device=auto; this process has none"
HOPPER, BLACKWELL = (9, 0), (10, 0)
OLDEST_CUDA = (12, 9)
"""Of torch's build, for Transformer Engine's block-scaled products."""
TRANSFORMER_ENGINE = (2, 20)
"""The series whose conventions for gradients and codes the adapter follows."""


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


def kernel_problems(optimizer: OptimizerConfig, machine: Machine) -> list[str]:
    """Return what `optimizer.kernel` needs and the machine has not."""
    if optimizer.kernel is not AdamKernel.transformer_engine:
        return []
    missing = [] if machine.capability else [NO_GPU]
    missing += _transformer_engine(machine)
    instead = "use optimizer.kernel=torch, which computes the same"
    return [f"optimizer.kernel={optimizer.kernel} needs {line}; {instead}" for line in missing]


def width_multiple(machine: Machine | None) -> int:
    """Return of what widths must be multiples under fp8_te; of Hopper's where the machine is not known."""
    newer = machine is not None and machine.capability is not None and machine.capability >= BLACKWELL
    return BLACKWELL_MULTIPLE if newer else WIDTH_MULTIPLE


def _triton(machine: Machine) -> Iterator[str]:
    if not machine.triton:
        yield "the package triton, which is not installed (Linux only: pip install triton)"
    if not machine.interprets:  # slow, but it computes the same: tests rely on it
        yield from _gpu(machine)


def _gpu(machine: Machine) -> Iterator[str]:
    if machine.capability is None:
        yield NO_GPU
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
    elif numbers(machine.transformer_engine) != TRANSFORMER_ENGINE:
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


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
