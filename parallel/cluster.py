"""The hardware a plan is made for: one accelerator, its links, its price. Importable without torch.

Peaks are the vendor's. What share of them a job reaches is in `Efficiencies`, each with its source beside the
default; `python -m launch calibrate` measures them where there is a device.
"""

from dataclasses import dataclass, field, fields


@dataclass(kw_only=True, slots=True)
class Efficiencies:
    """Shares of a peak that a job reaches; 1 is the speed of light."""

    gemm_bf16: float = 0.75  # of peak_tflops, in large BF16 products
    gemm_fp8: float = 0.60  # of peak_fp8_tflops, in block-scaled FP8 products
    attention_forward: float = 0.62  # of peak_tflops, in the forward pass of the attention core
    attention_backward: float = 0.50  # of peak_tflops, in its backward pass
    memory: float = 0.80  # of memory_gb_s, in operations that are bound by it
    intra_node: float = 0.80  # of intra_node_gb_s, in exchanges of many megabytes
    inter_node: float = 0.90  # of inter_node_gb_s, in exchanges of many megabytes

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
    peak_tflops: float | None = None  # dense BF16 peak of one device; null: no MFU is reported
    peak_fp8_tflops: float | None = None  # dense FP8 peak; null: the device has no FP8
    memory_gb_s: float | None = None  # memory bandwidth of one device, 10^9 bytes per second
    intra_node_gb_s: float | None = None  # of one device to others of its node, each way
    inter_node_gb_s: float | None = None  # of one device to other nodes, each way
    dollars_per_hour: float | None = None  # rent of one device; null: no cost is printed
    communication_share: float = 0.0  # of a device's compute units that exchanges under way take from it
    efficiency: Efficiencies = field(default_factory=Efficiencies)

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
            "memory_gb_s",
            "intra_node_gb_s",
            "inter_node_gb_s",
            "dollars_per_hour",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                found.append(f"{name}={value} must be positive; use null where it is not known")
        if not 0 <= self.communication_share < 1:
            found.append(f"communication_share={self.communication_share} must lie in [0, 1); use 0")
        return found
