"""The hardware a plan is made for: one accelerator, its links, its price. Importable without torch.

Peaks are the vendor's. What share of them a job reaches is in `Efficiencies`, each with its source beside the
default: measurements that others published of single kernels, none of them fitted to the speed of a whole
training run. `python -m launch calibrate` measures them where there is a device.
"""

from dataclasses import dataclass, field, fields


@dataclass(kw_only=True, slots=True)
class Efficiencies:
    """Shares of a peak that a job reaches; 1 is the speed of light. Where the defaults come from:

    gemm_bf16           the best shapes reach 0.80 (H100) and 0.78 (B200): ml-engineering, "maximum achievable
                        matmul FLOPS"; a model's own shapes a little less
    gemm_fp8            DeepGEMM's first release on H800, DeepSeek-V3's shapes at 4096 tokens: 590 to 1358
                        TFLOP/s, 1186 of 1979 weighted by FLOPs
    attention_forward   FlashAttention-3 on H100, causal, 4096 tokens, heads of 128: 590 of 989 TFLOP/s
                        (pytorch/benchmark #2391); FlashMLA on B200: at most 1460 of 2250
    attention_backward  FlashMLA on B200: at most 1000 of 2250, at 2.5 times the forward FLOPs
    memory              DeepGEMM's memory-bound shapes on H800: 2668 of 3350 GB/s; plain streams reach 0.92
    intra_node          DeepEP inside a node: 153 to 158 of 200 GB/s (H800), 726 to 740 of 900 (B200)
    inter_node          DeepEP over 8 nodes: 46 of 50 GB/s, of which 1/8 does not leave the node
    """

    gemm_bf16: float = 0.75  # of peak_tflops, in BF16 products; of peak_fp32_tflops, in FP32 ones
    gemm_fp8: float = 0.60  # of peak_fp8_tflops, in block-scaled FP8 products
    attention_forward: float = 0.60  # of peak_tflops, in the forward pass of the attention core
    attention_backward: float = 0.45  # of peak_tflops, in its backward pass, of 2.5 times the forward FLOPs
    memory: float = 0.80  # of memory_gb_s, in operations that are bound by it
    intra_node: float = 0.80  # of intra_node_gb_s, in exchanges of many megabytes
    inter_node: float = 0.80  # of inter_node_gb_s, in exchanges of many megabytes

    def problems(self) -> list[str]:
        """Return every broken rule."""
        return [
            f"{each.name}={getattr(self, each.name)} must lie in (0, 1]; use {each.default}"
            for each in fields(self)
            if not 0 < getattr(self, each.name) <= 1
        ]


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """The machines that figures are compared with and plans are made for; null where nothing is known."""

    name: str = "cpu"
    num_devices: int | None = None  # devices of the whole cluster; null: as many as the job has processes
    node_size: int = 8  # devices joined by the fast link
    memory_gb: float | None = None  # of one device, in 10^9 bytes
    memory_reserve_gb: float = (
        6.0  # of it, what no plan may use: driver, communication buffers, fragmentation
    )
    peak_tflops: float | None = None  # dense BF16 peak of one device; null: no MFU is reported
    peak_fp8_tflops: float | None = None  # dense FP8 peak; null: the device has no FP8
    peak_fp32_tflops: float | None = None  # dense peak of matrix products in FP32 (TF32 where there is one)
    memory_gb_s: float | None = None  # memory bandwidth of one device, 10^9 bytes per second
    intra_node_gb_s: float | None = None  # of one device to others of its node, each way
    inter_node_gb_s: float | None = None  # of one device to other nodes, each way
    dollars_per_hour: float | None = None  # rent of one device; null: no cost is printed
    communication_share: float = 0.0  # of a device's compute units that exchanges under way take from it
    hop_overlap: float = (
        1.0  # of the shorter hop of two_hop, hidden behind the longer; 0: one after the other
    )
    efficiency: Efficiencies = field(default_factory=Efficiencies)

    @property
    def usable_gb(self) -> float | None:
        """Return what a job may use of a device's memory, in 10^9 bytes; None where that is not known."""
        return None if self.memory_gb is None else self.memory_gb - self.memory_reserve_gb

    def problems(self) -> list[str]:
        """Return every broken rule."""
        found: list[str] = []
        for name in ("num_devices", "node_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"{name}={value} must be at least 1; use 8")
        for name in (
            "memory_gb",
            "peak_tflops",
            "peak_fp8_tflops",
            "peak_fp32_tflops",
            "memory_gb_s",
            "intra_node_gb_s",
            "inter_node_gb_s",
            "dollars_per_hour",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                found.append(f"{name}={value} must be positive; use null where it is not known")
        if self.memory_reserve_gb < 0 or (self.memory_gb or float("inf")) <= self.memory_reserve_gb:
            found.append(
                f"memory_reserve_gb={self.memory_reserve_gb} must lie in [0, memory_gb={self.memory_gb}); "
                "use 0"
            )
        if not 0 <= self.communication_share < 1:
            found.append(f"communication_share={self.communication_share} must lie in [0, 1); use 0")
        if not 0 <= self.hop_overlap <= 1:
            found.append(f"hop_overlap={self.hop_overlap} must lie in [0, 1]; use 1")
        return found
