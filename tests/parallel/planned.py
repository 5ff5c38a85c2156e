"""A card and a model for tests of plans: round rates, and links of which one is much slower."""

from model.config import PrecisionConfig
from parallel.cluster import ClusterConfig, Efficiencies
from parallel.planner import Task
from tests.model.small import small

PERFECT = Efficiencies(
    gemm_bf16=1,
    gemm_fp8=1,
    attention_forward=1,
    attention_backward=1,
    memory=1,
    intra_node=1,
    inter_node=1,
)

CARD = ClusterConfig(
    name="card",
    node_size=4,
    memory_gb=1.0,
    memory_reserve_gb=0.0,
    peak_tflops=1.0,
    peak_fp8_tflops=2.0,
    peak_fp32_tflops=0.5,
    memory_gb_s=100.0,
    intra_node_gb_s=10.0,
    inter_node_gb_s=1.0,
    dollars_per_hour=2.0,
    efficiency=PERFECT,
)

MODEL = small(num_layers=6, num_mtp_layers=1, num_heads=4, q_lora_rank=16, qk_rope_head_dim=8, num_experts=8)


def task(**changes: object) -> Task:
    """Return a task of 8 devices, with settings of our own where given."""
    settings: dict[str, object] = {
        "model": MODEL,
        "precision": PrecisionConfig(),
        "cluster": CARD,
        "world_size": 8,
        "seq_len": 64,
        "batch_sizes": (32,),
        "moment_bytes": 2,
    }
    return Task(**(settings | changes))  # type: ignore[arg-type]
