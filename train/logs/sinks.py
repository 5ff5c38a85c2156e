"""Where the records of a run go: always metrics.jsonl, and the console and Weights & Biases beside it.

A sink receives every step record (train/logs/metrics.py), every evaluation and the few messages worth a line.
`Sinks` hands each to all of them, so that the trainer knows one object.
"""

import json
import math
import mmap
import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console

from train.config import RunConfig, WandbMode
from train.errors import RunError, writing
from train.logs.console import ConsoleSink
from train.logs.wandb_login import logged_in, resolve_mode


class Sink(Protocol):
    """One destination of a run's records."""

    def write(self, record: dict[str, Any]) -> None:
        """Take the record of one optimizer step."""
        ...

    def evaluation(self, result: dict[str, Any]) -> None:
        """Take the result of one evaluation (train/evaluate.py)."""
        ...

    def message(self, text: str) -> None:
        """Take one line for people, such as "saved checkpoint pretrain-00000200"."""
        ...

    def close(self) -> None:
        """Finish writing; nothing may follow."""
        ...


class JsonlSink:
    """metrics.jsonl: one strictly valid JSON object a line, flushed line by line.

    Opening it for a run that continues after `resume_step` cuts off the lines of later steps, which will
    be written again, and a last line torn by a crash. Steps only ever grow, so that is one truncation:
    atomic, and independent of the length of the file. Raises RunError when a line is not a record.

    A file that cannot be written ends the run by a RunError: steps would be trained and never seen. Those
    after the last checkpoint are repeated by the next start.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                os.truncate(path, _resume_offset(path, resume_step))
            self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; a float that is not finite becomes null."""
        line = json.dumps(finite(record), allow_nan=False, separators=(",", ":")) + "\n"
        rest = memoryview(line.encode())
        with writing(self._path):
            while rest:  # a disk takes what it has room for, and refuses only the next call
                rest = rest[self._file.write(rest) :]

    def evaluation(self, result: dict[str, Any]) -> None:
        """Do nothing: evaluations have files of their own."""

    def message(self, text: str) -> None:
        """Do nothing: messages are not metrics."""

    def close(self) -> None:
        """Close the file."""
        with writing(self._path):
            self._file.close()


class Sinks:
    """All sinks of a run behind one; usable as a context manager that closes them."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def write(self, record: dict[str, Any]) -> None:
        """Hand the record of one step to every sink."""
        for sink in self._sinks:
            sink.write(record)

    def evaluation(self, result: dict[str, Any]) -> None:
        """Hand the result of one evaluation to every sink."""
        for sink in self._sinks:
            sink.evaluation(result)

    def message(self, text: str) -> None:
        """Hand one line for people to every sink."""
        for sink in self._sinks:
            sink.message(text)

    def close(self) -> None:
        """Close every sink, also when one of them cannot be."""
        with ExitStack() as closing:
            for sink in reversed(self._sinks):
                closing.callback(sink.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_sinks(
    config: RunConfig,
    run_dir: Path,
    *,
    resume_step: int,
    total_tokens: int,
    console: Console | None = None,
) -> Sinks:
    """Open the sinks that `config.logging` asks for.

    `resume_step` is the step the run continues after (0 for a new run), `total_tokens` the tokens of all
    its stages. Raises RunError when metrics.jsonl is damaged or cannot be written, or when W&B cannot be
    reached though it must.
    """
    environ = dict(os.environ)
    mode = resolve_mode(config.logging.wandb, environ)
    if mode is WandbMode.online and not logged_in(environ):
        raise RunError(
            "logging.wandb=online needs a W&B login and there is none; run `wandb login`, or set "
            "WANDB_API_KEY, or choose logging.wandb=offline"
        )
    screen = ConsoleSink(
        console or Console(),
        every=config.logging.console_every,
        total_tokens=total_tokens,
        stages=config.stages,
    )
    sinks: list[Sink] = [JsonlSink(run_dir / "metrics.jsonl", resume_step=resume_step), screen]
    if mode is not WandbMode.disabled:
        # Importing wandb takes about a second, which a run without it need not spend.
        from train.logs.wandb_sink import WandbSink

        tracker = WandbSink(config, run_dir, mode=mode)
        sinks.append(tracker)
        screen.message(f"W&B: {tracker.place}")
    return Sinks(sinks)


def finite(value: Any) -> Any:
    """Return `value` with every float that JSON cannot express (nan, ±inf) replaced by None, at any depth."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case _:
            return value


def _resume_offset(path: Path, resume_step: int) -> int:
    """Return the length of `path` up to and including the last whole line of a step <= `resume_step`."""
    if path.stat().st_size == 0:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # What follows the last newline is a line whose writing was interrupted.
        end = data.rfind(b"\n") + 1
        while end > 0:
            start = data.rfind(b"\n", 0, end - 1) + 1
            if _step_of(data[start:end], path=path, offset=start) <= resume_step:
                return end
            end = start
    return 0


def _step_of(line: bytes, *, path: Path, offset: int) -> int:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        step = None
    if not isinstance(step, int):
        raise RunError(
            f"{path}: the line at byte {offset} is not a step record; the file is damaged, "
            "so remove that line or move the file away, then start again"
        )
    return step
