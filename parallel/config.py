"""How one step is cut into microbatches and what is recomputed. Importable without torch."""

from dataclasses import dataclass

from model.config import Recompute


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """The layout of one step."""

    microbatch_size: int = 1  # sequences that go through the model together
    recompute: Recompute = Recompute.none

    def problems(self) -> list[str]:
        """Return every broken rule."""
        if self.microbatch_size < 1:
            return [f"microbatch_size={self.microbatch_size} must be at least 1; use 1"]
        return []
