"""A stand-in for Transformer Engine: its interface, its conventions for gradients and codes, plain products.

Transformer Engine computes on a GPU only. What its adapter has to get right besides is held against this:
every call is bound to the real signatures (te_signatures.json), and what the sources of 2.20.2 do with
`main_grad`, `is_first_microbatch`, queued products and kept codes is repeated. Products are plain, in the
type of the operands, so that whole models can be compared with models without it. "Codes" are copies of the
weights. The kernel of FusedAdam is repeated from its source.
"""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.model.te_signatures import signature, stored

recipes: dict[int, Any] = {}
"""The recipe with which each module ran last, by the address of its first weight."""
_autocast: list[Any] = []
_width_multiple = 16


def install_stand_in(
    monkeypatch: pytest.MonkeyPatch, *, capability: tuple[int, int] = (9, 0), width_multiple: int = 16
) -> None:
    """Let `transformer_engine` be this module, on a GPU of a compute capability.

    width_multiple: what widths must be multiples of on Hopper, in truth 16.
    """
    recipes.clear()
    monkeypatch.setattr(sys.modules[__name__], "_width_multiple", width_multiple)
    for name, members in {
        "transformer_engine": {},
        "transformer_engine.pytorch": {
            "Linear": Linear,
            "GroupedLinear": GroupedLinear,
            "autocast": autocast,
        },
        "transformer_engine.pytorch.optimizers": {
            "multi_tensor_applier": multi_tensor_applier,
            "multi_tensor_adam": multi_tensor_adam,
        },
        "transformer_engine.common": {},
        "transformer_engine.common.recipe": {kind: _recipe(kind) for kind in stored()["fields"]},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def multi_tensor_applier(kernel: Any, noop_flag: Tensor, tensors: list[list[Tensor]], *numbers: Any) -> None:
    """Call the kernel as the real one does: a launch takes so many elements, lists are of one length."""
    assert len({len(each) for each in tensors}) == 1
    kernel(65536, noop_flag, tensors, *numbers)


def multi_tensor_adam(chunk_size: int, noop_flag: Tensor, tensors: list[list[Tensor]], *numbers: Any) -> None:
    """Repeat transformer_engine/common/multi_tensor/adam.cu: FP32 arithmetic, moments rounded once."""
    *names, order = stored()["fused_adam"]
    assert names[:3] == ["adam_func", "self._dummy_overflow_buf", "tensor_list_chunk"]
    assert order == "[g_of_f32_model, p_f32_model, m_of_f32_model, v_of_f32_model]"
    given = dict(zip((name for name in names[3:] if not name.startswith("*")), numbers, strict=True))
    assert given["self.adam_w_mode"] == given["bias_correction"] == 1
    assert noop_flag.dtype == torch.int32
    beta1, beta2, step = given["beta1"], given["beta2"], given["group['step']"]
    for gradient, weights, first, second in zip(*tensors, strict=True):
        assert gradient.dtype == weights.dtype == torch.float32
        assert first.dtype == second.dtype
        m = beta1 * first.float() + (1 - beta1) * gradient
        v = beta2 * second.float() + (1 - beta2) * gradient * gradient
        update = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + given["group['eps']"])
        weights -= given["group['lr']"] * (update + given["group['weight_decay']"] * weights)
        first.copy_(m)
        second.copy_(v)


class autocast:  # noqa: N801 (its name)
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        given = signature("autocast").bind(*arguments, **keywords).arguments
        assert given["enabled"]
        self._recipe = given["recipe"]

    def __enter__(self) -> None:
        _autocast.append(self._recipe)

    def __exit__(self, *_: object) -> None:
        _autocast.pop()


class _Module(nn.Module):
    """What both modules share; `matrices` names the weights."""

    def __init__(self, kind: str, given: dict[str, Any], matrices: list[str]) -> None:
        super().__init__()
        assert not given["bias"]
        assert given["fuse_wgrad_accumulation"]
        assert given["delay_wgrad_compute"]
        self._kind, self._matrices = kind, matrices
        self._fp8_workspaces: dict[str, Tensor] = {}
        self.queue: list[Callable[[], None]] = []
        size = (given["out_features"], given["in_features"])
        for name in matrices:
            memory = torch.empty(size, dtype=given["params_dtype"], device=given["device"])
            self.register_parameter(name, nn.Parameter(memory))

    def run(self, x: Tensor, sizes: list[int], is_first_microbatch: bool | None) -> Tensor:
        assert sum(sizes) == len(x)
        assert not any(size % 128 for size in sizes)  # Float8BlockQuantizer.is_quantizable
        # assert_dim_for_fp8_exec; MXFP8Quantizer in csrc/quantizer.cpp
        multiple = 32 if type(_autocast[-1]).__name__ == "MXFP8BlockScaling" else _width_multiple
        assert not any(
            width % multiple for width in (x.shape[-1], *self.get_parameter(self._matrices[0]).shape)
        )
        weights = [self.get_parameter(name) for name in self._matrices]
        recipes[weights[0].data_ptr()] = _autocast[-1]
        assert all(weight.dtype == x.dtype for weight in weights)
        if is_first_microbatch is not False:
            self._fp8_workspaces.clear()
        for name, weight in zip(self._matrices, weights, strict=True):
            self._fp8_workspaces.setdefault(name, weight.detach().clone())
        codes = [self._fp8_workspaces[name] for name in self._matrices]
        y: Any = _Products.apply(x, self, sizes, codes, bool(is_first_microbatch), *weights)
        return y

    def backward_dw(self, *arguments: Any) -> None:
        signature(f"{self._kind}.backward_dw").bind(*arguments)
        self.queue.pop(0)()


class Linear(_Module):
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__("Linear", signature("Linear").bind(*arguments, **keywords).arguments, ["weight"])

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        given = signature("Linear.forward").bind(*arguments, **keywords).arguments
        x = given["inp"]
        y = self.run(x.reshape(-1, x.shape[-1]), [x[..., 0].numel()], given.get("is_first_microbatch"))
        return y.view(*x.shape[:-1], -1)


class GroupedLinear(_Module):
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        given = signature("GroupedLinear").bind(*arguments, **keywords).arguments
        assert given["use_grouped_tensor"] is False
        super().__init__("GroupedLinear", given, [f"weight{i}" for i in range(given["num_gemms"])])

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        given = signature("GroupedLinear.forward").bind(*arguments, **keywords).arguments
        sizes = given["m_splits"]
        assert sizes.dtype == torch.int64
        return self.run(given["inp"], sizes.tolist(), given.get("is_first_microbatch"))


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        module: _Module,
        sizes: list[int],
        codes: list[Tensor],
        first: bool,
        *weights: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, *codes)
        ctx.module, ctx.sizes, ctx.first, ctx.weights = module, sizes, first, weights
        return torch.cat([part @ matrix.T for part, matrix in zip(x.split(sizes), codes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, *codes), sizes = ctx.saved_tensors, ctx.sizes
        parts = list(zip(grads[0].split(sizes), x.split(sizes), codes, ctx.weights, strict=True))

        def multiply() -> None:
            for dy, inputs, _, weight in parts:
                product = (dy.T @ inputs).to(weight.main_grad.dtype)
                weight.main_grad.copy_(product if ctx.first else weight.main_grad + product)

        if ctx.weights[0].requires_grad:
            ctx.module.queue.append(multiply)
        dx = torch.cat([dy @ matrix for dy, _, matrix, _ in parts])
        return dx, *(None,) * (4 + len(codes))


def _recipe(kind: str) -> type:
    """Return a class that takes the real one's fields."""

    def __init__(self: Any, **keywords: Any) -> None:  # noqa: N807
        assert not set(keywords) - set(stored()["fields"][kind])
        self.__dict__.update(keywords)

    def __setattr__(self: Any, name: str, value: Any) -> None:  # noqa: N807
        assert name in stored()["fields"][kind]
        self.__dict__[name] = value

    return type(kind, (SimpleNamespace,), {"__init__": __init__, "__setattr__": __setattr__})
