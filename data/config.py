"""Where the tokens come from and how documents become samples. Importable without torch."""

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One corpus of prepared token shards."""

    path: str = "???"  # a folder written by data.prepare, or a Megatron prefix (PATH.bin, PATH.idx)
    weight: float = 1.0

    def problems(self) -> list[str]:
        """Return every broken rule."""
        if self.weight < 0:
            return [f"weight={self.weight} must not be negative; use 0 to leave the source out"]
        return []


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    """How a recipe makes its own corpus when it is missing; the same options as `python -m data.prepare`."""

    sources: list[str] = field(default_factory=list[str])
    out: str = "???"
    train_tokenizer: int | None = None  # vocabulary of a BPE trained on the corpus; null uses data.tokenizer
    validation_fraction: float = 0.01
    text_key: str = "text"  # the field of jsonl, parquet, arrow and Hugging Face records that holds the text
    split_fused_rate: float = 0.0  # share of tokens such as `;\n` that are stored as two, report section 4.1

    def problems(self) -> list[str]:
        """Return every broken rule."""
        found: list[str] = []
        if not self.sources:
            found.append("sources=[] must name at least one source; use python-stdlib")
        if not 0 <= self.validation_fraction < 1:
            found.append(f"validation_fraction={self.validation_fraction} must lie in [0, 1); use 0.01")
        if not 0 <= self.split_fused_rate <= 1:
            found.append(f"split_fused_rate={self.split_fused_rate} must lie in [0, 1]; use 0")
        return found


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The corpus of a run. Sample i is a pure function of (seed, i)."""

    sources: dict[str, SourceConfig] = field(default_factory=dict[str, SourceConfig])
    validation: str | None = None  # held-out shards; null switches held-out evaluation off
    tokenizer: str = "deepseek-v3"  # or the path of a tokenizer.json
    fim_rate: float = 0.1  # share of documents rearranged as prefix-suffix-middle, report section 4.1
    shuffle: bool = True  # the order of documents, and of samples within windows
    shuffle_window: int = 268_435_456  # tokens within which the samples of a source are mixed; 0: not mixed
    prepare: PrepareConfig | None = None

    def problems(self) -> list[str]:
        """Return every broken rule."""
        found: list[str] = []
        if not 0 <= self.fim_rate <= 1:
            found.append(f"fim_rate={self.fim_rate} must lie in [0, 1]; use 0.1")
        if self.shuffle_window < 0:
            found.append(f"shuffle_window={self.shuffle_window} must not be negative; use 0 for no mixing")
        if self.sources and not any(source.weight > 0 for source in self.sources.values()):
            found.append("sources have no positive weight; give at least one source a weight above 0")
        return found
