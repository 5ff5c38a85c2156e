"""What a device of a cluster does in a second: its peaks times the shares of them that a job reaches."""

from dataclasses import dataclass

from model.config import Compute, Gemm, PrecisionConfig
from parallel.cluster import ClusterConfig

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """FLOP/s and bytes/s that are reached."""

    block: float
    """Matrix products by the weights of blocks: in FP8 where the precision says so."""
    plain: float
    """All other matrix products, in the compute type."""
    attention_forward: float
    attention_backward: float
    memory: float
    intra: float
    """To other devices of the node, each way."""
    inter: float
    """To other nodes, each way."""


def missing(cluster: ClusterConfig, precision: PrecisionConfig) -> list[str]:
    """Return what a plan needs to know of the cluster and does not, as `cluster.field=value rule; remedy`."""
    needs = ["memory_gb", "memory_gb_s", "intra_node_gb_s", "inter_node_gb_s", _plain_peak(precision)]
    found = [
        f"cluster.{name}=null must be known for a plan; set it, or choose a card such as cluster=h100"
        for name in needs
        if getattr(cluster, name) is None
    ]
    if precision.gemm is not Gemm.compute and cluster.peak_fp8_tflops is None:
        found.append(
            f"cluster.peak_fp8_tflops=null: {cluster.name} has no FP8, which precision.gemm={precision.gemm} "
            "needs; use precision=bf16, or a card such as cluster=h100"
        )
    return found


def rates_of(cluster: ClusterConfig, precision: PrecisionConfig) -> Rates:
    """Return the rates of one device. Raises ValueError where `missing` names something."""
    if problems := missing(cluster, precision):
        raise ValueError("; ".join(problems))
    reached = cluster.efficiency
    plain_peak = TERA * _known(cluster, _plain_peak(precision))
    plain = plain_peak * reached.gemm_bf16
    fp8 = precision.gemm is not Gemm.compute
    return Rates(
        block=TERA * _known(cluster, "peak_fp8_tflops") * reached.gemm_fp8 if fp8 else plain,
        plain=plain,
        attention_forward=plain_peak * reached.attention_forward,
        attention_backward=plain_peak * reached.attention_backward,
        memory=GIGA * _known(cluster, "memory_gb_s") * reached.memory,
        intra=GIGA * _known(cluster, "intra_node_gb_s") * reached.intra_node,
        inter=GIGA * _known(cluster, "inter_node_gb_s") * reached.inter_node,
    )


def _plain_peak(precision: PrecisionConfig) -> str:
    return "peak_fp32_tflops" if precision.compute is Compute.fp32 else "peak_tflops"


def _known(cluster: ClusterConfig, name: str) -> float:
    return float(getattr(cluster, name))
