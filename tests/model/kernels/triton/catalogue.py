"""Every kernel in every configuration that a launch may choose, as it is compiled for V3's shapes."""

from collections.abc import Sequence
from typing import Any

import triton

from model.kernels.triton import gemm, grouped_gemm, permute, quantize, swiglu
from tests.model.kernels.triton.ahead_of_time import Variant

CODES, SCALES = "*fp8e4nv", "*fp32"
SIZE = {"R": "i32", "D": "i32"}
OUTPUTS = {"codes_t_ptr": CODES, "scales_t_ptr": SCALES}
TILES = {"x_ptr": "*bf16", "codes_ptr": CODES, "scales_ptr": SCALES, **OUTPUTS, **SIZE}
QUANTIZE_OPTIONS = {"num_warps": quantize.WARPS, "enable_fp_fusion": False}


def quantisers() -> list[Variant]:
    """Return the kernels of quantize.py, with scales that are powers of two and that are not."""
    found = []
    for power_of_two in (True, False):
        constants = {"POWER_OF_TWO": power_of_two, "INTERPRET": False}
        suffix = "" if power_of_two else ", FP32 scales"
        for name, rows, columns in (
            ("rows", True, False),
            ("rows and columns", True, True),
            ("columns", False, True),
        ):
            wanted = {"ROWS": rows, "COLUMNS": columns, **constants}
            found.append(
                Variant(
                    f"quantise {name}{suffix}",
                    quantize.tiles_kernel,
                    TILES,
                    wanted,
                    QUANTIZE_OPTIONS,
                    unaligned=() if columns else ("R",),
                )
            )
        kept = {name: kind for name, kind in TILES.items() if name != "x_ptr"}
        for name, kernel, types in (
            ("requantise columns", quantize.requantize_kernel, kept),
            ("quantise blocks", quantize.blocks_kernel, TILES),
        ):
            found.append(Variant(name + suffix, kernel, types, constants, QUANTIZE_OPTIONS))
    return found


def permutations() -> list[Variant]:
    """Return the kernel of permute.py, for V3's eight experts a token."""
    types = {"x_ptr": "*bf16", "rows_ptr": "*i64", "codes_ptr": CODES, "scales_ptr": SCALES}
    types |= {"T": "i32", "D": "i32"}
    constants = {"A": 8, "POWER_OF_TWO": True, "INTERPRET": False}
    name, options = "permute and quantise", QUANTIZE_OPTIONS
    return [Variant(name, permute.permute_kernel, types, constants, options, unaligned=("T",))]


def swiglus() -> list[Variant]:
    """Return the kernel of swiglu.py, with scales that are powers of two and that are not."""
    types = {"gate_ptr": "*bf16", "up_ptr": "*bf16", "weights_ptr": "*fp32", "X": "i32", "I": "i32"}
    for name in ("hidden", "gate", "up"):
        types |= {f"{name}_codes_ptr": CODES, f"{name}_scales_ptr": SCALES}
    return [
        Variant(
            "SwiGLU and quantise" + ("" if power_of_two else ", FP32 scales"),
            swiglu.swiglu_kernel,
            types,
            {"POWER_OF_TWO": power_of_two, "INTERPRET": False},
            QUANTIZE_OPTIONS,
            unaligned=("X",),
        )
        for power_of_two in (True, False)
    ]


def products() -> list[Variant]:
    """Return the kernel of gemm.py in all its configurations; outputs as each product has them."""
    sizes = ("M", "N", "K")
    return [
        *_products("product with blocks", gemm.gemm_kernel, "*bf16", sizes, gemm.BLOCK_SCALES, B_BLOCKS=True),
        *_products("weight gradient", gemm.gemm_kernel, "*fp32", sizes, gemm.ROW_SCALES, B_BLOCKS=False),
    ]


def grouped_products() -> list[Variant]:
    """Return the kernels of grouped_gemm.py in all their configurations."""
    forward, outer = grouped_gemm.grouped_kernel, grouped_gemm.outer_kernel
    configs, sizes = grouped_gemm.GROUPED_CONFIGS, ("M", "N", "X")
    return [
        *_products("experts' product", forward, "*bf16", ("N", "K"), configs, tiles_ptr="*i32"),
        *_products("experts' weight gradient", outer, "*fp32", sizes, gemm.ROW_SCALES, bounds_ptr="*i32"),
    ]


def _products(
    name: str,
    kernel: Any,
    out: str,
    sizes: tuple[str, ...],
    configs: Sequence[triton.Config],
    **more: str | bool,
) -> list[Variant]:
    """Return one variant for each configuration; `more` are further parameters, types or constants."""
    types = {"a_ptr": CODES, "a_scales_ptr": SCALES, "b_ptr": CODES, "b_scales_ptr": SCALES, "out_ptr": out}
    types |= dict.fromkeys(sizes, "i32")
    types |= {parameter: kind for parameter, kind in more.items() if isinstance(kind, str)}
    constants = {parameter: value for parameter, value in more.items() if isinstance(value, bool)}
    return [
        Variant(
            f"{name}, {config.kwargs['BLOCK_M']}×{config.kwargs['BLOCK_N']}",
            kernel,
            types,
            constants | config.kwargs,
            {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True},
            multiplies=True,
            unaligned=("M",),
        )
        for config in configs
    ]


def everything() -> list[Variant]:
    """Return all variants."""
    return [*quantisers(), *permutations(), *swiglus(), *products(), *grouped_products()]
