"""Print docs/kernels.md: what the Triton kernels compile to, and how fast a GPU could run them at best.

    python -m tests.bench.kernel_roofline > docs/kernels.md

Compiles every kernel in every configuration for sm_90a and sm_100a, which takes about a minute and no GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import triton

from model.kernels.fp8 import BLOCK
from tests.model.kernels.triton.ahead_of_time import MATRIX_PRODUCT, TARGETS, compile_for
from tests.model.kernels.triton.catalogue import everything

TOKENS, HIDDEN, DENSE = 4096, 7168, 18432
EXPERT, EXPERTS, CHOSEN = 2048, 4, 8
"""Of 256 experts over 64 devices, 4 lie on one, which receives as many rows as it sends: 8 a token."""
ROWS = TOKENS * CHOSEN
QUERIES, QUERY_LATENT, VALUES = 128 * 192, 1536, 128 * 128

SCALE = 4 / BLOCK
"""Bytes of scales for each value in 1×128 tiles."""
TILED = 1 + SCALE
"""Bytes of a value in tiles, scale included."""


@dataclass(frozen=True)
class Gpu:
    """Bytes a second of memory, and FP8 operations a second of dense tensor cores, as published."""

    name: str
    bandwidth: float
    operations: float


GPUS = (Gpu("H100", 3.35e12, 1979e12), Gpu("B200", 8e12, 4500e12))


@dataclass(frozen=True)
class Work:
    """What one launch must move and multiply: every operand read once, every result written once."""

    kernel: str
    shape: str
    bytes: float
    operations: float = 0.0

    def floor(self, gpu: Gpu) -> tuple[float, str]:
        """Return the least time in seconds, and what bounds it."""
        memory, products = self.bytes / gpu.bandwidth, self.operations / gpu.operations
        return (memory, "memory") if memory > products else (products, "tensor cores")


def quantisers() -> list[Work]:
    """Return the work of everything that is bound by memory."""
    x, w = f"[{TOKENS}, {HIDDEN}]", f"[{DENSE}, {HIDDEN}]"
    values, weights = TOKENS * HIDDEN, DENSE * HIDDEN
    permuted = values * (2 + CHOSEN * TILED) + 8 * TOKENS * CHOSEN
    swiglu = ROWS * EXPERT * (4 + 3 * TILED) + 4 * ROWS
    return [
        Work("quantise rows", x, values * (2 + TILED)),
        Work("quantise rows and columns", x, values * (2 + 2 * TILED)),
        Work("quantise columns", x, values * (2 + TILED)),
        Work("requantise columns", x, values * 2 * TILED),
        Work("quantise blocks", w, weights * (2 + 2 * (1 + SCALE / BLOCK))),
        Work("permute and quantise", f"{x}, {CHOSEN} experts a token", permuted),
        Work("SwiGLU and quantise", f"[{ROWS}, {EXPERT}]", swiglu),
    ]


def products() -> list[Work]:
    """Return the work of the products of a dense network, of attention and of the experts."""
    return [
        _forward("product with blocks", TOKENS, DENSE, HIDDEN),
        _forward("product with blocks", TOKENS, HIDDEN, DENSE),
        _forward("product with blocks", TOKENS, QUERIES, QUERY_LATENT),
        _forward("product with blocks", TOKENS, HIDDEN, VALUES),
        _gradient("weight gradient", DENSE, HIDDEN, TOKENS),
        _gradient("weight gradient", QUERIES, QUERY_LATENT, TOKENS),
        _forward("experts' product", ROWS, EXPERT, HIDDEN, experts=EXPERTS),
        _forward("experts' product", ROWS, HIDDEN, EXPERT, experts=EXPERTS),
        _gradient("experts' weight gradient", EXPERT, HIDDEN, ROWS, experts=EXPERTS),
    ]


def _forward(kernel: str, m: int, n: int, k: int, *, experts: int = 1) -> Work:
    read = m * k * TILED + experts * n * k * (1 + SCALE / BLOCK)
    shape = f"[{m}, {k}] · [{n}, {k}]ᵀ" + (f", {experts} experts" if experts > 1 else "")
    return Work(kernel, shape, read + 2 * m * n, 2 * m * n * k)


def _gradient(kernel: str, m: int, n: int, k: int, *, experts: int = 1) -> Work:
    shape = f"[{m}, {k}] · [{n}, {k}]ᵀ" + (f", {experts} experts" if experts > 1 else "")
    return Work(kernel, shape, (m + n) * k * TILED + experts * 4 * m * n, 2 * m * n * k)


def work_table() -> Iterator[str]:
    """Yield the lines of the table of floors."""
    yield "| kernel | shape | MB | GFLOP | H100, µs | B200, µs | bound on both by |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | --- |"
    for work in (*quantisers(), *products()):
        floors = [work.floor(gpu) for gpu in GPUS]
        times = " | ".join(f"{seconds * 1e6:.1f}" for seconds, _ in floors)
        bounds = " / ".join(dict.fromkeys(bound for _, bound in floors))
        size, operations = (
            f"{work.bytes / 1e6:.1f}",
            f"{work.operations / 1e9:.0f}" if work.operations else "–",
        )
        yield f"| {work.kernel} | {work.shape} | {size} | {operations} | {times} | {bounds} |"


def compiled_table() -> Iterator[str]:
    """Yield the lines of the table of what ptxas made of each kernel."""
    yield "| kernel | warps | target | registers | spilled | shared memory, KiB | tensor-core instructions |"
    yield "| --- | ---: | --- | ---: | ---: | ---: | --- |"
    for variant in everything():
        for target in TARGETS:
            found = compile_for(variant, target)
            product = f"{found.products} × `{MATRIX_PRODUCT[target]}`" if found.products else "–"
            yield (
                f"| {variant.name} | {variant.options['num_warps']} | {target} | {found.registers} "
                f"| {found.stack} | {found.shared / 1024:.1f} | {product} |"
            )


PAGE = """\
# FP8 kernels in Triton: what they compile to, and their floors

Printed by `python -m tests.bench.kernel_roofline`. **Nothing here has run on a GPU.** The kernels were run in
Triton's interpreter on a CPU, where codes and scales equal those of the plain versions bit for bit and
products agree within 1e-6, and they were compiled for both targets (`tests/model/kernels/triton/`).

## Compiled

By Triton {version} and its own ptxas, for any number of rows, and for widths (and rows that are summed over)
that are multiples of 16; other sizes give right results, but spill registers. Registers are those of one
thread, which may have 255; shared memory is that of one program. Every configuration that autotuning may
choose is listed. The tests fail where one spills a register, does not fit, or multiplies without FP8 tensor
cores. The instructions are those of one tile and 128 of K, which the loop repeats.

{compiled}

## Floors

The least time that the published figures allow: H100 3.35 TB/s and 1979 TFLOP/s, B200 8 TB/s and
4500 TFLOP/s, FP8 dense. Every operand is read once and every result written once. Shapes are V3's: {tokens}
tokens of a microbatch, {hidden} channels, dense networks of {dense}, and {experts} experts of {expert} on
each of 64 devices, which receives as many rows as it sends: {chosen} a token. Activations before quantisation
and results are BF16, gradients of weights FP32.

{work}

A floor is not a forecast. Of what stands between: after each 128 of K, every FP32 partial sum is multiplied
and added outside the tensor cores (one instruction for 128 products, two in weight gradients), which on an
H100 of 67 TFLOP/s in FP32 takes 23 % of the time of the products themselves, and is hidden only as far as
other warps multiply meanwhile; operands are read again by every tile that finds them no longer in cache; the
scales of rows are read four bytes at a time.
"""


def main() -> None:
    """Print the page."""
    print(
        PAGE.format(
            version=triton.__version__,
            compiled="\n".join(compiled_table()),
            work="\n".join(work_table()),
            tokens=TOKENS,
            hidden=HIDDEN,
            dense=DENSE,
            experts=EXPERTS,
            expert=EXPERT,
            chosen=CHOSEN,
        ),
        end="",
    )


if __name__ == "__main__":
    main()
