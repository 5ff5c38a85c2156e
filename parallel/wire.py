"""What rows look like while they travel to experts and back: numbers, or FP8 codes (arXiv 2412.19437, 3.3.3).

Experts that multiply in FP8 quantise the rows they are given, and the gradients of what they return, in
1 x 128 tiles whose scales are powers of two. Nothing is lost when that happens before the exchange, and half
as many bytes travel:

                 rows to the experts     outputs of the experts
    forward      codes                   compute type
    backward     compute type            codes

What returns is added up, over the experts of a token, and keeps the precision of the compute type both ways.

A coded row is one line of bytes, so that codes and scales need one exchange:

    | D codes, E4M3 | a scale for every 128 codes, E8M0 |        B = D + ceil(D / 128) bytes

E8M0 is the scale of the OCP microscaling formats: the biased exponent e of 2^(e - 127), and 255 for NaN.
Scales of `model.kernels.fp8` lie between 2^-117 and 2^120, so it holds each of them exactly.

Exactness: an E4M3 number has four significant bits, so code * scale is exact in BF16 and FP32 where the scale
is a power of two. Quantised again, a tile whose largest code is above 224 gets the scale that it had. If it
is 224, the scale halves and all codes double, which E4M3 can do. So the experts find the values that they
would have found in the rows themselves.

Bytes have no gradient. Autograd follows a *shell* beside them: a tensor with the shape and type of the rows,
but one number in memory. Gradients come back to the shell as if the rows had travelled as they were: the
derivative of quantisation is taken as the identity. A token is quantised once, before it is copied for its
experts, and stays in bytes until its rows lie as the experts want them.

What the codes lose is counted here as well (model/fp8_watch.py): the experts see only what is left. A token,
and the gradient of its output, count once for each of the rows that they become.

Legend: T tokens, R rows, D hidden, A experts per token, B bytes of a coded row.
"""

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.config import Recompute
from model.fp8_watch import Fp8Watch, TensorClass
from model.kernels.fp8 import BLOCK, ROW_TILE, Quantized, quantize
from model.recompute import region

Payload = tuple[Tensor, ...]
"""Rows as a wire holds them."""


class Way(Enum):
    """How one tensor travels in one direction of an exchange."""

    numbers = "numbers"
    """As it is."""
    codes = "codes"
    """As bytes: `encode` before, `decode` after."""
    shape = "shape"
    """Not at all: what arrives is a shell."""


class Trip(NamedTuple):
    """How a tensor travels there, and how its gradient travels back."""

    there: Way = Way.numbers
    back: Way = Way.numbers

    def turned(self) -> "Trip":
        """Return the trip of the gradient."""
        return Trip(self.back, self.there)


class Gather(NamedTuple):
    """Rows taken from others: row r is row index_R[r]; gradient: that of the others from that of the rows."""

    index_R: Tensor
    gradient: Callable[[Tensor], Tensor]


class Wire(Protocol):
    """How rows are held between the router and the experts, and how they and their gradients travel."""

    dispatched: tuple[Trip, ...]
    """Trips of the tensors of a payload."""
    combined: tuple[Trip, ...]
    """Trips of the experts' output."""

    def pack(self, x_TD: Tensor, *, top_k: int) -> Payload:
        """Return tokens as they are copied and sent; top_k: A, the rows that each becomes."""
        ...

    def gather(self, payload: Payload, how: Gather) -> Payload:
        """Return rows taken from others."""
        ...

    def unpack(self, payload: Payload, how: Gather) -> Tensor:
        """Return rows taken from others, [R, D] in the compute type; recomputed where copies of rows are."""
        ...

    def finish(self, y_TD: Tensor, *, top_k: int) -> Tensor:
        """Return the sums of the experts' outputs of each token, whose gradients set off from here."""
        ...


class NumberWire:
    """Rows travel in the compute type, both ways.

    recompute: where copies of rows are recomputed rather than kept.
    """

    dispatched: tuple[Trip, ...] = (Trip(),)
    combined: tuple[Trip, ...] = (Trip(),)

    def __init__(self, recompute: Recompute = Recompute.none) -> None:
        self.recompute = recompute

    def pack(self, x_TD: Tensor, *, top_k: int) -> Payload:
        """Return the tokens."""
        return (x_TD,)

    def gather(self, payload: Payload, how: Gather) -> Payload:
        """Return rows taken from others."""
        return (self.unpack(payload, how),)

    def unpack(self, payload: Payload, how: Gather) -> Tensor:
        """Return rows taken from others."""
        (x_TD,) = payload
        return region(self.recompute, partial(gather, how=how), x_TD)

    def finish(self, y_TD: Tensor, *, top_k: int) -> Tensor:
        """Return the sums."""
        return y_TD


class Fp8Wire:
    """Tokens travel as a shell and bytes [R, B], and so do the gradients of the experts' output.

    recompute: where rows in the compute type are decoded again rather than kept. `watch`, which may be
    replaced by one that is shared: counts what the codes lose, when they are differentiated.
    """

    dispatched: tuple[Trip, ...] = (Trip(there=Way.shape),)  # bytes are integers: sent as they are, one way
    combined: tuple[Trip, ...] = (Trip(back=Way.codes),)

    def __init__(self, recompute: Recompute = Recompute.none) -> None:
        self.recompute, self.watch = recompute, Fp8Watch()

    def pack(self, x_TD: Tensor, *, top_k: int) -> Payload:
        """Return shell and bytes of the tokens, each quantised once."""
        coded = quantize(x_TD.detach(), ROW_TILE, power_of_two=True)
        sample = self.watch.sample(TensorClass.EXPERT_ROWS, x_TD, coded, copies=top_k)

        def gradient(grad_TD: Tensor) -> Tensor:
            self.watch.count(sample)
            return grad_TD

        return _shell_of(x_TD, len(x_TD), gradient), _bytes(coded)

    def gather(self, payload: Payload, how: Gather) -> Payload:
        """Return shell and bytes of rows taken from others."""
        shell_TD, bytes_TB = payload
        shell_RD = _shell_of(shell_TD, len(how.index_R), how.gradient)
        return shell_RD, bytes_TB.index_select(0, how.index_R)

    def unpack(self, payload: Payload, how: Gather) -> Tensor:
        """Return rows taken from others, decoded."""
        return region(self.recompute, partial(_decode_rows, how=how), *payload)

    def finish(self, y_TD: Tensor, *, top_k: int) -> Tensor:
        """Return the sums; an active watch sees their gradients, quantised once more for it."""

        def see(grad_TD: Tensor) -> None:
            coded = quantize(grad_TD, ROW_TILE, power_of_two=True)
            self.watch.see(TensorClass.GRADIENTS, grad_TD, coded, copies=top_k)

        if self.watch.active and y_TD.requires_grad:
            y_TD.register_hook(see)
        return y_TD


def wire(recompute: Recompute, *, fp8: bool) -> Wire:
    """Return the wire of a dispatcher."""
    return Fp8Wire(recompute) if fp8 else NumberWire(recompute)


def encode(x_RD: Tensor) -> Tensor:
    """Return rows, in BF16, FP16 or FP32, as bytes: uint8 [R, B], no gradient."""
    return _bytes(quantize(x_RD, ROW_TILE, power_of_two=True))


def decode(bytes_RB: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows that bytes stand for, [R, D] in `dtype`: exact in BF16 and FP32."""
    codes_RD, scales = bytes_RB.tensor_split([_width(bytes_RB.shape[1])], dim=1)
    scales = scales.contiguous().view(torch.float8_e8m0fnu).float()
    return Quantized(codes_RD.view(torch.float8_e4m3fn), scales, ROW_TILE, power_of_two=True).dequantize(
        dtype
    )


def shell(num_rows: int, like: Tensor) -> Tensor:
    """Return rows with the width, type and device of those of `like`, all one zero in memory; [R, D]."""
    return like.new_zeros(1, 1).expand(num_rows, like.shape[1])


def gather(x_TD: Tensor, how: Gather) -> Tensor:
    """Return row index[r] of x as row r, [R, D] or [R]; differentiable."""
    return through(x_TD, lambda x_TD: x_TD.index_select(0, how.index_R), how.gradient)


def through(x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
    """Return forward(x), whose gradient `backward` turns into that of x; neither holds on to x."""
    y: Any = _Through.apply(x, forward, backward)
    return y


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.gradient = backward
        return forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient(grads[0]), None, None


def _shell_of(x_TD: Tensor, num_rows: int, gradient: Callable[[Tensor], Tensor]) -> Tensor:
    return through(x_TD, partial(shell, num_rows), gradient)


def _decode_rows(shell_TD: Tensor, bytes_TB: Tensor, how: Gather) -> Tensor:
    """Return row index[r] of the bytes, decoded, as row r; the gradient is the shell's."""
    bytes_RB = bytes_TB.index_select(0, how.index_R)
    return through(shell_TD, lambda shell_TD: decode(bytes_RB, shell_TD.dtype), how.gradient)


def _bytes(coded: Quantized) -> Tensor:
    """Return codes and scales as lines of bytes."""
    scales = coded.scales.to(torch.float8_e8m0fnu)
    return torch.cat([coded.codes.view(torch.uint8), scales.view(torch.uint8)], 1)


def _width(num_bytes: int) -> int:
    """Return D from B: of every 129 bytes, and of what remains, the last is a scale."""
    return num_bytes - -(-num_bytes // (BLOCK + 1))
