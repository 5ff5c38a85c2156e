"""What the FP8 backends ask of a model and of a layout; checked anywhere, also by plans. Imports no torch."""

from collections.abc import Iterator

from model.config import Gemm, ModelConfig, PrecisionConfig
from parallel.config import Engine, ParallelConfig

WIDTH_MULTIPLE = 16
"""Transformer Engine's FP8 products take widths that are multiples of this,"""
BLACKWELL_MULTIPLE = 32
"""and on Blackwell of the number of values that share a scale there."""


def backend_problems(
    precision: PrecisionConfig,
    layout: ParallelConfig,
    model: ModelConfig,
    *,
    path: str,
    multiple: int = WIDTH_MULTIPLE,
) -> list[str]:
    """Return what `precision.gemm` asks of a model, and of a layout, whose place is `path`.

    multiple: of which widths must be, on the GPUs that are known to run it.
    """
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
        f"{multiple}, as precision.gemm=fp8_te needs; change one of them, or use another precision"
        for name, width, shares in _widths(model, layout)
        if width % (multiple * shares)
    ]


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
