"""What a model is: sizes, routing, precision and recomputation. Importable without torch.

Defaults are DeepSeek-V3's (arXiv 2412.19437, section 4.2), so `ModelConfig()` is the 671B model.
`problems()` lists every broken rule of a section as "field=value rule; remedy"; nothing is ever
corrected silently.
"""

from dataclasses import dataclass, field
from enum import StrEnum


class Recompute(StrEnum):
    """Which activations are thrown away in the forward pass and computed again in the backward pass."""

    none = "none"
    """Keep everything."""
    deepseek = "deepseek"
    """RMSNorm outputs, MLA up-projections and SwiGLU outputs: what the report recomputes (section 3.2.3)."""
    core = "core"
    """`deepseek` plus the attention core itself."""
    full = "full"
    """Keep only the input of each block."""


class Compute(StrEnum):
    """The floating-point type of GEMM inputs and activations."""

    bf16 = "bf16"
    fp32 = "fp32"
    fp16 = "fp16"


class Gemm(StrEnum):
    """What multiplies by weights inside the blocks; never embedding, head, gate and attention core."""

    compute = "compute"
    """The compute type."""
    fp8_reference = "fp8_reference"
    """Block-scaled FP8 (arXiv 2412.19437, section 3.3), emulated in plain torch."""
    fp8_triton = "fp8_triton"
    """The same by this project's Triton kernels; needs a GPU of compute capability 9.0 or more."""
    fp8_te = "fp8_te"
    """The same maps by Transformer Engine, with what its recipes leave open (docs/fp8.md)."""


class Fp8Scales(StrEnum):
    """Which scales of FP8 blocks are powers of two rather than FP32 numbers."""

    deepseek = "deepseek"
    """The report's: inputs of attention's output projection, and what routed experts exchange (3.3.3)."""
    power_of_two = "power_of_two"
    """All of them, as in Transformer Engine's recipe."""


@dataclass(kw_only=True, slots=True)
class LossScaleConfig:
    """Dynamic loss scaling, used only when computing in FP16 (arXiv 1710.03740, section 3.2)."""

    initial: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000  # finite steps in a row before the scale grows
    minimum: float = 1.0

    def problems(self) -> list[str]:
        """Return every broken rule."""
        found: list[str] = []
        if self.growth_factor <= 1:
            found.append(f"growth_factor={self.growth_factor} must exceed 1; use 2")
        if not 0 < self.backoff_factor < 1:
            found.append(f"backoff_factor={self.backoff_factor} must lie between 0 and 1; use 0.5")
        if self.growth_interval < 1:
            found.append(f"growth_interval={self.growth_interval} must be at least 1; use 2000")
        if not 0 < self.minimum <= self.initial:
            found.append(f"minimum={self.minimum} must lie in (0, initial={self.initial}]; use 1")
        return found


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    """Precision policy. Norm and gate weights, softmax, loss and master weights are FP32 whatever it says."""

    compute: Compute = Compute.bf16
    gemm: Gemm = Gemm.compute
    fp8_scales: Fp8Scales = Fp8Scales.deepseek  # without effect unless gemm is FP8
    fp8_dispatch: bool = True  # tokens travel to experts as FP8 codes; without effect unless gemm is FP8
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)

    @property
    def exchanges_codes(self) -> bool:
        """Return whether tokens travel to experts as FP8 codes, which they do only to experts in FP8."""
        return self.fp8_dispatch and self.gemm is not Gemm.compute

    def problems(self) -> list[str]:
        """Return every broken rule."""
        if self.gemm is Gemm.fp8_te and self.compute is not Compute.bf16:
            return [f"gemm=fp8_te needs compute=bf16, not {self.compute}; use compute=bf16"]
        return []


@dataclass(kw_only=True, slots=True)
class YarnConfig:
    """YaRN rescaling of the rotary frequencies (arXiv 2309.00071); V3 has one setting for both extensions."""

    factor: float = 40.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def problems(self) -> list[str]:
        """Return every broken rule."""
        found: list[str] = []
        if self.factor < 1:
            found.append(f"factor={self.factor} must be at least 1; use 40, or null for plain RoPE")
        if self.original_length < 1:
            found.append(
                f"original_length={self.original_length} must be positive; use the pretraining length"
            )
        if not 0 < self.beta_slow < self.beta_fast:
            found.append(
                f"beta_slow={self.beta_slow} must lie in (0, beta_fast={self.beta_fast}); use 1 and 32"
            )
        return found


@dataclass(kw_only=True, slots=True)
class AttentionConfig:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1)."""

    num_heads: int = 128
    q_lora_rank: int | None = 1536  # null: queries are projected directly
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_theta: float = 10000.0

    def problems(self) -> list[str]:
        """Return every broken rule."""
        found = _positive(
            self,
            "num_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "rope_theta",
        )
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            found.append(
                f"q_lora_rank={self.q_lora_rank} must be positive; use null to project queries directly"
            )
        if self.qk_rope_head_dim % 2:
            found.append(
                f"qk_rope_head_dim={self.qk_rope_head_dim} must be even, rotations act on pairs; "
                f"use {self.qk_rope_head_dim + 1}"
            )
        return found


@dataclass(kw_only=True, slots=True)
class MoEConfig:
    """DeepSeekMoE with the sigmoid gate, node-limited routing and bias balancing of V3 (section 2.1.2)."""

    num_experts: int = 256
    num_shared_experts: int = 1
    top_k: int = 8
    intermediate_size: int = 2048
    num_groups: int = 8
    top_k_groups: int = 4
    route_scale: float = 2.5
    normalize_weights: bool = True
    balance_loss_weight: float = 0.0001  # alpha of the sequence-wise balance loss, equation 17

    def problems(self) -> list[str]:
        """Return every broken rule."""
        found = _positive(
            self, "num_experts", "top_k", "intermediate_size", "num_groups", "top_k_groups", "route_scale"
        )
        if found:
            return found
        if self.num_shared_experts < 0:
            found.append(f"num_shared_experts={self.num_shared_experts} must not be negative; use 0 or more")
        if self.balance_loss_weight < 0:
            found.append(
                f"balance_loss_weight={self.balance_loss_weight} must not be negative; use 0 or more"
            )
        if self.num_experts % self.num_groups:
            legal = [n for n in range(1, self.num_experts + 1) if self.num_experts % n == 0]
            nearest = min(legal, key=lambda n: abs(n - self.num_groups))
            found.append(
                f"num_groups={self.num_groups} must divide num_experts={self.num_experts}; use {nearest}"
            )
            if self.top_k > self.num_experts:
                most = self.num_experts
                found.append(f"top_k={self.top_k} must not exceed num_experts={most}; use {most}")
            return found
        if self.top_k_groups > self.num_groups:
            found.append(
                f"top_k_groups={self.top_k_groups} must not exceed num_groups={self.num_groups}; "
                f"use {self.num_groups}"
            )
        group_size = self.num_experts // self.num_groups
        if self.num_groups > 1 and group_size < 2:
            found.append(
                f"num_groups={self.num_groups} leaves {group_size} expert per group, but a group is scored "
                f"by its two best; use at most {max(1, self.num_experts // 2)}"
            )
        if self.top_k > self.top_k_groups * group_size:
            most = self.top_k_groups * group_size
            found.append(
                f"top_k={self.top_k} must not exceed the {most} experts of the chosen groups; use {most}"
            )
        return found


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A DeepSeek-V3-class decoder: the first `num_dense_layers` blocks are dense, the others MoE."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_layers: int = 61
    num_dense_layers: int = 3
    dense_intermediate_size: int = 18432
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    num_mtp_layers: int = 1  # depth D of multi-token prediction, section 2.2; 0 switches it off
    norm_eps: float = 1e-6
    init_std: float = 0.006
    dropout: float = 0.0  # on the output of attention and of the FFN; V3 trains without

    def problems(self) -> list[str]:
        """Return every broken rule."""
        found = _positive(
            self, "vocab_size", "hidden_size", "num_layers", "dense_intermediate_size", "norm_eps", "init_std"
        )
        if not 0 <= self.num_dense_layers <= self.num_layers:
            found.append(
                f"num_dense_layers={self.num_dense_layers} must lie in [0, num_layers={self.num_layers}]; "
                f"use {min(max(self.num_dense_layers, 0), self.num_layers)}"
            )
        if self.num_mtp_layers < 0:
            found.append(
                f"num_mtp_layers={self.num_mtp_layers} must not be negative; use 0 to switch MTP off"
            )
        if not 0 <= self.dropout < 1:
            found.append(f"dropout={self.dropout} must lie in [0, 1); use 0")
        return found


def _positive(section: object, *names: str) -> list[str]:
    values = {name: getattr(section, name) for name in names}
    return [f"{name}={value} must be positive; use 1 or more" for name, value in values.items() if value <= 0]
