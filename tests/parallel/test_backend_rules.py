"""What the FP8 backends ask of a model and a layout is said with the remedy, and plans keep to it."""

import pytest

from model.config import AttentionConfig, Gemm, ModelConfig, MoEConfig, PrecisionConfig
from parallel.backend_rules import BLACKWELL_MULTIPLE, backend_problems
from parallel.candidates import candidates
from parallel.config import Engine, ParallelConfig
from tests.parallel.planned import task

TRITON, TE = PrecisionConfig(gemm=Gemm.fp8_triton), PrecisionConfig(gemm=Gemm.fp8_te)


def test_transformer_engine_and_deepspeed() -> None:
    layout = ParallelConfig(engine=Engine.deepspeed)
    (line,) = backend_problems(TE, layout, ModelConfig(), path="parallel")
    assert line.startswith("parallel.engine=deepspeed cannot be had with precision.gemm=fp8_te")
    assert "use engine=zero1" in line
    assert backend_problems(TRITON, layout, ModelConfig(), path="parallel") == []


def test_widths_that_transformer_engine_does_not_take() -> None:
    model = ModelConfig(
        moe=MoEConfig(intermediate_size=24), attention=AttentionConfig(q_lora_rank=8, kv_lora_rank=16)
    )
    found = backend_problems(TE, ParallelConfig(), model, path="parallel")
    assert {line.split("=")[0] for line in found} == {
        "model.moe.intermediate_size",
        "model.moe.num_shared_experts × intermediate_size",
        "model.attention.q_lora_rank",
    }
    assert "model.attention.q_lora_rank=8 over parallel.tp=1 leaves 8 columns" in found[0]
    (line,) = backend_problems(TE, ParallelConfig(tp=256), ModelConfig(), path="parallel")[-1:]
    assert "over parallel.tp=256 leaves 8 columns" in line
    assert backend_problems(TE, ParallelConfig(tp=8), ModelConfig(), path="parallel") == []


HEADS = "model.attention.num_heads ×"
KEYS = "model.attention.kv_lora_rank + qk_rope_head_dim"
QUERIES, ROWS = f"{HEADS} (qk_nope_head_dim + qk_rope_head_dim)", f"{HEADS} (qk_nope_head_dim + v_head_dim)"
DENSE = "model.dense_intermediate_size"


@pytest.mark.parametrize(
    ("model", "tp", "names"),
    [
        (ModelConfig(attention=AttentionConfig(num_heads=1, qk_rope_head_dim=8)), 1, {KEYS, QUERIES}),
        (ModelConfig(attention=AttentionConfig(num_heads=1, qk_nope_head_dim=120)), 1, {QUERIES, ROWS}),
        (ModelConfig(dense_intermediate_size=24), 1, {DENSE}),
        (ModelConfig(dense_intermediate_size=24, num_dense_layers=0), 1, set()),
        (ModelConfig(moe=MoEConfig(intermediate_size=24), num_dense_layers=61), 1, set()),
        (ModelConfig(moe=MoEConfig(intermediate_size=48, num_shared_experts=2)), 2, set()),
    ],
)
def test_widths_are_those_of_the_matrices_there_are(model: ModelConfig, tp: int, names: set[str]) -> None:
    """Those of routed experts are not split over tp."""
    found = backend_problems(TE, ParallelConfig(tp=tp), model, path="parallel")
    assert {line.split("=")[0] for line in found} == names


def test_blackwell_takes_fewer_widths() -> None:
    model = ModelConfig(moe=MoEConfig(intermediate_size=48))
    assert backend_problems(TE, ParallelConfig(), model, path="parallel") == []
    found = backend_problems(TE, ParallelConfig(), model, path="parallel", multiple=BLACKWELL_MULTIPLE)
    assert "no multiple of 32, as precision.gemm=fp8_te needs" in found[0]
    assert len(found) == 2
    tp = ParallelConfig(tp=8)
    assert backend_problems(TE, tp, ModelConfig(), path="parallel", multiple=BLACKWELL_MULTIPLE) == []


def test_plans_keep_to_widths_that_transformer_engine_takes() -> None:
    model = ModelConfig(
        moe=MoEConfig(num_experts=8, num_groups=1, top_k_groups=1, top_k=2, intermediate_size=32)
    )
    tps = {}
    for precision in (TRITON, TE):
        asked = task(model=model, precision=precision, world_size=8, batch_sizes=(8,))
        tps[precision.gemm] = {layout.tp for layout in candidates(asked, base=ParallelConfig())}
    assert tps == {Gemm.fp8_triton: {1, 2, 4}, Gemm.fp8_te: {1, 2}}
    on_deepspeed = ParallelConfig(engine=Engine.deepspeed)
    assert not list(candidates(task(precision=TE, world_size=8, batch_sizes=(8,)), base=on_deepspeed))
