"""The end of a preparation: the parts of all units joined into shards, and the manifest completed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.indexed import IndexedReader, IndexedWriter, bin_path, idx_path
from data.manifest import Manifest
from data.shards import examine
from data.tokenize_unit import SPLITS
from data.tokenizer import Tokenizer, load_tokenizer

_SHARD_TOKENS = 1 << 30  # 4 GiB of int32


def finish(manifest: Manifest, parts: list[Path], *, plan: str, name: str) -> None:
    """Write OUT/train and OUT/validation from the parts, in their order, and mark the corpus complete."""
    tokenizer = load_tokenizer(manifest.folder / "tokenizer.json")
    records = [json.loads(Path(f"{part}.json").read_text()) for part in parts]
    skipped = [path for record in records for path in record["skipped"]]
    if not any(record["documents"]["train"] for record in records):
        unreadable = f" ({_not_text(skipped)})" if skipped else ""
        raise DataError(
            f"{', '.join(manifest.options['sources'])} gave no training documents{unreadable}; "
            "check that the sources hold text and that --validation-fraction leaves some for training"
        )
    splits = {split: _write_split(manifest.folder, split, parts, name, tokenizer) for split in SPLITS}
    manifest.write(
        status="complete",
        plan=plan,
        num_units=len(parts),
        tokenizer=_describe(tokenizer),
        characters=sum(record["characters"] for record in records),
        skipped=skipped,
        splits=splits,
    )


def summary(folder: Path, *, seconds: float) -> str:
    """Return a few lines on a finished corpus for the console."""
    manifest = json.loads((folder / "manifest.json").read_text())
    lines = []
    for split, content in manifest["splits"].items():
        lines.append(
            f"{split}: {content['documents']:,} documents, {content['tokens']:,} tokens, "
            f"{len(content['shards'])} shard(s) in {folder / split}"
        )
    total = sum(content["tokens"] for content in manifest["splits"].values())
    tokenizer = manifest["options"]["tokenizer"]
    lines.append(f"tokenizer of {manifest['tokenizer']['vocab_size']:,} tokens ({tokenizer})")
    lines.append(f"{manifest['characters'] / total:.2f} characters a token; {seconds:.1f} s")
    if manifest["skipped"]:
        lines.append(_not_text(manifest["skipped"]))
    return "\n".join(lines)


def _not_text(skipped: list[str]) -> str:
    return f"skipped, not UTF-8 text: {len(skipped)} files: {', '.join(skipped)}"


def _write_split(
    folder: Path, split: str, parts: list[Path], name: str, tokenizer: Tokenizer
) -> dict[str, Any]:
    (folder / split).mkdir(exist_ok=True)
    prefixes = [Path(f"{part}.{split}") for part in parts if bin_path(Path(f"{part}.{split}")).is_file()]
    shards: list[dict[str, Any]] = []
    for group in _groups(prefixes):
        shard = folder / split / f"{name}-{len(shards):05d}"
        _join(shard, group)
        facts = examine(IndexedReader(shard), eos_id=tokenizer.eos_id)
        shards.append(
            {
                "name": shard.name,
                "documents": facts.num_documents,
                "tokens": facts.num_tokens,
                "bytes": [bin_path(shard).stat().st_size, idx_path(shard).stat().st_size],
                "sha256": facts.sha256,
            }
        )
    return {
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "shards": shards,
    }


def _groups(prefixes: list[Path]) -> Iterator[list[Path]]:
    group: list[Path] = []
    size = 0
    for prefix in prefixes:
        group.append(prefix)
        size += IndexedReader(prefix).num_tokens
        if size >= _SHARD_TOKENS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _join(shard: Path, prefixes: list[Path]) -> None:
    with IndexedWriter(shard, dtype=IndexedReader(prefixes[0]).dtype) as writer:
        for prefix in prefixes:
            reader = IndexedReader(prefix)
            writer.extend(reader.tokens, reader.lengths)


def _describe(tokenizer: Tokenizer) -> dict[str, Any]:
    fim = tokenizer.fim
    return {
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "fim": None if fim is None else {"begin": fim.begin, "hole": fim.hole, "end": fim.end},
    }
