"""Compiling a Triton kernel for GPUs that this machine lacks, and reading what came out.

`triton.compile` needs no driver. The machine code says what a launch would use: registers of a thread, bytes
of its stack (a register that is spilled goes there), shared memory of a block, tensor-core instructions.

Only for processes without TRITON_INTERPRET, which turns kernels into something that cannot be compiled.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TARGETS = {"sm_90a": GPUTarget("cuda", 90, 32), "sm_100a": GPUTarget("cuda", 100, 32)}
MATRIX_PRODUCT = {"sm_90a": "wgmma.mma_async", "sm_100a": "tcgen05.mma"}
"""The tensor-core instruction of each target, as PTX spells it."""


@dataclass(frozen=True)
class Variant:
    """One kernel as it would be launched. `types` and `constants` name its parameters.

    Pointers and integers are taken for multiples of 16, on which a launch specialises, unless `unaligned`
    names them: numbers of rows, which may be anything.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    multiplies: bool = False
    unaligned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a variant: registers of a thread, bytes of its stack, bytes of shared memory, matrix
    instructions, those of them that read FP8, and divisions that are not exactly rounded.
    """

    registers: int
    stack: int
    shared: int
    products: int
    fp8_products: int
    inexact_divisions: int


def compile_for(variant: Variant, target: str) -> Compiled:
    """Compile `variant` for `target`, "sm_90a" or "sm_100a"."""
    names = variant.kernel.arg_names
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    aligned = [n for n in names if n in variant.types and n not in variant.unaligned]
    aligned = [n for n in aligned if variant.types[n].startswith("*") or variant.types[n].startswith("i")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(variant.kernel, signature, dict(variant.constants), attributes)
    binary = triton.compile(source, target=TARGETS[target], options=dict(variant.options))
    assert f".target {target}" in binary.asm["ptx"]
    ptx = binary.asm["ptx"]
    products = re.findall(rf"{re.escape(MATRIX_PRODUCT[target])}\S*", ptx)
    usage = _resource_usage(binary.asm["cubin"])
    return Compiled(
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        shared=binary.metadata.shared,
        products=len(products),
        fp8_products=sum("e4m3.e4m3" in p or "kind::f8f6f4" in p for p in products),
        inexact_divisions=len(re.findall(r"div\.(full|approx)|rcp\.approx", ptx)),
    )


@cache
def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
