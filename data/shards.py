"""Finding the shards of a corpus, and proving once that their tokens are fit for a model.

Every token of a shard is read the first time it is opened: the largest and smallest id, how the
documents end, and a digest of the content. The verdict is kept beside the shard in PREFIX.check.json
and holds as long as both files keep their size and modification time, so that later runs start at once.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.indexed import IndexedReader, bin_path, idx_path
from data.tokenizer import Tokenizer

_CHUNK_TOKENS = 1 << 22
_VERSION = 1


@dataclass(frozen=True)
class ShardFacts:
    """What a full read of a shard found. sha256 covers the tokens and the index."""

    num_documents: int
    num_tokens: int
    min_id: int
    max_id: int
    num_ending_with_eos: int
    eos_id: int
    sha256: str


@dataclass(frozen=True)
class OpenShards:
    """The shards of one split, proved fit for a run. ends_with_eos: whether documents are stored with eos."""

    readers: list[IndexedReader]
    facts: list[ShardFacts]
    ends_with_eos: bool


def open_shards(path: str | Path, *, split: str, tokenizer: Tokenizer, vocab_size: int) -> OpenShards:
    """Open and examine all shards of a split. Raises DataError for whatever makes them unfit."""
    check_tokenizer(path, tokenizer)
    readers = [IndexedReader(prefix) for prefix in find_shards(path, split=split)]
    facts = [examine(reader, eos_id=tokenizer.eos_id) for reader in readers]
    for reader, shard_facts in zip(readers, facts, strict=True):
        check_ids(reader, shard_facts, vocab_size=vocab_size)
    return OpenShards(readers, facts, ends_with_eos(readers, facts, eos_id=tokenizer.eos_id))


def find_shards(path: str | Path, *, split: str) -> list[Path]:
    """Return the prefixes of the shards of a split, in name order.

    `path` is a folder that data.prepare wrote (its `split` subfolder is taken), a folder of shards, or one
    prefix PATH of PATH.bin and PATH.idx. Raises DataError when there are none.
    """
    folder = Path(path)
    if bin_path(folder).is_file() or idx_path(folder).is_file():
        return [folder]
    if not folder.is_dir():
        raise DataError(
            f"{path} does not exist, neither as a folder of shards nor as {path}.bin; "
            f"prepare it: python -m data.prepare SOURCE --out {path}"
        )
    root, manifest = _manifest_of(path)
    if manifest.get("status") == "incomplete":
        raise DataError(
            f"{path} is not finished: {root / 'manifest.json'} is marked incomplete; "
            "run the same data.prepare command again, it goes on where it stopped"
        )
    inside = folder / split if (folder / split).is_dir() else folder
    names = {file.stem for file in inside.glob("*.bin")} | {file.stem for file in inside.glob("*.idx")}
    if not names:
        remedy = " with a larger --validation-fraction" if split == "validation" else ""
        raise DataError(
            f"{path} has no {split} documents: no .bin and .idx files in {inside}; "
            f"prepare the corpus again{remedy}: python -m data.prepare SOURCE --out {root}"
        )
    return [inside / name for name in sorted(names)]


def check_tokenizer(path: str | Path, tokenizer: Tokenizer) -> None:
    """Raise DataError when a prepared folder was made with another tokenizer than the run uses."""
    root, manifest = _manifest_of(path)
    made_with = manifest.get("tokenizer")
    if isinstance(made_with, dict) and made_with.get("sha256") != tokenizer.sha256:
        raise DataError(
            f"{path} was prepared with another tokenizer than data.tokenizer={tokenizer.origin}; "
            f"set data.tokenizer={root / 'tokenizer.json'}, or prepare it again"
        )


def examine(reader: IndexedReader, *, eos_id: int) -> ShardFacts:
    """Return the facts about a shard, from PREFIX.check.json when that is still valid."""
    cache = Path(f"{reader.prefix}.check.json")
    state = {"version": _VERSION, "eos_id": eos_id, "files": [_file_state(p) for p in _files(reader)]}
    known = _load_json(cache)
    if known is not None and known.get("state") == state:
        return ShardFacts(**known["facts"])
    facts = _read_all(reader, eos_id)
    temporary = Path(f"{cache}.tmp")
    try:
        temporary.write_text(json.dumps({"state": state, "facts": asdict(facts)}, indent=1))
        temporary.replace(cache)
    except OSError:  # a corpus that is read-only or full is examined again by every run; nothing else is lost
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return facts


def check_ids(reader: IndexedReader, facts: ShardFacts, *, vocab_size: int) -> None:
    """Raise DataError when a token of the shard lies outside the vocabulary."""
    if facts.num_tokens and (facts.max_id >= vocab_size or facts.min_id < 0):
        worst = facts.max_id if facts.max_id >= vocab_size else facts.min_id
        raise DataError(
            f"{bin_path(reader.prefix)} holds token id {worst}, but the vocabulary has {vocab_size} tokens "
            f"(ids 0 to {vocab_size - 1}); prepare the corpus with the run's tokenizer, or set "
            "model.vocab_size and data.tokenizer to those it was made with"
        )


def ends_with_eos(readers: list[IndexedReader], facts: list[ShardFacts], *, eos_id: int) -> bool:
    """Return whether the documents are stored with their eos: all or none of them. Raises DataError."""
    total = sum(one.num_documents for one in facts)
    ending = sum(one.num_ending_with_eos for one in facts)
    if ending not in (0, total):
        raise DataError(
            f"{readers[0].prefix.parent}: {ending} of {total} documents end with the end-of-document "
            f"token {eos_id}; all must, or none; prepare the corpus again with or without it"
        )
    return ending == total


def _files(reader: IndexedReader) -> list[Path]:
    return [bin_path(reader.prefix), idx_path(reader.prefix)]


def _file_state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _manifest_of(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Return a prepared folder and its manifest, for the folder itself and for its split folders."""
    for folder in (Path(path), Path(path).parent):
        manifest = _load_json(folder / "manifest.json")
        if isinstance(manifest, dict) and "options" in manifest:
            return folder, manifest
    return Path(path), {}


def _load_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None  # absent, unreadable or torn: the shard is examined again


def _read_all(reader: IndexedReader, eos_id: int) -> ShardFacts:
    digest = hashlib.sha256()
    lows, highs = [0], [-1]
    for start in range(0, reader.num_tokens, _CHUNK_TOKENS):
        chunk = reader.tokens[start : start + _CHUNK_TOKENS]
        digest.update(chunk.data)
        lows.append(int(chunk.min()))
        highs.append(int(chunk.max()))
    digest.update(reader.lengths.data)
    last = reader.tokens[(reader.starts + reader.lengths - 1)[reader.lengths > 0]]
    return ShardFacts(
        num_documents=reader.num_documents,
        num_tokens=reader.num_tokens,
        min_id=min(lows),
        max_id=max(highs),
        num_ending_with_eos=int(np.count_nonzero(last == eos_id)),
        eos_id=eos_id,
        sha256=digest.hexdigest(),
    )
