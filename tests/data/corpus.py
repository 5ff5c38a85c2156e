"""Small corpora for the tests of this package."""

from pathlib import Path

import numpy as np

from data.config import DataConfig, SourceConfig
from data.indexed import IndexedWriter
from data.tokenizer import Tokenizer, train_bpe

TEXTS = [f"def f{i}(x):\n    return x * {i};\n\n# done.\n" for i in range(60)]


def tiny_tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, vocab_size=300)


def write_shard(prefix: Path, documents: list[list[int]], *, eos_id: int | None = 1) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, dtype=np.uint16) as writer:
        for document in documents:
            writer.add(np.array(document + ([] if eos_id is None else [eos_id])))


def random_documents(seed: int, count: int, *, longest: int = 40, vocab_size: int = 290) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(10, vocab_size, rng.integers(0, longest)).tolist() for _ in range(count)]


def make_config(
    folder: Path, *, weights: dict[str, float] | None = None, fim_rate: float = 0.3
) -> DataConfig:
    """Two sources of different documents, a validation split, and the tiny tokenizer."""
    tiny_tokenizer().save(folder / "tokenizer.json")
    for k, name in enumerate(weights or {"a": 0.7, "b": 0.3}):
        for shard in range(2):
            write_shard(folder / name / "train" / f"s{shard}", random_documents(10 * k + shard, 50))
    write_shard(folder / "held" / "validation" / "v", random_documents(99, 50))
    sources = {
        name: SourceConfig(path=str(folder / name), weight=weight)
        for name, weight in (weights or {"a": 0.7, "b": 0.3}).items()
    }
    return DataConfig(
        sources=sources,
        validation=str(folder / "held"),
        tokenizer=str(folder / "tokenizer.json"),
        fim_rate=fim_rate,
    )
