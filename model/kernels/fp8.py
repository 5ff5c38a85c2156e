"""Block quantisation to FP8: E4M3 codes, and an FP32 scale for each tile or block (arXiv 2412.19437, 3.3.2).

E4M3 has four significant bits and spans 2^-9 to 448. One scale for a whole tensor would let a single outlier
push everything else below that range; a scale for each 1 x 128 tile of an activation (one token, 128
channels) and each 128 x 128 block of a weight confines an outlier to its neighbours:

    scale = max |x| / 448         in FP32, or rounded up to a power of two
    code  = E4M3(x / scale)       to nearest, ties to even
    x     ~ code * scale

A power of two loses up to one bit of range, and makes code * scale exact in BF16: quantising such a tensor
again in another direction, as the weight gradient needs, then adds next to no error of its own.

What is defined beyond that:

* a tile of zeros has scale 1;
* a tile that holds an infinity or a NaN has the scale NaN and so decodes to NaN throughout. The codes alone
  could not tell: the conversion to E4M3 turns an infinity into 448;
* scales are at least 2^-117, so that the smallest code, 2^-9, decodes to a normal number in FP32 and BF16;
* tiles at the edges are smaller: sizes need not be multiples of 128.

Legend: R rows, C columns, H and W height and width of a block, r = R / H and c = C / W rounded up;
N rows of blocks of a tensor with any leading dimensions, n of them in cache at a time.
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.blocks import row_blocks, scratch_rows

BLOCK = 128
LARGEST_CODE = 448.0
SMALLEST_SCALE = 2.0**-117

BlockShape = tuple[int, int]
"""Height and width, in rows and columns, of what shares a scale."""

ROW_TILE: BlockShape = (1, BLOCK)
"""For a product that sums over columns: activations and output gradients."""
COLUMN_TILE: BlockShape = (BLOCK, 1)
"""For a product that sums over rows: both operands of a weight gradient."""
SQUARE: BlockShape = (BLOCK, BLOCK)
"""For weights, whose products sum over columns forward and over rows backward."""

CHUNK_ELEMENTS = 1 << 18
"""Elements that are coded or decoded at a time. Most of these passes are over one or two bytes an element:
with fewer at a time, calling them would cost as much as they do."""
_HALF_SHIFT = 1 << 7
"""Times this, E4M3's sign, exponent and mantissa are those of an FP16 number 2^8 times smaller."""
_HALF_FACTOR = 256.0


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor [..., R, C] as codes and scales.

    codes: float8_e4m3fn [..., R, C]; scales: FP32 [..., r, c]; block: the shape that shares a scale;
    power_of_two: whether all scales are, which makes `dequantize` exact in BF16.
    """

    codes: Tensor
    scales: Tensor
    block: BlockShape
    power_of_two: bool

    @property
    def T(self) -> "Quantized":  # noqa: N802 (named as torch names it)
        """Return the transposed tensor [..., C, R], a view."""
        high, wide = self.block
        return Quantized(self.codes.mT, self.scales.mT, (wide, high), self.power_of_two)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return codes * scales, [..., R, C], rounded once if `dtype` cannot hold the product."""
        if self.codes.is_contiguous():
            return _decode(self, dtype)
        if self.codes.mT.is_contiguous():
            return _decode(self.T, dtype).mT
        return _decode(Quantized(self.codes.contiguous(), self.scales, self.block, self.power_of_two), dtype)


def quantize(x: Tensor, block: BlockShape, *, power_of_two: bool) -> Quantized:
    """Return x [..., R, C], in BF16, FP16 or FP32, quantised with one scale for each block."""
    x_NHcW = _split(x, block)
    scales_Nc = _scales(_largest_magnitudes(x_NHcW), power_of_two=power_of_two)
    # multiplying by a rounded reciprocal would give other codes; that of a power of two is exact, and cheaper
    factors_NIcI = (scales_Nc.reciprocal() if power_of_two else scales_Nc)[:, None, :, None]
    scale = Tensor.mul_ if power_of_two else Tensor.div_
    codes_NHcW = torch.empty(x_NHcW.shape, dtype=torch.float8_e4m3fn, device=x.device)
    num_blocks, width = len(x_NHcW), prod(x_NHcW.shape[1:])
    scratch = x.new_empty(
        scratch_rows(num_blocks, width, elements=CHUNK_ELEMENTS), *x_NHcW.shape[1:], dtype=torch.float32
    )
    for part in row_blocks(num_blocks, width, elements=CHUNK_ELEMENTS):
        x_nHcW = x_NHcW[part]
        codes_NHcW[part] = scale(scratch[: len(x_nHcW)].copy_(x_nHcW), factors_NIcI[part])
    codes = _join(codes_NHcW, x.shape)
    if codes.numel() < codes_NHcW.numel():  # a view, even a contiguous one, would keep the edges in memory
        codes = codes.clone(memory_format=torch.contiguous_format)
    down, across = _ceil_div(x.shape[-2], block[0]), scales_Nc.shape[1]
    return Quantized(codes, scales_Nc.view(*x.shape[:-2], down, across), block, power_of_two)


def requantize(x: Quantized, block: BlockShape) -> Quantized:
    """Return the tensor in blocks of another shape, from codes and scales alone.

    This is how a weight gradient gets 128 x 1 tiles of an activation that was kept in 1 x 128 tiles.
    """
    dtype = torch.bfloat16 if x.power_of_two else torch.float32
    return quantize(x.dequantize(dtype), block, power_of_two=x.power_of_two)


def _ceil_div(size: int, divisor: int) -> int:
    return -(-size // divisor)


def _split(x: Tensor, block: BlockShape) -> Tensor:
    """Return x [..., R, C] as rows of blocks [N, H, c, W], with zeros beyond its edges."""
    high, wide = block
    down, across = (_ceil_div(size, side) for size, side in zip(x.shape[-2:], block, strict=True))
    below, right = down * high - x.shape[-2], across * wide - x.shape[-1]
    padded = F.pad(x, (0, right, 0, below)) if below or right else x.contiguous()
    return padded.view(prod(x.shape[:-2]) * down, high, across, wide)


def _join(x_NHcW: Tensor, shape: torch.Size) -> Tensor:
    """Return [..., R, C] from rows of blocks, without what lies beyond its edges; a view."""
    _, high, across, wide = x_NHcW.shape
    rows, columns = shape[-2:]
    padded = x_NHcW.view(*shape[:-2], _ceil_div(rows, high) * high, across * wide)
    return padded[..., :rows, :columns]


def _largest_magnitudes(x_NHcW: Tensor) -> Tensor:
    """Return max |x| of each block, FP32 [N, c].

    Without its sign bit a floating-point number orders as an integer does, which is several times faster to
    compare. Infinity and NaN come out as the largest.
    """
    integer, magnitude = (torch.int32, 0x7FFFFFFF) if x_NHcW.itemsize == 4 else (torch.int16, 0x7FFF)
    bits_NHcW = x_NHcW.view(integer) & magnitude
    bits_NHc = bits_NHcW.squeeze(-1) if bits_NHcW.shape[-1] == 1 else bits_NHcW.amax(-1)
    bits_Nc = bits_NHc.squeeze(1) if bits_NHc.shape[1] == 1 else bits_NHc.amax(1)
    return bits_Nc.view(x_NHcW.dtype).float()


def _scales(amax: Tensor, *, power_of_two: bool) -> Tensor:
    """Return the scales of blocks whose largest magnitudes are `amax`, FP32."""
    scales = (amax / LARGEST_CODE).clamp_min(SMALLEST_SCALE)
    if power_of_two:  # any bit of the mantissa carries into the exponent
        scales = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    scales = scales.masked_fill(amax == 0, 1.0)
    return scales.masked_fill(~torch.isfinite(amax), torch.nan)


def _decode(x: Quantized, dtype: torch.dtype) -> Tensor:
    """Return codes * scales; codes are contiguous.

    By way of FP16, which converts to FP32 in hardware. A NaN code would not survive the shift, but stands
    only in blocks whose scale is NaN.
    """
    codes_NHcW = _split(x.codes.view(torch.int8), x.block)
    num_blocks, width = len(codes_NHcW), prod(codes_NHcW.shape[1:])
    scales_NIcI = x.scales.reshape(num_blocks, 1, codes_NHcW.shape[2], 1)
    out_NHcW = codes_NHcW.new_empty(codes_NHcW.shape, dtype=dtype)
    size = (scratch_rows(num_blocks, width, elements=CHUNK_ELEMENTS), *codes_NHcW.shape[1:])
    bits = codes_NHcW.new_empty(size, dtype=torch.int16)
    values = None if dtype is torch.float32 else codes_NHcW.new_empty(size, dtype=torch.float32)
    for part in row_blocks(num_blocks, width, elements=CHUNK_ELEMENTS):
        codes_nHcW, out_nHcW = codes_NHcW[part], out_NHcW[part]
        bits_nHcW = bits[: len(codes_nHcW)].copy_(codes_nHcW)  # the sign is extended to the left
        bits_nHcW.mul_(_HALF_SHIFT).bitwise_and_(~0x4000)
        values_nHcW = out_nHcW if values is None else values[: len(codes_nHcW)]
        # one after the other: their product may overflow where codes * scales does not
        values_nHcW.copy_(bits_nHcW.view(torch.float16)).mul_(_HALF_FACTOR).mul_(scales_NIcI[part])
        if values is not None:
            out_nHcW.copy_(values_nHcW)
    return _join(out_NHcW, x.codes.shape)
