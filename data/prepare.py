"""Text to token shards: `python -m data.prepare SOURCE… --out DIR`.

OUT/tokenizer.json, OUT/manifest.json and the shards OUT/train/* and OUT/validation/*. The work is cut
into units that are tokenised in parallel; each finished unit is kept, so the same command goes on after
an interruption, even kill -9, and gives the same bytes. When the corpus is complete it does nothing.
"""

import argparse
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from data.config import PrepareConfig
from data.documents import UnitReader
from data.errors import DataError
from data.manifest import Manifest, open_manifest, options_of
from data.merge import finish, summary
from data.progress import PrepareProgress
from data.sources import Unit, UnitKind, plan_digest, plan_units
from data.tokenize_unit import Job, is_validation, run_job, start_worker
from data.tokenizer import DEEPSEEK, load_tokenizer, train_bpe

_TRAIN_TOKENIZER_BYTES = 64 << 20  # a vocabulary of thousands of tokens gains nothing from more text
_IN_PROCESS_BYTES = 64 << 20  # below this the threads of the tokenizer are faster than starting processes


def prepare(
    config: PrepareConfig,
    *,
    tokenizer: str = DEEPSEEK,
    workers: int | None = None,
    name: str = "shard",
    extensions: tuple[str, ...] = (),
) -> Path:
    """Make the corpus that `config` describes, or go on making it; return its folder.

    tokenizer is used when config.train_tokenizer is None. workers: processes; 0 works in this process with
    the tokenizer's threads; None chooses by the size of the sources. Processes that call this at the same
    time wait for one another. Raises DataError.
    """
    problems = config.problems()
    if workers is not None and workers < 0:
        problems.append(f"workers={workers} must not be negative; use 0 to work in one process")
    if not name or "/" in name:
        problems.append(f"name={name!r} must be the beginning of a file name; use shard")
    if problems:
        raise DataError("; ".join(problems))
    folder = Path(config.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"folder {folder} cannot be made: {error}; name a folder in a writable place"
        ) from error
    options = options_of(config, tokenizer=tokenizer, name=name, extensions=sorted(extensions))
    with _locked(folder):
        manifest = open_manifest(folder, options)
        if manifest.complete:
            _remove_parts(folder)
            return folder
        units = plan_units(config.sources, extensions=extensions)
        digest = plan_digest(units)
        if manifest.stored is not None and manifest.stored["plan"] != digest:
            raise DataError(
                f"the files of {', '.join(config.sources)} have changed since the interrupted preparation of "
                f"{folder}; delete {folder} and prepare again"
            )
        manifest.write(status="incomplete", plan=digest, num_units=len(units))
        try:
            _make(manifest, config, units, tokenizer=tokenizer, workers=workers, name=name)
        except OSError as error:
            raise DataError(
                f"preparing {folder} failed: {error}; when the disk has room and the sources can be read, "
                "the same command goes on where it stopped"
            ) from error
    return folder


def _make(
    manifest: Manifest,
    config: PrepareConfig,
    units: list[Unit],
    *,
    tokenizer: str,
    workers: int | None,
    name: str,
) -> None:
    folder = manifest.folder
    parts = folder / "parts"
    parts.mkdir(exist_ok=True)
    _write_tokenizer(folder / "tokenizer.json", config, units, tokenizer)
    jobs = [
        Job(
            part=parts / f"{i:06d}",
            unit=unit,
            tokenizer=folder / "tokenizer.json",
            text_key=config.text_key,
            validation_fraction=config.validation_fraction,
            split_fused_rate=config.split_fused_rate,
        )
        for i, unit in enumerate(units)
    ]
    waiting = [job for job in jobs if not Path(f"{job.part}.json").is_file()]
    with PrepareProgress(units=len(jobs), done=len(jobs) - len(waiting)) as progress:
        for record in _run(waiting, _choose_workers(workers, units)):
            progress.advance(sum(record["tokens"].values()))
    finish(manifest, [job.part for job in jobs], plan=plan_digest(units), name=name)
    _remove_parts(folder)


def _choose_workers(workers: int | None, units: list[Unit]) -> int:
    if workers is not None:
        return workers
    small = sum(unit.num_bytes for unit in units) < _IN_PROCESS_BYTES
    size_known = all(unit.kind != UnitKind.HUB for unit in units)
    return 0 if small and size_known else len(os.sched_getaffinity(0))


def _run(jobs: list[Job], workers: int) -> Iterator[dict]:
    if workers == 0 or not jobs:
        yield from map(run_job, jobs)
        return
    # spawned, because a forked copy of a process that has started threads may hang
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=start_worker) as pool:
        try:
            for future in as_completed([pool.submit(run_job, job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, most likely for want of memory; "
                "run the same command with fewer --workers, it goes on where it stopped"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)  # an error or Ctrl-C must not wait for the units in the queue
            raise


def _write_tokenizer(path: Path, config: PrepareConfig, units: list[Unit], name: str) -> None:
    if path.is_file():
        return  # made by the interrupted command
    if config.train_tokenizer is None:
        tokenizer = load_tokenizer(name)
    else:
        tokenizer = train_bpe(_tokenizer_texts(config, units), vocab_size=config.train_tokenizer)
    temporary = path.with_suffix(".tmp")
    tokenizer.save(temporary)
    temporary.replace(path)


def _tokenizer_texts(config: PrepareConfig, units: list[Unit]) -> Iterator[str]:
    """Yield training documents from units spread over the sources; held-out text stays unseen."""
    stride = 1 + sum(unit.num_bytes for unit in units) // _TRAIN_TOKENIZER_BYTES
    for unit in units[::stride]:
        for text in UnitReader(unit, config.text_key):
            if not is_validation(text, config.validation_fraction):
                yield text


def _remove_parts(folder: Path) -> None:
    if (folder / "parts").is_dir():
        shutil.rmtree(folder / "parts")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time work in a folder; the system releases the lock of a killed one."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare", description="Turn text into token shards."
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a .txt, .jsonl[.gz], .parquet or .arrow file, a folder of them or of source files, a URL, "
        "hf:NAME[@CONFIGURATION][:SPLIT], or python-stdlib",
    )
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--tokenizer", default=DEEPSEEK, help=f"{DEEPSEEK} or a tokenizer.json")
    parser.add_argument("--train-tokenizer", type=int, metavar="N", help="train a BPE of N tokens instead")
    parser.add_argument("--validation-fraction", type=float, default=0.01, metavar="F")
    parser.add_argument("--text-key", default="text", help="the field of a record that holds the text")
    parser.add_argument(
        "--split-fused-rate",
        type=float,
        default=0.0,
        metavar="R",
        help="share of tokens like `;\\n` to split",
    )
    parser.add_argument("--extensions", default="", help="endings of the files of a folder to take: py,md")
    parser.add_argument("--name", default="shard", help="what the shard files are called")
    parser.add_argument("--workers", type=int, help="processes; 0: this process with threads")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 2 after a mistake that the user can mend, 130 after Ctrl-C."""
    options = _parse(arguments)
    config = PrepareConfig(
        sources=options.sources,
        out=options.out,
        train_tokenizer=options.train_tokenizer,
        validation_fraction=options.validation_fraction,
        text_key=options.text_key,
        split_fused_rate=options.split_fused_rate,
    )
    started = time.monotonic()
    try:
        folder = prepare(
            config,
            tokenizer=options.tokenizer,
            workers=options.workers,
            name=options.name,
            extensions=tuple(filter(None, options.extensions.split(","))),
        )
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    print(summary(folder, seconds=time.monotonic() - started))
    return 0


if __name__ == "__main__":
    sys.exit(main())
