"""One unit of work of a preparation: its documents tokenised, split off for validation, and stored.

A unit leaves PART.train and PART.validation in the shard format, and last PART.json, whose presence says
that the unit is done. All files appear by renaming, so that a kill leaves a unit done or not begun.
"""

import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from data.documents import UnitReader
from data.fused_tokens import FusedTokenSplitter
from data.hashing import text_key
from data.indexed import IndexedWriter, token_dtype
from data.sources import Unit
from data.tokenizer import Tokenizer, load_tokenizer

SPLITS: tuple[str, ...] = ("train", "validation")
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Job:
    """A unit and how to prepare it; `part` is the path its files begin with."""

    part: Path
    unit: Unit
    tokenizer: Path
    text_key: str
    validation_fraction: float
    split_fused_rate: float


def is_validation(text: str, fraction: float) -> bool:
    """Return whether a document is held out: a function of its text, so that copies fall on one side."""
    return text_key(text) < fraction * 2**64


def run_job(job: Job) -> dict[str, Any]:
    """Prepare one unit and return its record: documents and tokens per split, characters, skipped files."""
    tokenizer, splitter = _load(job.tokenizer, job.split_fused_rate)
    dtype = token_dtype(tokenizer.vocab_size)
    documents, tokens = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    writers = {split: IndexedWriter(Path(f"{job.part}.{split}"), dtype=dtype) for split in SPLITS}
    reader = UnitReader(job.unit, job.text_key)
    num_characters = 0
    for texts in _batches(reader):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            document = np.array([*ids, tokenizer.eos_id])
            if splitter is not None:
                document = splitter.split(document, key=text_key(text))
            split = "validation" if is_validation(text, job.validation_fraction) else "train"
            writers[split].add(document)
            documents[split] += 1
            tokens[split] += len(document)
            num_characters += len(text)
    for split, writer in writers.items():
        if documents[split]:
            writer.close()
        else:
            writer.abort()
    record = {
        "documents": documents,
        "tokens": tokens,
        "characters": num_characters,
        "skipped": reader.skipped,
    }
    temporary = Path(f"{job.part}.json.tmp")
    temporary.write_text(json.dumps(record))
    temporary.replace(f"{job.part}.json")
    return record


def start_worker() -> None:
    """Set up a worker process: one thread each, and an end when the process that started it is gone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker at once and without a traceback
    parent = parent_process()
    if parent is not None:
        # after kill -9 of the parent nobody else would end a worker that waits for its next unit
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


@cache
def _load(path: Path, split_fused_rate: float) -> tuple[Tokenizer, FusedTokenSplitter | None]:
    tokenizer = load_tokenizer(path)
    splitter = FusedTokenSplitter(tokenizer, rate=split_fused_rate) if split_fused_rate else None
    return tokenizer, splitter


def _batches(texts: UnitReader) -> Iterator[list[str]]:
    """Yield lists of texts large enough to tokenise at full speed."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
