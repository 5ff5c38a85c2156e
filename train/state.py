"""Where a run stands: the few numbers that, with the tensors of a checkpoint, determine everything after."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(kw_only=True, slots=True)
class TrainState:
    """Progress of a run. Random draws are derived from (seed, step), so no generator state is needed."""

    step: int = 0  # optimizer steps of the whole run, skipped ones included
    tokens: int = 0  # tokens of the whole run
    num_updates: int = 0  # optimizer updates made since the moments were last reset
    stage: str = ""
    stage_step: int = 0
    stage_tokens: int = 0
    stage_samples: int = 0  # the next sample of the stage's data
    data_start: dict[str, int] = field(default_factory=dict)  # per source, the token at which the stage began
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    loss_scale: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)  # what must not change when the run goes on

    def enter(self, stage: str, *, data_start: dict[str, int]) -> None:
        """Begin `stage` at its first sample; what the run has done so far stays counted."""
        self.stage = stage
        self.stage_step = self.stage_tokens = self.stage_samples = 0
        self.data_start = data_start

    def advance(self, *, num_samples: int, seq_len: int) -> None:
        """Count one step over `num_samples` sequences of `seq_len` tokens."""
        self.step += 1
        self.stage_step += 1
        self.stage_samples += num_samples
        self.tokens += num_samples * seq_len
        self.stage_tokens += num_samples * seq_len

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        """Rebuild what `to_dict` returned."""
        return cls(**values)
