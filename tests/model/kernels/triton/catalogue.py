"""Every kernel in every configuration that a launch may choose, as it is compiled for V3's shapes."""

from model.kernels.triton import gemm, quantize
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
                Variant(f"quantise {name}{suffix}", quantize.tiles_kernel, TILES, wanted, QUANTIZE_OPTIONS)
            )
        kept = {name: kind for name, kind in TILES.items() if name != "x_ptr"}
        for name, kernel, types in (
            ("requantise columns", quantize.requantize_kernel, kept),
            ("quantise blocks", quantize.blocks_kernel, TILES),
        ):
            found.append(Variant(name + suffix, kernel, types, constants, QUANTIZE_OPTIONS))
    return found


def products() -> list[Variant]:
    """Return the kernel of gemm.py in all its configurations; outputs as each product has them."""
    found = []
    for name, blocks, out, configs in (
        ("product with blocks", True, "*bf16", gemm.BLOCK_SCALES),
        ("weight gradient", False, "*fp32", gemm.ROW_SCALES),
    ):
        types = {"a_ptr": CODES, "a_scales_ptr": SCALES, "b_ptr": CODES, "b_scales_ptr": SCALES}
        types |= {"out_ptr": out, "M": "i32", "N": "i32", "K": "i32"}
        for config in configs:
            tile = f"{config.kwargs['BLOCK_M']}×{config.kwargs['BLOCK_N']}"
            options = {
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
                "enable_fp_fusion": True,
            }
            constants = {"B_BLOCKS": blocks, **config.kwargs}
            found.append(
                Variant(f"{name}, {tile}", gemm.gemm_kernel, types, constants, options, multiplies=True)
            )
    return found
